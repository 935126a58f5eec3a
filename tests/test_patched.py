"""fastseq.patched: what is routed, what goes to torch and why, and that all is put back."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import LSTM as NAME_BOUND_BEFORE
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

import fastseq
from fastseq.convert import OURS
from tolerances import SAME_FLOAT32, SAME_FLOAT64

pytestmark = pytest.mark.usefixtures("one_thread")
SDPA = "scaled_dot_product_attention"
TORCHS = {SDPA: F.scaled_dot_product_attention, **{cls: cls.__init__ for cls in OURS}}
SIZES = {
    nn.RNN: (3, 5),
    nn.LSTM: (3, 5),
    nn.GRU: (3, 5),
    nn.RNNCell: (3, 5),
    nn.LSTMCell: (3, 5),
    nn.GRUCell: (3, 5),
    nn.MultiheadAttention: (6, 2),
}


@pytest.fixture(autouse=True)
def all_is_put_back():
    yield
    assert_put_back()


def assert_put_back():
    assert {SDPA: F.scaled_dot_product_attention, **{cls: cls.__init__ for cls in OURS}} == TORCHS


def qkv(*shape, dtype=torch.float64, heads=None):
    shape = shape or (2, 4, 7, 6)
    kv = shape if heads is None else (shape[0], heads, *shape[2:])
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, kv, kv)]


ARGUMENTS = {
    "plain": (qkv, {}),
    "causal": (qkv, {"is_causal": True}),
    "mask": (qkv, {"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril()}),
    "bias": (qkv, {"attn_mask": torch.linspace(-1, 1, 49, dtype=torch.float64).view(7, 7)}),
    "scale": (qkv, {"scale": 0.3}),
    "grouped": (lambda: qkv(heads=2), {"enable_gqa": True}),
    "no heads": (lambda: qkv(7, 6), {}),
    "causal bias": (qkv, {"attn_mask": causal_lower_right(7, 7)}),
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_attention_is_routed_and_is_torchs(arguments):
    make, keywords = ARGUMENTS[arguments]
    tensors = make()
    expected = F.scaled_dot_product_attention(*tensors, **keywords)
    with fastseq.patched() as routed:
        output = F.scaled_dot_product_attention(*tensors, **keywords)
    assert routed.here == {SDPA: 1}
    assert not routed.left
    torch.testing.assert_close(output, expected, **SAME_FLOAT64)
    gradients = [torch.autograd.grad(y.sin().sum(), tensors) for y in (output, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)


def test_fastseqs_kernel_is_called():
    with fastseq.patched():
        (call,) = fastseq.explain(lambda: F.scaled_dot_product_attention(*qkv()))
    assert call.mode == "ATTENTION"


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_new_modules_are_fastseqs_and_as_torch_makes_them(cls):
    torch.manual_seed(3)
    torchs = cls(*SIZES[cls])
    after = torch.rand(1)
    torch.manual_seed(3)
    with fastseq.patched() as routed:
        ours = cls(*SIZES[cls])
    assert torch.equal(torch.rand(1), after), "as many random numbers are drawn"
    assert type(ours) is OURS[cls]
    assert routed.here == {f"torch.nn.{cls.__name__}": 1}
    for name, parameter in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter)
    assert type(cls(*SIZES[cls])) is cls, "outside again"
    assert fastseq.revert(ours).changed


def test_layers_that_torch_builds_have_fastseqs_attention():
    with fastseq.patched():
        layer = nn.TransformerDecoderLayer(8, 2)
        named = NAME_BOUND_BEFORE(3, 5)
    assert type(layer.self_attn) is fastseq.MultiheadAttention
    assert type(layer.multihead_attn) is fastseq.MultiheadAttention
    assert type(named) is fastseq.LSTM


def test_isinstance_and_subclasses_are_torchs_inside():
    existing = nn.LSTM(3, 5)
    with fastseq.patched() as routed:
        assert isinstance(existing, nn.LSTM)

        class Derived(nn.LSTM):
            pass

        derived = Derived(3, 5)
        assert type(fastseq.MultiheadAttention(4, 2)) is fastseq.MultiheadAttention
    assert type(derived) is Derived
    ((name, reason),) = routed.left
    assert name == "torch.nn.LSTM"
    assert "a subclass of torch.nn.LSTM" in reason
    assert derived(torch.ones(2, 1, 3))[0].isfinite().all()


class Loud(torch.Tensor):
    """Sees to torch's functions itself."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += func is TORCHS[SDPA]
        return super().__torch_function__(func, types, args, kwargs or {})


