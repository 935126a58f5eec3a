"""What is measured of attention on a GPU: fastseq against each of the backends of torch, and against itself.

Every case of the grid has 16k tokens and heads whose features are 2048 together, as the papers on attention
have it, so that the operations grow with the length alone. Torch has neither window, soft cap, ALiBi, lengths
nor packed sequences in a fused kernel: these are measured against fastseq's call without them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention_grid
import fastseq
from attention_grid import KINDS, OPTIONS, TRAINED, Shape, grad_of_output, results_of
from grid import MODES

TOKENS, FEATURES = 16 * 1024, 2048  # batch x length, heads x head size
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_SIZES = (64, 128, 256)
FLOAT32_HEAD_SIZE = 64
MASKED_LENGTHS, MASKED_HEAD_SIZES = (2048, 4096), (64, 128)
MASKS = ("boolean mask", "additive mask", TRAINED)
BACKWARD = "backward"  # the mode of a case that is timed after another of the same tensors
DROPOUT, PACKED = "dropout 0.1", "packed"
EXTRAS = (*OPTIONS, DROPOUT, PACKED)
EXTRAS_LENGTH = 4096
CACHED = (1024, 4096, 16384, 65536, 131072)  # keys
DECODED = (1, 4)  # queries
DECODING_BATCHES = (1, 8, 64)
QUERY_HEADS, KV_HEADS, DECODING_HEAD_SIZE = 32, 8, 128
MOST_BYTES = 40e9  # of key and value, so that any GPU of 80 GB takes it
REHEARSAL = 64  # --dry-run-on-cpu: lengths, tokens and keys are so many times smaller

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "default": None,  # torch chooses
}
AGAINST = {  # the libraries that a group is measured against; the first of them is its ratio in one word
    "attention": ("default", "flash", "efficient", "cudnn"),
    "masks": ("efficient", "default"),
    "decoding": ("flash", "default"),
    "options": ("unmasked",),
}


@dataclass(frozen=True)
class Call:
    """A function without arguments, and the backend that torch is told to take."""

    function: Callable
    backend: SDPBackend | None = None

    def chosen(self):
        return contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend)

    def __call__(self):
        with self.chosen():
            return self.function()


class BackendTimer:
    """A timer of calls. Torch is told the backend before the clock runs, since that takes microseconds."""

    def __init__(self, timer):
        self.timer, self.enough, self.long = timer, timer.enough, timer.long

    def replays(self, calls):
        """{name: Call} of the same calls without what the host does, less those that cannot do without."""
        found = {}
        for name, call in calls.items():
            try:
                with call.chosen():
                    found[name] = Call(self.timer.replayed(call.function))
            except RuntimeError:
                self.wait()  # raises if it was the GPU that broke
        return found

    def sample(self, call, repeats):
        with call.chosen():
            return self.timer.sample(call.function, repeats)

    def wait(self):
        self.timer.wait()


@dataclass(frozen=True)
class Case(attention_grid.Case):
    """A group is attention, masks, options, decoding, or smoke, of which nothing is timed."""

    @property
    def against(self):
        return AGAINST[self.group]

    @property
    def visible(self):
        if self.kind == PACKED:
            return sum(n * n for n in self.lengths) / self.keys**2 / self.shape.batch
        return super().visible

    @property
    def bytes_of_cache(self):
        """Of key and value, which a step of decoding reads once."""
        shape = self.shape
        numbers = 2 * shape.batch * (shape.kv_heads or shape.heads) * self.keys * shape.head_size
        return numbers * getattr(torch, self.dtype).itemsize

    @property
    def flops(self):
        forward = replace(self, mode="inference")
        return 2.5 * forward.flops if self.mode == BACKWARD else super().flops

    def flops_of(self, library):
        return replace(self, kind="full").flops if library == "unmasked" else self.flops

    def arguments(self, device="cpu"):
        torch.manual_seed(0)
        inputs, options = super().arguments(device)
        if self.kind == PACKED:
            # (total, heads, features): the first tokens of every sequence, one after the other.
            inputs = [
                torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(self.lengths)]) for x in inputs
            ]
        return inputs, options

    def options(self, dtype, device="cpu"):
        if self.kind == DROPOUT:
            return {"dropout_p": float(DROPOUT.split()[1])}
        if self.kind == PACKED:
            ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
            return {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        return super().options(dtype, device)

    def function(self, function, inputs, options, wanted):
        """As of every Case; of the backward pass alone, which follows the first call's forward pass."""
        if self.mode != BACKWARD:
            return super().function(function, inputs, options, wanted)
        grad, outputs = grad_of_output(inputs), []
        for tensor in wanted:
            tensor.requires_grad_()

        def goes_back():
            if not outputs:
                outputs.append(results_of(function(*inputs, **options))[0])
            return torch.autograd.grad(outputs[0], wanted, grad, retain_graph=True)

        return goes_back

    def ours(self, inputs, options):
        wanted = self.wanted(inputs, options)
        return Call(self.function(fastseq.scaled_dot_product_attention, inputs, options, wanted))

    def libraries(self, inputs, options, device="cpu"):
        """{name: Call}, fastseq first, all of them of the same tensors."""
        calls = {"fastseq": self.ours(inputs, options)}
        if self.group == "options":
            plain = replace(self, kind="full")
            return calls | {"unmasked": plain.ours(*plain.arguments(device))}
        torchs = torch.nn.functional.scaled_dot_product_attention
        theirs = self.function(torchs, inputs, options, self.wanted(inputs, options))
        return calls | {name: Call(theirs, BACKENDS[name]) for name in self.against}


