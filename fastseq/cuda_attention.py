"""The operators of attention on CUDA: a plan and one call of the compiled module for each.

An Engine is that of loops.py: the GPU, and in the tests the kernels' host twin. Nothing in here waits for the
device: lengths, starts of packed sequences and the seed are read by the kernels. So lengths that are out of
bounds raise no error here; the kernels take them for the nearest that are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import attention_numbers, precision
from .addresses import address
from .attention_checks import Arguments, Attention, check_attention
from .checks import DTYPES
from .loops import Engine

if TYPE_CHECKING:
    from .attention_ops import Gradients, Incoming, Running


class Problem(NamedTuple):
    """What a plan is made for: AttentionProblem of csrc/cuda/attention_plan.h."""

    dtype: int
    tf32: bool
    packed: bool
    backward: bool
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_size: int
    value_size: int
    options: bool
    only_mask: bool
    tma: bool
    weights: bool
    of_mask: bool
    mask_has_batch: bool
    mask_has_head: bool
    mask_has_query: bool
    mask_has_key: bool
    one_pass: bool
    dual: bool = False


@lru_cache(maxsize=1024)
def _plan(module: Any, problem: Problem, facts: tuple[int, ...], forced: str) -> Any:
    return module.cuda_attention_plan(problem, facts, forced)


def plan_of(engine: Engine, problem: Problem, device: torch.device) -> Any:
    """FASTSEQ_CUDA_ATTENTION_PLAN=kernel[:parts] forces one; the backward pass has only tiles and hopper."""
    forced = os.environ.get("FASTSEQ_CUDA_ATTENTION_PLAN", "")
    return _plan(engine.module, problem, engine.facts(device.index or 0), forced)


def _has_options(a: Arguments) -> bool:
    """Whether there is anything between products and weights but the scale, lengths, causality, windows and
    sinks; csrc/cuda/attention.cu has the same bound of the scale."""
    return bool(
        a.attn_mask is not None
        or a.alibi_slopes is not None
        or a.softcap
        or a.dropout_p
        or not a.scale > 1e-6
    )


def _only_mask(a: Arguments) -> bool:
    """Whether a mask is all that may be between products and weights."""
    return a.alibi_slopes is None and not a.softcap and not a.dropout_p


def _fits_tensor_map(x: Tensor) -> bool:
    """Whether the GPU's tensor memory accelerator can read it: csrc/cuda/tensor_map.h has the conditions."""
    if x.data_ptr() % 16:
        return False
    size, most = x.element_size(), 1 << 40
    return all(
        n == 1 or (step > 0 and step * size % 16 == 0 and step * size * n < most)
        for n, step in zip(x.shape[:-1], x.stride(), strict=False)
    )


def run(
    engine: Engine, kernels: Callable[..., None], problem: Problem, a: Arguments, numbers: tuple[Any, ...]
) -> None:
    """kernels: of the engine's module, which are called with the plan."""
    device = a.query.device
    plan = plan_of(engine, problem, device)
    size = plan.workspace_bytes
    workspace = a.query.new_empty(size, dtype=torch.uint8) if size else None
    index = device.index or 0
    kernels(
        plan,
        *numbers,
        problem.tf32,
        problem.one_pass,
        address(a.seed) if _seed_is_there(a) else 0,
        index,
        engine.stream(index),
        0 if workspace is None else address(workspace),
    )


def _seed_is_there(a: Arguments) -> bool:
    """Whether the kernels can read the seed, which may have been made on the CPU."""
    return a.seed is not None and a.seed.device == a.query.device


def seed_of(a: Arguments) -> int:
    return 0 if a.seed is None or _seed_is_there(a) else int(a.seed.item())