def nested():
    return [torch.nested.nested_tensor([torch.randn(2, 3, 4)] * 2, layout=torch.jagged).transpose(1, 2)] * 3


LEFT = {
    "nested": (nested, "nested tensors"),
    "subclass": (lambda: [x.detach().as_subclass(Loud) for x in qkv()], "a Loud"),
    "dtype": (lambda: [x.detach().to(torch.complex64) for x in qkv()], "query of dtype torch.complex64"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", LEFT)
def test_what_fastseq_cannot_do_goes_to_torch_with_the_reason(what):
    make, reason = LEFT[what]
    tensors, results = make(), []
    for routed in (None, fastseq.patched()):
        try:
            if routed is None:
                results.append(F.scaled_dot_product_attention(*tensors))
            else:
                with routed as report:
                    results.append(F.scaled_dot_product_attention(*tensors))
        except RuntimeError as error:
            results.append(str(error))
    assert not report.here
    ((name, given),) = report.left
    assert name == SDPA
    assert reason in given
    assert f"{SDPA}: 1 to torch, given: " in str(report)
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert results[0].layout == results[1].layout
    if what == "subclass":
        assert Loud.seen == 2


def test_what_fastseq_refuses_torch_has_the_last_word_on():
    query, key, value = qkv()
    with fastseq.patched() as routed, pytest.raises(RuntimeError) as error:
        F.scaled_dot_product_attention(query, key[..., :3], value)
    assert "given: " not in str(error.value), "it is torch's own error"
    (given,) = (reason for _, reason in routed.left)
    assert given.startswith("given: key of shape")


def test_forward_mode_and_vmap_are_right():
    x, t = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 3, 4, 6).double()

    def attend(x):
        return F.scaled_dot_product_attention(x, x.cos(), x.sin())

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = torch.func.jvp(attend, (x,), (t,))
        with fastseq.patched():
            results = torch.func.jvp(attend, (x,), (t,))
            mapped = torch.func.vmap(attend)(x)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME_FLOAT64)
    torch.testing.assert_close(mapped, expected[0], **SAME_FLOAT64)


def test_parameters_under_a_default_device_are_routed():
    query, key, value = (nn.Parameter(x.detach()) for x in qkv())
    with torch.device("cpu"), fastseq.patched() as routed:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert routed.here == {SDPA: 1}
    assert query.grad is not None


def test_autocast_is_torchs():
    tensors = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*tensors)
        with fastseq.patched() as routed:
            output = F.scaled_dot_product_attention(*tensors)
    assert routed.here == {SDPA: 1}
    assert output.dtype == expected.dtype == torch.bfloat16


def test_nests_and_counts_for_each():
    with fastseq.patched() as outer:
        with fastseq.patched() as inner:
            F.scaled_dot_product_attention(*qkv())
        F.scaled_dot_product_attention(*qkv())
    assert inner.here == {SDPA: 1}
    assert outer.here == {SDPA: 2}
    assert str(outer) == f"{SDPA}: 2 to fastseq"


def test_one_object_can_be_entered_again():
    patched = fastseq.patched()
    with patched, patched:
        assert F.scaled_dot_product_attention is not TORCHS[SDPA]
    with patched as routed:
        pass
    assert str(routed) == "nothing was routed"


