"""The one table of tolerances.

The rule: measured against the float64 reference, the error may be at most twice torch's own error in the
same dtype on the same data, plus a few units in the last place of the tensor's largest element (torch is
sometimes exact by luck).

The exception: a tensor of a single element may be the small difference of larger numbers, with no other
element to show their size (the GRU cell with B = I = H = 1: h' = (1 - z) n + z h is 0.013 of terms ten times
larger). The suite's data are of size 1, so its rounding is taken as that of a number of size 1.
"""

import torch

# Units in the last place, of the dtype, that are forgiven whatever torch's error is. float64 is compared with
# a reference in float64, which is itself a few units off.
FLOOR_ULPS = {torch.float64: 16, torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}
TIMES_TORCH = 2


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_accurate_as_torch(ours, torchs, reference, dtype, name="result"):
    """`ours` and `torchs` in `dtype`, `reference` in float64, all of one shape; `name` is for the message."""
    assert ours.dtype == dtype, f"{name}: dtype {ours.dtype}, should be {dtype}"
    assert ours.shape == reference.shape, (
        f"{name}: shape {tuple(ours.shape)}, should be {tuple(reference.shape)}"
    )
    reference = reference.double()
    error = largest(ours.double() - reference)
    torchs_error = largest(torchs.double() - reference)
    size = largest(reference) if reference.numel() > 1 else max(1.0, largest(reference))
    floor = FLOOR_ULPS[dtype] * torch.finfo(dtype).eps * size
    assert error <= TIMES_TORCH * torchs_error + floor, (
        f"{name}: error {error:.3g}, torch's own {torchs_error:.3g}, floor {floor:.3g}, "
        f"largest element {largest(reference):.3g}"
    )
