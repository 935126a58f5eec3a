"""convert() makes torch.nn's modules in a model fastseq's, and revert() makes them torch.nn's again.

A module keeps its identity and everything that it holds: what changes is its class, `__class__`. So whoever
has a reference to it, to one of its parameters or to a hook goes on having the right one. The classes of
torch.nn and fastseq hold the same attributes, but for

    _flat_weights      RNNBase's second list of its weights, which would keep replaced ones alive
    a forward hook     of MultiheadAttention, for torch's layers: see modules/attention.py
    what only ours has reset_after, for instance: as a new module of ours has it

convert() leaves word in the module of what it was and what it was given, under _RECORD, so that copies and
pickles of a converted model can be reverted too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import ops
from .checks import DTYPES, problem, tensors_with_kernels
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, MultiheadAttention, RNNCell
from .modules.attention import must_be_called

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.MultiheadAttention: MultiheadAttention,
}
_RECORD = "_converted_by_fastseq"
_FLAT = ("_flat_weights", "_flat_weight_refs")


class Module(NamedTuple):
    """One module that convert() or revert() has looked at."""

    name: str  # in model.named_modules(), "" for the model itself
    others: tuple[str, ...]  # its other names, if it is used at several places
    old: str  # its class
    new: str  # its class now; "" if it was left
    reason: str  # why it was left

    def __str__(self) -> str:
        name = ", ".join(x or "the model itself" for x in (self.name, *self.others))
        return f"{name}: {self.old}" + (f" -> {self.new}" if self.new else f", {self.reason}")

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class Conversion:
    """What was changed and what was left; str() is made for people."""

    changed: tuple[Module, ...]
    left: tuple[Module, ...]

    def __str__(self) -> str:
        lines = []
        for title, modules in (("changed", self.changed), ("left", self.left)):
            if modules:
                lines += [f"{title}:", *(f"  {module}" for module in modules)]
        return "\n".join(lines) or "nothing to change"

    __repr__ = __str__


def convert(model: nn.Module) -> Conversion:
    """Makes every torch.nn.RNN, LSTM, GRU, their cells and MultiheadAttention in `model` fastseq's, in place.

    The modules stay the same objects with the same Parameters, buffers, hooks, parametrizations, attributes
    and names; only their class changes. So the optimizer, state_dicts and checkpoints, tied weights, a module
    that is used at several places, and references kept elsewhere go on working, and `model` itself may be
    such a module. A second call changes nothing more. Copies and pickles of the model are converted ones.

    What differs afterwards: a recurrent layer is no instance of torch.nn.LSTM (or RNN, GRU), because
    torch.compile refuses those; torch.nn.modules.rnn.RNNBase is what both are, and a cell is an RNNCellBase.
    torch.jit.script takes none of fastseq's modules: revert() first.

    Left as they are, each with the reason in the report: subclasses of torch.nn's modules, objects whose
    forward was replaced, quantized and scripted modules, those with parameters that are not initialised yet
    or of a dtype or on a device for which there is no kernel, and those that are fastseq's already. Modules
    that `model.named_modules()` does not find, in a list or tuple for instance, are not seen.

    Args:
        model: any torch.nn.Module.

    Returns:
        The report: `changed` and `left`, each a tuple with name, others, old, new and reason of each module.
        Print it.

    Raises:
        TypeError: a model that is no torch.nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16, batch_first=True))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> print(fastseq.convert(model))
        changed:
          0: torch.nn.LSTM -> fastseq.LSTM
        >>> output, _ = model(torch.randn(3, 5, 8))
        >>> output.sum().backward()
        >>> optimizer.step()
        >>> print(fastseq.revert(model))
        changed:
          0: fastseq.LSTM -> torch.nn.LSTM
    """
    return _each(model, _is_like_torchs, why_not, to_ours)


def revert(model: nn.Module) -> Conversion:
    """Undoes convert(), in place: what it changed is torch.nn's again, with what the modules hold by now.

    Modules of fastseq that convert() did not make are left, as are those with an option set since then that
    torch.nn does not have. Copies and pickles of converted models can be reverted too.

    Args:
        model: any torch.nn.Module, converted as a whole or in parts.

    Returns:
        The report, as convert() returns it.

    Raises:
        TypeError: a model that is no torch.nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.GRU(8, 16), fastseq.GRU(16, 16))
        >>> converted = fastseq.convert(model)
        >>> print(fastseq.revert(model))
        changed:
          0: fastseq.GRU -> torch.nn.GRU
        left:
          1: fastseq.GRU, it was not made by convert()
    """
    return _each(model, lambda module: isinstance(module, tuple(OURS.values())), _why_not_back, _to_torchs)


def _each(
    model: nn.Module,
    concerns: Callable[[nn.Module], bool],
    obstacle: Callable[[nn.Module], str],
    change: Callable[[nn.Module], None],
) -> Conversion:
    if not isinstance(model, nn.Module):
        raise TypeError(problem(f"model of type {type(model).__name__}", "a torch.nn.Module", "the module"))
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    changed, left = [], []
    for module, (name, *others) in names.items():
        if not concerns(module):
            continue
        old, reason = _class_in_words(module), obstacle(module)
        if reason:
            left.append(Module(name, tuple(others), old, "", reason))
        else:
            change(module)
            changed.append(Module(name, tuple(others), old, _class_in_words(module), ""))
    return Conversion(tuple(changed), tuple(left))


def _class_in_words(module: nn.Module) -> str:
    cls = _without_parametrizations(module)
    library = "torch.nn" if cls in OURS else "fastseq" if cls in OURS.values() else cls.__module__
    return f"{library}.{cls.__name__}"


# ----------------------------------------------------------------------------------------------- to fastseq


def _is_like_torchs(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in OURS}
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in names
    if isinstance(module, (*OURS, *OURS.values())):
        return True
    return _is_quantized(module) and type(module).__name__ in names


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.ao.", "torch.nn.quant"))


def why_not(module: nn.Module) -> str:
    """Why a module like torch.nn's cannot be made fastseq's; "" if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: convert before torch.jit.script"
    if isinstance(module, tuple(OURS.values())):
        return "fastseq's already"
    if _is_quantized(module):
        return "quantized, for which there is no kernel"
    cls = _without_parametrizations(module)
    if cls not in OURS:
        base = next(base for base in cls.__mro__ if base in OURS)
        if any(other.__name__ == "FSDPModule" for other in cls.__mro__):
            return "managed by fully_shard: convert before it"
        own = " with a forward of its own" if cls.forward is not base.forward else ""
        return f"a subclass of torch.nn.{base.__name__}{own}: derive it from fastseq.{base.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the object: convert before that"
    parameters = list(module.parameters())
    if any(is_lazy(parameter) for parameter in parameters):
        return "not initialised yet: call it once before"
    for parameter in parameters:
        if parameter.dtype not in DTYPES:
            return f"a parameter of dtype {parameter.dtype}, for which there is no kernel"
        if parameter.device.type not in (*ops.KERNELS, "meta"):
            return f"on {parameter.device}, where there is no kernel, only for {tensors_with_kernels()}"
    return ""


