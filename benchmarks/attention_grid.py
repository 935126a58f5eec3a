"""What is measured of attention: the cases, each one call of torch's and the fastseq call that replaces it.

What torch does not have, and what a mask costs, is measured against fastseq's own call without options.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fastseq
from grid import MODES

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    queries: int
    head_size: int
    keys: int | None = None  # as many as queries if None
    kv_heads: int | None = None  # as many as heads if None

    @property
    def name(self):
        heads = f"{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads else "")
        rows = f"{self.queries}" + (f"x{self.keys}" if self.keys else "")
        return f"B{self.batch} H{heads} S{rows} D{self.head_size}"


# The shapes that the project is judged by.
TABLE = (
    Shape(1, 8, 128, 64),
    Shape(4, 8, 512, 64),
    Shape(4, 8, 1024, 64),
    Shape(1, 8, 4096, 64),
    Shape(2, 8, 1024, 128),
    Shape(1, 12, 197, 64),
)
KINDS = ("full", "causal")
LONG = 1024  # from this length on, a share of the peak is asked for
DECODING = Shape(8, 16, 1, 64, keys=4096)
GROUPED = Shape(4, 8, 1024, 64, kv_heads=2)
MASKED = (TABLE[2], TABLE[3])
TRAINED = "trained mask"  # additive, with a gradient
MASKS = ("boolean mask", "padding mask", "additive mask", TRAINED)
WINDOW = 256
OPTIONS = (f"window {WINDOW}", "softcap", "alibi", "key_lengths")  # torch has none of them
MODULE = (Shape(8, 8, 128, 64), Shape(8, 8, 512, 64))
MODULES = ("without weights", "with weights")


@dataclass(frozen=True)
class Case:
    group: str  # attention, decoding, grouped, masks, options or modules
    kind: str
    mode: str
    dtype: str
    shape: Shape

    cell = None  # --cells is about recurrent ones

    @property
    def name(self):
        return f"{self.group}: {self.kind} {self.mode} {self.dtype} {self.shape.name}"

    @property
    def facts(self):
        facts = {name: getattr(self, name) for name in ("name", "group", "kind", "mode", "dtype")}
        return facts | {"shape": self.shape.name}

    @property
    def against(self):
        return "unmasked" if self.group == "options" else "torch"

    @property
    def same_results(self):
        """Whether both functions compute the same."""
        return self.against == "torch"

    @property
    def keys(self):
        return self.shape.keys or self.shape.queries

    @property
    def lengths(self):
        """The keys that padding mask and key_lengths leave each sequence, three quarters on average."""
        batch = self.shape.batch
        return [self.keys - self.keys * (b + 1) // (2 * batch + 2) for b in range(batch)]

    @property
    def visible(self):
        """The share of the scores that has to be computed; causal is half, a random mask saves nothing."""
        if self.kind == "causal":
            return 0.5
        if self.kind in ("padding mask", "key_lengths"):
            return sum(self.lengths) / self.keys / self.shape.batch
        if self.kind == OPTIONS[0]:
            rows = self.shape.queries
            return sum(min(row, WINDOW) + 1 for row in range(rows)) / rows / self.keys
        return 1.0

    @property
    def flops(self):
        """Of the matrix products: two forward, and with the backward pass three and a half times as many."""
        shape, training = self.shape, self.mode == "training"
        scores = shape.batch * shape.heads * shape.queries * self.keys * self.visible
        flops = 4 * scores * shape.head_size * (3.5 if training else 1)
        if self.group == "modules":  # four projections of E x E
            features = shape.heads * shape.head_size
            flops += 8 * shape.batch * shape.queries * features**2 * (3 if training else 1)
        return flops

    def functions(self):
        """(the one compared with, fastseq's): functions without arguments, one call being one iteration.

        Each returns what it computed: the output, and in training the gradients of inputs and parameters.
        """
        torch.manual_seed(0)
        return self.modules() if self.group == "modules" else self.calls()

    def modules(self):
        shape, dtype = self.shape, getattr(torch, self.dtype)
        features = shape.heads * shape.head_size
        x = torch.randn(shape.batch, shape.queries, features, dtype=dtype)
        options = {"embed_dim": features, "num_heads": shape.heads, "batch_first": True, "dtype": dtype}
        theirs, ours = torch.nn.MultiheadAttention(**options), fastseq.MultiheadAttention(**options)
        ours.load_state_dict(theirs.state_dict())

        def called(module):
            module.train(self.mode == "training")
            arguments = {"need_weights": self.kind == "with weights"}
            return self.function(module, [x, x, x], arguments, [x, *module.parameters()])

        return called(theirs), called(ours)

    def calls(self):
        inputs, options = self.arguments()
        wanted = self.wanted(inputs, options)
        ours = self.function(fastseq.scaled_dot_product_attention, inputs, options, wanted)
        if self.against == "unmasked":
            return self.function(fastseq.scaled_dot_product_attention, inputs, {}, inputs), ours
        torchs = torch.nn.functional.scaled_dot_product_attention
        return self.function(torchs, inputs, options, wanted), ours

    def arguments(self, device="cpu"):
        """([query, key, value], the keyword arguments that make this kind of attention)"""
        shape, dtype = self.shape, getattr(torch, self.dtype)
        kv = (shape.batch, shape.kv_heads or shape.heads, self.keys, shape.head_size)
        sizes = [(shape.batch, shape.heads, shape.queries, shape.head_size), kv, kv]
        inputs = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
        return inputs, self.options(dtype, device)

    def wanted(self, inputs, options):
        """What gets a gradient in training."""
        return [*inputs, options["attn_mask"]] if self.kind == TRAINED else inputs

    def options(self, dtype, device="cpu"):
        batch, heads, rows, keys = self.shape.batch, self.shape.heads, self.shape.queries, self.keys
        options = {"enable_gqa": True} if self.shape.kv_heads else {}
        if self.kind == "causal":
            options["is_causal"] = True
        elif self.kind == "boolean mask":
            options["attn_mask"] = torch.rand(batch, 1, rows, keys, device=device) < 0.5
        elif self.kind == "padding mask":
            seen = torch.arange(keys, device=device) < torch.tensor(self.lengths, device=device)[:, None]
            options["attn_mask"] = seen[:, None, None]
        elif self.kind in ("additive mask", TRAINED):
            options["attn_mask"] = torch.randn(1, heads, rows, keys, dtype=dtype, device=device)
        elif self.kind == OPTIONS[0]:
            options |= {"causal": "top_left", "window": (WINDOW, 0)}
        elif self.kind == "softcap":
            options["softcap"] = 30.0
        elif self.kind == "alibi":
            options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, heads + 1, device=device)
        elif self.kind == "key_lengths":
            options["key_lengths"] = torch.tensor(self.lengths, device=device)
        return options

    def function(self, function, inputs, options, wanted):
        """One iteration: in inference the results, in training the output and the gradients of `wanted`."""
        if self.mode == "inference":

            def infers():
                with torch.inference_mode():
                    return results_of(function(*inputs, **options))

            return infers
        grad = grad_of_output(inputs)
        for tensor in wanted:
            tensor.requires_grad_()

        def trains():
            output = results_of(function(*inputs, **options))[0]
            return output.detach(), *torch.autograd.grad(output, wanted, grad)

        return trains


def grad_of_output(inputs):
    """The same at every call; the output has the query's shape."""
    torch.manual_seed(1)
    return torch.randn_like(inputs[0])


def results_of(result):
    """Of a function, or of a module, which returns its weights or None beside the output."""
    return tuple(x for x in result if x is not None) if isinstance(result, tuple) else (result,)


def product(group, kinds, shapes, modes=MODES, dtypes=DTYPES):
    return [
        Case(group, kind, mode, dtype, shape)
        for dtype in dtypes
        for shape in shapes
        for kind in kinds
        for mode in modes
        if (kind, mode) != (TRAINED, "inference")  # there its gradient is what counts
    ]


def cases(quick=False):
    """Every case; the quick choice leaves out what takes long or resembles another."""
    if quick:
        return (
            product("attention", KINDS, (TABLE[1], TABLE[2]))
            + product("decoding", ("full",), (DECODING,), modes=("inference",))
            + product("masks", MASKS[:3], MASKED[:1], modes=("inference",))
            + product("options", MASKS[:3], MASKED[:1], modes=("inference",))
            + product("modules", MODULES[:1], MODULE[1:], dtypes=DTYPES[:1])
        )
    return (
        product("attention", KINDS, TABLE)
        + product("decoding", ("full",), (DECODING,), modes=("inference",))
        + product("grouped", KINDS, (GROUPED,))
        + product("masks", MASKS, MASKED)
        + product("options", MASKS, MASKED)
        + product("options", OPTIONS, MASKED[:1])
        + product("modules", MODULES, MODULE)
    )
