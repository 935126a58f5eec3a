"""Cases of MultiheadAttention, and how to run one through fastseq and through torch.nn.

The float64 reference is torch.nn's module in float64. Masks leave every query a key to see, because torch has
NaN where there is none.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastseq
from harness import assert_all_as_accurate_as_torch, threads, with_gradients
from tolerances import SAME_FLOAT64

EMBED = 24
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "one head": {"num_heads": 1},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim": {"kdim": 5},
    "kdim and vdim": {"kdim": 5, "vdim": 7, "bias": False},
    "vdim, bias_kv": {"vdim": 7, "add_bias_kv": True},
}
KINDS = ("self", "cross", "separate", "unbatched")  # key is query; value is key; three tensors; no batch
MASKS = {
    "none": "",
    "padding": "padding=bool",
    "float padding": "padding=float",
    "2-D": "attn2=bool",
    "float 2-D": "attn2=float",
    "3-D": "attn3=bool",
    "float 3-D": "attn3=float",
    "padding and 2-D": "padding=bool attn2=bool",
    "padding and float 3-D": "padding=bool attn3=float",
    "float padding and 3-D": "padding=float attn3=bool",
    "float padding and float 2-D": "padding=float attn2=float",
    "causal": "causal",
    "causal and padding": "padding=bool causal",
}


@dataclass(frozen=True)
class Case:
    options: dict = field(default_factory=dict)
    kind: str = "self"
    masks: str = ""
    dtype: torch.dtype = torch.float32
    batch_first: bool = False
    need_weights: bool = True
    average: bool = True
    batch: int = 3
    queries: int = 13
    keys: int = 19

    @property
    def same_size(self):
        return not {"kdim", "vdim"} & self.options.keys()


def make(case: Case, library=fastseq, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    options = {"num_heads": 3, "batch_first": case.batch_first, **case.options}
    module = library.MultiheadAttention(EMBED, **options)
    # Biases start as zeros, which would hide one at the wrong place. They are small, because what all keys
    # have in common cancels in the gradient of the query, and only its rounding would be left.
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("proj_bias") or name == "out_proj.bias":
                parameter.normal_(std=0.1)
    return module.to(case.dtype)


def make_data(case: Case, seed=1) -> dict[str, Tensor]:
    """Leaves by name: query, key and value if they are tensors of their own, masks."""
    g = torch.Generator().manual_seed(seed)
    dtype, heads = case.dtype, case.options.get("num_heads", 3)
    batched, own_key = case.kind != "unbatched", case.kind != "self" or not case.same_size
    keys = case.keys if own_key else case.queries

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    def sequence(length, size):
        if not batched:
            return randn(length, size)
        return randn(case.batch, length, size) if case.batch_first else randn(length, case.batch, size)

    def mask(kind, *shape):
        if kind == "float":
            return randn(*shape)
        hidden = torch.rand(*shape, generator=g) < 0.4
        hidden[..., 0] = False  # what everybody may see
        return hidden

    kdim, vdim = case.options.get("kdim", EMBED), case.options.get("vdim", EMBED)
    data = {"query": sequence(case.queries, EMBED)}
    if own_key:
        data["key"] = sequence(keys, kdim)
    if case.kind == "separate" or kdim != vdim:
        data["value"] = sequence(keys, vdim)
    given = dict(word.split("=") for word in case.masks.split() if "=" in word)
    batch = case.batch if batched else 1
    if "padding" in given:
        data["key_padding_mask"] = mask(given["padding"], *([batch] if batched else []), keys)
    if "attn2" in given:
        data["attn_mask"] = mask(given["attn2"], case.queries, keys)
    if "attn3" in given:
        data["attn_mask"] = mask(given["attn3"], batch * heads, case.queries, keys)
    if "causal" in case.masks:
        data["attn_mask"] = torch.ones(case.queries, keys, dtype=torch.bool).triu(1)
    return data


def call(case: Case, module: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    query = data["query"]
    key = data.get("key", query)
    output, weights = module(
        query,
        key,
        data.get("value", key),
        key_padding_mask=data.get("key_padding_mask"),
        need_weights=case.need_weights,
        attn_mask=data.get("attn_mask"),
        average_attn_weights=case.average,
        # The hint makes torch hide the keys that are added, but only where it returns no weights.
        is_causal="causal" in case.masks and not {"add_bias_kv", "add_zero_attn"} & case.options.keys(),
    )
    assert (weights is None) == (not case.need_weights)
    return {"output": output} if weights is None else {"output": output, "weights": weights}


def run(case: Case, module: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {**data, **dict(module.named_parameters())}
    return with_gradients(call(case, module, data), leaves, case.dtype)


def to_double(data):
    return {
        name: x if x.dtype == torch.bool else x.detach().double().requires_grad_() for name, x in data.items()
    }


def check(case: Case):
    """Outputs, weights and every gradient."""
    ours, torchs, data = make(case), make(case, nn), make_data(case)
    with threads(1):  # torch's threads fight over small work when the machine is busy
        exact = run(case, copy.deepcopy(torchs).double(), to_double(data))
        torchs = run(case, torchs, data)
    results = run(case, ours, data)
    if case.dtype == torch.float64:
        for name, x in exact.items():
            torch.testing.assert_close(
                results[name], x, **SAME_FLOAT64, msg=lambda m, name=name: f"{name} of {case}: {m}"
            )
        return
    assert_all_as_accurate_as_torch(results, torchs, exact, case.dtype, f" of {case}")
