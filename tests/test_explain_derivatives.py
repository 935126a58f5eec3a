"""fastseq.explain of forward mode and second derivatives: the operators over dual numbers."""

import pytest
import torch

import fastseq
from fastseq import attention_dual_ops


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
        assert "weights that are returned" in call.plan.reasons[0]


@pytest.mark.parametrize("sizes", [(3, 4, 20, 8), (1, 1, 700, 8), (40, 8, 300, 4)])
def test_blocks_are_those_that_run(monkeypatch, sizes):
    from fastseq import attention_units

    ran = []
    make = attention_units.Unit.__init__

    def record(unit, s, batch, kv_heads, group, rows, careful):
        ran.append((batch.stop - batch.start, kv_heads.stop - kv_heads.start, rows))
        make(unit, s, batch, kv_heads, group, rows, careful)

    monkeypatch.setattr(attention_units.Unit, "__init__", record)
    monkeypatch.setitem(attention_dual_ops.KERNELS, "cpu", attention_dual_ops.in_blocks(True))
    (call,) = fastseq.explain(along(fastseq.scaled_dot_product_attention, *q_k_v(*sizes)))
    assert max(ran) == tuple(call.plan.partition.values())
