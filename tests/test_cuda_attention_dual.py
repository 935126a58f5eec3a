"""Attention's CUDA kernels over dual numbers, on their host twin and on a GPU: what the tests of tangents and
of second derivatives, which run on both as they are, do not see. Each tangent without the others, every size
of tiles, tf32, the order in which threads run, plans."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import cuda_host
import fastseq
from attention_harness import Case, as_leaves, call_fastseq, kept_weights, make_data
from devices import ARITHMETIC, GPUS
from fastseq import attention_blocks, attention_dual_ops, cuda_attention, precision
from harness import ProductsInTf32, assert_same_bits
from test_attention_tangents import OPTIONS, derivatives_of, like, run_reference
from test_attention_tangents import check as check_derivatives
from test_cuda_attention import moved
from tolerances import SAME_FLOAT64, TIMES_TORCH

NAMES = ("query", "key", "value", "attn_mask", "sinks")
BASE = Case(torch.float64, 2, 4, 0, 37, 75, 16, 24)
# The mask's gradient is made in blocks: here it is not wanted, and its tangent meets the kernels.
WANTED = [True, True, True, False, True]


class Recorded(Exception):
    """Of a call of the function the operators' arguments, and nothing else."""


def arguments_of(case: Case, data: dict[str, Tensor], monkeypatch) -> tuple[list, list]:
    """The tensors of a call and its numbers, as the operators take them."""

    def record(*arguments):
        raise Recorded(arguments)

    with monkeypatch.context() as patched:
        patched.setattr(fastseq.autograd, "attention", record)
        with pytest.raises(Recorded) as recorded:
            call_fastseq(case, {name: x.detach() for name, x in data.items()})
    (arguments,) = recorded.value.args
    return list(arguments[:10]), list(arguments[10:16])


def tangents_of(tensors: list, only: tuple[str, ...], seed=5) -> list:
    """Of query, key, value, attn_mask and sinks; None of those that are not named."""
    g = torch.Generator().manual_seed(seed)
    tangents = [None] * 5
    for i, at in enumerate((0, 1, 2, 3, 8)):
        x = tensors[at]
        if x is not None and x.is_floating_point():
            tangent = like(x, g, x.dtype)
            tangents[i] = tangent if NAMES[i] in only else None
    return tangents


def run_operators(kernels, tensors, tangents, numbers, grads=(True, True, True, True)) -> dict[str, Tensor]:
    """Both; grads: which of grad_output, grad_lse and their tangents there are."""
    results = attention_dual_ops.DualResults(*kernels.attention_dual(*tensors, *tangents, *numbers, False))
    g = torch.Generator().manual_seed(7)
    of_output, of_lse, change, change_of_lse = (
        like(x, g, x.dtype) if there else None
        for x, there in zip((results.output, results.lse) * 2, grads, strict=True)
    )
    incoming = (of_output, of_lse, None, change, change_of_lse, None)
    kept = [
        x if x.numel() else None for x in (*results[:1], *results[2:6], results.lse_tangent, *results[7:])
    ]
    wanted = [want and x is not None for want, x in zip(WANTED, tensors[:4] + tensors[8:9], strict=True)]
    made = kernels.attention_dual_backward(*incoming, *tensors, *tangents, *kept, *numbers, wanted, wanted)
    names = [name for name, want in zip(NAMES, wanted, strict=True) if want]
    of = [f"gradient of {name}" for name in names] + [f"tangent of the gradient of {name}" for name in names]
    return results._asdict() | dict(zip(of, made, strict=True))


BLOCKS = attention_dual_ops.Kernels(
    partial(attention_dual_ops._run, attention_blocks.forward, True),
    partial(attention_dual_ops._run_backward, attention_blocks.backward, True),
)
WAYS = OPTIONS | {"few keys": {"keys": 6, "dropout": 0.3}, "few keys, packed": {"keys": 7, "packed": True}}
TANGENTS = [NAMES, *((name,) for name in NAMES), ()]


