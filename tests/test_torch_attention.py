"""fastseq in torch.nn.attention's registry of flash attention implementations.

On the CPU it is activated and called as users do; torch's operators on CUDA are called as functions, with CPU
tensors, on the CPU's kernels and on the host twin.
"""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseq
from devices import in_use, twin_device
from fastseq import attention_ops
from fastseq.integrations import torch_attention as integration
from tolerances import SAME_FLOAT64, assert_as_accurate_as_torch

registry = pytest.importorskip("torch.nn.attention._registry", reason="this torch has no registry")
pytestmark = pytest.mark.usefixtures("one_thread")
SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    yield
    nn.attention.restore_flash_attention_impl(_raise_warn=False)


class active:
    def __enter__(self):
        nn.attention.activate_flash_attention_impl("fastseq")

    def __exit__(self, *_):
        nn.attention.restore_flash_attention_impl()


def qkv(dtype=torch.float64, queries=5, keys=7, size=8, heads=3):
    shapes = ((2, heads, queries, size), (2, 3, keys, size), (2, 3, keys, size))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def results(tensors, function=SDPA, **keywords):
    output = function(*tensors, **keywords)
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), tensors)]


def operators(function):
    with torch.profiler.profile() as profile:
        function()
    return {event.name for event in profile.events()}


HIDDEN_ROW = torch.ones(5, 7, dtype=torch.bool).tril()
HIDDEN_ROW[2] = False
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": HIDDEN_ROW},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 35, dtype=torch.float64).view(5, 7)},
    "mask of each head": {"attn_mask": torch.linspace(-2, 2, 210, dtype=torch.float64).view(2, 3, 5, 7)},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.7},
}


@pytest.mark.parametrize("call", CALLS)
def test_outputs_and_gradients_are_torchs(call):
    tensors = qkv()
    expected = results(tensors, **CALLS[call])
    with active():
        ours = results(tensors, **CALLS[call])
        ran = operators(lambda: results(tensors, **CALLS[call]))
    assert {"fastseq::attention", "fastseq::attention_backward"} <= ran
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["plain", "causal"])
def test_is_as_accurate_as_torchs(call, dtype):
    tensors = qkv(dtype, 33, 40, 16)
    torchs = results(tensors, **CALLS[call])
    exact = results([x.detach().double().requires_grad_() for x in tensors], **CALLS[call])
    with active():
        ours = results(tensors, **CALLS[call])
    for a, b, reference in zip(ours, torchs, exact, strict=True):
        assert_as_accurate_as_torch(a, b, reference, dtype)


def test_grouped_queries_are_torchs():
    tensors = qkv(heads=6)
    expected = results(tensors, enable_gqa=True)
    with active():
        ours = results(tensors, enable_gqa=True)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_is_listed_activated_and_restored():
    assert "fastseq" in nn.attention.list_flash_attention_impls()
    assert nn.attention.current_flash_attention_impl() is None, "registering activates nothing"
    tensors = qkv()
    before = operators(lambda: results(tensors))
    with active():
        assert nn.attention.current_flash_attention_impl() == "fastseq"
        nn.attention.activate_flash_attention_impl("fastseq")
        integration.register()
        assert "fastseq::attention" in operators(lambda: results(tensors))
    assert nn.attention.current_flash_attention_impl() is None
    assert operators(lambda: results(tensors)) == before
    expected = results(tensors)
    with active():
        pass
    for a, b in zip(results(tensors), expected, strict=True):
        assert torch.equal(a, b)


def test_it_may_change_between_forward_and_backward():
    tensors, keywords = qkv(), CALLS["bool mask"]
    expected = results(tensors, **keywords)[1:]
    output = SDPA(*tensors, **keywords)
    with active():
        ours_after_torchs = torch.autograd.grad(output.sin().sum(), tensors)
        output = SDPA(*tensors, **keywords)
    torchs_after_ours = torch.autograd.grad(output.sin().sum(), tensors)
    for grads in (ours_after_torchs, torchs_after_ours):
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_what_torchs_flash_attention_does_not_take_is_not_changed():
    tensors = qkv()
    bias = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(SDPA(*tensors, bias).sum(), bias)
    with active():
        assert "fastseq::attention" not in operators(lambda: SDPA(*tensors, dropout_p=0.5))
        assert torch.equal(*torch.autograd.grad(SDPA(*tensors, bias).sum(), bias), *expected)


