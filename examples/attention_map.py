"""Train a small vision transformer twice, with torch.nn and with fastseq, and draw what it looks at.

    python examples/attention_map.py
    python examples/attention_map.py --heads 8 --layers 3 --steps 1000

The model tells the ten handwritten digits of scikit-learn apart, images of 8 x 8 pixels:

    image -> a patch around each pixel, each a token, and one token more, the class token
          -> transformer layers -> what has become of the class token -> linear -> scores of the ten digits

The class token starts as the same vector for every image. All that it knows of an image in the end it has
gathered from the patches by attention: in each layer, each head gives every token a weight, and the weights
of a head add up to 1. So these weights show where the model looks. They are what is drawn, for one image of
each digit that it was not trained on.

Two copies of the model start from the same weights and see the same images in the same order; only the
library that computes the attention differs. They are trained in turns of a few steps, so that whatever else
the machine is doing slows both alike.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into a file; needs no display

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import fastseq

LIBRARIES = {"torch.nn": torch.nn, "fastseq": fastseq}
SIDE = 8  # pixels of an image in each direction
DIGITS = 10
HELD_OUT = 0.2  # share of the images that is not trained on
TURN = 10  # steps that one library trains before the other has its turn
PEAK_LEARNING_RATE = 3e-3
CLIP = 1.0  # largest norm of the gradient
LARGEST_DOT = 600  # area of the dot of a patch that gets all of a head's attention, in square points


class Block(nn.Module):
    """A transformer layer with its normalizations before attention and network (R. Xiong et al., 2020)."""

    def __init__(self, library, embedding_size, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(embedding_size)
        self.attention = library.MultiheadAttention(embedding_size, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(embedding_size)
        self.network = nn.Sequential(
            nn.Linear(embedding_size, 2 * embedding_size),
            nn.GELU(),
            nn.Linear(2 * embedding_size, embedding_size),
        )

    def forward(self, x, need_weights=False):
        """x (B, S, E) -> (B, S, E), weights (B, heads, S, S) or None."""
        y = self.norm1(x)
        y, weights = self.attention(y, y, y, need_weights=need_weights, average_attn_weights=False)
        x = x + y
        return x + self.network(self.norm2(x)), weights


class VisionTransformer(nn.Module):
    """Scores of the ten digits (A. Dosovitskiy et al., 2021).

    `library` is the module that MultiheadAttention is taken from.
    """

    def __init__(self, library, patch_size, embedding_size, heads, layers):
        super().__init__()
        self.patch_size = patch_size  # odd; patches overlap, and zeros surround the image
        self.embedding = nn.Linear(patch_size**2, embedding_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, embedding_size))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + SIDE**2, embedding_size))
        self.blocks = nn.ModuleList(Block(library, embedding_size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(embedding_size)
        self.linear = nn.Linear(embedding_size, DIGITS)

    def forward(self, images, need_weights=False):
        """images (B, 8, 8) -> scores (B, 10), and each layer's weights (B, heads, 65, 65) or None."""
        around = self.patch_size // 2
        patches = nn.functional.unfold(images[:, None], self.patch_size, padding=around).transpose(1, 2)
        class_token = self.class_token.expand(len(images), -1, -1)
        x = torch.cat([class_token, self.embedding(patches)], dim=1) + self.position
        weights = []
        for block in self.blocks:
            x, seen = block(x, need_weights)
            weights.append(seen)
        return self.linear(self.norm(x[:, 0])), weights


class Trainer:
    """One model, its optimizer, and what its training has cost so far."""

    def __init__(self, model, steps):
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1
        )
        self.losses = []
        self.turns = []  # seconds for each step of a turn
        self.seconds = 0.0

    def train(self, batches):
        """One optimizer step for each batch (images, labels)."""
        start = time.perf_counter()
        for images, labels in batches:
            scores, _ = self.model(images)
            loss = nn.functional.cross_entropy(scores, labels)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.turns.append(seconds / len(batches))

    @property
    def step_time(self):
        """Of a step of the middle one of all turns, in ms."""
        return 1e3 * statistics.median(self.turns)


