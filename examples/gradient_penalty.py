"""What second derivatives of recurrent networks are for: a gradient penalty, and curvature.

    python examples/gradient_penalty.py
    python examples/gradient_penalty.py --steps 300 --hidden-size 64

First a critic over sequences is trained as in a Wasserstein GAN (Gulrajani et al. 2017). It should tell
sums of two sine waves from noise with the same spectrum of steps, its score changing by at most 1 where a
sequence changes by 1. So the loss has a term that is itself a gradient,

    loss = E[critic(noise)] - E[critic(waves)] + 10 E[(|d critic / d x| - 1)^2]

with x on the lines between both kinds, and training differentiates through that gradient.

Then the sharpest curvature of another loss is found: the largest eigenvalue of the Hessian H of a GRU that
predicts the next value of a wave, by power iteration. It only needs products H v, and these are made in two
ways that have to agree: by differentiating the gradient twice in reverse mode, and by forward mode over
reverse mode.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

import fastseq

LENGTH = 32


def waves(count: int) -> Tensor:
    """(LENGTH, count, 1): two sine waves each, of random frequencies, phases and heights."""
    t = torch.arange(LENGTH, dtype=torch.float32)[:, None, None]
    frequency, phase, height = torch.rand(3, 1, count, 2)
    return (height * torch.sin((0.2 + frequency) * t + 2 * math.pi * phase)).sum(2, keepdim=True)


def noise(count: int) -> Tensor:
    """The same numbers in another order: only time tells them apart."""
    values = waves(count)
    order = torch.rand(LENGTH, count, 1).argsort(0)
    return values.gather(0, order)


class Critic(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = fastseq.LSTM(1, hidden_size, num_layers=2)
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.layers(x)
        return self.score(h[-1]).squeeze(1)


def slopes(critic: Critic, real: Tensor, fake: Tensor) -> Tensor:
    """|d critic / d x| at a random point between each pair."""
    share = torch.rand(1, real.shape[1], 1)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return gradient.norm(dim=(0, 2))


def train(critic: Critic, steps: int, batch: int) -> None:
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(1, steps + 1):
        real, fake = waves(batch), noise(batch)
        distance = critic(real).mean() - critic(fake).mean()
        slope = slopes(critic, real, fake)
        loss = 10 * (slope - 1).square().mean() - distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}   distance {distance.item():6.3f}   slope {slope.mean().item():.3f}")


class Curvature:
    """Products of the Hessian of a loss with a vector that has the shapes of the parameters."""

    def __init__(self, hidden_size: int) -> None:
        self.model, self.readout = fastseq.GRU(1, hidden_size), nn.Linear(hidden_size, 1)
        self.x = waves(16)
        modules = (("gru", self.model), ("readout", self.readout))
        self.parameters = {
            f"{name}.{key}": x.detach() for name, module in modules for key, x in module.named_parameters()
        }

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        def of(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): x for k, x in parameters.items() if k.startswith(name)}

        output, _ = functional_call(self.model, of("gru"), (self.x[:-1],))
        return (functional_call(self.readout, of("readout"), (output,)) - self.x[1:]).square().mean()

    def forward_over_reverse(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(grad(self.loss), (self.parameters,), (vector,))[1]

    def reverse_over_reverse(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: x.requires_grad_() for name, x in self.parameters.items()}
        first = torch.autograd.grad(self.loss(leaves), list(leaves.values()), create_graph=True)
        product = sum((g * v).sum() for g, v in zip(first, vector.values(), strict=True))
        second = torch.autograd.grad(product, list(leaves.values()))
        for x in leaves.values():
            x.requires_grad_(False)
        return dict(zip(leaves, second, strict=True))


def norm(vector: dict[str, Tensor]) -> Tensor:
    return torch.stack([x.norm() for x in vector.values()]).norm()


def largest_eigenvalue(product, like: dict[str, Tensor], rounds: int) -> float:
    """Of the symmetric map `product`, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    vector = {name: torch.randn(x.shape, generator=generator) for name, x in like.items()}
    value = 0.0
    for _ in range(rounds):
        size = norm(vector)
        vector = {name: x / size for name, x in vector.items()}
        image = product(vector)
        value = sum((vector[name] * x).sum() for name, x in image.items()).item()
        vector = image
    return value


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"given: {text}; accepted: a number of at least 1; try: 100")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=60, help="of training the critic")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--hidden-size", type=positive, default=32)
    parser.add_argument("--rounds", type=positive, default=20, help="of power iteration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    start = time.perf_counter()
    train(Critic(options.hidden_size), options.steps, options.batch_size)
    print(f"gradient penalty: {time.perf_counter() - start:.1f} s\n")

    curvature = Curvature(options.hidden_size)
    for name in ("forward_over_reverse", "reverse_over_reverse"):
        start = time.perf_counter()
        value = largest_eigenvalue(getattr(curvature, name), curvature.parameters, options.rounds)
        seconds = time.perf_counter() - start
        print(f"largest eigenvalue, {name.replace('_', ' ')}: {value:.6f}   {seconds:.2f} s")


if __name__ == "__main__":
    main()
