"""The host twin of the CUDA kernels finds what a GPU punishes, and computes what a GPU computes."""

import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch

import cuda_host
from devices import in_use, twin_device
from harness import Case, make_data, make_module

TESTS = Path(__file__).parent
pytestmark = pytest.mark.cuda_host


@pytest.fixture
def twin():
    yield cuda_host.load()
    cuda_host.set_schedule("forward")


# ---- planted faults, each beside its correct self ----

# What a kernel with the fault does. Those that differ with the schedule do so in two of SCHEDULES at least.
DIFFERS = {
    "missing_block_barrier",
    "missing_warp_barrier",
    "missing_barrier_before_reuse",
    "missing_cluster_barrier",
    "missing_cluster_start",
    "early_message_read",
    "missing_flag_wait",
    "flag_before_barrier",
    "source_overwritten",
}
IS_NAN = {"unwritten_shared_memory", "early_async_read", "uncommitted_copy"}
SAYS = {
    "skipped_block_barrier": r"sync_block is not reached.*\nblock 1 thread 0 waits.*"
    r"block 1 thread 37 has exited",
    "skipped_by_one_lane": r"shuffle_xor is not reached.*\nblock \d thread 32 waits.*"
    r"block \d thread 37 waits at sync_block",
    "different_collectives": r"different places\nblock \d thread \d+ waits at mma of (\w+), "
    r"thread \d+ came to mma of (?!\1$)",
    "skipped_cluster_barrier": r"cluster_wait is not reached.*\nblock 0 thread 0 waits.*"
    r"block 1 thread 37 has exited",
    "second_arrive": r"second cluster_arrive.*\nblock \d thread \d+",
    "wait_without_arrive": r"cluster_wait without cluster_arrive\nblock \d thread \d+",
    "arrive_without_wait": r"cluster_arrive without cluster_wait\nblock \d thread \d+",
    "message_never_sent": r"arrivals_wait.*\nblock 0 thread 0 .* for 8 bytes more",
    "flag_never_set": r"wait_flag.*\nblock 0 thread 0 .* for 3, the flag is 2",
    "not_together": r"wait_flag.*\nblock \d thread 0 .* for 1, the flag is 0\n1 blocks have not begun",
    "misaligned_row": r"load_matrices .* not a multiple of 16\nblock \d thread \d+",
    "row_of_another_block": r"load_matrices .* own shared memory\nblock \d thread \d+",
    "misaligned_copy": r"copy_async .* not a multiple of 16\nblock \d thread \d+",
    "copy_to_global_memory": r"copy_async .* own shared memory\nblock \d thread \d+",
    "misaligned_load": r"load_constant .* not a multiple of 16\nblock \d thread \d+",
    "map_of_global_memory": r"cluster_map .* own shared memory\nblock \d thread \d+",
    "rank_out_of_cluster": r"cluster_map .* rank 2 in a cluster of 2\nblock \d thread \d+",
}
# What the guards beside shared memory find where there is no AddressSanitizer, and what only that finds.
GUARDED = {
    "shared_write_out_of_bounds": r"out of bounds\n.* 512 bytes of block \d",
    "shared_write_below": r"out of bounds\n.* 512 bytes of block \d",
    "missing_cluster_end": r"after its block had exited\n.* block \d",
}
UNGUARDED = {
    "shared_read_out_of_bounds",
    "global_read_out_of_bounds",
    "global_write_out_of_bounds",
    "async_read_out_of_bounds",
}
# The memory of a block that has not begun may not be touched; there AddressSanitizer is the first to say so.
FOREIGN = {"missing_cluster_barrier", "missing_cluster_start"}
FAULTS = sorted(DIFFERS | IS_NAN | set(SAYS) | set(GUARDED) | UNGUARDED)


def results(twin, name, faulty):
    """The numbers of all threads, as bits, in each schedule."""
    found = []
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        found.append(numpy.array(twin.run_fault(name, faulty), numpy.float32))
    return found


