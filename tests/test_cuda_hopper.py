"""The primitives of csrc/cuda/prim_hopper.h, one by one: what they compute, on the host twin and on a GPU of
compute capability 9.0; and that the twin finds kernels that use them wrongly."""

import itertools
import math
import re
from contextlib import contextmanager

import numpy
import pytest
import torch

import cuda_host
from tolerances import largest

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def hopper(device):
    """Calls one of the primitives' kernels: tensors of the device in, `to` first."""
    if device.is_gpu and device.facts[:2] != (9, 0):
        pytest.skip("the GPU is not of compute capability 9.0")

    def call(name, tensors, numbers):
        stream = torch.cuda.current_stream().cuda_stream if device.is_gpu else 0
        addresses = [x.data_ptr() for x in tensors]
        index = torch.cuda.current_device() if device.is_gpu else 0
        device.module.hopper_primitive(name, index, stream, addresses, [int(n) for n in numbers])

    call.where, call.is_gpu = device.where, device.is_gpu
    return call


@contextmanager
def schedule(order, seed):
    cuda_host.set_schedule(order, seed)
    try:
        yield
    finally:
        cuda_host.set_schedule("forward")


def in_every_schedule(hopper, run):
    """What run() gives, the same bits in each schedule; once on a GPU."""
    if hopper.is_gpu:
        return run().cpu()
    results = []
    for order, seed in cuda_host.SCHEDULES:
        with schedule(order, seed):
            results.append(run())
    assert all(results[0].numpy().tobytes() == x.numpy().tobytes() for x in results)
    return results[0]


