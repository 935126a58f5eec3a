"""Which kernel runs, how it is cut, what is saved, and why nothing faster.

explain() makes one call under a recorder, a TorchDispatchMode of this thread, which sees every operator of
torch.ops.fastseq, runs it as it would have run, and asks the plan of that call of the kernels' owner
(ops.Kernels.plan). A plan is data, of which explain_calls.py and plan_words.py make words.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import attention_ops
from .checks import DTYPES, problem
from .convert import OURS
from .explain_calls import READERS, Call, address_of, with_checkpoints
from .integrations import torch_attention


@dataclass(frozen=True, repr=False)
class Explanation:
    """The calls in order. Iterating, indexing and len() give them; str() is made for people."""

    calls: tuple[Call, ...]
    replaceable: tuple[str, ...]  # torch's modules and functions that were called, and what can replace each

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> Call:
        return self.calls[index]

    def __str__(self) -> str:
        counts = Counter(str(call) for call in self.calls)  # in the order of the first of each
        parts = [text if n == 1 else f"{n} calls, each: {text}" for text, n in counts.items()]
        parts = parts or ["no fastseq kernel was called"]
        if self.replaceable:
            parts.append("\n".join(["fastseq can replace:", *(f"  {line}" for line in self.replaceable)]))
        return "\n".join(parts)

    __repr__ = __str__


def explain(module_or_function: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Explanation:
    """Which kernel on what hardware, how the work is cut, what is saved, and why not something faster.

    Calls `module_or_function(*inputs, **kwargs)` once, for real: gradients are recorded or not as outside of
    explain(), and a module in training mode updates its buffers. Afterwards torch's random state is as it
    was, and the results are dropped. Seen are the calls of this thread and of a backward pass that it starts;
    what torch.compile has compiled runs as it was written, which calls the same operators.

    Args:
        module_or_function: a module of fastseq, a function of fastseq.functional, or anything that uses them.
        inputs, kwargs: what it is called with.

    Returns:
        The calls of fastseq's operators in order, printable, each with the fields operator, mode, weight,
        layer (steps, batch, input_size, hidden_size, width, directions, ...; of attention batch, heads,
        kv_heads, queries, keys, head_size, value_size), packed, dtype, device, saved, saved_bytes, plan and,
        if something was saved, backward. A plan has kernel, architecture, partition, words and reasons.
        Without any call it says so. It also says which modules of torch.nn, and calls of torch's attention,
        fastseq could replace.

    Raises:
        TypeError: something that cannot be called.
        Whatever the call raises.

    Example:
        >>> lstm = fastseq.LSTM(8, 16, num_layers=2)
        >>> explanation = fastseq.explain(lstm, torch.randn(5, 3, 8))
        >>> [(call.mode, call.weight, call.layer.steps, call.plan.kernel) for call in explanation]
        [('LSTM', 'weight_hh_l0', 5, 'sequence'), ('LSTM', 'weight_hh_l1', 5, 'sequence')]
        >>> print(explanation)  # doctest: +ELLIPSIS
        LSTM, float32 on cpu, T 5, B 3, I 8, H 16 (weight_hh_l0)
          forward   sequence, ...
        >>> print(fastseq.explain(torch.nn.GRU(8, 16), torch.randn(5, 3, 8)))
        no fastseq kernel was called
        fastseq can replace:
          torch.nn.GRU with fastseq.GRU
    """
    if not callable(module_or_function):
        raise TypeError(
            problem(
                f"module_or_function of type {type(module_or_function).__name__}",
                "a module or a function, which is called with the other arguments",
                "fastseq.explain(module, input)",
            )
        )
    modules = _modules_of(module_or_function)
    recorder = _Recorder(_names_of_weights(modules))
    torchs = _TorchsAttention(recorder)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus), _nothing_compiles(), recorder, torchs:
        module_or_function(*inputs, **kwargs)
    return Explanation(tuple(recorder.calls), _replaceable(modules) + torchs.replaceable())


# ------------------------------------------------------------------------------------------------ recording


def _nothing_compiles() -> AbstractContextManager[Any]:
    """What torch.compile has compiled runs as it was written: the operators are the same, and it would
    remember of functions that it meets under a recorder that they cannot be compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _Recorder(TorchDispatchMode):
    """Runs everything as without it, and lists the calls of fastseq's operators."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.calls = names, []  # names of recurrent weights by address

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # loading it takes seconds, and nothing compiles in here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and (kernel := _in_place_of(name, args)):
            with self:  # which calls fastseq's
                return kernel(*args, **(kwargs or {}))
        if func.namespace != "fastseq" or name not in READERS:
            return func(*args, **(kwargs or {}))
        # As from fastseq.autograd: in here the mode is off, so the kernel is found as it is outside.
        call, read = READERS[name]
        results = call(*args)
        if name == "recurrent_checkpoints":  # of the forward pass that was called last
            self.calls[-1] = with_checkpoints(self.calls[-1], results)
        else:
            self.calls.append(read(self.names, args, results))
        return results


def _in_place_of(name: str, args: Sequence[Any]) -> Callable[..., Any] | None:
    """What computes one of torch's operators, if fastseq does: see integrations/torch_attention.py."""
    tensor = next((x for x in args if isinstance(x, Tensor)), None)
    if tensor is None or not torch_attention.is_active():
        return None
    return torch_attention.OPERATORS.get(tensor.device.type, {}).get(name)


class _TorchsAttention(TorchFunctionMode):
    """Runs everything as without it, and counts the calls of torch's attention that fastseq could make."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.count, self._recorder = 0, recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self._recorder.calls)
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and len(self._recorder.calls) == before:
            query = args[0] if args else (kwargs or {}).get("query")
            self.count += isinstance(query, Tensor) and _has_kernel(query)
        return result

    def replaceable(self) -> tuple[str, ...]:
        if self.count == 0:
            return ()
        times = "" if self.count == 1 else f", called {self.count} times,"
        name = "scaled_dot_product_attention"
        return (f"torch.nn.functional.{name}{times} with fastseq.{name}",)


def _has_kernel(query: Tensor) -> bool:
    here = query.device.type in attention_ops.KERNELS and query.layout is torch.strided
    return here and query.dtype in DTYPES


# -------------------------------------------------------------------------------------- modules in a callable


def _modules_of(function: Callable[..., Any]) -> dict[str, nn.Module]:
    """The modules that are called, that have or hold the method that is called, or that a function names."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    owner = getattr(function, "__self__", None)
    found: dict[str, Any] = {"": function, "self": owner, **getattr(owner, "__dict__", {})}
    if inspect.isfunction(function):
        with suppress(ValueError):  # of a variable that has no value yet
            used = inspect.getclosurevars(function)
            found |= {**used.globals, **used.nonlocals}
    modules: dict[str, nn.Module] = {}
    for prefix, value in found.items():
        if isinstance(value, nn.Module):
            modules |= value.named_modules(prefix=prefix)
    return modules


def _names_of_weights(modules: dict[str, nn.Module]) -> dict[int, str]:
    """The names of recurrent weights by address, which is what the operators know of them."""
    return {
        address: f"{prefix}.{name}" if prefix else name
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("weight_hh") and (address := address_of(parameter))
    }


def _replaceable(modules: dict[str, nn.Module]) -> tuple[str, ...]:
    return tuple(
        f"{f'{name}, ' if name else ''}torch.nn.{type(module).__name__} with fastseq.{type(module).__name__}"
        for name, module in modules.items()
        if type(module) in OURS
    )
