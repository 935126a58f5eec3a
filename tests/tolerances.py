"""The one table of tolerances. No test has a number of its own.

The rule: measured against the float64 reference, the error may be at most twice torch's own error in the
same dtype on the same data, plus a few units in the last place of the tensor's largest element (torch is
sometimes exact by luck).

The exception: a tensor of a single element may be the small difference of larger numbers, with no other
element to show their size (the GRU cell with B = I = H = 1: h' = (1 - z) n + z h is 0.013 of terms ten times
larger). The suite's data are of size 1, so its rounding is taken as that of a number of size 1.

Where there is no such reference, because two computations of the same thing are compared, one of the entries
below says how close they are: torch.testing.assert_close(a, b, **ENTRY).
"""

import torch

# Units in the last place, of the dtype, that are forgiven whatever torch's error is. float64 is compared with
# a reference in float64, which is itself a few units off.
FLOOR_ULPS = {torch.float64: 16, torch.float32: 4, torch.bfloat16: 3, torch.float16: 3}
TIMES_TORCH = 2

# Attention, the root of the mean of squared errors over many draws, relative to that of the numbers, in units
# of the dtype: twice torch's own would be far from it.
ROOT_MEAN_SQUARE_ERROR = {"times": 1.6, "units": 0.5}
# float64, whole networks and their gradients: sums of some ten terms of size 1 to 10, in another order.
SAME_FLOAT64 = {"rtol": 0, "atol": 1e-12}
# float64, the states of a few steps: numbers below 1, a few units off after each step.
SAME_STATES_FLOAT64 = {"rtol": 0, "atol": 1e-14}
# float64, states below 1 of a few steps, in which a single addition is done in another order.
SAME_EQUATION_FLOAT64 = {"rtol": 0, "atol": 1e-15}
# float32, beside torch.nn itself: what torch.testing allows.
SAME_FLOAT32 = {"rtol": 1.3e-6, "atol": 1e-5}
# The decimals with which the worked example is printed.
WORKED_EXAMPLE = {"rtol": 0, "atol": 1e-10}
# float64, losses of ten steps of Adam, which divides by gradients and so enlarges what rounding leaves.
TRAINING_CURVE = {"rtol": 1e-9, "atol": 0}
# float32, losses of a dozen steps of the demo, in nats: some units in the last place of a loss of 4.
DEMO_CURVES = {"rtol": 0, "atol": 1e-5}
# The table that the demo prints has three and four decimals.
DEMO_TABLE = {"rtol": 1e-3, "atol": 0}
# The least by which results of two different networks are apart, far above any rounding.
DIFFERENT_NETWORKS = 1e-3
# Finite differences of size eps in float64 leave an error of eps^2 and of rounding / eps; torch's own choice.
# Two calls of one backward pass are the same bits.
GRADCHECK = {"eps": 1e-6, "rtol": 1e-3, "atol": 1e-5, "nondet_tol": 0}
# float64, central differences of that size: an error of its square, and of rounding divided by it.
EPSILON = 1e-6
DIFFERENCES = {"rtol": 1e-6, "atol": 1e-7}


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_accurate_as_torch(ours, torchs, reference, dtype, name="result", units=None, terms=0.0):
    """`ours` and `torchs` in `dtype`, `reference` in float64, all of one shape; `name` is for the message.

    `units` is the dtype in whose units the floor is counted, if not `dtype`: that of the numbers that it was
    computed from. `terms` is the size of the terms of which the tensor is the difference, if they cancel out.
    """
    assert ours.dtype == dtype, f"{name}: dtype {ours.dtype}, should be {dtype}"
    assert ours.shape == reference.shape, (
        f"{name}: shape {tuple(ours.shape)}, should be {tuple(reference.shape)}"
    )
    reference = reference.double()
    error = largest(ours.double() - reference)
    torchs_error = largest(torchs.double() - reference)
    size = max(largest(reference), terms, 1.0 if reference.numel() == 1 else 0.0)
    units = units or dtype
    floor = FLOOR_ULPS[units] * torch.finfo(units).eps * size
    assert error <= TIMES_TORCH * torchs_error + floor, (
        f"{name}: error {error:.3g}, torch's own {torchs_error:.3g}, floor {floor:.3g}, "
        f"largest element {largest(reference):.3g}"
    )
