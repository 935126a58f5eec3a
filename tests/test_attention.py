"""Attention against the float64 reference: dtypes x head sizes x lengths x options x layouts.

Results, log-sum-exp, weights and every gradient; the error is at most twice torch's own.
"""

from dataclasses import replace

import pytest
import torch

import fastseq
from attention_harness import (
    ALL,
    LAYOUTS,
    Case,
    call_fastseq,
    check,
    lay_out,
    make_data,
    run_fastseq,
)
from harness import DTYPES, assert_same_bits

# Of keys, of values: smaller and larger than a vector, multiples of one and not, equal and not, beyond 256.
HEAD_SIZES = [(d, d) for d in (1, 3, 8, 16, 31, 64, 96, 128, 256, 300)]
HEAD_SIZES += [(64, 1), (1, 64), (3, 128), (96, 64), (64, 96), (128, 31), (300, 8), (8, 300), (257, 65)]
SMOKE_HEAD_SIZES = {(3, 3), (64, 64), (64, 96), (257, 65)}

LENGTHS = [(n, n) for n in (1, 2, 7, 63, 64, 65, 128, 197, 255, 256, 257, 600)]
LENGTHS += [(1, n) for n in (2, 7, 64, 65, 257, 600, 2050)] + [(n, 1) for n in (2, 65, 600)]
LENGTHS += [(2, 600), (5, 1030), (63, 65), (65, 63), (257, 128), (128, 257), (600, 7), (7, 600), (40, 1100)]
SMOKE_LENGTHS = {(65, 65), (1, 257), (5, 1030), (257, 128)}

SHAPES = [(130, 130), (1, 131), (70, 133), (133, 70), (20, 1100), (60, 530)]  # queries, keys

OPTIONS = {
    "plain": {},
    "lse and weights": {"returns": ALL},
    "weights averaged over the heads": {"returns": ALL, "average": True},
    "bool mask": {"mask": "bool"},
    "float mask": {"mask": "float"},
    "causal": {"causal": "top_left"},
    "causal from the end": {"causal": "bottom_right"},
    "window": {"causal": "bottom_right", "window": (40, 0)},
    "grouped queries": {"heads": 6, "kv_heads": 2},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "H", "causal": "bottom_right"},
    "sinks": {"sinks": True, "causal": "top_left"},
    "key lengths": {"lengths": True, "batch": 3},
    "packed": {"packed": True, "batch": 3},
    "dropout": {"dropout": 0.3},
    "scale": {"scale": -1.7},
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_option = pytest.mark.parametrize("option", OPTIONS)


def sizes(pairs, smoke):
    """The pairs as parameters, those in `smoke` tested on every instruction set."""
    return [
        pytest.param(*pair, marks=[pytest.mark.smoke] * (pair in smoke), id="x".join(map(str, pair)))
        for pair in pairs
    ]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("head_size", "value_size"), sizes(HEAD_SIZES, SMOKE_HEAD_SIZES))
@pytest.mark.parametrize("option", ["lse and weights", "causal from the end"])
@every_dtype
def test_head_sizes_match_float64_reference(dtype, option, head_size, value_size, rung):
    if rung != "cpu" and max(head_size, value_size) > 256:
        pytest.skip("heads of up to 256 features on CUDA")
    case = Case(dtype, 2, 2, 0, 37, 66, head_size, value_size)
    check(replace(case, **OPTIONS[option]))


