"""Second derivatives and forward mode of attention, on the CPU or a GPU, against torch's operations
(SDPBackend.MATH), which are what torch has them by.

    python benchmarks/derivatives_attention.py
    python benchmarks/derivatives_attention.py --seconds 20 --case "causal .*"
    python benchmarks/derivatives_attention.py --device cuda --seconds 1

Two things are timed, in turn with torch in one process:

    jvp               results and their tangents along directions of query, key and value, by dual numbers
    double backward   the gradients with create_graph, and the gradients of their products with a direction

and both also against fastseq's own forward pass and its forward and backward pass.
"""

from __future__ import annotations

import argparse
import re
import statistics

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastseq
from paired import in_turn
from timers import CudaTimer, HostTimer

SHAPES = {  # B, H, S, D
    "cpu": [(4, 8, 512, 64), (1, 8, 1024, 64)],
    "cuda": [(4, 16, 2048, 64), (4, 8, 2048, 128)],
}


def torchs(*x, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*x, **options)


def forward_mode(f, x, along, incoming):
    def call():
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(a.detach(), t) for a, t in zip(x, along, strict=True))
            return forward_ad.unpack_dual(f(*duals))

    return call


def double_backward(f, x, along, incoming):
    def call():
        grads = torch.autograd.grad(f(*x), x, incoming, create_graph=True)
        return torch.autograd.grad(grads, x, along)

    return call


def forward(f, x, along, incoming):
    def call():
        with torch.no_grad():
            return f(*x)

    return call


def training(f, x, along, incoming):
    return lambda: torch.autograd.grad(f(*x), x, incoming)


def run(case, shape, is_causal, dtype, seconds, device):
    x = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    along = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]
    given = (x, along, torch.randn(shape, dtype=dtype, device=device))
    cells = []
    for make, plain in ((forward_mode, forward), (double_backward, training)):

        def ours(*x):
            return fastseq.scaled_dot_product_attention(*x, is_causal=is_causal)

        functions = {
            "torch": make(lambda *x: torchs(*x, is_causal=is_causal), *given),
            "fastseq": make(ours, *given),
            "plain": plain(ours, *given),
        }
        for function in functions.values():
            function()
        rounds = in_turn(functions, None, seconds, 3, CudaTimer() if device == "cuda" else HostTimer())
        cells += [
            statistics.median(rounds.ratios(a, b)) for a, b in (("torch", "fastseq"), ("fastseq", "plain"))
        ]
    print(f"| {case} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6, help="for each of two comparisons of a case")
    parser.add_argument("--case", default="", help="only cases that this regular expression finds")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(
        "| | jvp, times torch's speed | jvp / forward | double backward, times torch's speed | / training |"
    )
    print("|---|---:|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[options.device]:
            for is_causal in (False, True):
                sizes = "B{} H{} S{} D{}".format(*shape)
                case = f"{'causal' if is_causal else 'full'}, {sizes}, {str(dtype).removeprefix('torch.')}"
                if re.search(options.case, case):
                    run(case, shape, is_causal, dtype, options.seconds, options.device)


if __name__ == "__main__":
    main()
