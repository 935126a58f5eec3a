"""The plan of a call in words, and why it is not faster: what ops.Kernels.plan gives, for fastseq.explain.

A reason comes from the plan's own numbers, and names the setting that would change it. What another kernel or
setting would give is the planner's answer too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import _C, precision
from .attention_checks import Attention
from .checks import Layer

Words = tuple[str, list[str], list[str]]  # architecture, the plan, reasons


def amount(size: int) -> str:
    for unit, bytes_of in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size} bytes"


def many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _class_of(mode: str) -> str:
    return mode.partition("_")[0]


# ------------------------------------------------------------------------------------------------ on the CPU


def _cpu_in_words(plan: dict[str, Any], mode: str, layer: Layer, dtype: torch.dtype) -> Words:
    isa, cut, kernel = _C.cpu_info()["isa"], plan["partition"], plan["kernel"]
    parts = "{direction_parts} x {batch_parts} x {unit_parts}".format(**cut)
    words = f"{many(cut['threads'], 'thread')}, directions x rows x hidden units in {parts} parts"
    if layer.steps > 1:
        words += f", chunks of {cut['chunk_rows']} rows"
    most = layer.directions * layer.batch * -(-layer.hidden_size // _C.UNIT_QUANTUM)
    units = f"directions x rows x blocks of {_C.UNIT_QUANTUM} hidden units"
    reasons = _isa_reasons(dtype) + _thread_reasons(plan, most, units, "FASTSEQ_PLAN", "DxBxU")
    rows = -(-layer.batch // cut["batch_parts"])
    if cut["unit_parts"] > 1:
        reasons.append(
            f"{cut['unit_parts']} threads share each row's hidden units, and so wait for each other at every "
            "step; a larger batch can be cut by rows instead"
        )
    if kernel == "step" and layer.directions == 1 and not layer.projected:
        reasons.append(
            f"a sequence of one step: weights are packed for it alone; fastseq.{_class_of(mode)}Cell uses "
            "them where they lie"
        )
    elif kernel == "cell":
        reasons.append(_one_step_a_call(mode))
    elif layer.steps > 1 and 0 < rows < 4:
        reasons.append(
            f"{many(rows, 'row')} a step in each part: reading the recurrent weights takes longer than "
            "multiplying by them; from 4 rows on it does not"
        )
    return isa, [words], reasons


def _one_step_a_call(mode: str) -> str:
    return f"one step a call; fastseq.{_class_of(mode)} runs all steps of a sequence in one call"


def _isa_reasons(dtype: torch.dtype) -> list[str]:
    info = _C.cpu_info()
    isa, here, built = info["isa"], info["isas"], info["compiled_isas"]
    reasons = []
    if better := here[here.index(isa) + 1 :]:
        reasons.append(
            f"FASTSEQ_ISA={isa} was set when fastseq was imported; this CPU has {', '.join(better)}"
        )
    elif missing := [name for name in built if name not in here]:
        reasons.append(f"this CPU has no {', no '.join(missing)}, for which there are kernels")
    if dtype is torch.bfloat16 and isa != "avx512bf16":
        reasons.append("bfloat16 is multiplied as float32, at its speed: only avx512bf16 multiplies bfloat16")
    elif dtype is torch.float16:
        faster = "; bfloat16 is multiplied as it is" if isa == "avx512bf16" else ""
        reasons.append(f"float16 is multiplied as float32, at its speed: no CPU kernel multiplies it{faster}")
    elif dtype is torch.float64:
        reasons.append("a vector has half as many float64 as float32")
    return reasons


def _thread_reasons(plan: dict[str, Any], most: int, units: str, variable: str, value: str) -> list[str]:
    """`units` of work are `most`; the environment variable forces a cut."""
    wanted, there = torch.get_num_threads(), plan["available_threads"]
    used = plan["partition"]["threads"]
    reasons = []
    if there < wanted:
        reasons.append(
            f"{there} of torch's {many(wanted, 'thread')} can be used: there are fewer in a forked child, "
            "within a parallel region, and by OMP_THREAD_LIMIT"
        )
    elif wanted == 1 and plan["threads_on_all_cpus"] > 1:
        more = plan["threads_on_all_cpus"]
        reasons.append(f"torch has one thread; torch.set_num_threads({more}) would give this call {more}")
    if forced := os.environ.get(variable):
        reasons.append(f"{variable}={forced} forces the cut")
    elif used < there:
        if used == most:
            what = f"{units} give {most}"
        else:
            what = f"the plan's arithmetic finds no faster cut; {variable}={value} forces one"
        reasons.append(f"{used} of {many(there, 'thread')}: {what}")
    return reasons


def _attention_in_words(plan: dict[str, Any], _: str, sizes: Attention, dtype: torch.dtype) -> Words:
    isa, cut = _C.cpu_info()["isa"], plan["partition"]
    words = f"{many(cut['threads'], 'thread')}, heads x tiles of queries in {cut['head_parts']} x "
    words += f"{cut['row_parts']} parts"
    units, most = "sequences x heads of key and value", sizes.batch * sizes.kv_heads
    if cut["key_parts"] > 1:
        words += f", keys in {cut['key_parts']} parts"
        if cut.get("split"):
            units, most = units + " x parts of the keys", most * cut["key_parts"]
    reasons = _isa_reasons(dtype)
    reasons += _thread_reasons(plan, most, units, "FASTSEQ_ATTENTION_PLAN", "HxR")
    if plan["kernel"] == "decode":
        rows = sizes.queries * sizes.heads // sizes.kv_heads
        per_key = torch.finfo(dtype).bits // 8 * (sizes.head_size + sizes.value_size)
        size = amount(per_key * sizes.batch * sizes.kv_heads * sizes.keys)
        reasons.append(
            f"{many(rows, 'query row')} for each key: {size} of keys and values are read once, where they "
            "lie, which takes longer than multiplying by them; fewer heads of key and value, or a smaller "
            "dtype, are fewer bytes"
        )
    return isa, [words], reasons


def _attention_blocks_in_words(plan: dict[str, Any], _: str, sizes: Attention, dtype: torch.dtype) -> Words:
    cut = plan["partition"]
    words = f"torch's operations, of {many(cut['batch'], 'sequence')}, "
    words += f"{many(cut['kv_heads'], 'head')} of key and value, {many(cut['rows'], 'row')} of queries "
    words += "and all keys at a time"
    return "", [words], [f"there is no kernel for {plan['why']}"]


# ------------------------------------------------------------------------------- where time loops are kernels


def _loop_in_words(plan: dict[str, Any], mode: str, layer: Layer, dtype: torch.dtype) -> Words:
    major, minor = plan["facts"][:2]
    architecture, kernel = f"compute capability {major}.{minor}", plan["kernel"]
    if kernel == "none":
        return architecture, ["there are no rows"], []
    if kernel == "cell":
        fused = plan["partition"]["fused"]
        words = "U h and the gates in one kernel" if fused else "torch's products, a kernel after those of U"
        return architecture, [words], [_one_step_a_call(mode)]
    chosen = plan["partition"]
    time = f"{_time(chosen)} by arithmetic for an H200, not measured"
    if kernel == "steps":
        words = ["for each step torch's products, and a kernel for what is left of it", time]
    else:
        groups, at_once = chosen["groups"], chosen["groups_at_once"]
        room = "all at once" if at_once == groups else f"{at_once} at a time"
        if kernel == "cluster":  # the hardware places them
            room = "as there is room"
        words = [
            f"{many(groups, 'group')} of {chosen['rows']} rows on {many(chosen['blocks'], 'block')} each, "
            f"{room}; {chosen['threads']} threads a block",
            *(_weights_in_words(product) for product in chosen["products"]),
            f"{amount(chosen['workspace_bytes'])} of workspace; {time}",
        ]
    return architecture, words, _loop_reasons(plan, layer, dtype)


def _dual_loop_in_words(plan: dict[str, Any], mode: str, layer: Layer, _: torch.dtype) -> Words:
    major, minor = plan["facts"][:2]
    architecture = f"compute capability {major}.{minor}"
    if plan["kernel"] == "none":
        return architecture, ["there are no rows"], []
    with_tangent = ", and of the numbers with the weight's tangent" * (plan["partition"]["planes"] == 3)
    words = "for each step one product of torch of numbers and tangents" + with_tangent
    twice = layer.projected or mode == "GRU_RESET_BEFORE"
    words += ", and a kernel for what is left of both" + ", and these two once more" * twice
    return architecture, [words], ["no kernel runs all steps of numbers and tangents: a loop in Python does"]


def _time(plan: dict[str, Any]) -> str:
    return f"{plan['microseconds']:.1f} us a step"


def _weights_in_words(product: dict[str, Any]) -> str:
    places = {
        "register_units": "in registers",
        "shared_units": "in shared memory",
        "streamed_units": "from L2 at every step",
    }
    shares = {place: product[name] / product["units"] for name, place in places.items()}
    return "weights " + ", ".join(f"{100 * share:.0f} % {place}" for place, share in shares.items() if share)


def _loop_reasons(plan: dict[str, Any], layer: Layer, dtype: torch.dtype) -> list[str]:
    chosen, kernel, free = plan["partition"], plan["kernel"], plan["not_forced"]
    reasons = []
    if forced := os.environ.get("FASTSEQ_CUDA_PLAN"):
        reasons.append(f"FASTSEQ_CUDA_PLAN={forced} forces this plan; without it {_plan_in_short(free)}")
    else:
        kinds = list(plan["alone"])
        for other in kinds[: kinds.index(kernel)]:
            reasons.append(f"not {other}: {_why_not(other, plan, layer)}")
    if kernel == "stream" and any(product["streamed_units"] for product in chosen["products"]):
        reasons.append(
            "the weights that fit neither registers nor shared memory are read from L2 at every step"
        )
    if kernel == "steps":
        reasons.append(
            "no shape is handed to cuDNN: a loop in Python, which holds the GIL, launches a product and a "
            "kernel for each step; whether cuDNN is faster here has not been measured"
        )
    elif chosen["groups_at_once"] < chosen["groups"]:
        rounds = -(-chosen["groups"] // chosen["groups_at_once"])
        reasons.append(
            f"{chosen['groups_at_once']} of {chosen['groups']} groups have room on {plan['facts'][2]} "
            f"multiprocessors: the layer runs in {rounds} rounds"
        )
    if dtype is torch.float32 and not plan["tf32"]:
        reasons.append(
            f"float32 is multiplied as it is; {precision.SETTING} lets tensor cores do it: "
            f"{_plan_in_short(plan['in_tf32'])}"
        )
    elif dtype is torch.float64:
        reasons.append("float64 does not run on tensor cores here; float32 as tf32, bfloat16 and float16 do")
    return reasons


def _plan_in_short(plan: dict[str, Any] | None) -> str:
    if plan is None:
        return "nothing fits"
    blocks = f" of {many(plan['blocks'], 'block')}" if "blocks" in plan else ""
    return f"{plan['kernel']}{blocks}, {_time(plan)}"


def _why_not(other: str, plan: dict[str, Any], layer: Layer) -> str:
    facts, alone = plan["facts"], plan["alone"][other]
    if alone is not None:
        return f"it fits, but takes {_time(alone)} by the same arithmetic"
    if other == "cluster" and facts[0] != 9:
        return f"its thread-block clusters are for compute capability 9.0, this is {facts[0]}.{facts[1]}"
    if other == "stream":
        room = " of the multiprocessors that each direction has" * (layer.directions == 2)
        return f"the operands of a step do not fit the shared memory{room}"
    most = facts[2] if other == "grid" else facts[5] if len(facts) > 5 else 16
    most = min(most, facts[2] // layer.directions)  # which run at the same time
    most = min(most, -(-layer.hidden_size // 8))  # a block has 8 hidden units at least
    each = ", for each direction" * (layer.directions == 2)
    return f"the layer does not fit the registers and shared memory of {many(most, 'block')}{each}"


# --------------------------------------------------------------------------------------- attention on a GPU


_PASSES = {
    "forward": "output",
    "weights": "weights",
    "grad_queries": "gradient of query",
    "grad_keys": "gradients of key and value",
    "grad_mask": "gradient of attn_mask",
}
_OWNED_BY_KEYS = {"grad_keys"}
# Of what is in the way of the kernels of Hopper GPUs (not_hopper of a plan), what would change it.
_NOT_HOPPER = {
    "elements of more than 16 bits": "bfloat16 and float16 have no more",
    "options other than masks": "softcap, alibi_slopes, dropout_p, gradients of weights are general kernels'",
    "no queries or keys": "there is nothing to multiply",
    "tensors whose rows do not begin at multiples of 16 bytes": "contiguous ones of 8, 16, 24... features do",
    "the shared memory of a block": "tiles of smaller heads fit it",
    "few rows of a key head": "with 32 keys or more for each, parts of these fill the GPU",
    "another kernel is forced": "unset FASTSEQ_CUDA_ATTENTION_PLAN",
    "few keys": "more than 16 are not few",
}


def _cuda_attention_in_words(plan: dict[str, Any], _: str, sizes: Attention, dtype: torch.dtype) -> Words:
    major, minor = plan["facts"][:2]
    architecture, chosen = f"compute capability {major}.{minor}", plan["partition"]
    if plan["kernel"] == "none":
        return architecture, ["there are no query heads"], []
    words = [_pass_in_words(name, one) for name, one in chosen["passes"].items()]
    if chosen.get("parts", 1) > 1:
        words.append(f"keys in {chosen['parts']} parts of {chosen['part_keys']}, joined by one more kernel")
    if chosen.get("mask_parts", 1) > 1:
        words.append(
            f"the gradient of attn_mask in {chosen['mask_parts']} parts, which are added up in order"
        )
    if chosen["workspace_bytes"]:
        words.append(f"{amount(chosen['workspace_bytes'])} of workspace")
    reasons = []
    if forced := os.environ.get("FASTSEQ_CUDA_ATTENTION_PLAN"):
        reasons.append(f"FASTSEQ_CUDA_ATTENTION_PLAN={forced} forces the kernel")
    if obstacle := chosen.get("not_hopper"):
        reasons.append(f"not hopper: {obstacle}; {_NOT_HOPPER.get(obstacle, 'it is for 9.0')}")
    other = plan.get("in_any_order", plan["kernel"])
    if other != plan["kernel"]:
        reasons.append(
            f"foretold for deterministic=True; with False it is {other}, which makes fewer products"
        )
    if dtype is torch.float32 and not plan["tf32"]:
        reasons.append(
            "float32 is multiplied in three tf32 products, so that nothing of it is lost; "
            f"{precision.SETTING_OF_PRODUCTS} allows a single one"
        )
    elif dtype is torch.float64:
        reasons.append("float64 has a small part of the rate of float32 on tensor cores")
    if chosen["features"] > max(sizes.head_size, sizes.value_size):
        reasons.append(f"tiles have room for heads of {chosen['features']} features")
    return architecture, words, reasons


def _pass_in_words(name: str, one: dict[str, Any]) -> str:
    own, other = ("keys", "rows") if name in _OWNED_BY_KEYS else ("rows", "keys")
    return (
        f"{_PASSES[name]}: {many(one['blocks'], 'block')} of {one['threads']} threads, {one['own']} {own} by "
        f"{one['other']} {other} at a time"
    )


ENGINES: dict[str, Callable[..., Words]] = {
    "cpu": _cpu_in_words,
    "cpu_attention": _attention_in_words,
    "attention_blocks": _attention_blocks_in_words,
    "loop": _loop_in_words,
    "dual_loop": _dual_loop_in_words,
    "cuda_attention": _cuda_attention_in_words,
}
