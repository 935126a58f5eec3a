"""torch.func over attention: vmap with every option, per-entry gradients of what is shared, Jacobians."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastseq
from tolerances import SAME_FLOAT64

N, B, H, S, D = 3, 2, 4, 5, 8  # entries, batch, heads, queries and keys, features


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


BOOL = torch.rand(N, B, 1, S, S) > 0.3
# Options, and which of them are of each entry.
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "shared bool mask": {"attn_mask": BOOL[0, :1]},
    "bool mask of each row": {"attn_mask": BOOL[0]},
    "bool mask of each entry": {"attn_mask": BOOL, "each": True},
    "shared float mask": {"attn_mask": randn(1, H, S, S)},
    "float mask of each row": {"attn_mask": randn(B, 1, S, S)},
    "float mask of each entry, broadcast": {"attn_mask": randn(N, 1, H, S, S), "each": True},
    "float mask of each entry": {"attn_mask": randn(N, B, H, 1, S), "each": True},
    "shared lengths": {"key_lengths": torch.tensor([5, 2])},
    "lengths of each entry": {"key_lengths": torch.tensor([[5, 2], [0, 1], [3, 3]]), "each": True},
    "slopes": {"alibi_slopes": torch.rand(H)},
    "slopes of each entry": {"alibi_slopes": torch.rand(N, H), "each": True},
    "shared sinks": {"sinks": randn(H)},
    "sinks of each entry": {"sinks": randn(N, H), "each": True},
    "window and softcap": {"window": (2, 1), "softcap": 5.0},
    "weights": {"return_weights": True, "return_lse": True},
    "mean weights": {"return_weights": True, "average_weights": True},
    "not deterministic": {"deterministic": False},
}


def call_of(options):
    """attention(query, key, value, option): the one with values last, for it may be mapped too."""
    named = {name: x for name, x in options.items() if name != "each"}
    name = next((name for name, x in named.items() if isinstance(x, torch.Tensor)), None)
    value = named.pop(name, None)

    def attention(query, key, value_, option):
        given = named if name is None else {**named, name: option}
        return fastseq.scaled_dot_product_attention(query, key, value_, **given)

    return attention, value, 0 if options.get("each") else None


def loop(function, in_dims, *arguments):
    def entry(x, dim, i):
        return x if dim is None else x.select(dim, i)

    results = [function(*(entry(x, d, i) for x, d in zip(arguments, in_dims, strict=True))) for i in range(N)]
    return tree_map(lambda *x: torch.stack(x), *results)


def assert_same(a, b):
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, **SAME_FLOAT64)


BATCHED = [(name, (B, H, S, D)) for name in OPTIONS]
OF_A_BATCH = ("row", "lengths", "mask of each entry")
UNBATCHED = [(name, (H, S, D)) for name in OPTIONS if not any(word in name for word in OF_A_BATCH)]


@pytest.mark.parametrize(("name", "shape"), BATCHED + UNBATCHED)
def test_vmap_is_a_loop_over_entries(name, shape):
    attention, option, mapped = call_of(OPTIONS[name])
    if len(shape) == 3 and "mask" in name:
        option = option[0]
    in_dims = (0, 0, 0, mapped)
    data = *(randn(N, *shape) for _ in range(3)), option
    assert_same(vmap(attention, in_dims)(*data), loop(attention, in_dims, *data))

    def loss(*arguments):
        return sum(x.sin().sum() for x in tree_leaves(attention(*arguments)))

    has_gradient = option is not None and option.is_floating_point() and "slopes" not in name
    trained = (0, 1, 2, 3) if has_gradient else (0, 1, 2)
    derivative = grad(loss, argnums=trained)
    assert_same(vmap(derivative, in_dims)(*data), loop(derivative, in_dims, *data))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += [str(func)] if func.namespace == "fastseq" else []
        return func(*args, **(kwargs or {}))


def test_entries_are_one_larger_batch_in_one_call():
    q = randn(N, B, H, S, D).requires_grad_()
    with Operators() as operators:
        output = vmap(fastseq.scaled_dot_product_attention)(q, q, q)
        output.sum().backward()
    assert operators.calls == ["fastseq.attention.default", "fastseq.attention_backward.default"]
    larger = fastseq.scaled_dot_product_attention(*[q.flatten(0, 1)] * 3)  # in training too
    assert torch.equal(output.flatten(0, 1), larger)


def test_what_is_shared_may_be_the_keys():
    q, k = randn(2, B, N, H, S, D), randn(B, H, S, D)
    attention = fastseq.scaled_dot_product_attention
    in_dims = ((2, None, None), (0, None, None))
    ours = vmap(vmap(attention, in_dims[1]), (1, None, None))(q.transpose(1, 2), k, k)
    for i in range(N):
        for j in range(2):
            assert_same(ours[i, j], attention(q[j, :, i], k, k))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_dropout_is_drawn_as_vmap_is_told_and_the_same_in_the_backward_pass(randomness, sinks):
    q = randn(1, B, H, S, D).expand(N, B, H, S, D)
    sink = torch.zeros(H, dtype=torch.float64) if sinks else None

    def of_value(value, query, sink):
        return fastseq.scaled_dot_product_attention(query, query, value, dropout_p=0.5, sinks=sink)

    mapped = vmap(of_value, (0, 0, None), randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            mapped(q, q, sink)
        return
    output = mapped(q, q, sink)
    assert torch.equal(output[0], output[1]) == (randomness == "same")

    def both(value, query, sink):  # output is linear in value: <value, gradient> is the sum of output
        def total(value, sink):
            output = of_value(value, query, sink)
            return output.sum(), output

        argnums = (0, 1) if sinks else 0
        gradient, output = grad(total, argnums=argnums, has_aux=True)(value, sink)
        return gradient[0] if sinks else gradient, output

    gradient, output = vmap(both, (0, 0, None), randomness=randomness)(q, q, sink)
    assert_same((gradient * q).flatten(1).sum(1), output.flatten(1).sum(1))
    assert torch.equal(output[0], output[1]) == (randomness == "same")


def test_packed_sequences():
    q, starts = randn(N, 7, H, D), torch.tensor([0, 3, 7])

    def attention(q):
        return fastseq.scaled_dot_product_attention(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts)

    assert_same(vmap(attention)(q), loop(attention, (0,), q))
    derivative = grad(lambda q: attention(q).sin().sum())
    assert_same(vmap(derivative)(q), loop(derivative, (0,), q))


def test_jacobians_are_torchs():
    q = randn(1, 1, 3, 2)
    k = randn(1, 1, 3, 2)

    def attention(q):
        return fastseq.scaled_dot_product_attention(q, k, k)

    assert_same(jacrev(attention)(q), torch.autograd.functional.jacobian(attention, q))
    assert_same(jacrev(attention, chunk_size=1)(q), torch.autograd.functional.jacobian(attention, q))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_has_per_sample_gradients_and_ensembles(need_weights):
    modules = [fastseq.MultiheadAttention(8, 2, batch_first=True).double() for _ in range(N)]
    x, padding = randn(N, B, S, 8), torch.rand(N, B, S) > 0.7

    def loss(parameters, x, padding):
        output, weights = functional_call(
            modules[0], parameters, (x, x, x), {"key_padding_mask": padding, "need_weights": need_weights}
        )
        return output.sin().sum() + (weights.square().sum() if need_weights else 0)

    shared = {name: p.detach() for name, p in modules[0].named_parameters()}
    ours = vmap(grad(loss), (None, 0, 0))(shared, x, padding)
    expected = [grad(loss)(shared, x[i], padding[i]) for i in range(N)]
    assert_same(ours, tree_map(lambda *g: torch.stack(g), *expected))
    stacked = tree_map(torch.Tensor.detach, stack_module_state(modules)[0])
    ours = vmap(grad(loss))(stacked, x, padding)
    expected = [grad(loss)({n: p[i] for n, p in stacked.items()}, x[i], padding[i]) for i in range(N)]
    assert_same(ours, tree_map(lambda *g: torch.stack(g), *expected))


TRAINED_SLOPES = {
    "grad": lambda f, s: grad(f)(s[0]),
    "jvp": lambda f, s: jvp(f, (s[0],), (s[0],)),
    "grad of each": lambda f, s: vmap(grad(f))(s),
    "jvp of each": lambda f, s: vmap(lambda s: jvp(f, (s,), (s,)))(s),
    "jvp of a vmap": lambda f, s: jvp(vmap(f), (s,), (s,)),
}


@pytest.mark.parametrize("transform", TRAINED_SLOPES.values(), ids=list(TRAINED_SLOPES))
def test_slopes_with_a_gradient_at_any_level_are_an_error(transform):
    q, slopes = torch.randn(1, 2, 3, 4), torch.rand(5, 2)
    with pytest.raises(RuntimeError, match="given: alibi_slopes that require a gradient"):
        transform(lambda s: fastseq.scaled_dot_product_attention(q, q, q, alibi_slopes=s).sum(), slopes)


def test_slopes_of_each_entry_are_constants_beside_what_is_differentiated():
    q, slopes = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)

    def along(s, q=q):
        return jvp(lambda q: fastseq.scaled_dot_product_attention(q, q, q, alibi_slopes=s).sum(), (q,), (q,))

    expected = tuple(map(torch.stack, zip(*map(along, slopes), strict=True)))
    torch.testing.assert_close(vmap(along)(slopes), expected)
    ours = jvp(
        lambda q: vmap(lambda s: fastseq.scaled_dot_product_attention(q, q, q, alibi_slopes=s).sum())(slopes),
        (q,),
        (q,),
    )
    torch.testing.assert_close(ours, expected)
