"""Train a character language model twice, with torch.nn and with fastseq, and compare.

    python examples/char_lm.py                                 # LSTM on Python's own documentation
    python examples/char_lm.py --cell gru --text war_and_peace.txt --steps 2000

The model reads a text one character at a time and learns to guess the next one:

    character -> embedding -> two recurrent layers -> linear -> scores of the next character

Two copies of it start from the same weights and see the same text in the same order; only the library
that computes the recurrent layers differs. They are trained in turns of a few steps, so that whatever else
the machine is doing slows both alike. The loss curves should lie on top of each other: fastseq changes the
speed, not the result.

The text is cut into as many contiguous streams as the batch has rows. Every step continues each stream where
the step before ended and carries the recurrent state along (truncated backpropagation through time), so the
model can use what it read long before the current chunk.
"""

from __future__ import annotations

import argparse
import copy
import math
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into a file; needs no display

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

import fastseq

LIBRARIES = {"torch.nn": torch.nn, "fastseq": fastseq}
COLORS = {"torch.nn": "#ee7733", "fastseq": "#0077bb"}
HELD_OUT = 0.1  # share of the text that is not trained on
TURN = 10  # steps that one library trains before the other has its turn
PEAK_LEARNING_RATE = 3e-3
CLIP = 1.0  # largest norm of the gradient


class CharLM(nn.Module):
    """Scores of the next character; `library` is the module that LSTM, GRU or RNN is taken from."""

    def __init__(self, library, cell, vocabulary_size, embedding_size, hidden_size, num_layers):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.recurrent = getattr(library, cell)(embedding_size, hidden_size, num_layers)
        self.linear = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens, state=None):
        """tokens (T, B) -> scores (T, B, vocabulary_size), state after the last step."""
        output, state = self.recurrent(self.embedding(tokens), state)
        return self.linear(output), state


class Trainer:
    """One model, its optimizer, and what its training has cost so far."""

    def __init__(self, model, steps):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1
        )
        self.state = None
        self.losses = []
        self.turns = []  # seconds for each step of a turn
        self.seconds = 0.0

    def train(self, chunks):
        """One optimizer step for each chunk (inputs, targets, whether the streams begin anew)."""
        device = chunks[0][0].device
        losses = []
        synchronize(device)
        start = time.perf_counter()
        for inputs, targets, first in chunks:
            scores, state = self.model(inputs, None if first else self.state)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.schedule.step()
            self.state = detach(state)
            losses.append(loss.detach())
        self.losses += torch.stack(losses).tolist()  # waits for the device
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.turns.append(seconds / len(chunks))

    @property
    def step_time(self):
        """Of a step of the middle one of all turns, in ms."""
        return 1e3 * statistics.median(self.turns)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def detach(state):
    """An LSTM's state is the pair (h, c), the other cells' is h alone."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def default_text():
    """The English of Python's own help(), without tables, and each paragraph once; topics repeat some."""
    topics = pydoc_data.topics.topics
    paragraphs = [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
    paragraphs = [paragraph for paragraph in paragraphs if not paragraph.lstrip().startswith(("+", "|"))]
    return "\n\n".join(dict.fromkeys(paragraphs))


def as_streams(tokens, batch_size):
    """Cut a text (N,) into `batch_size` contiguous pieces, side by side: (N // batch_size, batch_size)."""
    length = len(tokens) // batch_size
    return tokens[: length * batch_size].view(batch_size, length).t().contiguous()


def chunks_of(streams, length):
    """Consecutive chunks of the streams: inputs, targets (the next characters), is it the first."""
    for start in range(0, len(streams) - length, length):
        yield streams[start : start + length], streams[start + 1 : start + length + 1], start == 0


def endless_chunks(streams, length):
    while True:
        yield from chunks_of(streams, length)


@torch.no_grad()
def perplexity(model, tokens, length):
    """exp of the mean loss per character; the number of equally likely characters it amounts to."""
    model.eval()
    total, count, state = 0.0, 0, None
    streams = as_streams(tokens, batch_size=16)
    for inputs, targets, _ in chunks_of(streams, min(length, len(streams) - 1)):
        scores, state = model(inputs, state)
        total += nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


@torch.no_grad()
def write(model, prompt, count, temperature, generator):
    """Draw `count` characters that continue `prompt` (T, 1), one recurrent step for each."""
    model.eval()
    scores, state = model(prompt)
    written = []
    for _ in range(count):
        probabilities = torch.softmax(scores[-1, 0].float().cpu() / temperature, dim=0)
        written.append(torch.multinomial(probabilities, 1, generator=generator))
        scores, state = model(written[-1].view(1, 1).to(prompt.device), state)
    return torch.cat(written)


def smoothed(losses, window):
    """Running mean over the last `window` steps; a single step's loss depends on the passage it falls on."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def draw(trainers, title, path):
    """The loss curves, fastseq dashed over torch.nn so that both can be seen, and their difference."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    window = max(1, len(trainers["torch.nn"].losses) // 50)
    for name, trainer in trainers.items():
        above.plot(
            smoothed(trainer.losses, window),
            label=f"{name}: {trainer.step_time:.1f} ms a step",
            color=COLORS[name],
            linewidth=5 if name == "torch.nn" else 1.8,
            alpha=0.5 if name == "torch.nn" else 1,
            linestyle="-" if name == "torch.nn" else "--",
        )
    above.set(title=title, ylabel=f"loss, nats per character\n(mean of {window} steps)")
    below.semilogy([max(d, 1e-9) for d in differences(trainers)], color="#555555", linewidth=1)
    below.set(xlabel="step", ylabel="difference of\nthe two losses")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def speed_up(trainers):
    """Of fastseq: the median of the ratios of turns that followed each other."""
    theirs, ours = (trainer.turns for trainer in trainers.values())
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def differences(trainers):
    a, b = (trainer.losses for trainer in trainers.values())
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"given {text}, accepted is a number above 0")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into "invalid int value"
    return parse


