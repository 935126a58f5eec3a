"""torch's own inputs, those of its test suite that come with it, through fastseq in the place of torch.nn.

For every sample of torch.testing._internal's databases of modules and operators: the same results and
gradients, also of inputs that do not lie dense in memory, and an error wherever torch raises one.
"""

import copy
import io
import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastseq
from harness import assert_same_bits
from tolerances import FLOOR_ULPS, SAME_FLOAT64, TIMES_TORCH, largest

# torch's suite forbids its process to set flags as torch.backends.cudnn.allow_tf32, which other tests do.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
    from torch.testing._internal.common_utils import noncontiguous_like

OURS = {
    cls: getattr(fastseq, cls.__name__)
    for cls in (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.MultiheadAttention)
}
# Modules around attention, which torch makes of the name in its own file.
AROUND = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.Transformer)
MODULES = {info.module_cls.__name__: info for info in module_db if info.module_cls in (*OURS, *AROUND)}
LAYERS = [name for name in MODULES if getattr(nn, name) in OURS]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning"),
]


def samples(name, dtype, training=False):
    torch.manual_seed(1)
    info, packed = MODULES[name], {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training, **packed
    )


def make(name, arguments, library, monkeypatch, dtype=None, training=False):
    """The module from the same seed, without dropout, of which the random numbers are others."""
    cls, (args, kwargs) = getattr(nn, name), copy.deepcopy((arguments.args, arguments.kwargs))
    torch.manual_seed(2)
    if library is nn:
        module = cls(*args, **kwargs)
    elif cls in OURS:
        module = OURS[cls](*args, **kwargs)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(nn.modules.transformer, "MultiheadAttention", fastseq.MultiheadAttention)
            module = cls(*args, **kwargs)
        for part in list(module.modules()):  # of layers that were given, and made before
            for child, attention in list(part.named_children()):
                if type(attention) is nn.MultiheadAttention:
                    setattr(part, child, like(attention))
    for part in module.modules():
        if isinstance(part, (nn.Dropout, nn.MultiheadAttention)):
            part.p = part.dropout = 0.0
    return module.to(dtype).train(training)


