"""The compiled module. Its contract, with the shape of every address, is csrc/fastseq.h."""

from typing import Any

from torch import Tensor

CELLS: dict[str, dict[str, Any]]  # mode -> code, gates, saved, cell_state
DTYPES: dict[str, int]  # "float32" -> code
MOST_FUSED_ROWS: int  # of cell_forward with weight_hh
UNIT_QUANTUM: int  # the least hidden units of a unit part of recurrent_plan

# Addresses are ints, 0 where there is none; strides count elements.
def recurrent_forward(
    cell: int,
    dtype: int,
    threads: int,
    steps: int,
    batch: int,
    batch_sizes: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    reversed: bool,
    resets: int,
    one_step: bool,
    saves_states: bool,
    input: int,
    input_stride_t: int,
    input_stride_b: int,
    input_stride_i: int,
    output: int,
    output_stride_t: int,
    output_stride_b: int,
    # each: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, h_n, c_n, saved
    directions: tuple[tuple[int, ...], ...],
    /,
) -> None: ...
def recurrent_backward(
    cell: int,
    dtype: int,
    threads: int,
    steps: int,
    batch: int,
    batch_sizes: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    reversed: bool,
    resets: int,
    grad_clip: float,  # below 0: none
    truncate: int,  # 0: none
    input: int,
    input_stride_t: int,
    input_stride_b: int,
    input_stride_i: int,
    output: int,
    output_stride_t: int,
    output_stride_b: int,
    grad_output: int,
    grad_output_stride_t: int,
    grad_output_stride_b: int,
    grad_output_stride_i: int,
    grad_input: int,
    grad_input_stride_t: int,
    grad_input_stride_b: int,
    # each: the ten above, grad_h_n, grad_c_n, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh,
    # grad_weight_hr, grad_h0, grad_c0, grad_hidden
    directions: tuple[tuple[int, ...], ...],
    /,
) -> None: ...

# The same of numbers and their tangents: the first eleven arguments of recurrent_forward, then those below. A
# tangent's address is 0 where it is zero.
def recurrent_dual_forward(*arguments: Any) -> None:
    """..., one_step: False, saves_states: False, truncate, known, then for numbers and again for tangents
    input, output, and directions, as recurrent_forward has them. known: output and saved of numbers are
    read."""

def recurrent_dual_backward(*arguments: Any) -> None:
    """..., resets, grad_clip, truncate, known, then for numbers and again for tangents input, output,
    grad_output, grad_input and directions, as recurrent_backward has them. known: grad_hidden is read."""

def use_tensors(tensor: type, parameter: type, /) -> bool: ...  # whether recurrent_cell can read them

# False if the tensors are not dense ones on the CPU that fit together; then nothing was done.
def recurrent_cell(
    cell: int,
    threads: int,
    input: Any,
    h0: Any,
    c0: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    h: Any,
    c: Any,
    saved: Any,
    /,
) -> bool: ...
def recurrent_plan(
    cell: int,
    dtype: int,
    threads: int,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    directions: int,
    backward: bool,
    planes: int,  # 2 with tangents
    /,
) -> dict[str, int | str]: ...

# False if the tensors are not dense ones on the CPU that fit together; then nothing was done.
def attention(
    threads: int,
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    /,
) -> bool: ...

