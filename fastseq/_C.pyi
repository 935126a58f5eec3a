"""The compiled module. Its contract, with the shape of every address, is csrc/fastseq.h."""

from typing import Any

CELLS: dict[str, dict[str, Any]]  # mode -> code, gates, saved, cell_state
DTYPES: dict[str, int]  # "float32" -> code

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
    one_step: bool,
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
    # grad_weight_hr, grad_h0, grad_c0
    directions: tuple[tuple[int, ...], ...],
    /,
) -> None: ...
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
    /,
) -> dict[str, int | str]: ...
def cpu_info() -> dict[str, Any]: ...  # isa: str, isas: list[str], compiled_isas: list[str]
def cuda_info() -> dict[str, Any]: ...  # built: bool, reason: str, devices: int, architectures: list[str]
def fma_peak(dtype: int, threads: int, seconds: float, /) -> float: ...