def like(theirs):
    bias = theirs.in_proj_bias is not None
    sizes = theirs.embed_dim, theirs.num_heads
    dtype = theirs.out_proj.weight.dtype
    ours = fastseq.MultiheadAttention(*sizes, bias=bias, batch_first=theirs.batch_first, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours


def tensors_in(tree):
    """Also those in a PackedSequence, which is a tuple."""
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def of_dtype(tree, dtype, change=lambda x: x):
    """Copies, the floating ones as leaves of a dtype."""

    def copied(x):
        if not x.is_floating_point():
            return x.clone()
        return change(x.detach().to(dtype, copy=True)).requires_grad_(x.requires_grad)

    return pytree.tree_map_only(Tensor, copied, tree)


def results(call, given, parameters=()):
    """What a call returns, with the gradients of all leaves; or the error that it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = [x for x in tensors_in(call(given)) if x.is_floating_point()]
    except Exception as error:
        return error
    leaves = [x for x in (*tensors_in(given), *parameters) if x.requires_grad]
    differentiable = [x for x in outputs if x.requires_grad]
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if differentiable and leaves:
        g = torch.Generator().manual_seed(3)
        incoming = [
            torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in differentiable
        ]
        grads = torch.autograd.grad(differentiable, leaves, incoming, allow_unused=True)
        found |= {f"gradient {i}": grad for i, grad in enumerate(grads) if grad is not None}
    return found


def run_module(module, given):
    return results(lambda x: module(*x[0], **x[1]), given, module.parameters())


class Errors:
    """Of all samples together: one tensor of three numbers says little of how exact a method is."""

    def __init__(self, dtype):
        self.dtype, self.ours, self.theirs = dtype, [], []

    def add(self, ours, theirs, exact, what):
        """Where torch raises we raise. Else the same in float64, or errors relative to what is largest."""
        if isinstance(theirs, Exception):
            assert isinstance(ours, Exception), f"{what}: torch raises {theirs!r}"
            return
        assert not isinstance(ours, Exception), f"{what}: {ours!r}"
        assert ours.keys() == theirs.keys(), what
        for kind in ("output", "gradient"):
            names = [name for name in theirs if name.startswith(kind)]
            # Where torch has NaN, as of rows of attention that see nothing, we need not.
            seen = {name: ~theirs[name].isnan() for name in names}
            size = max((largest(exact[name][seen[name]]) for name in names), default=0.0)
            for name in names:
                x, y, z = (of[name][seen[name]].double() for of in (ours, theirs, exact))
                assert ours[name].dtype is theirs[name].dtype
                if self.dtype is torch.float64:
                    scale = max(size, 1.0)
                    torch.testing.assert_close(
                        x / scale, y / scale, **SAME_FLOAT64, msg=lambda m, n=name: f"{what}, {n}: {m}"
                    )
                elif size:
                    self.ours.append(largest(x - z) / size)
                    self.theirs.append(largest(y - z) / size)

    def check(self):
        if self.dtype is torch.float64:
            return
        ours, theirs = (torch.tensor(e, dtype=torch.float64) for e in (self.ours, self.theirs))
        assert len(ours)
        floor = FLOOR_ULPS[self.dtype] * torch.finfo(self.dtype).eps
        rms = [e.square().mean().sqrt().item() for e in (ours, theirs)]
        assert rms[0] <= TIMES_TORCH * rms[1] + floor, f"error {rms[0]:.3g}, torch's own {rms[1]:.3g}"
        # And no sample by itself is much worse than the worst of torch's.
        assert ours.max() <= TIMES_TORCH * theirs.max() + floor


# ---------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module_samples_give_torchs_results_and_gradients(monkeypatch, name, dtype, training):
    errors = Errors(dtype)
    for i, sample in enumerate(samples(name, torch.float64, training)):
        given = (sample.forward_input.args, sample.forward_input.kwargs)
        results_of = [
            run_module(
                make(name, sample.constructor_input, library, monkeypatch, as_dtype, training),
                of_dtype(of_dtype(given, dtype), as_dtype),
            )
            for library, as_dtype in ((fastseq, dtype), (nn, dtype))
        ]
        exact = make(name, sample.constructor_input, nn, monkeypatch, dtype, training).double()
        results_of.append(run_module(exact, of_dtype(of_dtype(given, dtype), torch.float64)))
        errors.add(*results_of, f"sample {i} of {name}, {sample.constructor_input.kwargs}")
    errors.check()


@pytest.mark.parametrize("name", MODULES)
def test_inputs_that_do_not_lie_dense_change_nothing(monkeypatch, name):
    for i, sample in enumerate(samples(name, torch.float64)):
        given = (sample.forward_input.args, sample.forward_input.kwargs)
        module = make(name, sample.constructor_input, fastseq, monkeypatch, torch.float64)
        dense = run_module(module, of_dtype(given, torch.float64))
        strided = of_dtype(given, torch.float64, noncontiguous_like)
        assert any(not x.is_contiguous() for x in tensors_in(strided)), i
        for key, x in run_module(module, strided).items():
            torch.testing.assert_close(x, dense[key], **SAME_FLOAT64)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_pickles_moves_and_frozen_parameters(monkeypatch, name):
    """What torch's suite asks of every module."""
    done = set()
    for sample in samples(name, torch.float32):
        kind = str(sample.constructor_input.kwargs) + str(sample.constructor_input.args)
        if kind in done:
            continue
        done.add(kind)
        module = make(name, sample.constructor_input, fastseq, monkeypatch)
        given = (sample.forward_input.args, sample.forward_input.kwargs)
        expected = run_module(module, of_dtype(given, torch.float32))
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        empty = module.to("meta").to_empty(device="cpu")
        state = make(name, sample.constructor_input, fastseq, monkeypatch).state_dict()
        empty.load_state_dict(state)
        twins = {
            "copy": copy.deepcopy(empty),
            "pickle": pickle.loads(pickle.dumps(empty)),
            "file": torch.load(file, weights_only=False),
            "from meta": empty,
            "to float64 and back": copy.deepcopy(empty).double().float(),
            "shared memory": copy.deepcopy(empty).share_memory(),
            "applied": copy.deepcopy(empty).apply(lambda m: None),
        }
        for how, twin in twins.items():
            assert_same_bits(run_module(twin, of_dtype(given, torch.float32)), expected, how)
        frozen = copy.deepcopy(empty).requires_grad_(False)
        outputs = run_module(frozen, of_dtype(given, torch.float32))
        assert all(torch.equal(x, expected[key]) for key, x in outputs.items() if key.startswith("output"))


def error_samples():
    for name in LAYERS:
        info = MODULES[name]
        if info.module_error_inputs_func is None:
            continue
        for training in (True, False):
            found = info.module_error_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
            )
            for i, error in enumerate(found):
                yield pytest.param(name, error, id=f"{name}-{training}-{i}")


