"""fastseq.explain of forward mode and second derivatives: the operators over dual numbers."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

import fastseq
from fastseq import _C, attention_units


def q_k_v(*shape):
    return [torch.randn(shape) for _ in range(3)]


def along(function, *tensors):
    """A call in forward mode."""
    return lambda: torch.func.jvp(function, tensors, tuple(map(torch.randn_like, tensors)))


def twice(function, *tensors):
    """A call and its second derivative."""

    def call():
        leaves = [x.clone().requires_grad_() for x in tensors]
        grads = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()

    return call


def test_attention_in_forward_mode_is_reported_with_its_sizes():
    q, k, v = q_k_v(2, 4, 50, 16)
    (call,) = fastseq.explain(along(fastseq.scaled_dot_product_attention, q, k, v))
    assert call.operator == "attention_dual"
    assert (call.layer.queries, call.layer.keys, call.plan.kernel) == (50, 50, "tiles")
    assert call.plan.partition["key_parts"] == 1
    assert (call.backward, call.saved) == (None, {})
    assert str(call).startswith("attention along a direction, float32 on cpu, B 2, heads 4, Sq 50")


def test_second_derivatives_of_attention_are_reported_after_the_first_ones():
    calls = fastseq.explain(twice(fastseq.scaled_dot_product_attention, *q_k_v(2, 4, 50, 16)))
    names = [call.operator for call in calls]
    assert names[:2] == ["attention", "attention_backward"]
    second = calls[names.index("attention_dual_backward")]
    assert names.index("attention_dual") < names.index("attention_dual_backward")
    assert str(second).startswith("the gradients of attention along a direction, ")
    assert "  backward  tiles" in str(second)


def test_weights_of_attention_are_said_to_have_no_kernel_of_second_derivatives():
    def weights(q, k, v):
        return fastseq.scaled_dot_product_attention(q, k, v, return_weights=True)[1]

    calls = fastseq.explain(twice(weights, *q_k_v(2, 4, 6, 8)))
    along_a_direction = [call for call in calls if "dual" in call.operator]
    assert len(along_a_direction) == 2
    for call in along_a_direction:
        assert call.plan.kernel == "blocks"
        assert call.plan.partition == {"batch": 2, "kv_heads": 4, "rows": 6}
        assert "weights" in call.plan.reasons[0]


@pytest.mark.parametrize("sizes", [(3, 4, 20, 8), (1, 1, 700, 8), (40, 8, 300, 4)])
def test_blocks_are_those_that_run(monkeypatch, sizes):
    ran = []
    make = attention_units.Unit.__init__

    def record(unit, s, batch, kv_heads, group, rows, careful):
        ran.append((batch.stop - batch.start, kv_heads.stop - kv_heads.start, rows))
        make(unit, s, batch, kv_heads, group, rows, careful)

    monkeypatch.setattr(attention_units.Unit, "__init__", record)

    def with_weights(q, k, v):
        return fastseq.scaled_dot_product_attention(q, k, v, return_weights=True)[1]

    (call,) = fastseq.explain(along(with_weights, *q_k_v(*sizes)))
    assert max(ran) == tuple(call.plan.partition.values())


# ---- recurrent networks ----


def input_along(module, input):
    """A call in forward mode along its input."""

    def call():
        with torch.no_grad(), forward_ad.dual_level():
            module(forward_ad.make_dual(input, torch.ones_like(input)))

    return call


def weights_along(module, input):
    """A call in forward mode along its weights."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return lambda: jvp(lambda w: functional_call(module, w, (input,))[0], (weights,), (weights,))


def penalty(module, input):
    """A gradient penalty, whose derivative is a second one."""

    def call():
        x = input.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        grad.square().sum().backward()

    return call


LAYER = {"LSTM": fastseq.LSTM, "GRU": fastseq.GRU, "RNN_TANH": fastseq.RNN}


@pytest.mark.parametrize("mode", LAYER)
def test_a_layer_in_forward_mode_is_reported_with_its_sizes(mode, two_threads):
    module = LAYER[mode](4, 32, num_layers=2)
    first, second = fastseq.explain(input_along(module, torch.randn(9, 3, 4)))
    for call, name in ((first, "module.weight_hh_l0"), (second, "module.weight_hh_l1")):
        assert (call.operator, call.mode, call.weight) == ("recurrent_dual", mode, name)
        assert (call.plan.kernel, call.plan.architecture) == ("sequence", _C.cpu_info()["isa"])
        assert (call.backward, call.saved) == (None, {})
    assert str(first).startswith(f"{mode} along a direction, float32 on cpu, T 9, B 3, I 4, H 32")
    cell, dtype = _C.CELLS[mode]["code"], _C.DTYPES["float32"]
    cut = _C.recurrent_plan(cell, dtype, 2, 9, 3, 4, 32, 0, 1, False, 2)
    assert first.plan.partition == cut


def test_second_derivatives_of_a_layer_are_reported_after_the_first_ones():
    calls = fastseq.explain(penalty(fastseq.LSTM(4, 8, truncate=6), torch.randn(9, 3, 4)))
    names = [call.operator for call in calls]
    assert names == ["recurrent", "recurrent_backward", "recurrent_tangents", "recurrent_dual_backward"]
    *_, along, gradients = calls
    assert along.options == gradients.options == ("truncate 6",)
    assert str(along).startswith("LSTM along a direction, ")
    assert str(gradients).startswith("the gradients of LSTM along a direction, ")


@pytest.mark.cuda_host
def test_steps_over_dual_numbers_are_reported_with_what_is_saved(twin):
    module, x = fastseq.LSTM(4, 8), torch.randn(9, 3, 4)
    *_, along, gradients = fastseq.explain(penalty(module, x))
    assert [along.operator, gradients.operator] == ["recurrent_dual", "recurrent_dual_backward"]
    gates, a_state = 9 * 3 * 5 * 8 * 4, 9 * 3 * 8 * 4
    kept = {"input": x.nbytes, "tangent of input": x.nbytes, "gates": gates, "tangent of gates": gates}
    kept |= {"output": a_state, "tangent of output": a_state}
    assert along.saved == kept | {"weights": sum(p.nbytes for p in module.parameters())}
    assert along.backward.partition == gradients.plan.partition


@pytest.mark.cuda_host
def test_steps_over_dual_numbers_are_said_to_be_steps(twin):
    module, x = fastseq.GRU(4, 8, bidirectional=True), torch.randn(9, 3, 4)
    for call, planes, words in (
        (input_along(module, x), 2, "of numbers and tangents, and a kernel"),
        (weights_along(module, x), 3, "with the weight's tangent"),
    ):
        (told,) = fastseq.explain(call)
        assert (told.plan.kernel, told.plan.partition) == ("steps", {"planes": planes})
        assert told.plan.architecture == "compute capability 9.0"
        assert words in told.plan.words[0]
        assert "a loop in Python" in told.plan.reasons[0]