def test_compiled_functions_follow():
    tensors = qkv()
    compiled = torch.compile(SDPA, backend="aot_eager", fullgraph=True)
    expected = results(tensors, compiled, is_causal=True)
    with active():
        ours = results(tensors, compiled, is_causal=True)
        assert "fastseq::attention" in operators(lambda: results(tensors, compiled, is_causal=True))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_explain_tells_of_it():
    tensors = qkv(keys=20)
    with active():
        explanation = fastseq.explain(lambda: results(tensors))
    assert [call.operator for call in explanation] == ["attention", "attention_backward"]
    assert not explanation.replaceable
    assert fastseq.explain(lambda: results(tensors)).replaceable


# ------------------------------------------------------------------------------------ the operators' contract


@pytest.fixture(params=["cpu", pytest.param("twin", marks=pytest.mark.cuda_host)])
def kernels(request):
    if request.param == "cpu":
        yield
    else:
        with in_use(twin_device()):
            yield


def reference(query, key, value, mask=None, scale=None):
    """Output and log-sum-exp, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().nan_to_num(0) @ value, lse


def band(queries, keys, left=None, right=None):
    """Visible keys, with the last query beside the last key."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible &= distance >= -left if left is not None else visible
    return visible & (distance <= right) if right is not None else visible


def check_against(tensors, ours, backward, mask, scale=None):
    """Output and log-sum-exp, and the gradients that the backward operator makes of them."""
    output, lse = reference(*tensors, mask, scale)
    torch.testing.assert_close(ours[0], output, **SAME_FLOAT64)
    torch.testing.assert_close(ours[1], lse, **SAME_FLOAT64)
    incoming = torch.randn_like(output)
    expected = torch.autograd.grad(output, tensors, incoming)
    for a, b in zip(backward(incoming, *ours), expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [5, 9])
def test_operator_on_cuda(kernels, keys, causal):
    tensors = qkv(queries=5, keys=keys, heads=6)
    with torch.no_grad():
        ours = integration._cuda(*tensors, 0.0, causal, scale=0.3)
    output, lse, cum_q, cum_k, max_q, max_k, state, unused, debug = ours
    assert (cum_q, cum_k, max_q, max_k) == (None, None, 5, keys)
    assert (state.dtype, state.shape, unused.shape, debug.shape) == (torch.uint64, (2,), (), (0,))

    def backward(incoming, output, lse):
        with torch.no_grad():
            return integration._cuda_backward(
                incoming, *tensors, output, lse, None, None, 5, keys, 0.0, causal, state, unused, scale=0.3
            )

    mask = band(5, keys, right=0) if causal else None
    check_against(tensors, (output, lse), backward, mask, 0.3)


@pytest.mark.parametrize(
    ("causal", "left", "right"), [(False, None, None), (True, -1, -1), (True, 2, None), (False, 2, 1)]
)
def test_flash_operator_with_windows(kernels, causal, left, right):
    tensors = qkv(queries=5, keys=9, heads=6)
    turned = [x.transpose(1, 2) for x in tensors]
    window = {"window_size_left": left, "window_size_right": right}
    with torch.no_grad():
        output, lse, state, unused, _ = integration._flash(
            *turned, None, None, 5, 9, 0.0, causal, False, **window
        )

    def backward(incoming, output, lse):
        with torch.no_grad():
            grads = integration._flash_backward(
                *(incoming.transpose(1, 2), *turned, output.transpose(1, 2), lse, None, None, 5, 9, 0.0),
                *(causal, state, unused),
                **window,
            )
        return [grad.transpose(1, 2) for grad in grads]

    limits = [None if limit in (None, -1) else limit for limit in (left, 0 if causal else right)]
    check_against(tensors, (output.transpose(1, 2), lse), backward, band(5, 9, *limits))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_operator_of_packed_sequences(kernels, causal):
    """Each is as it is alone; in place too, as varlen_attn calls it without gradients."""
    lengths = ((4, 6), (1, 1), (3, 8))
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True)]
    shapes = ((8, 6, 8), (15, 3, 8), (15, 3, 8))
    packed = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    arguments = (*starts, 4, 8, 0.0, causal)
    output, lse, state, unused, _ = integration._flash(*packed, *arguments, False)
    incoming = torch.randn_like(output)
    grads = integration._flash_backward(incoming, *packed, output, lse, *arguments, state, unused)
    in_place = torch.empty_like(output)
    assert torch.equal(integration._flash_in_place(in_place, *packed, *arguments, False), lse)
    assert torch.equal(in_place, output)
    assert lse.shape == (6, 8)
    for b, (queries, keys) in enumerate(lengths):
        q, k = (slice(int(s[b]), int(s[b + 1])) for s in starts)
        alone = [x[rows].transpose(0, 1)[None] for x, rows in zip(packed, (q, k, k), strict=True)]
        alone = [x.detach().requires_grad_() for x in alone]

        def backward(_, __, ___, q=q, k=k):
            return [g[rows].transpose(0, 1)[None] for g, rows in zip(grads, (q, k, k), strict=True)]

        mask = band(queries, keys, right=0) if causal else None
        expected, expected_lse = reference(*alone, mask)
        torch.testing.assert_close(output[q].transpose(0, 1)[None], expected, **SAME_FLOAT64)
        torch.testing.assert_close(lse[:, q][None], expected_lse, **SAME_FLOAT64)
        given = torch.autograd.grad(expected, alone, incoming[q].transpose(0, 1)[None])
        for a, g in zip(backward(None, None, None), given, strict=True):
            torch.testing.assert_close(a, g, **SAME_FLOAT64)


