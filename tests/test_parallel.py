"""Two processes that train a model together, by DistributedDataParallel or fully_shard, are as one that has
all of the batch: the same gradients, and the same parameters after some steps."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastseq
from processes import World
from tolerances import SAME_FLOAT64

pytestmark = pytest.mark.slow  # it starts processes

SIZE, BATCH, STEPS, FEATURES = 2, 6, 5, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(SIZE, tmp_path_factory.mktemp("world")) as world:
        yield world


class Sequence(nn.Module):
    """(B, T, I) -> (B, T, I) of a recurrent module, through a projection of its output."""

    def __init__(self, make, **keywords):
        super().__init__()
        self.layer = make(FEATURES, 6, batch_first=True, **keywords)
        width = (keywords.get("proj_size") or 6) * (2 if keywords.get("bidirectional") else 1)
        self.project = nn.Linear(width, FEATURES)

    def forward(self, x):
        return x + self.project(self.layer(x)[0])


class Loop(nn.Module):
    """A cell in a loop over time."""

    def __init__(self, make, **keywords):
        super().__init__()
        self.cell = make(FEATURES, FEATURES, **keywords)

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class Attention(nn.Module):
    def __init__(self, **keywords):
        super().__init__()
        self.attention = fastseq.MultiheadAttention(FEATURES, 2, batch_first=True, **keywords)
        self.causal = True

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False, is_causal=self.causal)[0]


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Partial(nn.Module):
    """A branch that only one process takes, and a module that no process uses."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = Sequence(fastseq.GRU), Sequence(fastseq.RNN)
        self.never = fastseq.LSTMCell(2, 3)

    def forward(self, x):
        x = self.always(x)
        return self.sometimes(x) if x.shape[0] == BATCH or dist.get_rank() == 0 else x


MODELS = {
    "LSTM": lambda: Sequence(fastseq.LSTM, num_layers=2, bidirectional=True, proj_size=4),
    "GRU": lambda: Sequence(fastseq.GRU, num_layers=2),
    "GRU that resets before": lambda: Sequence(fastseq.GRU, reset_after=False, bidirectional=True),
    "RNN": lambda: Sequence(fastseq.RNN, nonlinearity="relu", bias=False),
    "LSTMCell": lambda: Loop(fastseq.LSTMCell),
    "GRUCell": lambda: Loop(fastseq.GRUCell, reset_after=False),
    "RNNCell": lambda: Loop(fastseq.RNNCell),
    "MultiheadAttention": Attention,
    "MultiheadAttention of other sizes": lambda: Attention(
        add_bias_kv=True, add_zero_attn=True, kdim=FEATURES, vdim=FEATURES
    ),
    "all of them": lambda: nn.Sequential(
        Sequence(fastseq.LSTM, bidirectional=True), Attention(), Sequence(fastseq.GRU), Loop(fastseq.LSTMCell)
    ),
    "checkpointed": lambda: nn.Sequential(
        Checkpointed(Sequence(fastseq.LSTM, proj_size=3)), Checkpointed(Attention()), Loop(fastseq.RNNCell)
    ),
}


def make(name, dtype=torch.float64):
    torch.manual_seed(3)
    return MODELS[name]().to(dtype)


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(4)
    return torch.randn(BATCH, STEPS, FEATURES, generator=g, dtype=torch.float64).to(dtype)


def mine(x):
    return x.chunk(SIZE)[dist.get_rank()]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(model, x, steps=4):
    """Gradients of the first step, and parameters after some steps."""
    # Not Adam, which makes a step of every gradient, also of rounding where the bias of keys has none.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        first = first or {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return first, {name: full(p).detach().clone() for name, p in model.named_parameters()}


def names_without_wrappers(tensors):
    return {name.removeprefix("module."): x for name, x in tensors.items()}


def assert_as_one(results, name):
    """Of every process: gradients, and the parameters that were made of them."""
    model = make(name)
    grads, parameters = train(model, batch())
    assert grads
    for of_process in results:
        for ours, theirs in zip(of_process, (grads, parameters), strict=True):
            ours = names_without_wrappers(ours)
            assert ours.keys() == theirs.keys()
            for key, x in theirs.items():
                torch.testing.assert_close(
                    ours[key], x, **SAME_FLOAT64, msg=lambda text, k=key: f"{k}: {text}"
                )