def default_backend(inputs, options):
    """What torch's own choice is, by name; None where it does not tell."""
    try:
        return SDPBackend(torch._fused_sdp_choice(*inputs, **options)).name.partition("_")[0].lower()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------ the cases


def shape_of(length, head_size, scale=1):
    return Shape(TOKENS // scale // length, FEATURES // head_size, length, head_size)


def product(group, kinds, shapes, modes=MODES, dtype="bfloat16"):
    return [
        Case(group, kind, mode, dtype, shape)
        for shape in shapes
        for kind in kinds
        for mode in modes
        if (kind, mode) != (TRAINED, "inference")  # there its gradient is what counts
    ]


def decoding_cases(scale):
    shapes = [
        Shape(batch, QUERY_HEADS, queries, DECODING_HEAD_SIZE, keys // scale, kv_heads)
        for kv_heads in (KV_HEADS, None)
        for queries in DECODED
        for batch in DECODING_BATCHES
        for keys in CACHED
    ]
    every = product("decoding", ("full",), shapes, modes=("inference",))
    return [case for case in every if case.bytes_of_cache * scale <= MOST_BYTES]


def has_figure(case, scale=1):
    """Whether the project's goal for this case is a number of TFLOP/s, see gpu_attention_summary.py."""
    length = case.shape.queries * scale
    if case.group != "attention" or case.dtype != "bfloat16" or case.shape.head_size != 128:
        return False
    return length >= 4096 if case.kind == "full" else (length, case.mode) == (16384, "inference")


def has_ratio(case, scale=1):
    """Whether the goal for this case is more than to be as fast as torch's own choice."""
    if case.group == "attention":
        short = case.shape.queries * scale <= 1024
        return case.dtype == "float32" or short or (case.shape.head_size, case.mode) == (64, "inference")
    return case.group == "masks"


def cases(scale=1):
    """Every case: first those with the goals that count most, then those with others, then all that have one
    at least, which is what torch is measured against, then what is left.

    Each part is in an order that is random, but always the same, so that a run that is cut off has measured a
    fair sample of where it was.
    """
    lengths = [length // scale for length in LENGTHS]
    grid = [shape_of(length, size, scale) for size in HEAD_SIZES for length in lengths]
    masked = [shape_of(n // scale, size, scale) for size in MASKED_HEAD_SIZES for n in MASKED_LENGTHS]
    float32 = [shape for shape in grid if shape.head_size == FLOAT32_HEAD_SIZE]
    extras = [shape_of(EXTRAS_LENGTH // scale, size, scale) for size in MASKED_HEAD_SIZES]
    every = product("attention", KINDS, grid) + product("attention", KINDS, float32, dtype="float32")
    every += product("masks", MASKS, masked) + product("options", EXTRAS, extras) + decoding_cases(scale)
    random.Random(0).shuffle(every)

    def rank(case):
        if has_figure(case, scale) or has_ratio(case, scale):
            return 0 if has_figure(case, scale) else 1
        return 2 if case.group != "options" else 3

    return sorted(every, key=rank)


def smoke_cases():
    """Small cases that touch every dtype, head size and option, for a look before the long stages."""
    plain = [
        Shape(2, 2, 130, 64),
        Shape(1, 2, 200, 128),
        Shape(1, 2, 150, 256),
        Shape(2, 4, 70, 64, keys=100, kv_heads=2),
        Shape(2, 3, 33, 40),
        Shape(2, 4, 1, 128, keys=300, kv_heads=2),
    ]
    dtypes = ("float32", "float64", "float16", "bfloat16")
    every = [case for dtype in dtypes for case in product("smoke", KINDS, plain[:5], ("training",), dtype)]
    for dtype in dtypes:
        every += product("smoke", ("full",), plain[5:], dtype=dtype)
    for dtype in ("float32", "bfloat16"):
        kinds = [kind for kind in (*MASKS, *EXTRAS) if kind != DROPOUT]  # whose draws have tests of their own
        every += product("smoke", kinds, [Shape(2, 2, 300, 64)], ("training",), dtype)
    return every