@pytest.mark.parametrize(("name", "error"), list(error_samples()))
def test_module_error_samples_raise_torchs_errors(monkeypatch, name, error):
    sample = error.module_error_input
    if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            make(name, sample.constructor_input, fastseq, monkeypatch)
        return
    module = make(name, sample.constructor_input, fastseq, monkeypatch)
    with pytest.raises(error.error_type):
        module(*sample.forward_input.args, **sample.forward_input.kwargs)


# -------------------------------------------------------------------------------------------------- operators

ATTENTION = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def attention_samples(dtype):
    """Without dropout, of which the random numbers are others."""
    torch.manual_seed(1)
    for sample in ATTENTION.reference_inputs("cpu", dtype, requires_grad=True):
        keywords = dict(sample.kwargs)
        if keywords.pop("dropout_p", 0.0) == 0.0:
            yield (sample.input, *sample.args), keywords


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_samples_give_torchs_results_and_gradients(dtype, layout):
    change = noncontiguous_like if layout == "strided" else lambda x: x
    assert dtype in ATTENTION.dtypes
    errors = Errors(dtype)
    for i, given in enumerate(attention_samples(torch.float64)):
        rounded = of_dtype(given, dtype)
        found = [
            results(lambda x, f=f: f(*x[0], **x[1]), of_dtype(rounded, as_dtype, change))
            for f, as_dtype in (
                (fastseq.scaled_dot_product_attention, dtype),
                (F.scaled_dot_product_attention, dtype),
                (F.scaled_dot_product_attention, torch.float64),
            )
        ]
        errors.add(*found, f"sample {i}")
    errors.check()


def wrong_attention():
    """One thing wrong with each sample: a dtype, features or rows, a mask, dropout out of bounds."""
    for (query, key, value), keywords in attention_samples(torch.float32):
        wrong_mask = torch.ones(query.shape[-2] + 1, key.shape[-2], dtype=torch.bool)
        yield (query.double(), key, value), keywords
        yield (query, key[..., :-1], value), keywords
        yield (query, key, value[..., :-1, :]), keywords
        yield (query, key, value), keywords | {"attn_mask": wrong_mask, "is_causal": False}
        yield (query, key, value), keywords | {"attn_mask": wrong_mask.long(), "is_causal": False}
        yield (query, key, value), keywords | {"dropout_p": 1.5}
        yield (query, key, value), keywords | {"dropout_p": -0.5}
        yield (query.long(), key.long(), value.long()), keywords
        yield (query.flatten()[0], key, value), keywords


def test_where_torchs_attention_raises_ours_does():
    raised = 0
    for arguments, keywords in wrong_attention():
        try:
            F.scaled_dot_product_attention(*arguments, **keywords)
        except Exception:
            raised += 1
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                fastseq.scaled_dot_product_attention(*arguments, **keywords)
    assert raised > 50