# ----------------------------------------------------------------------------------- DistributedDataParallel


def data_parallel(name, options):
    return train(DistributedDataParallel(make(name), **options), mine(batch()))


@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_training_is_that_of_one_process(world, name):
    assert_as_one(world.run(data_parallel, name, {}), name)


@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
        {"broadcast_buffers": False, "static_graph": True, "gradient_as_bucket_view": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["all of them", "checkpointed"])
def test_data_parallel_options_change_nothing(world, name, options):
    assert_as_one(world.run(data_parallel, name, options), name)


def accumulated(name):
    """The batch in single rows, whose gradients are exchanged with the last one."""
    model = DistributedDataParallel(make(name))
    rows = mine(batch()).split(1)
    for i, row in enumerate(rows):
        with model.no_sync() if i + 1 < len(rows) else nullcontext():
            (model(row).square().mean() / len(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_are_accumulated_without_exchange(world):
    name = "all of them"
    expected, _ = train(make(name), batch(), 1)
    for grads in world.run(accumulated, name):
        for key, x in names_without_wrappers(grads).items():
            torch.testing.assert_close(x, expected[key], **SAME_FLOAT64)


def partial_use():
    torch.manual_seed(3)
    model = DistributedDataParallel(Partial().double(), find_unused_parameters=True)
    model(mine(batch())).square().mean().backward()
    return names_without_wrappers({name: p.grad for name, p in model.named_parameters()})


def test_modules_that_one_process_or_none_uses(world):
    first, second = world.run(partial_use)
    torch.manual_seed(3)
    alone = Partial().double()
    halves = batch().chunk(SIZE)
    x = alone.always(halves[0])
    loss = alone.sometimes(x).square().mean() + alone.always(halves[1]).square().mean()
    (loss / 2).backward()
    for name, p in alone.named_parameters():
        if name.startswith("never"):
            assert first[name] is None
            continue
        torch.testing.assert_close(first[name], p.grad, **SAME_FLOAT64)
        assert torch.equal(first[name], second[name])


# ----------------------------------------------------------------------------------------------- fully_shard


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (SIZE,))
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shard_and_train(name, options):
    model = sharded(make(name), **options)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return train(model, mine(batch()))


@pytest.mark.parametrize("name", MODELS)
def test_sharded_training_is_that_of_one_process(world, name):
    assert_as_one(world.run(shard_and_train, name, {}), name)


def test_parameters_may_stay_gathered_between_the_passes(world):
    name = "all of them"
    assert_as_one(world.run(shard_and_train, name, {"reshard_after_forward": False}), name)


def module_itself_sharded(name):
    """The recurrent module or attention is the sharded unit, not a module around it."""
    model, mesh = make(name), init_device_mesh("cpu", (SIZE,))
    for module in list(model.modules()):
        if type(module).__module__.startswith("fastseq"):
            fully_shard(module, mesh=mesh)
    return train(fully_shard(model, mesh=mesh), mine(batch()))


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "all of them"])
def test_each_of_our_modules_may_be_the_sharded_unit(world, name):
    assert_as_one(world.run(module_itself_sharded, name), name)


def round_trip(name):
    """Of a model that was trained: into another sharded one, and as whole tensors into one that is not."""
    model = sharded(make(name))
    train(model, mine(batch()))
    twin = sharded(MODELS[name]().double())
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    for key, x in model.state_dict().items():
        assert isinstance(x, DTensor)
        assert torch.equal(x.to_local(), twin.state_dict()[key].to_local())
    whole = MODELS[name]().double()
    whole.load_state_dict({key: full(x) for key, x in model.state_dict().items()})
    x = batch()
    for other in (twin, model):
        torch.testing.assert_close(other(x), whole(x), **SAME_FLOAT64)
    return whole.state_dict()