def parse_arguments():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = positive(int)

    def add(flag, help, **options):
        parser.add_argument(flag, help=help + " (default: %(default)s)" * ("default" in options), **options)

    add("--cell", "recurrent layer", choices=["lstm", "gru", "rnn"], default="lstm")
    add("--text", "UTF-8 text to learn (default: Python's own documentation)", type=Path, metavar="FILE")
    add("--steps", "optimizer steps", type=size, default=800)
    add("--batch-size", "streams read side by side", type=size, default=16)
    add("--length", "characters per stream and step", type=size, default=64)
    add("--embedding-size", "features of a character", type=size, default=64)
    add("--hidden-size", "features of the recurrent layers", type=size, default=256)
    add("--layers", "recurrent layers", type=size, default=2)
    add("--temperature", "of the sample; low is cautious", type=positive(float), default=0.5)
    add("--prompt", "what the sample begins with", default="The ")
    add("--sample-length", "characters to write", type=size, default=600)
    add("--seed", "of the weights and the sample", type=int, default=0)
    add("--threads", "CPU threads (default: torch's choice)", type=size)
    add("--device", "(default: cuda if torch and fastseq can both use it, else cpu)", choices=["cpu", "cuda"])
    add("--figure", "of the loss curves", type=Path, default=Path("out/char_lm.png"), metavar="FILE")
    return parser, parser.parse_args()


def choose_device(wanted, parser):
    """The device, and in words why it is this one."""
    cuda = fastseq._C.cuda_info()
    if not cuda["built"]:
        obstacle = cuda["reason"]
    else:
        obstacle = "" if torch.cuda.is_available() else "torch sees no GPU"
    if wanted == "cuda" and obstacle:
        parser.error(f"argument --device: given cuda\naccepted: cpu, because {obstacle}\ntry --device cpu")
    if wanted:
        return torch.device(wanted), "as --device says"
    if obstacle:
        return torch.device("cpu"), obstacle
    return torch.device("cuda"), "both libraries can use it"


def read_text(path, parser):
    if path is None:
        return default_text()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        parser.error(f"argument --text: cannot read {path}: {error.strerror}\ntry the path of a text file")
    except UnicodeDecodeError as error:
        parser.error(
            f"argument --text: {path} is not UTF-8 at byte {error.start}\n"
            f"try converting it: iconv -f latin1 -t utf-8 {path} > text.txt"
        )


def split(text, arguments, parser):
    """Training text, held-out text (the end, never trained on), and the characters that occur."""
    vocabulary = sorted(set(text))
    cut = int(len(text) * (1 - HELD_OUT))
    needed = arguments.batch_size * (arguments.length + 1)
    if cut < needed or len(text) - cut < 32:
        parser.error(
            f"argument --text: given {len(text):,} characters, {cut:,} of them to train on\n"
            f"accepted: at least {max(320, math.ceil(needed / (1 - HELD_OUT))):,} "
            f"for --batch-size {arguments.batch_size} --length {arguments.length}\n"
            "try a longer text, or a smaller --batch-size or --length"
        )
    unknown = sorted(set(arguments.prompt) - set(vocabulary))
    if unknown or not arguments.prompt:
        parser.error(
            f"argument --prompt: given {arguments.prompt!r}\n"
            "accepted: at least one character, all of which occur in the text"
            + (f"; {' '.join(map(repr, unknown))} do not" if unknown else "")
            + f"\ntry --prompt {text[0]!r}"
        )
    return text[:cut], text[cut:], vocabulary