def small_integers(*shape, dtype, seed=0):
    """Whose products and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


# ------------------------------------------------------------------------------------ barriers and turns


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 4, 7, 20])
def test_pipeline_of_two_stages_gives_each_consumer_every_tile(hopper, rounds):
    tiles = small_integers(max(rounds, 1), 64, 64, dtype=torch.bfloat16)
    data = tiles.to(hopper.where)

    def run():
        out = torch.full((2, 128), math.nan, device=hopper.where)
        hopper("pipeline", [out, data], [rounds])
        return out

    if rounds == 0:
        with pytest.raises(RuntimeError, match=r"size\[1\] is 0\naccepted is 1 to 2\^32"):
            run()
        return
    halves = tiles.float().view(rounds, 2, 32, 64).sum(2).view(rounds, 128)
    weights = torch.stack([torch.ones(rounds), torch.arange(1.0, rounds + 1)])
    assert torch.equal(in_every_schedule(hopper, run), weights @ halves)


@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_named_barriers_let_two_warpgroups_take_turns(hopper, rounds):
    def run():
        out = torch.zeros(2 * rounds, dtype=torch.int32, device=hopper.where)
        hopper("turns", [out], [rounds])
        return out

    expected, last = [], 0
    for i in range(2 * rounds):
        last = (2 * last + i % 2 + 1) % 9973
        expected.append(last)
    assert in_every_schedule(hopper, run).tolist() == expected


def test_one_lane_is_one_of_each_warp_and_always_the_same(hopper):
    out = torch.full((2, 128), -1, dtype=torch.int32, device=hopper.where)
    hopper("one_lane", [out], [])
    assert out.view(2, 4, 32).sum(2).tolist() == [[1] * 4] * 2
    assert torch.equal(out[0], out[1])


# ------------------------------------------------------------------------------------------------- tiles


def tile_numbers(x, box, at):
    """The numbers of load_tile and store_tile for a tensor whose innermost dimension is its last."""

    def five(values):
        values = list(values)
        return values + [0] * (5 - len(values))

    strides = [0] + [s * x.element_size() for s in x.stride()[::-1][1:]]
    return [x.dim(), *five(x.shape[::-1]), *five(strides)[1:], *five(box), *five(at)]


def swizzled(rows):
    """[rows, 64] as it lies in shared memory."""
    row, chunk = numpy.arange(len(rows))[:, None], numpy.arange(8)[None]
    return rows.view(-1, 8, 8)[row, chunk ^ row % 8].reshape(-1, 64)


def box_of(x, box, at):
    """[rows, 64] of a box of x, zero outside; box and at begin with the innermost dimension."""
    result = torch.zeros(box[::-1], dtype=x.dtype)
    inside = [range(max(0, -a), min(b, n - a)) for a, b, n in zip(at, box, x.shape[::-1], strict=True)]
    if all(len(r) for r in inside):
        to = tuple(slice(r.start, r.stop) for r in inside[::-1])
        source = zip(inside[::-1], at[::-1], strict=True)
        result[to] = x[tuple(slice(r.start + a, r.stop + a) for r, a in source)]
    return result.reshape(-1, 64)


def every_bit(*shape, dtype=torch.bfloat16):
    """All patterns of 16 bits in turn, NaNs among them."""
    bits = torch.arange(math.prod(shape)) * 40503 + 12345
    return bits.to(torch.int16).view(dtype).view(shape)


# Shape, the order of its dimensions in memory, box, and where boxes begin: tensors of attention, which are
# [batch, head, row, feature], and others.
TILES = {
    "rows": ((100, 64), (0, 1), (64, 64), [(0, 0), (0, 64), (0, 36), (0, 100), (0, -5), (0, -64)]),
    "one row": ((100, 64), (0, 1), (64, 1), [(0, 3), (0, 99)]),
    "256 rows": ((300, 64), (0, 1), (64, 256), [(0, 0), (0, 44), (0, 100)]),
    "odd rows": ((77, 128), (0, 1), (64, 13), [(0, 0), (64, 70), (32, 64), (-8, 1), (128, 0)]),
    "few columns": ((50, 40), (0, 1), (64, 24), [(0, 0), (0, 40), (8, 3)]),
    "heads": ((3, 70, 64), (1, 0, 2), (64, 48, 1), [(0, 0, 0), (0, 48, 2), (0, 60, 1), (0, 0, 3)]),
    "batch": ((2, 3, 40, 72), (0, 2, 1, 3), (64, 16, 1, 1), [(0, 0, 0, 0), (64, 32, 2, 1), (0, 39, 1, 1)]),
    "batch last": ((2, 3, 40, 64), (2, 0, 1, 3), (64, 16, 1, 1), [(0, 8, 2, 1), (0, 30, 0, 1)]),
    "several heads": (
        (2, 4, 20, 64),
        (0, 2, 1, 3),
        (64, 8, 3, 2),
        [(0, 0, 0, 0), (0, 15, 2, 0), (0, 3, 3, 1)],
    ),
    "five": ((2, 3, 2, 9, 64), (3, 1, 0, 2, 4), (64, 4, 2, 2, 1), [(0, 0, 0, 0, 0), (0, 7, 1, 2, 1)]),
    "size one": ((1, 1, 30, 64), (0, 1, 2, 3), (64, 32, 1, 1), [(0, 0, 0, 0), (0, 10, 0, 0)]),
}


def tensor_in(shape, order):
    """Of that shape, its dimensions in memory in that order."""
    inverse = [order.index(i) for i in range(len(order))]
    return every_bit(*(shape[i] for i in order)).permute(inverse)


TILE_CASES = [(name, at) for name, (*_, places) in TILES.items() for at in places]


@pytest.mark.parametrize(("name", "at"), TILE_CASES, ids=str)
def test_load_tile_swizzles_and_fills_with_zeros(hopper, name, at):
    shape, order, box, _ = TILES[name]
    x = tensor_in(shape, order)
    data = tensor_in(shape, order).to(hopper.where)
    assert data.stride() == x.stride()

    def run():
        out = torch.full((math.prod(box) // 64, 64), -1, dtype=torch.int16, device=hopper.where)
        hopper("load_tile", [out, data], tile_numbers(data, box, at))
        return out

    expected = swizzled(box_of(x, box, at)).view(torch.int16)
    assert torch.equal(in_every_schedule(hopper, run), expected)


@pytest.mark.parametrize(("name", "at"), TILE_CASES, ids=str)
def test_store_tile_writes_what_lies_inside(hopper, name, at):
    shape, order, box, _ = TILES[name]
    shared = every_bit(math.prod(box) // 64, 64).to(hopper.where)

    def run():
        out = torch.zeros_like(tensor_in(shape, order), device=hopper.where)
        hopper("store_tile", [out, shared], tile_numbers(out, box, at))
        return out.view(torch.int16)

    result = in_every_schedule(hopper, run)
    rows = swizzled(every_bit(math.prod(box) // 64, 64)).view(torch.int16)  # the swizzle undoes itself
    expected = torch.zeros(shape, dtype=torch.int16)
    boxed = rows.view(box[::-1])
    for index in itertools.product(*(range(n) for n in box[:0:-1])):
        place = [i + a for i, a in zip(index, at[:0:-1], strict=True)]
        if all(0 <= p < n for p, n in zip(place, shape[:-1], strict=True)):
            first, last = max(0, at[0]), min(shape[-1], at[0] + 64)
            if last > first:
                expected[tuple(place)][first:last] = boxed[index][first - at[0] : last - at[0]]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("count", [4, 64, 10000])
def test_load_bytes_brings_them_all(hopper, count):
    source = torch.randn(count)
    data = source.to(hopper.where)

    def run():
        out = torch.zeros(count, device=hopper.where)
        hopper("load_bytes", [out, data], [count])
        return out

    assert torch.equal(in_every_schedule(hopper, run), source)


@pytest.mark.parametrize(("blocks", "count"), [(1, 4), (3, 64), (20, 4096)])
def test_reduce_add_sums_over_blocks(hopper, blocks, count):
    source = small_integers(blocks, count, dtype=torch.float32)
    data = source.to(hopper.where)

    def run():
        out = torch.ones(count, device=hopper.where)
        hopper("reduce_add", [out, data], [blocks, count])
        return out

    assert torch.equal(in_every_schedule(hopper, run), 1 + source.sum(0))


BAD_TILES = {
    "rank is 6": {0: 6},
    r"size\[1\] is 0\naccepted is 1 to 2\^32": {2: 0},
    r"size\[0\] is 4294967297": {1: 2**32 + 1},
    r"stride\[1\] is 136\naccepted is a multiple of 16": {6: 136},
    r"stride\[1\] is 1099511627776": {6: 2**40},
    r"stride\[1\] is 0": {6: 0},
    r"box\[0\] is 32\naccepted is 64": {10: 32},
    r"box\[1\] is 257\naccepted is 1 to 256": {11: 257},
    r"box\[1\] is 0": {11: 0},
}


@pytest.mark.parametrize(("message", "change"), BAD_TILES.items(), ids=str)
def test_tensor_that_no_map_describes_is_an_error(hopper, message, change):
    x = torch.zeros(100, 64, dtype=torch.bfloat16, device=hopper.where)
    numbers = tile_numbers(x, (64, 16), (0, 0))
    for i, value in change.items():
        numbers[i] = value
    out = torch.zeros(16, 64, dtype=torch.bfloat16, device=hopper.where)
    with pytest.raises(RuntimeError, match=message):
        hopper("load_tile", [out, x], numbers)


def test_tensor_at_an_odd_address_is_an_error(hopper):
    x = torch.zeros(100 * 64 + 4, dtype=torch.bfloat16, device=hopper.where)[4:].view(100, 64)
    out = torch.zeros(16, 64, dtype=torch.bfloat16, device=hopper.where)
    with pytest.raises(RuntimeError, match=r"base is .*\naccepted is an address that is a multiple of 16"):
        hopper("load_tile", [out, x], tile_numbers(x, (64, 16), (0, 0)))


# ---------------------------------------------------------------------------------------------- products

ALL_N = [8, 16, 24, *range(32, 256, 16), 248, 256]
A_FROM = {"registers": (1, 0), "tiles": (0, 0), "tiles, transposed": (0, 1), "stores": (2, 0)}
# Of each N what attention needs; of some everything.
PRODUCTS = [(n, "tiles", False) for n in ALL_N] + [(n, "registers", True) for n in ALL_N]
WAYS = [(a, b) for a in A_FROM for b in (False, True) if (a, b) != ("stores", False)]
PRODUCTS += [(n, *way) for n in (24, 64, 192) for way in WAYS]
PRODUCTS = list(dict.fromkeys(PRODUCTS))


def product(hopper, a, b, a_from, b_transposed, initial=None):
    """a [64, depth] times b [depth, N], plus `initial` if given."""
    (_, depth), n = a.shape, b.shape[1]
    code, a_transposed = A_FROM[a_from]
    a_data = (a.T if a_transposed else a).contiguous().to(hopper.where)
    b_data = (b if b_transposed else b.T).contiguous().to(hopper.where)
    dtype = DTYPES.index(a.dtype)

    def run():
        out = torch.full((64, n), math.nan) if initial is None else initial.clone()
        out = out.to(hopper.where)
        numbers = [dtype, n, depth, code, a_transposed, b_transposed, initial is not None]
        hopper("product", [out, a_data, b_data], numbers)
        return out

    return in_every_schedule(hopper, run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "a_from", "b_transposed"), PRODUCTS)
def test_wgmma_is_the_product_of_the_matrices(hopper, n, a_from, b_transposed, dtype):
    """Exact, so that each element of both operands is where the descriptors say."""
    a, b = small_integers(64, 64, dtype=dtype), small_integers(64, n, dtype=dtype, seed=1)
    result = product(hopper, a, b, a_from, b_transposed)
    assert torch.equal(result, a.float() @ b.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [128, 192, 256])
@pytest.mark.parametrize(("a_from", "b_transposed"), WAYS)
def test_wgmma_adds_up_along_several_tiles(hopper, depth, a_from, b_transposed, dtype):
    a, b = torch.randn(64, depth).to(dtype), torch.randn(depth, 64).to(dtype)
    initial = torch.randn(64, 64)
    result = product(hopper, a, b, a_from, b_transposed, initial)
    exact = initial.double() + a.double() @ b.double()
    # The tensor cores cut the summands of a step off below the largest; float32 alone is nearer.
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wgmma_of_infinities_and_nan(hopper, dtype):
    a, b = small_integers(64, 64, dtype=dtype), small_integers(64, 64, dtype=dtype, seed=1)
    a[3, 5], a[20, 63], b[7, 9] = math.inf, math.nan, -math.inf
    result = product(hopper, a, b, "tiles", False)
    torch.testing.assert_close(result, a.float() @ b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d", "tiles"),
    [(192, 64, 1), (192, 64, 4), (176, 128, 1), (176, 128, 2), (80, 256, 1), (80, 256, 2)],
)
def test_product_of_a_product_that_stays_in_registers(hopper, n, d, tiles, dtype):
    q, k, v = (torch.randn(rows, d).to(dtype) for rows in (64, tiles * n, tiles * n))
    q = q / math.sqrt(d)
    data = [x.to(hopper.where) for x in (q, k, v)]

    def run():
        out = torch.full((64, d), math.nan, device=hopper.where)
        hopper("products", [out, *data], [DTYPES.index(dtype), n, d, tiles])
        return out

    p = (q.double() @ k.double().T).to(dtype)
    exact = p.double() @ v.double()
    # A score that lies halfway between two numbers may be rounded to either.
    error = largest(in_every_schedule(hopper, run).double() - exact)
    assert error < torch.finfo(dtype).eps * largest(p.double()) * largest(v.double())


def test_unknown_primitive_is_an_error(hopper):
    out = torch.zeros(1, device=hopper.where)
    with pytest.raises(
        RuntimeError, match=r"given: hopper_primitive.*\naccepted: .*no such primitive\ntry: "
    ):
        hopper("unknown", [out], [])


# --------------------------------------------------------------- planted faults, each beside its correct self

# What a kernel with the fault does: its bits change with the schedule, are others, are NaN, or it says why.
DIFFERS = {
    "tile_read_before_it_is_there",
    "stage_released_too_early",
    "turn_given_too_early",
    "tile_source_overwritten",
    "overwritten_while_stored",
    "operand_overwritten",
    "operand_released_too_early",
    "operand_stored_into",
    "operand_of_other_warps",
}
IS_OTHER = {"wrong_stride_offset", "wrong_leading_offset", "wrong_major"}
IS_NAN = {
    "stored_without_fence",
    "accumulators_read_too_early",
    "accumulators_not_named",
    "operand_without_fence",
}
BARRIER = r"barrier at byte \d+"
SAYS = {
    "stage_filled_without_asking": r"(more often than is counted\nblock 0 thread 0|a phase ended while a "
    r"thread waited for the one before\nblock 0 thread \d+|never complete\nblock 0 thread 0 has exited\n"
    rf"block 0 thread 128 waits at barrier_wait for phase \d of).* the {BARRIER}",
    "wrong_first_parity": r"barrier_wait waits for a phase that is never complete\nblock 0 thread 0 waits "
    rf"at barrier_wait for phase 0 of the {BARRIER}: 1 of 1 arrivals and 0 bytes are missing",
    "too_many_bytes_expected": r"never complete\nblock 0 thread 0 waits .* 0 of 1 arrivals and 128 bytes",
    "too_few_bytes_expected": r"load_tile brings more bytes than are expected\nblock 0 thread 0, .*: 8192 "
    "bytes, expected are 8064",
    "arrival_missing": r"never complete\nblock 0 thread 0 waits .* 1 of 256 arrivals and 0 bytes",
    "arrival_too_many": r"barrier_arrive comes more often .*\nblock 0 thread 0, .* its 1 arrivals",
    "arrival_left_over": rf"in the middle of a barrier's phase\nblock 0, the {BARRIER}: 1 of 2 arrivals",
    "barrier_not_begun": rf"barrier_arrive .* has not begun\nblock 0 thread \d+, the {BARRIER}",
    "barrier_not_announced": r"barrier_arrive comes before barriers_begun\nblock 0 thread \d+",
    "load_left_under_way": rf"exited while a load was under way\nblock 0, the {BARRIER}",
    "named_barrier_of_others": r"named_sync waits for threads that never come\nblock 0 thread 0 waits at "
    r"named_sync number 1: 128 of 256 threads have come\nblock 0 thread 128 waits at named_sync number 2",
    "named_barrier_without_one_lane": r"named_sync or named_arrive is not reached by all threads\nblock 0 "
    "thread 32 waits there, block 0 thread 37 has exited",
    "named_barrier_of_two_counts": r"named_sync is given \d+ threads\nblock 0 thread \d+, others came",
    "more_registers_than_there_are": r"registers that nobody gives up\nblock 0 thread \d+: the block has "
    r"64512, its warps ask for \d+",
    "registers_not_given": r"registers that nobody gives up\nblock 0 thread \d+: the block has 64512, its "
    "warps ask for 82944",
    "registers_taken_to_be_fewer": r"registers_take more\nblock 0 thread \d+ has 128 and asks for 64",
    "registers_of_three_warps": r"do not issue the same\nblock 0 warp 0 made 0 of 1 calls",
    "registers_without_one_lane": r"registers_take is not reached by all threads\nblock 0 thread 32 waits "
    "there, block 0 thread 37 waits at sync_block",
    "misaligned_tile": r"load_tile is given an address that is not a multiple of 1024\nblock 0 thread 0",
    "store_not_awaited": r"exited while a store of its was under way\nblock 0 thread 0",
    "store_not_committed": r"exited while a store of its was under way\nblock 0 thread 0",
    "wait_that_does_not_cover": r"names accumulators that it does not cover\nblock 0 thread \d+: 1 products",
    "product_not_committed": r"names accumulators that it does not cover\nblock 0 thread \d+: 1 products",
    "accumulators_written": r"accumulators were written between wgmma and its wait\nblock 0 thread \d+",
    "product_without_fence": r"wgmma without wgmma_fence\nblock 0 thread \d+",
    "fence_before_another_wait": r"wgmma without wgmma_fence\nblock 0 thread \d+",
    "product_without_one_lane": r"different places\nblock 0 thread \d+ waits at wgmma\w*, thread \d+ came to "
    "wgmma",
    "product_without_one_warp": r"wgmma_wait waits for products that other warps do not issue\nblock 0 "
    r"thread 0 waits at wgmma_wait, for other warps\nblock 0 thread 32 has exited",
    "operands_of_different_warps": r"do not issue the same\nblock 0 thread \d+ came to wgmma",
    "operand_out_of_bounds": r"wgmma reads what is not .* own shared memory\nblock 0 thread \d+: byte",
    "operand_misaligned": r"wgmma is given a descriptor that the twin does not know\nblock 0 thread \d+",
    "product_left_under_way": r"exited while a wgmma was under way\nblock 0 warp \d",
}
FAULTS = sorted(DIFFERS | IS_OTHER | IS_NAN | set(SAYS))


# ---------------------------------------------------- waits that correct kernels leave out, one after another


def bits_without(call, out, what, turn):
    """In each schedule; None after an error."""
    for order, seed in cuda_host.SCHEDULES:
        out.fill_(-1)
        try:
            with schedule(order, seed), cuda_host.leaving_out(what, turn):
                call()
            yield out.numpy().tobytes()
        except RuntimeError:
            yield None


def pipeline_call():
    tiles = small_integers(6, 64, 64, dtype=torch.bfloat16)
    return "pipeline", [torch.empty(2, 128), tiles], [6]


def turns_call():
    return "turns", [torch.empty(10, dtype=torch.int32)], [5]


def products_call():
    q, k, v = (small_integers(rows, 64, dtype=torch.bfloat16) for rows in (64, 576, 576))
    return "products", [torch.empty(64, 64), q, k, v], [0, 192, 64, 3]


@pytest.mark.cuda_host
@pytest.mark.parametrize(
    ("make", "what", "turns"),
    [
        (pipeline_call, "barrier_wait", 6),
        (pipeline_call, "named_sync", 4),
        (turns_call, "named_sync", 5),
        (products_call, "barrier_wait", 6),
        (products_call, "wgmma_wait", 6),
    ],
)
def test_no_wait_can_be_left_out(make, what, turns):
    """Of the first so many of each thread: bits change with the schedule, or it is an error."""
    name, tensors, numbers = make()
    addresses = [x.data_ptr() for x in tensors]

    def call():
        cuda_host.load().hopper_primitive(name, 0, 0, addresses, numbers)

    expected, *others = bits_without(call, tensors[0], "", 0)
    assert expected is not None
    assert {*others} == {expected}
    for turn in range(turns):
        assert {*bits_without(call, tensors[0], what, turn)} != {expected}, f"without {what} number {turn}"
    assert {*bits_without(call, tensors[0], what, 1000)} == {expected}


@pytest.fixture
def faults():
    yield cuda_host.load()
    cuda_host.set_schedule("forward")


def in_schedules(run):
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        yield run()


def results(faults, name, faulty):
    return list(in_schedules(lambda: numpy.array(faults.run_hopper_fault(name, faulty), numpy.float32)))


@pytest.mark.cuda_host
def test_every_planted_fault_is_tested(faults):
    assert sorted(faults.hopper_fault_names()) == FAULTS


@pytest.mark.cuda_host
@pytest.mark.parametrize("name", FAULTS)
def test_correct_kernel_gives_the_same_bits_in_every_schedule(faults, name):
    first, *others = results(faults, name, faulty=False)
    assert not numpy.isnan(first).any()
    assert all(first.tobytes() == other.tobytes() for other in others)


@pytest.mark.cuda_host
@pytest.mark.parametrize("name", sorted(DIFFERS))
def test_missing_wait_changes_the_result_with_the_schedule(faults, name):
    """Or is an error in some of them, where nobody can go on."""

    def run():
        try:
            return numpy.array(faults.run_hopper_fault(name, True), numpy.float32).tobytes()
        except RuntimeError as error:
            return re.sub(r"\d+", "", str(error))

    assert len(set(in_schedules(run))) > 1


@pytest.mark.cuda_host
@pytest.mark.parametrize("name", sorted(IS_OTHER))
def test_wrong_descriptor_gives_wrong_numbers(faults, name):
    correct, *_ = results(faults, name, faulty=False)
    assert all((result != correct).any() for result in results(faults, name, faulty=True))


@pytest.mark.cuda_host
@pytest.mark.parametrize("name", sorted(IS_NAN))
def test_what_is_not_there_yet_is_nan(faults, name):
    assert all(numpy.isnan(result[:256]).any() for result in results(faults, name, faulty=True))


@pytest.mark.cuda_host
@pytest.mark.parametrize(("order", "seed"), cuda_host.SCHEDULES)
@pytest.mark.parametrize("name", sorted(SAYS))
def test_fault_is_an_error_that_names_who_and_where(faults, name, order, seed):
    cuda_host.set_schedule(order, seed)
    with pytest.raises(RuntimeError, match=SAYS[name]):
        faults.run_hopper_fault(name, True)
    # What was left where it stood is not in the way of the next launch.
    assert 1.0 in faults.run_hopper_fault("arrival_missing", False)