@pytest.mark.parametrize("name", ["LSTM", "all of them"])
def test_state_dict_of_shards_goes_round(world, name):
    first, second = world.run(round_trip, name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def mixed_precision(name, library):
    """Gradients in float32, and under the policy."""
    torch.manual_seed(3)
    make_layer = getattr({"fastseq": fastseq, "torch.nn": nn}[library], name)
    models = [Sequence(make_layer).float() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    grads = []
    for model, options in zip(models, ({}, {"mp_policy": policy}), strict=True):
        model = sharded(model, **options)
        model(mine(batch(torch.float32))).float().square().mean().backward()
        grads.append({key: full(p.grad) for key, p in model.named_parameters()})
        assert all(p.dtype is p.grad.dtype is torch.float32 for p in model.parameters())
    return grads


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(world, name):
    """As exact as torch.nn's module under the same policy."""
    ours, theirs = (world.run(mixed_precision, name, library)[0] for library in ("fastseq", "torch.nn"))
    for key, exact in ours[0].items():
        error, their_error = ((grads[1][key] - grads[0][key]).abs().max().item() for grads in (ours, theirs))
        floor = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
        assert 0 < error <= 2 * their_error + floor, key


# ------------------------------------------------------------------------------------------------- DTensors

HOW = {"replicated": Replicate(), "of the batch": Shard(0), "of heads": Shard(1), "of queries": Shard(2)}


def attention_of_dtensors(how, average):
    """Beside that of whole tensors, with gradients of all."""
    mesh = init_device_mesh("cpu", (SIZE,))
    shapes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), (4, 5, 7), (4,)]
    whole = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    placements = [HOW[how]] * 3 + [Replicate()] * 2
    split = [
        distribute_tensor(x.detach(), mesh, [p]).requires_grad_()
        for x, p in zip(whole, placements, strict=True)
    ]

    def run(query, key, value, bias, sinks):
        return fastseq.scaled_dot_product_attention(
            *(query, key, value, bias),
            enable_gqa=True,
            causal="bottom_right",
            sinks=sinks,
            key_lengths=torch.tensor([7, 3]),
            return_lse=True,
            return_weights=True,
            average_weights=average,
        )

    for tensors in (whole, split):
        outputs = run(*tensors)
        sum(x.square().masked_fill(x.isinf(), 0).sum() for x in outputs).backward()
        tensors.extend(outputs)
    for i, (x, y) in enumerate(zip(whole, split, strict=True)):
        torch.testing.assert_close(full(y), x, **SAME_FLOAT64, msg=lambda text, i=i: f"{i}: {text}")
        if x.is_leaf:
            torch.testing.assert_close(full(y.grad), x.grad, **SAME_FLOAT64)
    return [str(y.placements) for y in split[len(shapes) :]]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_attention_of_dtensors_is_that_of_whole_tensors(world, how, average):
    results = world.run(attention_of_dtensors, how, average)
    kept = how == "of the batch" or (how == "of heads" and not average)
    assert results[0][0] == str((HOW[how] if kept else Replicate(),))


def multihead_of_dtensors(library):
    mesh = init_device_mesh("cpu", (SIZE,))
    module = {"fastseq": fastseq, "torch.nn": nn}[library].MultiheadAttention(8, 2).double()
    alone = copy.deepcopy(module)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    split = distribute_tensor(x, mesh, [Shard(1)])  # of the batch
    ours, theirs = distribute_module(module, mesh)(split, split, split), alone(x, x, x)
    for y, z in zip(ours, theirs, strict=True):
        torch.testing.assert_close(full(y), z, **SAME_FLOAT64)
    ours[0].sum().backward()
    theirs[0].sum().backward()
    for (name, p), q in zip(module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad, **SAME_FLOAT64, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("library", ["torch.nn", "fastseq"])
def test_multihead_attention_of_dtensors_works_as_torchs(world, library):
    world.run(multihead_of_dtensors, library)


def refused_dtensors():
    mesh = init_device_mesh("cpu", (SIZE,))
    x = torch.randn(2, 2, 3, 4)
    split = distribute_tensor(x, mesh, [Shard(0)])
    for arguments, keywords, kind, word in (
        ((split, x, x), {}, RuntimeError, "DTensors for query, key and value"),
        ((split, split, split), {"dropout_p": 0.5}, NotImplementedError, "dropout_p"),
    ):
        with pytest.raises(kind, match=word):
            fastseq.scaled_dot_product_attention(*arguments, **keywords)


def test_what_dtensors_cannot_do_is_a_clear_error(world):
    world.run(refused_dtensors)