def test_every_planted_fault_is_tested(twin):
    assert sorted(twin.fault_names()) == FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_correct_kernel_gives_the_same_bits_in_every_schedule(twin, name):
    first, *others = results(twin, name, faulty=False)
    assert not numpy.isnan(first).any()
    assert all(first.tobytes() == other.tobytes() for other in others)


@pytest.mark.parametrize("name", sorted(DIFFERS))
def test_missing_wait_changes_the_result_with_the_schedule(twin, name):
    if twin.sanitized and name in FOREIGN:
        pytest.skip("AddressSanitizer ends the process")
    assert len({result.tobytes() for result in results(twin, name, faulty=True)}) > 1


@pytest.mark.parametrize("name", sorted(IS_NAN))
def test_what_is_not_there_yet_is_nan(twin, name):
    assert all(numpy.isnan(result).all() for result in results(twin, name, faulty=True))


@pytest.mark.parametrize(("order", "seed"), cuda_host.SCHEDULES)
@pytest.mark.parametrize("name", sorted(SAYS))
def test_failed_meeting_is_an_error_that_names_the_threads(twin, name, order, seed):
    cuda_host.set_schedule(order, seed)
    with pytest.raises(RuntimeError, match=SAYS[name]):
        twin.run_fault(name, True)
    # The threads that were left where they stood are not in the way of the next launch.
    assert set(twin.run_fault("skipped_block_barrier", False)) == {1.0}


@pytest.mark.parametrize("name", sorted(GUARDED))
def test_guards_find_writes_out_of_bounds(twin, name):
    if twin.sanitized:
        pytest.skip("AddressSanitizer ends the process")
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        with pytest.raises(RuntimeError, match=GUARDED[name]):
            twin.run_fault(name, True)


@pytest.mark.parametrize("name", sorted(UNGUARDED | set(GUARDED) | FOREIGN))
def test_sanitizer_finds_memory_out_of_bounds(twin, name):
    if not twin.sanitized:
        pytest.skip("needs the sanitized twin of `make asan`")
    script = f"import cuda_host; cuda_host.load().run_fault({name!r}, True)"
    script = f"import sys; sys.path.insert(0, {str(TESTS)!r}); {script}"  # make asan sets PYTHONSAFEPATH
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "ERROR: AddressSanitizer" in run.stderr
    # In the kernel's own line: the trace follows the threads' stacks.
    assert re.search(r" run .*faults\.cpp:\d+\n", run.stderr)
    assert "thread_body" in run.stderr


# ---- faults planted in the recurrent kernels, which are correct ----


def pass_results(device, module, x, backward, what="", turn=0):
    """The bits of one pass in each schedule, in which every thread leaves out a wait; None after an error."""
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        x.grad = None
        try:
            device.module.leave_out(*("", 0) if backward else (what, turn))
            result = module(x)[0]
            if backward:
                device.module.leave_out(what, turn)
                result.sum().backward()
                result = x.grad
            bits = result.detach().numpy().tobytes()
        except RuntimeError:
            bits = None
        finally:
            device.module.leave_out("", 0)
        yield bits


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("forced", ["cluster:2x1:operand", "cluster:2x1:sums", "grid:3x1"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU_RESET_BEFORE"])
def test_no_wait_of_a_step_can_be_left_out(twin, mode, forced, backward):
    """From the first steps to the last: bits change with the schedule, or it is an error."""
    if twin.sanitized:
        pytest.skip("AddressSanitizer may end the process")
    case = Case(mode, steps=5, batch=5, input_size=3, hidden_size=33)
    with in_use(twin_device()) as device, device.using(forced):
        module, x = make_module(case), make_data(case)["input"]
        expected, *others = pass_results(device, module, x, backward)
        assert {expected} == {*others}
        for what, first in (("sync_block", 6), ("wait_flag" if "grid" in forced else "arrivals_wait", 1)):
            turn = first
            while any(bits != expected for bits in pass_results(device, module, x, backward, what, turn)):
                turn += 1
            assert turn >= first + 2
            # The last one was left out.
            for later in (turn + 1, turn + 2, turn + 4):
                found = pass_results(device, module, x, backward, what, later)
                assert all(bits == expected for bits in found)


# ---- launches ----


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"blocks": 0, "threads": 32}, "blocks is 0"),
        ({"blocks": 1, "threads": 0}, "threads is 0"),
        ({"blocks": 1, "threads": 48}, "threads is 48\naccepted is a multiple of 32 up to the kernel's 256"),
        ({"blocks": 1, "threads": 288}, "threads is 288"),
        ({"blocks": 1, "threads": 32, "shared_bytes": 227 * 1024 + 1}, "shared_bytes is 232449"),
        ({"blocks": 34, "threads": 32, "cluster": 17}, "cluster is 17"),
        ({"blocks": 6, "threads": 32, "cluster": 4}, "cluster is 4"),
        ({"blocks": 1000, "threads": 256, "together": True}, "threads that run together is 256000"),
    ],
)
def test_shape_that_no_gpu_takes_is_an_error(twin, shape, message):
    with pytest.raises(RuntimeError, match=message):
        twin.nothing(**shape)