# Attention. A head is (address, strides of batch, head and row), rows (address, strides of batch and head), a
# mask (address, kind, strides of batch, head, query and key), of kind 0: none, 1: bool, 2: the dtype or 3:
# float32. Of packed sequences, which have cu_seqlens, the stride of batch is not read.
def attention_forward(
    dtype: int,
    threads: int,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_size: int,
    value_size: int,
    left: int,
    right: int,
    bottom_right: bool,
    seed: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    key_lengths: int,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    output: tuple[int, ...],
    lse: tuple[int, ...],
    highest: tuple[int, ...],
    inverse_sum: tuple[int, ...],
    attn_mask: tuple[int, ...],
    alibi_slopes: tuple[int, ...],  # rows
    sinks: int,
    weights: tuple[int, ...],
    remainder: tuple[int, ...],  # like output
    /,
) -> None: ...
def attention_backward(
    dtype: int,
    threads: int,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_size: int,
    value_size: int,
    left: int,
    right: int,
    bottom_right: bool,
    seed: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    key_lengths: int,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    output: tuple[int, ...],
    highest: tuple[int, ...],
    inverse_sum: tuple[int, ...],
    attn_mask: tuple[int, ...],
    alibi_slopes: tuple[int, ...],
    sinks: int,
    grad_output: tuple[int, ...],
    grad_lse: tuple[int, ...],
    grad_weights: tuple[int, ...],
    grad_query: tuple[int, ...],
    grad_key: tuple[int, ...],
    grad_value: tuple[int, ...],
    grad_mask: tuple[int, ...],  # address, strides of batch, head, query and key
    grad_sinks: int,
    remainder: tuple[int, ...],
    /,
) -> None: ...

# The numbers of attention_forward, without weights; then query, key and value of tangents, attn_mask and
# sinks of these, and of the tangents of results output, remainder and lse.
def attention_dual_forward(*numbers: Any) -> None: ...

# The numbers of attention_backward, without grad_weights; then of tangents query, key, value, attn_mask,
# sinks, output, remainder, lse, grad_output and grad_lse, and of the tangents that are written grad_query,
# grad_key, grad_value, grad_mask and grad_sinks. Both grad_mask are in the dtype of sums and filled with
# zeros, and have the same strides.
def attention_dual_backward(*numbers: Any) -> None: ...
def attention_plan(
    dtype: int,
    threads: int,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_size: int,
    value_size: int,
    backward: bool,
    keeps: bool,  # whether the forward pass leaves highest and inverse_sum
    *has_dimension: bool,  # of the mask that gets a gradient, if one does: batch, head, query, key
) -> dict[str, Any]: ...
def available_threads(requested: int, /) -> int: ...  # of those, how many a call may use here and now

# ---- the CUDA engine; all but the plans only where cuda_info()["built"], and in the tests' host twin ----

class LoopPlan:
    @property
    def kernel(self) -> str: ...  # cluster, grid, stream or steps
    @property
    def workspace_bytes(self) -> int: ...
    def describe(self) -> dict[str, Any]: ...

def loop_plan(
    cell: int,
    dtype: int,
    tf32: bool,
    steps: int,
    batch: int,
    hidden_size: int,
    proj_size: int,
    directions: int,
    packed: bool,
    backward: bool,
    # compute capability (two numbers), multiprocessors, bytes of shared memory of a block, bytes of L2; if
    # not what is usual, most blocks of a cluster
    device: tuple[int, ...],
    forced: str,  # FASTSEQ_CUDA_PLAN
    /,
) -> LoopPlan: ...

class AttentionPlan:
    @property
    def workspace_bytes(self) -> int: ...
    def describe(self) -> dict[str, Any]: ...

def cuda_attention_plan(
    problem: tuple[int, ...],  # cuda_attention.Problem
    device: tuple[int, ...],  # as of loop_plan
    forced: str,  # FASTSEQ_CUDA_ATTENTION_PLAN
    /,
) -> AttentionPlan: ...

# 0: done; -1: nothing was done, something is not as usual; else the bytes of workspace that are needed.
def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    device_type: int,  # loops.Engine
    tf32: bool,
    facts: tuple[int, ...],
    index: int,
    stream: int,
    workspace: int,
    /,
) -> int: ...

# The numbers are those of attention_forward and its like, then tf32, one_pass, address of the seed,
# device, stream, workspace. All addresses are on the device.
def cuda_attention_forward(plan: AttentionPlan, /, *numbers: Any) -> None: ...
def cuda_attention_backward(plan: AttentionPlan, /, *numbers: Any) -> None: ...
def cuda_attention_dual_forward(plan: AttentionPlan, /, *numbers: Any) -> None: ...