def test_an_exception_leaves_it():
    with pytest.raises(KeyError), fastseq.patched(), fastseq.patched():
        raise KeyError
    assert_put_back()


def test_decorates_a_function():
    seen = []

    @fastseq.patched()
    def attend(n):
        seen.append(F.scaled_dot_product_attention is TORCHS[SDPA])
        return n if n == 0 else attend(n - 1)

    attend(2)
    assert seen == [False, False, False]
    assert attend.__name__ == "attend"


def _generator():
    yield


async def _coroutine():
    pass


async def _asynchronous_generator():
    yield


@pytest.mark.parametrize("function", [_generator, _coroutine, _asynchronous_generator, partial(_generator)])
def test_decorates_no_function_whose_body_runs_later(function):
    """It would run outside, and nothing would tell."""
    with pytest.raises(TypeError, match=r"given: @patched\(\) of a generator .*\naccepted: .*\ntry: "):
        fastseq.patched()(function)


def test_leaving_without_entering_is_an_error():
    with pytest.raises(RuntimeError, match=r"given: .*not entered\naccepted: .*\ntry: "):
        fastseq.patched().__exit__(None, None, None)


def test_threads_enter_and_leave_in_any_order():
    """The one that entered first leaves first; what is left of the other's time is routed."""
    first_left, both_in = threading.Event(), threading.Barrier(2)
    seen = []

    def first():
        with fastseq.patched():
            both_in.wait()
        first_left.set()

    def second():
        with fastseq.patched() as routed:
            both_in.wait()
            first_left.wait()
            F.scaled_dot_product_attention(*qkv())
            seen.append(routed.here[SDPA])

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]
    assert_put_back()


def test_many_threads_lose_no_count():
    tensors = [x.detach() for x in qkv(1, 1, 2, 2)]

    def work():
        for _ in range(50):
            with fastseq.patched():
                F.scaled_dot_product_attention(*tensors)

    with fastseq.patched() as routed:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert F.scaled_dot_product_attention is not TORCHS[SDPA]
    assert routed.here == {SDPA: 200}


def test_a_name_bound_inside_is_torchs_again_outside():
    with fastseq.patched() as routed:
        name = F.scaled_dot_product_attention
    tensors = qkv()
    assert torch.equal(name(*tensors), F.scaled_dot_product_attention(*tensors))
    assert not routed.here


def test_somebody_elses_replacement_stays(monkeypatch):
    with fastseq.patched():
        ours = F.scaled_dot_product_attention
        monkeypatch.setattr(F, SDPA, lambda *args: ours(*args))
    tensors = qkv()
    output = F.scaled_dot_product_attention(*tensors)
    monkeypatch.undo()
    F.scaled_dot_product_attention = TORCHS[SDPA]
    assert torch.equal(output, F.scaled_dot_product_attention(*tensors))


def test_recomputation_in_a_backward_pass_inside_is_routed():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    (expected,) = torch.autograd.grad(attend(x).sin().sum(), x)
    with fastseq.patched() as routed, torch.utils.checkpoint.set_checkpoint_early_stop(False):
        output = torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False)
        (grad,) = torch.autograd.grad(output.sin().sum(), x)
    assert routed.here == {SDPA: 2}
    torch.testing.assert_close(grad, expected, **SAME_FLOAT64)


def test_torch_compile_inside_and_outside():
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) * 2

    def operators(function, x):
        with torch.profiler.profile() as profile:
            output = function(x)
        return output, {event.name for event in profile.events()}

    x = torch.randn(2, 3, 5, 4)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected, outside = operators(compiled, x)
    with fastseq.patched():
        output, inside = operators(compiled, x)
    again, after = operators(compiled, x)
    assert "fastseq::attention" in inside
    assert "fastseq::attention" not in outside | after
    torch.testing.assert_close(output, expected, **SAME_FLOAT32)
    assert torch.equal(again, expected)
