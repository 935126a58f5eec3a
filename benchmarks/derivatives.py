"""Second derivatives and forward mode of recurrent layers, against a loop of torch operations over time.

    python benchmarks/derivatives.py
    python benchmarks/derivatives.py --seconds 20 --case "LSTM T100 B1 .*"
    python benchmarks/derivatives.py --device cuda
    OMP_NUM_THREADS=1 python benchmarks/derivatives.py --cpu-time    # on a machine that does other things too

torch.nn's layers have second derivatives by the same formulas as such a loop, and no forward mode. The loop
multiplies all steps by W_ih at once, and each by W_hh. Three things are timed, in turn with the loop in one
process:

    double backward   the gradient of the input with create_graph, and those of its norm for the parameters
    jvp               torch.func.jvp along a direction of the input, the parameters constant
    HVP               forward over reverse: torch.func.jvp of torch.func.grad, for the parameters

and the jvp also against the plain forward pass, whose products it makes twice.
"""

from __future__ import annotations

import argparse
import re
import statistics

import torch
from torch.func import functional_call, grad, jvp

import fastseq
from paired import in_turn
from timers import CudaTimer, HostTimer, ProcessTimer

SHAPES = [(100, 1, 128, 256), (100, 16, 256, 256), (100, 64, 512, 512)]  # T, B, I, H


class Loop(torch.nn.Module):
    """A layer with the parameters of `module`, step by step."""

    def __init__(self, module: fastseq.LSTM | fastseq.GRU | fastseq.RNN) -> None:
        super().__init__()
        self.gates = {fastseq.LSTM: 4, fastseq.GRU: 3, fastseq.RNN: 1}[type(module)]
        for name, parameter in module.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = torch.nn.functional.linear(input, self.weight_ih_l0, self.bias_ih_l0)
        h = c = input.new_zeros(input.shape[1], self.weight_hh_l0.shape[1])
        outputs = []
        for a in x.unbind():
            u = torch.nn.functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            if self.gates == 4:
                i, f, g, o = (a + u).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.gates == 1:
                h = torch.tanh(a + u)
            else:
                (x_r, x_z, x_n), (u_r, u_z, u_n) = a.chunk(3, 1), u.chunk(3, 1)
                z = (x_z + u_z).sigmoid()
                n = torch.tanh(x_n + (x_r + u_r).sigmoid() * u_n)
                h = (1 - z) * n + z * h
            outputs.append(h)
        return torch.stack(outputs), None


def double_backward(module, input):
    leaf = input.clone().requires_grad_()
    parameters = list(module.parameters())

    def call():
        output, _ = module(leaf)
        (gradient,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)

    return call


def forward_mode(module, input):
    frozen = {name: x.detach() for name, x in module.named_parameters()}
    direction = torch.randn_like(input)
    return lambda: jvp(lambda x: functional_call(module, frozen, (x,))[0], (input,), (direction,))


def hessian_vector(module, input):
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    direction = {name: torch.randn_like(x) for name, x in parameters.items()}

    def loss(parameters):
        return functional_call(module, parameters, (input,))[0].square().mean()

    return lambda: jvp(grad(loss), (parameters,), (direction,))


def plain(module, input):
    def call():
        with torch.no_grad():
            return module(input)

    return call


def run(case, module, input, seconds, timer):
    loop = Loop(module)
    ratios = {}
    for name, make in (("double backward", double_backward), ("jvp", forward_mode), ("HVP", hessian_vector)):
        functions = {"loop": make(loop, input), "fastseq": make(module, input)}
        if name == "jvp":
            functions["forward"] = plain(module, input)
        for function in functions.values():
            function()
        rounds = in_turn(functions, None, seconds, 3, timer)
        ratios[name] = statistics.median(rounds.ratios("loop", "fastseq"))
        if name == "jvp":
            ratios["of forward"] = statistics.median(rounds.ratios("fastseq", "forward"))
    print(
        f"| {case} | {ratios['double backward']:.2f} | {ratios['jvp']:.2f} | {ratios['HVP']:.2f} "
        f"| {ratios['of forward']:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6, help="for each of three comparisons of a case")
    parser.add_argument("--case", default="", help="only cases that this regular expression finds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cpu-time", action="store_true", help="the processor's: with one thread")
    options = parser.parse_args()
    on_host = ProcessTimer if options.cpu_time else HostTimer
    timer = on_host() if options.device == "cpu" else CudaTimer()
    torch.manual_seed(0)
    print("| float32 | double backward | jvp | HVP | jvp / forward pass |")
    print("|---|---|---|---|---|")
    for name in ("LSTM", "GRU", "RNN"):
        for steps, batch, inputs, hidden in SHAPES:
            case = f"{name} T{steps} B{batch} {inputs}->{hidden}"
            if re.search(options.case, case):
                module = getattr(fastseq, name)(inputs, hidden).to(options.device)
                input = torch.randn(steps, batch, inputs).to(options.device)
                run(case, module, input, options.seconds, timer)


if __name__ == "__main__":
    main()