@pytest.mark.parametrize(("queries", "keys"), sizes(LENGTHS, SMOKE_LENGTHS))
@pytest.mark.parametrize("option", ["causal", "causal from the end", "float mask"])
@every_dtype
def test_lengths_match_float64_reference(dtype, option, queries, keys):
    heads = 2 if queries * keys < 1e5 else 1
    check(Case(dtype, 1, heads, 0, queries, keys, 20, **OPTIONS[option]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("queries", "keys"), [(130, 130), (1, 131), (70, 133), (133, 70), (20, 1100), (60, 530)]
)
@every_option
@every_dtype
def test_options_match_float64_reference(dtype, option, queries, keys):
    check(replace(Case(dtype, 2, 3, 0, queries, keys, 24, 40), **OPTIONS[option]))


@pytest.mark.smoke
@every_option
@every_dtype
def test_options_match_float64_reference_on_every_instruction_set(dtype, option):
    check(replace(Case(dtype, 2, 2, 0, 35, 70, 19, 33), **OPTIONS[option]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("batch", [0, 1, 2, 9])
@pytest.mark.parametrize("heads", [1, 5])
@every_option
def test_batches_and_heads_match_float64_reference(option, heads, batch):
    case = replace(Case(torch.float32, queries=10, keys=10), **{**OPTIONS[option], "batch": batch})
    case = replace(case, heads=heads * (case.kv_heads or 1))
    if batch:
        return check(case)
    data = make_data(replace(case, packed=False, lengths=False))
    results = run_fastseq(replace(case, packed=False, lengths=False), data)
    assert results["output"].shape == (0, case.heads, 10, 8)
    for name in ("query", "key", "value"):
        assert results[f"grad of {name}"].shape == data[name].shape


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
@every_dtype
def test_without_queries_or_keys_the_output_is_zero_and_lse_that_of_the_sinks(dtype, sinks, queries, keys):
    case = Case(dtype, queries=queries, keys=keys, sinks=sinks, returns=ALL)
    data = make_data(case)
    results = run_fastseq(case, data)
    assert results["output"].shape == (2, 4, queries, 8)
    assert results["weights"].shape == (2, 4, queries, keys)
    assert not results["output"].any()
    expected = data["sinks"].detach() if sinks else torch.full((4,), -torch.inf, dtype=case.accumulation)
    torch.testing.assert_close(results["lse"], expected[:, None].expand(2, 4, queries))
    for name in ("query", "key", "value"):
        assert results[f"grad of {name}"].shape == data[name].shape
        assert not results[f"grad of {name}"].any()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 70])
@every_dtype
def test_strides_do_not_change_a_bit(dtype, queries, layout):
    """Of query, key, value, mask and the incoming gradients; nothing that is given is modified."""
    case = Case(dtype, 2, 3, 0, queries, 75, 17, 12, mask="float", returns=ALL)
    plain = make_data(case)
    data = {name: lay_out(x, layout) for name, x in plain.items()}
    before = [(x._version, x.detach().clone()) for x in data.values()]
    assert_same_bits(run_fastseq(case, data), run_fastseq(case, plain))
    for x, (version, values) in zip(data.values(), before, strict=True):
        assert x._version == version, "an argument was modified"
        assert torch.equal(x, values)

    def gradients(incoming):
        return torch.autograd.grad(call_fastseq(case, plain)["output"], list(plain.values()), incoming)

    incoming = torch.randn(2, 3, queries, 12).to(dtype)
    strided, dense = gradients(lay_out(incoming, layout)), gradients(incoming)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_output_has_the_memory_layout_of_the_query(layout, queries):
    case = Case(queries=queries, layout=layout, value_size=5)
    output = call_fastseq(case, make_data(case))["output"]
    assert (output if layout == "BHSD" else output.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("queries", [1, 66])
def test_query_key_and_value_from_one_projection(queries):
    """Views of one (B, S, 3, H, D) tensor, with one gradient for all."""
    case = Case(torch.float64, 2, 3, 0, 66, 66, 16)
    data = make_data(case)
    together = torch.stack([x.detach().transpose(1, 2) for x in data.values()], 2).requires_grad_()
    q, k, v = together.permute(2, 0, 3, 1, 4)
    output = fastseq.scaled_dot_product_attention(q[:, :, :queries], k, v)
    (gradient,) = torch.autograd.grad(output.square().sum(), together)
    output = fastseq.scaled_dot_product_attention(data["query"][:, :, :queries], data["key"], data["value"])
    separate = torch.autograd.grad(output.square().sum(), list(data.values()))
    assert torch.equal(gradient, torch.stack([g.transpose(1, 2) for g in separate], 2))


@pytest.mark.parametrize("dims", ["B", "H", "S", "BH", "BS", "BHS"])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_expanded_tensors_have_the_bits_of_dense_ones(which, dims):
    """Strides of 0; the gradient of a sum is expanded too."""
    case = Case(torch.float32, queries=70, keys=70)
    data = make_data(case)
    x = data[which].detach()
    for axis, dim in enumerate("BHS"):
        x = x.narrow(axis, 0, 1) if dim in dims else x
    results = []
    for dense in (False, True):
        y = x.expand_as(data[which])
        data[which] = (y.contiguous() if dense else y).detach().requires_grad_()
        output = call_fastseq(case, data)["output"]
        gradients = torch.autograd.grad(output.sum(), list(data.values()))
        results.append(dict(zip(["output", *data], [output.detach(), *gradients], strict=True)))
    assert_same_bits(*results)


@pytest.mark.parametrize("which", ["query", "key and value", "all"])
def test_leading_dimensions_broadcast_and_gradients_are_reduced(which):
    case = Case(torch.float64, batch=3)
    data = make_data(case)
    small = ["query"] if which == "query" else ["key", "value"]
    results = []
    for expand in (False, True):
        leaves = {name: x.detach().clone() for name, x in data.items()}
        if which == "all":  # (3, 1, ...) beside (2, ...)
            leaves["query"] = leaves["query"][:, None]
            leaves |= {name: leaves[name][:2] for name in small}
        else:
            leaves |= {name: leaves[name][:1] for name in small}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        given = leaves
        if expand:
            lead = torch.broadcast_shapes(*(x.shape[:-3] for x in leaves.values()))
            given = {name: x.expand(*lead, *x.shape[-3:]) for name, x in leaves.items()}
        output = fastseq.scaled_dot_product_attention(**given)
        gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
        results.append([output, *gradients])
    assert results[0][0].shape == ((3, 2, 4, 9, 8) if which == "all" else (3, 4, 9, 8))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 3, 5, 6])
def test_other_ranks_are_reshapes_of_four(rank):
    """Results, gradients, log-sum-exp and weights, with a float mask of the same rank."""
    batch, heads = (1, 1) if rank == 2 else (1, 4) if rank == 3 else (6, 4)
    case = Case(torch.float64, batch, heads, mask="float", returns=ALL)
    lead = {2: (), 3: (4,), 5: (2, 3, 4), 6: (2, 1, 3, 4)}[rank]
    data = make_data(case)
    expected = run_fastseq(case, data)
    reshaped = {
        name: x.detach().reshape(lead + x.shape[-2:]).requires_grad_(x.requires_grad)
        for name, x in data.items()
    }
    with_rank = call_fastseq(case, reshaped)
    assert with_rank["output"].shape == lead + (9, 8)
    assert with_rank["lse"].shape == lead + (9,)
    assert with_rank["weights"].shape == lead + (9, 13)
    results = run_fastseq(case, reshaped)
    for name, x in expected.items():
        if not name.startswith("grad of"):
            assert torch.equal(results[name].reshape(x.shape), x)
    gradients = torch.autograd.grad(with_rank["output"].square().sum(), list(reshaped.values()))
    plain = torch.autograd.grad(call_fastseq(case, data)["output"].square().sum(), list(data.values()))
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(gradients, plain, strict=True))
