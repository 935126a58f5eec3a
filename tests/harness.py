"""Cases, and how to run one through fastseq, through torch and through the float64 reference.

Modules and data are made on the CPU, and results come back to it; `where`, "cpu" or "cuda", says on which
device the module runs.
"""

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
import reference
from tolerances import assert_as_accurate_as_torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A module and the data that it gets; the parameters have torch.nn's names."""

    mode: str = "LSTM"
    dtype: torch.dtype = torch.float32
    steps: int = 5
    batch: int = 3
    input_size: int = 4
    hidden_size: int = 7
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    packed: str = ""  # "sorted" or "unsorted"
    states: bool = True  # whether initial states are given
    batched: bool = True

    def __str__(self):
        def word(field):
            value = getattr(self, field.name)
            return str(value).removeprefix("torch.") if value is not True else field.name

        special = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        shape = {"steps": "T", "batch": "B", "input_size": "I", "hidden_size": "H", "num_layers": "L"}
        shape |= {"proj_size": "P", "bias": "bias", "states": "states", "batched": "batched"}
        return "-".join([self.mode] + [shape.get(f.name, "") + word(f) for f in special if f.name != "mode"])

    @property
    def width(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def lengths(self) -> Tensor | None:
        """Of each row of a packed case: as different as they can be, the longest T, the shortest 1."""
        if not self.packed:
            return None
        lengths = torch.linspace(self.steps, 1, self.batch).round().long()
        return lengths if self.packed == "sorted" else lengths.roll(1)


def module_class(library, mode: str):
    """The class of `library` (fastseq, torch.nn) for a mode, and the arguments that select the mode."""
    if mode.startswith("RNN"):
        return library.RNN, {"nonlinearity": mode[4:].lower()}
    if mode == "GRU_RESET_BEFORE":
        return library.GRU, {"reset_after": False}
    return getattr(library, mode), {}


def cell_class(library, mode: str):
    module, arguments = module_class(library, mode)
    return getattr(library, module.__name__ + "Cell"), arguments


def make_module(case: Case, library=fastseq, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    cls, arguments = module_class(library, case.mode)
    if case.proj_size:
        arguments["proj_size"] = case.proj_size
    module = cls(
        max(1, case.input_size),
        case.hidden_size,
        case.num_layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.bidirectional,
        **arguments,
    ).to(case.dtype)
    if case.input_size == 0:
        take_input_features_away(module)
    return keep_relu_off_its_kink(module, case.mode)


def take_input_features_away(module: nn.Module):
    """torch.nn's layers run without input features, but their constructors refuse to make such a layer."""
    module.input_size = 0
    for name, weight in list(module.named_parameters()):
        if name.startswith("weight_ih_l0"):
            setattr(module, name, nn.Parameter(weight.detach()[:, :0].clone()))


def keep_relu_off_its_kink(module: nn.Module, mode: str) -> nn.Module:
    """The derivative of relu jumps at 0, where rounding would decide what is right.

    So every other unit gets weights above 0 only and the rest weights below 0 only; with data above 0 no
    pre-activation is near 0. The recurrent weights are made small, or the states would grow without bound.
    """
    if mode == "RNN_RELU":
        with torch.no_grad():
            for name, weight in module.named_parameters():
                weight.abs_().mul_(0.25 if "weight_hh" in name else 1)[1::2].neg_()
    return module


def make_data(case: Case, seed=1) -> dict[str, Tensor]:
    """input, and h0 and c0 if the case has states, in the layout in which the module expects them."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        values = torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)
        return (values.abs() if case.mode == "RNN_RELU" else values).requires_grad_()

    def unbatch(*shape, dim):
        return shape if case.batched else shape[:dim] + shape[dim + 1 :]

    if case.batch_first and case.batched:
        data = {"input": randn(case.batch, case.steps, case.input_size)}
    else:
        data = {"input": randn(*unbatch(case.steps, case.batch, case.input_size, dim=1))}
    if case.states:
        layers = case.num_layers * case.directions
        data["h0"] = randn(*unbatch(layers, case.batch, case.width, dim=1))
        if case.mode == "LSTM":
            data["c0"] = randn(*unbatch(layers, case.batch, case.hidden_size, dim=1))
    return data


def states_of(data: dict[str, Tensor]):
    if "h0" not in data:
        return None
    return (data["h0"], data["c0"]) if "c0" in data else data["h0"]


def named_outputs(output: Tensor, hidden) -> dict[str, Tensor]:
    if isinstance(hidden, tuple):
        return {"output": output, "h_n": hidden[0], "c_n": hidden[1]}
    return {"output": output, "h_n": hidden}


def call_module(case: Case, module: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name; the output of a packed case is padded again."""
    input = data["input"]
    if case.packed:
        input = pack_padded_sequence(
            input, case.lengths(), case.batch_first, enforce_sorted=case.packed == "sorted"
        )
    output, hidden = module(input, states_of(data))
    if case.packed:
        assert torch.equal(output.batch_sizes, input.batch_sizes)
        output, lengths = pad_packed_sequence(output, case.batch_first)
        assert torch.equal(lengths, case.lengths())
    return named_outputs(output, hidden)


def call_reference(case: Case, parameters: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """What call_module returns, by the equations, in whatever dtype the tensors have."""
    input = data["input"]
    input = input if case.batched else input.unsqueeze(1)
    if case.batch_first and case.batched:
        input = input.transpose(0, 1)
    layers = case.num_layers * case.directions
    h0, c0 = data.get("h0"), data.get("c0")
    if h0 is None:
        h0 = input.new_zeros(layers, input.size(1), case.width)
        c0 = input.new_zeros(layers, input.size(1), case.hidden_size)
    elif not case.batched:
        h0, c0 = h0.unsqueeze(1), None if c0 is None else c0.unsqueeze(1)
    output, h_n, c_n = reference.recurrent(
        case.mode,
        input,
        h0,
        c0 if case.mode == "LSTM" else None,
        reference.layers_of(parameters, case.num_layers, case.bidirectional),
        case.lengths() if not case.packed else case.lengths().to(input.device),
    )
    if not case.batched:
        output, h_n, c_n = (x if x is None else x.squeeze(1) for x in (output, h_n, c_n))
    elif case.batch_first:
        output = output.transpose(0, 1)
    return named_outputs(output, h_n if c_n is None else (h_n, c_n))


def with_gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor], dtype, seed=2) -> dict[str, Tensor]:
    """The outputs and, under random gradients of all of them, the gradient of every leaf that wants one."""
    g = torch.Generator().manual_seed(seed)
    incoming = [
        torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype).to(x.device, x.dtype)
        for x in outputs.values()
    ]
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    outgoing, wanted = list(outputs.values()), list(leaves.values())
    gradients = torch.autograd.grad(outgoing, wanted, incoming) if wanted else []
    results = {name: x.detach().cpu() for name, x in outputs.items()}
    results.update({f"grad of {name}": x.cpu() for name, x in zip(leaves, gradients, strict=True)})
    return results


