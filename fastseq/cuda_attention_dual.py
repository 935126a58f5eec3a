"""The operators of attention over dual numbers on CUDA: a plan, and what it says.

The forward pass is a kernel, unless weights are returned: then as many numbers as there are scores are in
memory anyway, and blocks of torch's operations do it. So they do the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import attention_blocks, attention_numbers, cuda_attention
from .attention_checks import Arguments, Attention
from .loops import Engine

if TYPE_CHECKING:
    from .attention_dual_ops import DualGradients, DualIncoming, DualResults, Tangents


def _plan(engine: Engine, problem: cuda_attention.Problem, a: Arguments) -> dict[str, Any]:
    return cuda_attention.plan_of(engine, problem, a.query.device).describe()


def forward(engine: Engine, sizes: Attention, a: Arguments, tangents: Tangents, results: DualResults) -> None:
    problem = cuda_attention.problem_of_dual(sizes, a, False, bool(a.return_weights))
    if not sizes.heads:
        return
    if _plan(engine, problem, a)["kernel"] == "blocks":
        attention_blocks.forward(sizes, a, tangents, results)
        return
    numbers = attention_numbers.of_dual_forward(sizes, a, tangents, results, 0, cuda_attention.seed_of(a))
    cuda_attention.run(engine, engine.module.cuda_attention_dual_forward, problem, a, numbers)


def backward(
    engine: Engine,
    sizes: Attention,
    a: Arguments,
    tangents: Tangents,
    incoming: DualIncoming,
    grads: DualGradients,
) -> None:
    attention_blocks.backward(sizes, a, tangents, incoming, grads)


def plan_in_data(engine: Engine, sizes: Attention, a: Arguments, backward: bool) -> dict[str, Any]:
    """What the engine does with a call, as cuda_attention.plan_in_data. `kernel` is "tiles", "none", or
    "blocks" for torch's operations, and then `not_tiles` in `partition` tells why. A backward pass whose
    `return_weights` is true has a gradient of the weights."""
    problem = cuda_attention.problem_of_dual(sizes, a, backward, bool(a.return_weights))
    facts = engine.facts(a.query.device.index or 0)
    plan = {"engine": "cuda_attention_dual", "facts": facts, "partition": {}, "tf32": problem.tf32}
    if not sizes.heads:
        return plan | {"kernel": "none"}
    chosen = _plan(engine, problem, a)
    return plan | {"kernel": chosen.pop("kernel"), "partition": chosen}