@pytest.mark.parametrize(
    "shape",
    [
        {"blocks": 1, "threads": 32},
        {"blocks": 1000, "threads": 256},
        {"blocks": 2, "threads": 256, "shared_bytes": 227 * 1024},
        {"blocks": 32, "threads": 32, "cluster": 16, "shared_bytes": 100},
        {"blocks": 96, "threads": 256, "together": True},
    ],
)
def test_shape_that_a_gpu_takes_runs(twin, shape):
    twin.nothing(**shape)


@pytest.mark.parametrize(("order", "seed"), cuda_host.SCHEDULES[:3])
@pytest.mark.parametrize(("blocks", "threads"), [(16, 512), (64, 128)])
def test_many_threads_meet(twin, blocks, threads, order, seed):
    cuda_host.set_schedule(order, seed)
    for name in ("sync_warp", "sync_block"):
        twin.collective(name, 5, blocks, threads, together=True)
    twin.collective("cluster", 5, min(blocks, 16), threads)


def test_python_threads_may_launch_at_the_same_time(twin):
    failures = []

    def work(name, faulty):
        for _ in range(50):
            try:
                good = set(twin.run_fault(name, faulty)) == {1.0} and not faulty
            except RuntimeError as error:
                good = faulty and "sync_block is not reached" in str(error)
            if not good:
                failures.append((name, faulty))

    threads = [threading.Thread(target=work, args=("skipped_block_barrier", i % 2 == 0)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- primitives ----

LANE = numpy.arange(32)[:, None]
WORD = numpy.arange(4)[None]


def words_of(matrix):
    """[rows, k] of 16 or 32 bits -> [rows, words], two 16-bit elements or one of 32 bits to a word."""
    return matrix.contiguous().view(torch.int32).numpy().view(numpy.uint32)


def mma(twin, kind, a, b, d):
    """d + a @ b by one warp, its operands laid out in lanes as csrc/cuda/prim.h says."""
    a_lanes = words_of(a)[LANE // 4 + 8 * (WORD % 2), LANE % 4 + 4 * (WORD // 2)].copy()
    b_lanes = words_of(b.T)[LANE // 4, LANE % 4 + 4 * WORD[:, :2]].copy()
    place = (LANE // 4 + 8 * (WORD // 2), 2 * (LANE % 4) + WORD % 2)
    d_lanes = d.numpy()[place].copy()
    twin.mma(kind, a_lanes.ctypes.data, b_lanes.ctypes.data, d_lanes.ctypes.data)
    result = numpy.empty((16, 8), numpy.float32)
    result[place] = d_lanes
    return torch.from_numpy(result)


def cut_to_tf32(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


MMA = {"bfloat16": (torch.bfloat16, 16), "float16": (torch.float16, 16), "tf32": (torch.float32, 8)}


@pytest.mark.parametrize("kind", MMA)
def test_mma_is_the_product_of_the_matrices(twin, kind):
    dtype, depth = MMA[kind]
    for _ in range(20):
        a, b = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
        d = torch.randn(16, 8)
        used = [cut_to_tf32(x) if kind == "tf32" else x for x in (a, b)]
        expected = d.double() + used[0].double() @ used[1].double()
        torch.testing.assert_close(mma(twin, kind, a, b, d).double(), expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("kind", MMA)
def test_mma_of_small_integers_is_exact(twin, kind):
    dtype, depth = MMA[kind]
    a, b = torch.randint(-9, 10, (16, depth)).to(dtype), torch.randint(-9, 10, (depth, 8)).to(dtype)
    d = torch.randint(-99, 100, (16, 8)).float()
    assert torch.equal(mma(twin, kind, a, b, d), d + a.float() @ b.float())


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mma_reads_every_16_bit_number(twin, kind):
    """Sixteen patterns at a time, each alone in its row, at an even and at an odd place."""
    dtype, depth = MMA[kind]
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[::7]
    numbers = numbers[: len(numbers) // 16 * 16].view(-1, 16)
    b, zero = torch.ones(depth, 8, dtype=dtype), torch.zeros(16, 8)
    for i, row in enumerate(numbers):
        a = torch.zeros(16, depth, dtype=dtype)
        a[:, i % depth] = row
        torch.testing.assert_close(
            mma(twin, kind, a, b, zero)[:, 3], row.float(), rtol=0, atol=0, equal_nan=True
        )


def test_mma_of_floats_does_not_look_at_the_13_lowest_bits(twin):
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    assert torch.equal(mma(twin, "tf32", a, b, d), mma(twin, "tf32", cut_to_tf32(a), cut_to_tf32(b), d))


def test_load_matrices_hands_out_words(twin):
    rows = numpy.arange(128, dtype=numpy.uint32).reshape(32, 4)  # of lane l: row l % 8 of matrix l / 8
    r = numpy.zeros_like(rows)
    twin.load_matrices(rows.ctypes.data, r.ctypes.data)
    matrices = rows.reshape(4, 8, 4)
    assert (r == matrices[WORD, LANE // 4, LANE % 4]).all()


def test_load_matrices_transposed_hands_out_columns(twin):
    rows = numpy.arange(256, dtype=numpy.uint16).reshape(32, 8)
    r = numpy.zeros((32, 4, 2), numpy.uint16)
    twin.load_matrices(rows.ctypes.data, r.ctypes.data, transposed=True)
    matrices = rows.reshape(4, 8, 8)
    for half in range(2):
        assert (r[..., half] == matrices[WORD, 2 * (LANE % 4) + half, LANE // 4]).all()


def test_mma_of_doubles_is_the_product_of_the_matrices(twin):
    a, b, d = (
        numpy.random.default_rng(i).standard_normal(s) for i, s in enumerate([(16, 8), (8, 8), (16, 8)])
    )
    row, word = numpy.arange(32)[:, None] // 4, numpy.arange(32)[:, None] % 4
    four, two = numpy.arange(4), numpy.arange(2)
    a_lanes = numpy.ascontiguousarray(a[row + 8 * (four % 2), word + 4 * (four // 2)])
    b_lanes = numpy.ascontiguousarray(b[word + 4 * two, row])
    place = (row + 8 * (four // 2), 2 * word + four % 2)
    d_lanes = numpy.ascontiguousarray(d[place])
    twin.mma_double(a_lanes.ctypes.data, b_lanes.ctypes.data, d_lanes.ctypes.data)
    numpy.testing.assert_allclose(d_lanes, (d + a @ b)[place], rtol=0, atol=1e-14)


def test_mma_cuts_off_what_does_not_fit_a_float(twin):
    """Once, towards zero, as tensor cores do: a thousand sums of 2^-12 of a unit leave a unit as it is, and
    eight terms of that size in one product are added before anything is cut off."""
    tiny = 2.0**-12 * 2.0**-23
    a, b = torch.zeros(16, 8), torch.ones(8, 8)
    a[0, 0], a[1] = tiny * 0.99, tiny * 2**9 * 1.01
    for sign in (1, -1):
        d = mma(twin, "tf32", sign * a, b, sign * torch.ones(16, 8))
        assert (d[0] == sign).all()
        assert (d[1] == sign * (1 + 2.0**-23)).all()


def test_copies_fill_up_with_zeros(twin):
    source = numpy.random.default_rng(0).integers(1, 256, (32, 16), dtype=numpy.uint8)
    result = numpy.full_like(source, 7)
    twin.copy_or_zero(source.ctypes.data, result.ctypes.data)
    kept = numpy.arange(16) < (numpy.arange(32) % 17)[:, None]
    assert (result == numpy.where(kept, source, 0)).all()


@pytest.mark.parametrize(("order", "seed"), cuda_host.SCHEDULES)
def test_any_finds_the_one_in_a_warp_and_in_a_block(twin, order, seed):
    cuda_host.set_schedule(order, seed)
    result = numpy.zeros((100, 96), numpy.uint8)
    twin.any(100, result.ctypes.data)
    rounds, threads = numpy.arange(100)[:, None], numpy.arange(96)
    assert (result % 2 == (rounds // 32 == threads // 32)).all()
    assert (result // 2 == (rounds < 96)).all()


def test_exp2_is_exact_to_two_units_and_flushes_what_is_subnormal(twin):
    source = torch.cat(
        [torch.linspace(-140, 130, 10_001), torch.tensor([-math.inf, math.inf, math.nan, 0.0])]
    )
    exact = torch.exp2(source.double())
    exact[exact < 2.0**-126] = 0
    exact[exact >= 2.0**128] = math.inf
    found = numbers(twin, "exp2", source, torch.float32).double()
    torch.testing.assert_close(found, exact, rtol=2 * 2.0**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
@pytest.mark.parametrize("mask", [0, 1, 2, 7, 16, 31])
def test_shuffle_xor_exchanges(twin, mask, dtype):
    value = numpy.random.default_rng(0).standard_normal(32).astype(dtype)
    result = numpy.empty_like(value)
    twin.shuffle_xor(value.itemsize, mask, value.ctypes.data, result.ctypes.data)
    assert (result == value[numpy.arange(32) ^ mask]).all()


def numbers(twin, function, source, dtype):
    result = torch.empty(len(source), dtype=dtype)
    twin.numbers(function, len(source), source.data_ptr(), result.data_ptr())
    return result


def same(x, y):
    return bool((((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())).all())


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_widen_is_exact_for_all_numbers(twin, kind):
    source = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(MMA[kind][0])
    assert same(numbers(twin, f"widen_{kind}", source, torch.float32), source.float())


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_narrow_rounds_to_nearest_even(twin, kind):
    """All numbers of the type, what lies halfway to the next, and what lies just beside that."""
    dtype = MMA[kind][0]
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    following = torch.arange(-(2**15), 2**15, dtype=torch.int16).add(1).view(dtype).float()
    half = ((exact.double() + following.double()) / 2).float()
    infinity = torch.tensor(math.inf)
    source = torch.cat([exact, half, half.nextafter(infinity), half.nextafter(-infinity), torch.randn(1000)])
    assert same(numbers(twin, f"narrow_{kind}", source, dtype).float(), source.to(dtype).float())


def test_round_to_tf32_takes_the_nearest_and_of_two_the_larger(twin):
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1 + 2**-11,
        -1 - 2**-11,
        1 + 3 * 2**-11,
        2**-140,
        3.4e38,
    ]
    low_payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN
    source = torch.cat([torch.tensor(special), low_payload, torch.randn(10000) * torch.randn(10000).exp()])
    _, exponent = source.double().abs().frexp()
    exponent = exponent.clamp(min=-125)  # subnormal numbers have fewer bits
    unit = torch.exp2(exponent - 11.0)
    expected = ((source.double().abs() / unit + 0.5).floor() * unit).copysign(source.double()).float()
    expected = torch.where(source.isinf(), source, expected)
    assert same(numbers(twin, "round_to_tf32", source, torch.float32), expected)


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "relu"])
def test_activation_functions(twin, function):
    source = torch.cat([torch.linspace(-100, 100, 10001), torch.tensor([math.inf, -math.inf, math.nan])])
    expected = getattr(torch, function)(source.double()).float()
    result = numbers(twin, function, source, torch.float32)
    torch.testing.assert_close(result, expected, rtol=5e-7, atol=1e-37, equal_nan=True)