def test_flash_operator_with_lengths_and_slopes(kernels):
    query, key, value = (x.detach() for x in qkv(queries=1, keys=9))
    lengths, slopes = torch.tensor([9, 4], dtype=torch.int32), torch.tensor([0.5, 0.25, 1.0])
    turned = [x.transpose(1, 2) for x in (query, key, value)]
    output, *_ = integration._flash(
        *turned, None, None, 1, 9, 0.0, False, False, seqused_k=lengths, alibi_slopes=slopes
    )
    for b, length in enumerate(lengths.tolist()):
        scores = query[b] @ key[b, :, :length].mT / math.sqrt(8)
        scores -= slopes.double()[:, None, None] * torch.arange(length).flip(0)
        expected = scores.softmax(-1) @ value[b, :, :length]
        torch.testing.assert_close(output[b].transpose(0, 1), expected, **SAME_FLOAT64)


def test_dropout_is_the_same_in_both_passes(kernels):
    """The output is linear in value: its product with the gradient is that of value with its own."""
    tensors = [x.detach() for x in qkv(queries=16, keys=16)]
    output, lse, *_, state, unused, _ = integration._cuda(*tensors, 0.5)
    again = integration._cuda(*tensors, 0.5)
    assert not torch.equal(again[0], output), "another mask each time"
    assert torch.equal(again[1], lse)
    incoming = torch.randn_like(output)
    *_, of_value = integration._cuda_backward(
        incoming, *tensors, output, lse, None, None, 16, 16, 0.5, False, state, unused
    )
    torch.testing.assert_close((incoming * output).sum(), (of_value * tensors[2]).sum(), **SAME_FLOAT64)


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(5, 8, False), (40, 60, False), (40, 20, True), (20, 40, True), (3, 9, True)],
)
def test_logsumexp_may_be_that_of_more_keys(kernels, queries, keys, causal):
    """As of ring attention: the backward pass of a part of the keys, with the merged output and logsumexp."""
    own = qkv(queries=queries, keys=keys)
    before = [x.detach().requires_grad_() for x in qkv(keys=7)[1:]]
    visible = band(queries, keys, right=0) if causal else torch.ones(queries, keys, dtype=torch.bool)
    visible = torch.cat([torch.ones(queries, 7, dtype=torch.bool), visible], 1)
    merged = [torch.cat(parts, 2) for parts in zip(before, own[1:], strict=True)]
    output, lse = reference(own[0], *merged, visible)
    incoming = torch.randn_like(output)
    of_query, *expected = torch.autograd.grad(output, [*own, *before], incoming)
    state = torch.zeros(2, dtype=torch.int64).view(torch.uint64)
    with torch.no_grad():
        grads = []
        for (key, value), is_causal in ((own[1:], causal), (before, False)):
            rest = (output, lse, None, None, queries, key.shape[2], 0.0, is_causal, state, state[0])
            grads.append(integration._cuda_backward(incoming, own[0], key, value, *rest))
    torch.testing.assert_close(grads[0][0] + grads[1][0], of_query, **SAME_FLOAT64)
    for a, b in zip((*grads[0][1:], *grads[1][1:]), expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_logsumexp_of_packed_sequences_may_be_that_of_more_keys(kernels):
    """Doubled weights, as if every key were there twice and logsumexp larger by log 2."""
    starts = [torch.tensor([0, 4, 5, 30]).int(), torch.tensor([0, 6, 7, 40]).int()]
    query, key, value = (torch.randn(n, 3, 8, dtype=torch.float64) for n in (30, 40, 40))
    arguments = (*starts, 25, 33, 0.0, True)
    output, lse, state, unused, _ = integration._flash(query, key, value, *arguments, False)
    incoming = torch.randn_like(output)
    rest = (*arguments, state, unused)
    whole = integration._flash_backward(incoming, query, key, value, output, lse, *rest)
    halves = integration._flash_backward(incoming, query, key, value, output, lse + math.log(2), *rest)
    for a, b in zip(halves, whole, strict=True):
        torch.testing.assert_close(2 * a, b, **SAME_FLOAT64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [name for kernels in integration.OPERATORS.values() for name in kernels])
def test_results_lie_in_memory_as_torchs_fake_ones(name, transposed):
    """torch.compile relies on it."""
    packed, backward, cpu = "_flash" in name[:6], name.endswith("backward"), "cpu" in name
    x = torch.randn(2, 4, 3, 8) if transposed or packed else torch.randn(2, 3, 4, 8)
    x = x.transpose(1, 2) if transposed else x
    y = x.clone(memory_format=torch.preserve_format)
    queries, heads = (x.shape[1], x.shape[2]) if packed else (x.shape[2], x.shape[1])
    lse = torch.zeros(2, queries, heads).transpose(1, 2) if cpu else torch.zeros(2, heads, queries)
    sizes = (None, None, 4, 4)
    state = [torch.zeros(2, dtype=torch.int64).view(torch.uint64)] * 2
    lead = (x, x, y, y, x, lse) if backward else (x, y, y)
    if "inplace" in name:
        lead = (torch.empty_like(x), *lead)
    options = () if cpu or (not packed and not backward) else sizes
    options = (*options, 0.0, False)
    options += tuple(state) if backward and not cpu else (False,) if packed else ()
    if not packed and not backward and not cpu:
        options = (0.0, False, False)
    arguments = (*lead, *options)
    device = "cpu" if cpu else "cuda"
    ours = integration.OPERATORS[device][name](*arguments)
    to_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    fake = getattr(torch.ops.aten, name).default(*to_meta)
    as_list = [r if isinstance(r, (tuple, list)) else [r] for r in (ours, fake)]
    for a, b in zip(*as_list, strict=True):
        if isinstance(b, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.stride() == b.stride()
        else:
            assert a == b


@pytest.mark.parametrize(
    ("name", "arguments", "keywords"),
    [
        ("return_debug_mask", (None, None, 5, 7, 0.0, False, True), {}),
        ("block_table", (None, None, 5, 7, 0.0, False, False), {"block_table": torch.zeros(1)}),
    ],
)
def test_what_is_not_there_is_refused(name, arguments, keywords):
    tensors = [x.detach().transpose(1, 2) for x in qkv()]
    with pytest.raises(NotImplementedError, match=f"given: {name} for torch's flash attention") as error:
        integration._flash(*tensors, *arguments, **keywords)
    assert len(str(error.value).splitlines()) == 3


def test_operators_on_cuda_are_replaced_where_there_are_kernels(monkeypatch):
    name = "aten::_scaled_dot_product_flash_attention"

    def there():
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")

    before = there()
    monkeypatch.delitem(attention_ops.KERNELS, "cuda", raising=False)
    with active():
        assert there() == before
    monkeypatch.setitem(attention_ops.KERNELS, "cuda", attention_ops.KERNELS["cpu"])
    with active():
        assert there()
    assert there() == before


def test_without_a_registry_the_error_is_clear():
    code = (
        "import torch.nn.attention as attention\n"
        "del attention.register_flash_attention_impl\n"
        "from fastseq.integrations import torch_attention\n"
        "try:\n"
        "    torch_attention.register()\n"
        "except ImportError as error:\n"
        "    assert 'without a registry' in str(error), error\n"
        "    assert len(str(error).splitlines()) == 3\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