def main():
    parser, arguments = parse_arguments()
    started = time.perf_counter()
    device, why = choose_device(arguments.device, parser)
    text = read_text(arguments.text, parser)
    train_text, held_out_text, vocabulary = split(text, arguments, parser)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    code = {character: i for i, character in enumerate(vocabulary)}

    def encode(string):
        return torch.tensor([code[character] for character in string], device=device)

    cell = arguments.cell.upper()
    sizes = (len(vocabulary), arguments.embedding_size, arguments.hidden_size, arguments.layers)
    models = {name: CharLM(library, cell, *sizes).to(device) for name, library in LIBRARIES.items()}
    models["fastseq"].load_state_dict(models["torch.nn"].state_dict())
    trainers = {name: Trainer(model, arguments.steps) for name, model in models.items()}

    parameters = sum(p.numel() for p in models["fastseq"].parameters())
    where = f"{torch.get_num_threads()} CPU thread(s)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"text      {arguments.text or 'the documentation that comes with Python'}")
    print(f"          {len(train_text):,} characters to train on, {len(held_out_text):,} held out")
    print(f"model     {arguments.layers} {cell} layers of {arguments.hidden_size}, {parameters:,} parameters")
    chunk = f"{arguments.batch_size} x {arguments.length}"
    print(f"device    {device.type}: {why}")
    print(f"training  {arguments.steps} steps of {chunk} characters on {where}\n", flush=True)

    streams = as_streams(encode(train_text), arguments.batch_size)
    chunks = endless_chunks(streams, arguments.length)
    for model in models.values():  # a step of copies that are thrown away, as first calls cost more
        Trainer(copy.deepcopy(model), arguments.steps).train([next(chunks)])
    chunks = endless_chunks(streams, arguments.length)
    bar = tqdm(total=arguments.steps, unit="step", desc="torch.nn and fastseq", dynamic_ncols=True)
    with bar:
        while bar.n < arguments.steps:
            turn = [next(chunks) for _ in range(min(TURN, arguments.steps - bar.n))]
            for trainer in trainers.values():
                trainer.train(turn)
            losses = " ".join(f"{trainer.losses[-1]:.3f}" for trainer in trainers.values())
            bar.set_postfix_str(f"losses {losses}, fastseq {speed_up(trainers):.2f}x as fast", refresh=False)
            bar.update(len(turn))

    print(f"\n{'':10}{'ms/step':>10}{'seconds':>10}{'final loss':>12}{'held-out perplexity':>22}")
    held_out = encode(held_out_text)
    for name, trainer in trainers.items():
        final = statistics.fmean(trainer.losses[-20:])
        value = perplexity(trainer.model, held_out, arguments.length)
        print(f"{name:10}{trainer.step_time:10.1f}{trainer.seconds:10.1f}{final:12.4f}{value:22.3f}")
    print("(loss: nats per character, mean of the last 20 steps; perplexity: per character, lower is better,")
    print(f" {len(vocabulary)} would be blind guessing)\n")
    print(
        f"speed-up  {speed_up(trainers):.2f}x, the whole training step (embedding, linear and optimizer too)"
    )
    print("          (the median of the ratios of turns that followed each other)")
    print(f"losses    largest difference at any step {max(differences(trainers)):.1e}", end="")
    print(f", mean {statistics.fmean(differences(trainers)):.1e}")

    title = f"The same {cell} trained twice: fastseq is {speed_up(trainers):.2f} times as fast"
    draw(trainers, title, arguments.figure)
    print(f"figure    {arguments.figure}\n")

    generator = torch.Generator().manual_seed(arguments.seed)
    prompt = encode(arguments.prompt)[:, None]
    written = write(models["fastseq"], prompt, arguments.sample_length, arguments.temperature, generator)
    print(f"What the fastseq model writes (temperature {arguments.temperature:g}):")
    print("-" * 80)
    print(arguments.prompt + "".join(vocabulary[i] for i in written.tolist()))
    print("-" * 80)
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing was written")