def plain(
    engine: Engine,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> bool:
    """Attention without any other option, where the compiled module reads the tensors; False if it cannot."""
    index = max(query.get_device(), 0)
    call = partial(
        engine.module.cuda_attention,
        query,
        key,
        value,
        output,
        is_causal,
        scale,
        enable_gqa,
        engine.device_type,
        precision.of_products(query.dtype) == "tf32",
        engine.facts(index),
        index,
        engine.stream(index),
    )
    needs = call(0)
    if needs > 0:
        workspace = query.new_empty(needs, dtype=torch.uint8)
        needs = call(workspace.data_ptr())
    return needs == 0


def _problem_of(
    sizes: Attention,
    a: Arguments,
    backward: bool,
    of_mask: Sequence[bool] | None,
    of_weights: bool,
    one_pass: bool,
) -> Problem:
    """of_mask: as in attention_ops.Kernels.plan; of_weights: whether they are wanted, or have a gradient."""
    return Problem(
        DTYPES[a.query.dtype],
        precision.of_products(a.query.dtype) == "tf32",
        a.cu_seqlens_q is not None,
        backward,
        *sizes,
        _has_options(a) or (backward and of_weights),
        _only_mask(a) and not (backward and of_weights),
        all(map(_fits_tensor_map, (a.query, a.key, a.value))),
        not backward and of_weights,
        of_mask is not None,
        *(of_mask or (False,) * 4),
        one_pass,
    )


def problem_of_dual(
    sizes: Attention, a: Arguments, backward: bool, of_mask: bool, of_weights: bool
) -> Problem:
    """Of a call over dual numbers. of_weights: whether they are returned, or have a gradient."""
    problem = _problem_of(sizes, a, backward, None, False, False)
    return problem._replace(of_mask=of_mask, weights=of_weights, dual=True)


def forward(engine: Engine, sizes: Attention, a: Arguments, *results: Tensor) -> None:
    if sizes.heads:
        numbers = attention_numbers.of_forward(sizes, a, results, 0, seed_of(a))
        problem = _problem_of(sizes, a, False, None, bool(a.return_weights), False)
        run(engine, engine.module.cuda_attention_forward, problem, a, numbers)


def backward(engine: Engine, sizes: Attention, a: Arguments, incoming: Incoming, grads: Gradients) -> None:
    of_mask = None if grads.attn_mask is None else [size != 1 for size in grads.attn_mask.shape]
    all_wanted = grads.query is not None and grads.key is not None and grads.value is not None
    one_pass = all_wanted and not incoming.deterministic
    of_weights = incoming.grad_weights is not None
    problem = _problem_of(sizes, a, True, of_mask, of_weights, one_pass)
    if problem.tma and not _fits_tensor_map(incoming.grad_output):
        # That of a mean over the queries is expanded, say: a copy costs less than the general kernels.
        if plan_of(engine, problem, a.query.device).describe()["kernel"] == "hopper":
            incoming = incoming._replace(grad_output=incoming.grad_output.contiguous())
        problem = problem._replace(tma=_fits_tensor_map(incoming.grad_output))
    numbers = attention_numbers.of_backward(sizes, a, incoming, grads, 0, seed_of(a))
    run(engine, engine.module.cuda_attention_backward, problem, a, numbers)


def makes_delta(keys: int, has_lengths: bool, has_window: bool) -> bool:
    """See attention_ops.Kernels; kFewKeys in attention_shapes.h: a tile of rows may see few of a window."""
    return keys <= 16 or has_lengths or has_window


def plan_in_data(
    engine: Engine,
    _: Attention,
    a: Arguments,
    backward: bool,
    of_mask: tuple[bool, ...] | None,
    running: Running | None,
) -> dict[str, Any]:
    """What the engine does with a call; see attention_ops.Kernels.plan."""
    device = a.query.device
    facts = engine.facts(device.index or 0)
    sizes = check_attention(a)
    of_weights, one_pass = running or (bool(a.return_weights), False)
    problem = _problem_of(sizes, a, backward, of_mask, of_weights, one_pass)
    plan = {"engine": "cuda_attention", "facts": facts, "partition": {}, "tf32": problem.tf32}
    if not sizes.heads:
        return plan | {"kernel": "none"}
    chosen = plan_of(engine, problem, device).describe()
    if backward and running is None:  # only the backward pass itself knows `deterministic`
        other = plan_of(engine, problem._replace(one_pass=True), device).describe()
        plan["in_any_order"] = other["kernel"]
    return plan | {"kernel": chosen.pop("kernel"), "partition": chosen}