@pytest.mark.parametrize("only", TANGENTS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("option", WAYS)
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_kernels_make_what_blocks_of_torchs_operations_make(device, monkeypatch, option, only):
    case = replace(BASE, **WAYS[option])
    case = replace(case, mask=case.mask.replace("float32", "float"), sinks=case.sinks or "sinks" in only)
    if only == ("attn_mask",) and not case.packed:
        case = replace(case, mask="float", mask_dims="HQK")
    tensors, numbers = arguments_of(case, make_data(case), monkeypatch)
    tangents = tangents_of(tensors, only)
    grads = (True, only != (), only != ("key",), only != ("value",))
    expected = run_operators(BLOCKS, tensors, tangents, numbers, grads)
    with device.using() as ran:
        there = [
            [x.to(device.where) if isinstance(x, Tensor) else x for x in of] for of in (tensors, tangents)
        ]
        found = run_operators(attention_dual_ops.KERNELS[device.where], *there, numbers, grads)
        assert [plan["pass"] for plan in ran if plan["pass"].startswith("dual")] == [
            "dual forward",
            "dual backward",
        ]
    torch.testing.assert_close({name: x.cpu() for name, x in found.items()}, expected, **SAME_FLOAT64)


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [1, 64, 65, 128, 129, 256])
def test_every_size_of_tiles_matches_float64_reference_over_many_tiles(twin, kind, head_size):
    case = Case(ARITHMETIC[kind][0], 1, 2, 1, 70, 75, head_size, causal="bottom_right", mask="bool")
    with twin.using() as ran:
        check_derivatives(replace(case, softcap=3.0, sinks=True, returns=("lse",)))
        too_large = kind == "float64" and head_size > 128  # for the shared memory of a block, backward
        passes = {"dual forward"} if too_large else {"dual forward", "dual backward"}
        assert {plan["pass"] for plan in ran if "dual" in plan["pass"]} == passes


@pytest.mark.parametrize("option", ["plain", "causal", "softcap", "dropout"])
def test_tf32_is_as_exact_as_products_of_tf32(twin, option):
    """By the mean of squares over several draws. float32 is not rounded to tf32 unasked."""
    case = replace(BASE, dtype=torch.float32, head_size=64, value_size=64, **OPTIONS[option])
    squares = {}
    for seed in range(3):
        data = make_data(case, seed)
        keep = kept_weights(case, data)
        exact = run_reference(case, data, keep, torch.float64)
        with ProductsInTf32():
            torchs = run_reference(case, data, keep, torch.float32)
        answers = [torchs]
        for products in ("tf32", "ieee"):
            with precision.products(products):
                call = partial(call_fastseq, case)
                answers.append(derivatives_of(call, as_leaves(data), case.dtype))
        for name, x in exact.items():
            errors = [(answer[name].double() - x).square().sum().item() for answer in answers]
            squares[name] = [a + b for a, b in zip(squares.get(name, [0.0] * 3), errors, strict=True)]
    for name, (of_torch, ours, in_float32) in squares.items():
        assert ours <= TIMES_TORCH**2 * of_torch, name
        assert in_float32 < of_torch / 20**2, name


# ------------------------------------------------------------------------------------------------------- bits


def bits_of(results: dict[str, Tensor]) -> bytes:
    return b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in results.values())


@pytest.mark.cuda_host
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("option", ["plain", "packed from the end", "everything"])
def test_same_bits_in_every_schedule(twin, monkeypatch, kind, option):
    case = replace(BASE, dtype=ARITHMETIC[kind][0], queries=20, keys=70, **OPTIONS[option])
    tensors, numbers = arguments_of(case, make_data(case), monkeypatch)
    run = partial(
        run_operators, attention_dual_ops.KERNELS["cpu"], tensors, tangents_of(tensors, NAMES), numbers
    )
    expected = run()
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        assert_same_bits(run(), expected, f" with threads in order {order} {seed}")


@pytest.mark.cuda_host
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_no_barrier_can_be_left_out(twin, monkeypatch, kind, backward):
    """Over four tiles: bits change with the schedule, or it is an error."""
    if twin.module.sanitized:
        pytest.skip("AddressSanitizer may end the process")
    case = Case(ARITHMETIC[kind][0], 1, 1, 0, 130, 130, 64)
    tensors, numbers = arguments_of(case, make_data(case), monkeypatch)
    tangents = tangents_of(tensors, NAMES)
    kernels = attention_dual_ops.KERNELS["cpu"]
    run = "cuda_attention_dual_" + ("backward" if backward else "forward")
    real = getattr(twin.module.module, run)

    def bits(turn):
        for order, seed in cuda_host.SCHEDULES:
            cuda_host.set_schedule(order, seed)

            def faulty(*arguments):
                with cuda_host.leaving_out("sync_block" if turn >= 0 else "", max(turn, 0)):
                    real(*arguments)

            with monkeypatch.context() as patched:
                patched.setattr(type(twin.module), run, lambda _, *arguments: faulty(*arguments))
                try:
                    yield bits_of(run_operators(kernels, tensors, tangents, numbers))
                except RuntimeError:
                    yield None

    expected, *others = bits(-1)
    assert {expected} == {*others}
    for turn in range(4):
        assert any(found != expected for found in bits(turn)), turn