# Of the gradients the tangents alone.
def cuda_attention_dual_backward(plan: AttentionPlan, /, *numbers: Any) -> None: ...
def loop_forward(
    plan: LoopPlan,
    cell: int,
    dtype: int,
    tf32: bool,
    device: int,
    stream: int,
    steps: int,
    batch: int,
    batch_sizes: int,
    hidden_size: int,
    proj_size: int,
    reversed: bool,
    lengths: int,
    resets: int,
    saves_states: bool,
    pre: int,
    output: int,
    output_stride_t: int,
    output_stride_b: int,
    workspace: int,
    # each: weight_hh, bias_hh, weight_hr, h0, c0, h_n, c_n, saved
    directions: tuple[tuple[int, ...], ...],
    /,
) -> None: ...
def loop_backward(
    plan: LoopPlan,
    cell: int,
    dtype: int,
    tf32: bool,
    device: int,
    stream: int,
    steps: int,
    batch: int,
    batch_sizes: int,
    hidden_size: int,
    proj_size: int,
    reversed: bool,
    lengths: int,
    resets: int,
    grad_clip: float,  # infinite: none
    cuts: int,
    grad_pre: int,
    output: int,
    output_stride_t: int,
    output_stride_b: int,
    grad_output: int,
    grad_output_stride_t: int,
    grad_output_stride_b: int,
    grad_output_stride_r: int,
    workspace: int,
    # each: the eight above, grad_h_n, grad_c_n, grad_h0, grad_c0, previous, grad_candidate, grad_hidden
    directions: tuple[tuple[int, ...], ...],
    /,
) -> None: ...

# One step of all directions. `common` and the directions' addresses are the same for all steps of a sequence;
# rows of each direction are (t, offset, rows) of its step, the same of the one after it, or in the backward
# pass before it, and whether gradients of states do not cross between them.
def cell_forward(
    # cell, dtype, device, stream, part, packed, wide, hidden_size, lengths, resets, saves_states, weight_hh,
    # pre, output, its strides of t and b
    common: tuple[int, ...],
    # each: product, bias_hh, h, c, h_next, c_next, saved
    directions: tuple[tuple[int, ...], ...],
    rows: tuple[tuple[int, ...], ...],
    /,
) -> None: ...
def cell_backward(
    # cell, dtype, device, stream, part, packed, wide, hidden_size, lengths, resets, grad_clip, grad_pre,
    # output, its strides of t and b, grad_output, its strides of t, b and feature
    common: tuple[float, ...],
    # each: saved, h0, c0, grad, product, grad_c, grad_product, direct, grad_c_previous, previous,
    # grad_candidate, grad_hidden, operand
    directions: tuple[tuple[int, ...], ...],
    rows: tuple[tuple[int, ...], ...],
    /,
) -> None: ...

# The same over dual numbers: common goes on with the tangents of pre and output, or of grad_pre, output and
# grad_output, and row_step; each direction with its tangents, product_of_weight_tangent, and h_next_again or
# grad_product_again.
def cell_dual_forward(
    common: tuple[int, ...], directions: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, ...], ...], /
) -> None: ...
def cell_dual_backward(
    common: tuple[float, ...], directions: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, ...], ...], /
) -> None: ...
def hopper_primitive(
    name: str,  # of a kernel of csrc/cuda/hopper_primitives.cu or hopper_products.cu, for the tests
    device: int,
    stream: int,
    addresses: list[int],  # what it writes, then what it reads
    numbers: list[int],
    /,
) -> None: ...
def cuda_device_facts(device: int, /) -> tuple[int, ...]: ...  # as loop_plan takes them
def cpu_info() -> dict[str, Any]: ...  # isa: str, isas: list[str], compiled_isas: list[str]
def cuda_info() -> dict[str, Any]: ...  # built: bool, reason: str, devices: int, architectures: list[str]
def fma_peak(dtype: int, threads: int, seconds: float, /) -> float: ...