def read_digits(generator):
    """Images (B, 8, 8) of 0 to 1 and labels (B,), to train on and held out."""
    digits = load_digits()
    images = torch.tensor(digits.images / digits.images.max(), dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=generator)
    held_out, trained_on = order.split([int(HELD_OUT * len(order)), len(order) - int(HELD_OUT * len(order))])
    return (images[trained_on], labels[trained_on]), (images[held_out], labels[held_out])


def shifted(images, generator):
    """Each image moved by up to a pixel in each direction, so that there is more to learn from."""
    wide = nn.functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(3, (2, len(images), 1, 1), generator=generator)
    i, j = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    return wide[torch.arange(len(images))[:, None, None], down + i, right + j]


def endless_batches(images, labels, batch_size, generator):
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            yield shifted(images[chosen], generator), labels[chosen]


@torch.no_grad()
def examine(model, images, labels):
    """Share of right answers."""
    scores, _ = model.eval()(images)
    return (scores.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def look(model, images):
    """Answers (B,), their probabilities, and the class token's weights in the last layer (B, heads, 8, 8)."""
    scores, weights = model.eval()(images, need_weights=True)
    probability, answer = scores.softmax(1).max(1)
    of_patches = weights[-1][:, :, 0, 1:]  # not the weight that the class token gives itself
    return answer, probability, of_patches.unflatten(-1, (SIDE, SIDE))


def one_of_each(labels):
    """The place of the first image of each digit."""
    return torch.tensor([int((labels == digit).nonzero()[0]) for digit in labels.unique()])


def speed_up(trainers):
    """Of fastseq: the median of the ratios of turns that followed each other."""
    theirs, ours = (trainer.turns for trainer in trainers.values())
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def differences(trainers):
    a, b = (trainer.losses for trainer in trainers.values())
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def draw(images, answers, probabilities, weights, path):
    """A column for each image; below it the same image in grey, with what each head looks at as dots."""
    heads = weights.shape[1]
    figure, axes = plt.subplots(
        heads + 1,
        len(images),
        figsize=(1.1 * len(images) + 1.2, 1.1 * heads + 2.9),
        layout="constrained",
        squeeze=False,
    )
    y, x = (
        place.flatten() for place in torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    )
    for column, image in enumerate(images):
        axes[0, column].imshow(image, cmap="gray_r")
        axes[0, column].set_title(f"{answers[column]} ({probabilities[column]:.0%})", fontsize=11)
        for head in range(heads):
            axis = axes[head + 1, column]
            axis.imshow(image, cmap="gray_r", vmax=3)
            sizes = LARGEST_DOT * weights[column, head].flatten()
            axis.scatter(x, y, s=sizes, color=f"C{head}", alpha=0.8, linewidths=0)
    for axis, name in zip(axes[:, 0], ["image", *(f"head {head + 1}" for head in range(heads))], strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
    figure.suptitle(
        "Where a small vision transformer looks to tell which digit it sees\n"
        "(above each image: its answer, and how sure it is)",
    )
    shares = {
        share: axis.scatter([], [], s=LARGEST_DOT * share, color="#555555") for share in (0.05, 0.25, 1)
    }
    figure.legend(
        shares.values(),
        [f"{share:.0%}" for share in shares],
        title="the larger a dot, the more its head (in the last layer) attends to the patch around it",
        loc="outside lower center",
        ncols=len(shares),
        labelspacing=1.2,
        columnspacing=3,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"given {text}, accepted is a number above 0")
    return value


positive.__name__ = "int"  # argparse puts it into "invalid int value"


def parse_arguments():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag, help, **options):
        parser.add_argument(flag, help=help + " (default: %(default)s)" * ("default" in options), **options)

    add("--steps", "optimizer steps", type=positive, default=300)
    add("--batch-size", "images of a step", type=positive, default=64)
    add("--patch-size", "pixels of a patch in each direction", type=int, choices=[1, 3, 5], default=3)
    add("--embedding-size", "features of a token", type=positive, default=64)
    add("--heads", "heads of each layer", type=positive, default=4)
    add("--layers", "transformer layers", type=positive, default=2)
    add("--seed", "of the weights, and of the order of the images", type=int, default=0)
    add("--threads", "CPU threads (default: torch's choice)", type=positive)
    add("--figure", "of the weights", type=Path, default=Path("out/attention_map.png"), metavar="FILE")
    arguments = parser.parse_args()
    if arguments.embedding_size % arguments.heads:
        parser.error(
            f"argument --heads: given {arguments.heads} for --embedding-size {arguments.embedding_size}\n"
            "accepted: a number that divides it\n"
            f"try --heads {math.gcd(arguments.heads, arguments.embedding_size)}"
        )
    return arguments


def main():
    arguments = parse_arguments()
    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    train_set, held_out = read_digits(generator)

    sizes = (arguments.patch_size, arguments.embedding_size, arguments.heads, arguments.layers)
    models = {name: VisionTransformer(library, *sizes) for name, library in LIBRARIES.items()}
    models["fastseq"].load_state_dict(models["torch.nn"].state_dict())
    trainers = {name: Trainer(model, arguments.steps) for name, model in models.items()}

    parameters = sum(p.numel() for p in models["fastseq"].parameters())
    print("images    handwritten digits that come with scikit-learn, 8 x 8 pixels")
    print(f"          {len(train_set[0]):,} to train on, {len(held_out[0]):,} held out")
    patch = f"{arguments.patch_size} x {arguments.patch_size}"
    print(f"tokens    {SIDE**2} patches of {patch} pixels, one around each pixel, and the class token")
    print(f"model     {arguments.layers} layers of {arguments.embedding_size} with ", end="")
    print(f"{arguments.heads} heads, {parameters:,} parameters")
    print(f"training  {arguments.steps} steps of {arguments.batch_size} images on ", end="")
    print(f"{torch.get_num_threads()} CPU thread(s)\n", flush=True)

    batches = endless_batches(*train_set, arguments.batch_size, generator)
    first = next(batches)
    for model in models.values():  # a step of copies that are thrown away, as first calls cost more
        Trainer(copy.deepcopy(model), arguments.steps).train([first])
    with tqdm(total=arguments.steps, unit="step", desc="torch.nn and fastseq", dynamic_ncols=True) as bar:
        while bar.n < arguments.steps:
            turn = [next(batches) for _ in range(min(TURN, arguments.steps - bar.n))]
            for trainer in trainers.values():
                trainer.train(turn)
            losses = " ".join(f"{trainer.losses[-1]:.3f}" for trainer in trainers.values())
            bar.set_postfix_str(f"losses {losses}, fastseq {speed_up(trainers):.2f}x as fast", refresh=False)
            bar.update(len(turn))

    print(f"\n{'':10}{'ms/step':>10}{'seconds':>10}{'final loss':>12}{'right on held-out images':>27}")
    for name, trainer in trainers.items():
        final = statistics.fmean(trainer.losses[-20:])
        right = examine(trainer.model, *held_out)
        print(f"{name:10}{trainer.step_time:10.1f}{trainer.seconds:10.1f}{final:12.4f}{right:27.1%}")
    print("(loss: nats per image, mean of the last 20 steps)\n")
    print(
        f"speed-up  {speed_up(trainers):.2f}x, the whole training step (linear layers and optimizer included)"
    )
    print("          (the median of the ratios of turns that followed each other)")
    print(f"losses    largest difference at any step {max(differences(trainers)):.1e}", end="")
    print(f", mean {statistics.fmean(differences(trainers)):.1e}")

    images = held_out[0][one_of_each(held_out[1])]
    answers, probabilities, weights = look(models["fastseq"], images)
    draw(
        images,
        answers.tolist(),
        probabilities.tolist(),
        weights,
        arguments.figure,
    )
    print(f"figure    {arguments.figure}")
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing was written")