# ------------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_rows_outside_of_all_packed_sequences_have_no_tangents(device, dtype):
    """A buffer of fixed size, of which sequences take a part."""
    query, key, value = (torch.randn(50, 2, 8, dtype=dtype, device=device.where) for _ in range(3))
    starts = torch.tensor([3, 20, 20, 41], device=device.where)
    tensors = [query, key, value, None, None, starts, starts, None, None, None]
    tangents = tangents_of([x if x is None else x.cpu() for x in tensors], NAMES)
    tangents = [x if x is None else x.to(device.where) for x in tangents]
    numbers = [0.3, 0.0, 0.0, -1, -1, False]
    assert torch.empty(3).isnan().all()
    with device.using():
        results = run_operators(attention_dual_ops.KERNELS[device.where], tensors, tangents, numbers)
    outside = torch.ones(50, dtype=torch.bool, device=device.where)
    outside[3:41] = False
    assert not results.pop("lse_tangent")[:, outside].any()
    assert (results.pop("lse")[:, outside] == -torch.inf).all()
    for name, x in results.items():
        if x.dim() == 3 and x.shape[0] == 50:
            assert not x[outside].any(), name
            assert x[~outside].isfinite().all(), name
            assert x[~outside].any(), name


def plan(dtype=torch.float32, facts=GPUS["H200"], backward=False, **changes):
    sizes = {"batch": 2, "heads": 8, "kv_heads": 8, "queries": 1000, "keys": 1000, "head_size": 64}
    sizes |= {name: changes.pop(name) for name in sizes if name in changes}
    sizes["value_size"] = sizes["head_size"]
    nothing = dict.fromkeys(cuda_attention.Problem._fields, False)
    code = fastseq.checks.DTYPES[dtype]
    problem = cuda_attention.Problem(
        **{**nothing, **sizes, "dtype": code, "backward": backward, "dual": True, **changes}
    )
    return fastseq._C.cuda_attention_plan(problem, facts, "").describe()


@pytest.mark.parametrize("facts", GPUS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head_size", [1, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("dtype", fastseq.checks.DTYPES, ids=str)
def test_tiles_fit_every_gpu_or_are_blocks(dtype, head_size, backward, facts):
    found = plan(dtype, GPUS[facts], backward, head_size=head_size)
    big = head_size > 128 and (dtype is torch.float64 or (backward and facts == "RTX"))
    few = facts == "RTX" and backward and head_size > 64 and dtype in (torch.float32, torch.float64)
    if found["kernel"] == "blocks":
        assert big or few
        assert found["not_tiles"] == "the shared memory of a block"
        assert found["passes"] == {}
        return
    assert found["kernel"] == "tiles"
    assert found["not_tiles"] == ""
    assert found["passes"].keys() == ({"grad_queries", "grad_keys"} if backward else {"forward"})
    for one in found["passes"].values():
        assert one["shared_bytes"] <= GPUS[facts][3]
        assert one["threads"] <= 256
        assert one["blocks"] == 16 * -(-1000 // one["own"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": True}, "weights are returned"),
        ({"weights": True, "backward": True}, "a gradient of the weights"),
        ({"of_mask": True, "backward": True}, "a gradient of the mask"),
        ({"head_size": 257}, "heads of more than 256 features"),
    ],
)
def test_what_has_no_kernel_is_made_in_blocks_and_the_plan_tells_why(changes, reason):
    found = plan(**changes)
    assert (found["kernel"], found["not_tiles"], found["passes"]) == ("blocks", reason, {})


def test_heads_of_more_than_256_features_have_tangents(device):
    case = Case(torch.float64, 1, 1, 0, 5, 6, 300)
    data = make_data(case)
    with device.using() as ran:
        there = moved(data, device.where)
        tangents = {name: torch.ones_like(x) for name, x in there.items()}
        _, found = torch.func.jvp(
            lambda given: fastseq.scaled_dot_product_attention(**given),
            ({name: x.detach() for name, x in there.items()},),
            (tangents,),
        )
        assert not ran
    assert found.isfinite().all()
    assert found.any()