def to_ours(module: nn.Module) -> None:
    """Changes a module of which why_not() says nothing."""
    cls = _without_parametrizations(module)
    state = vars(module)
    for name in _FLAT:
        state.pop(name, None)
    given = {name: x for name, x in vars(_small(OURS[cls])).items() if not hasattr(module, name)}
    state.update(given)
    state[_RECORD] = {"class": cls, "given": given}
    _set_class(module, OURS[cls])
    if cls is nn.MultiheadAttention:
        module.register_forward_pre_hook(must_be_called)


def _small(cls: type[nn.Module]) -> nn.Module:
    """A module that has all attributes, with their defaults, of a new one; no random number is drawn."""
    return cls(1, 1, device="meta")


# -------------------------------------------------------------------------------------------------- and back


def _why_not_back(module: nn.Module) -> str:
    record = vars(module).get(_RECORD)
    if record is None:
        return "it was not made by convert()"
    cls = record["class"]
    if _without_parametrizations(module) is not OURS[cls]:
        return "its class was changed after convert()"
    if "forward" in vars(module):
        return "its forward was replaced on the object: undo that before"
    for name, default in record["given"].items():
        value = vars(module).get(name, default)
        if value is not default and value != default:
            return f"{name}={value!r}, which torch.nn.{cls.__name__} does not have"
    return ""


def _to_torchs(module: nn.Module) -> None:
    state = vars(module)
    record = state.pop(_RECORD)
    for name in record["given"]:
        state.pop(name, None)
    if record["class"] is nn.MultiheadAttention:
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is must_be_called:
                del module._forward_pre_hooks[key]
    _set_class(module, record["class"])
    if isinstance(module, RNNBase):
        # As RNNBase makes it, but without computing parametrized weights: a dead reference has it made anew
        # at the next call.
        held = {**state, **module._parameters}
        weights = [held.get(name) for name in module._flat_weights_names]
        state["_flat_weights"] = weights
        state["_flat_weight_refs"] = [weakref.ref(torch.empty(0) if w is None else w) for w in weights]
        module.flatten_parameters()


# ---------------------------------------------------------------------------------------------------- classes


def _without_parametrizations(module: nn.Module) -> type[nn.Module]:
    """The class, without the one that torch.nn.utils.parametrize makes for a module of its own."""
    cls = type(module)
    return cls.__bases__[0] if _made_by_parametrize(module) else cls


def _made_by_parametrize(module: nn.Module) -> bool:
    cls = type(module)
    named_so = cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"
    return named_so and cls.__module__ == parametrize.__name__ and parametrize.is_parametrized(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if _made_by_parametrize(module):
        # The properties of the parametrized tensors are on the class.
        held = {name: x for name, x in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), held)
    module.__class__ = cls