def as_leaves(tensors: dict[str, Tensor], dtype=None, where="cpu") -> dict[str, Tensor]:
    return {
        name: x.detach().to(where, dtype or x.dtype).requires_grad_(x.requires_grad)
        for name, x in tensors.items()
    }


def move(module: nn.Module, data: dict[str, Tensor], where: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Copies of both on another device; on the CPU they stay what they are."""
    return (module, data) if where == "cpu" else (deepcopy(module).to(where), as_leaves(data, where=where))


def run_module(case: Case, module: nn.Module, data: dict[str, Tensor], where="cpu") -> dict[str, Tensor]:
    module, data = move(module, data, where)
    parameters = dict(module.named_parameters())
    return with_gradients(call_module(case, module, data), {**data, **parameters}, case.dtype)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_reference(case: Case, parameters, data, dtype=torch.float64, where="cpu") -> dict[str, Tensor]:
    parameters, data = as_leaves(parameters, dtype, where), as_leaves(data, dtype, where)
    with threads(1):  # torch's threads fight over small work when the machine is busy
        return with_gradients(call_reference(case, parameters, data), {**data, **parameters}, case.dtype)


def run_torch(case: Case, parameters, data, where="cpu") -> dict[str, Tensor]:
    """torch.nn's numbers; where torch has no such module or kernel, torch's operations in this dtype."""
    if case.mode != "GRU_RESET_BEFORE":
        module = make_module(case, nn)
        module.load_state_dict(parameters)
        try:
            with threads(1):
                return run_module(case, module, as_leaves(data), where)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("not implemented", "unsupported", "not support")):
                raise
    return run_reference(case, parameters, data, case.dtype, where)


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits after the leading one, to nearest, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class ProductsInTf32(TorchDispatchMode):
    """Matrix products of float32 on the CPU as tensor cores make them: all, or those with `weights`."""

    def __init__(self, weights=None):
        super().__init__()
        self.weights = None if weights is None else {w.untyped_storage().data_ptr() for w in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func not in (aten.addmm.default, aten.mv.default), f"{func} is not rounded"
        assert func is not aten.bmm.default or self.weights is None, f"{func} is not rounded"
        if func in (aten.mm.default, aten.bmm.default) and (
            self.weights is None or any(x.untyped_storage().data_ptr() in self.weights for x in args)
        ):
            args = [round_to_tf32(x) for x in args]
        return func(*args, **(kwargs or {}))


def products_in_tf32(parameters: dict[str, Tensor], where="cpu") -> ProductsInTf32:
    """As CUDA kernels with tf32 make them. Beside their host twin it is torch on the CPU that multiplies all
    steps at once, and it rounds nothing; so there only products with weights of the time loop are rounded."""
    loop = [x for name, x in parameters.items() if "weight_hh" in name or "weight_hr" in name]
    return ProductsInTf32(None if where == "cuda" else loop)


def run_torch_in_tf32(case: Case, parameters, data, where="cpu") -> dict[str, Tensor]:
    with products_in_tf32(parameters, where):
        return run_reference(case, parameters, data, torch.float32)


def assert_all_as_accurate_as_torch(ours, torchs, exact, dtype, what=""):
    """`what`, such as " with another plan", is added to the names in messages."""
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_as_accurate_as_torch(ours[name], torchs[name], exact[name], dtype, name + what)


def check(case: Case, module: nn.Module | None = None, data: dict[str, Tensor] | None = None):
    """Forward results and all gradients of a fastseq module against the float64 reference."""
    module = module or make_module(case)
    data = data or make_data(case)
    parameters = dict(module.named_parameters())
    ours = run_module(case, module, data)
    exact = run_reference(case, parameters, data)
    assert_all_as_accurate_as_torch(ours, run_torch(case, parameters, data), exact, case.dtype)


def same_bits(a, b) -> bool:
    """Equal as bits: NaNs count as equal, and 0 and -0 do not."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor], what=""):
    assert a.keys() == b.keys()
    different = [name for name in a if not same_bits(a[name], b[name])]
    assert not different, f"other bits in {different}{what}"
