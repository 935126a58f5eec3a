"""torch.compile over all modules: one graph, one operator for each layer, whatever the length, eager's bits.

The modules' graphs are also compared in test_autograd.py and test_multihead_attention_drop_in.py.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastseq
from harness import Case, cell_class, make_module, same_bits
from reference import MODES
from tolerances import SAME_FLOAT32

LENGTHS = ((5, 3), (500, 3), (7, 4), (9, 2))  # steps, batch


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """torch.compile(function, fullgraph=True), the graphs that it makes, and a comparison with eager."""

    def __init__(self, function, leaves=(), backend="aot_eager", dynamic=None):
        self.function, self.leaves = function, list(leaves)
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(function, fullgraph=True, backend=self.counter, dynamic=dynamic)

    def results(self, function, arguments):
        torch.manual_seed(3)  # of dropout
        outputs = [x for x in tree_leaves(function(*arguments)) if x is not None]
        leaves = self.leaves + [x for x in tree_leaves(arguments) if x.requires_grad]
        if not leaves:
            return outputs
        loss = sum(x.double().sin().sum() for x in outputs if x.requires_grad)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    def assert_same_bits(self, *arguments):
        for a, b in self.pairs(*arguments):
            assert same_bits(a.detach(), b.detach())

    def pairs(self, *arguments):
        ours, eager = (self.results(f, arguments) for f in (self.compiled, self.function))
        return list(zip(ours, eager, strict=True))

    def operators(self, graph=-1):
        return [node for node in self.counter.graphs[graph].graph.nodes if "fastseq" in str(node.target)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_operator_for_each_layer_whatever_the_length_and_the_batch(mode, training):
    module = make_module(Case(mode, num_layers=2, bidirectional=True)).requires_grad_(training)
    compiled = Compiled(module, module.parameters() if training else (), dynamic=True)
    for steps, batch in LENGTHS[:1]:
        compiled.assert_same_bits(torch.randn(steps, batch, 4))
    graphs = compiled.counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in LENGTHS[1:]:
            compiled.assert_same_bits(torch.randn(steps, batch, 4))
    assert compiled.counter.frame_count == graphs
    assert len(compiled.operators()) == 2


@pytest.mark.parametrize("make", [lambda: fastseq.LSTM(4, 7), lambda: fastseq.GRU(4, 7)], ids=["LSTM", "GRU"])
def test_marked_dimensions_are_compiled_once(make):
    module = make()
    compiled = Compiled(module, module.parameters())
    x = torch.randn(5, 3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    compiled.assert_same_bits(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in LENGTHS[1:]:
            compiled.assert_same_bits(torch.randn(steps, batch, 4))
    assert compiled.counter.frame_count == 1


def test_graph_does_not_grow_with_time():
    module = fastseq.LSTM(4, 7, num_layers=2)
    sizes = []
    for steps in (5, 500):
        torch._dynamo.reset()
        compiled = Compiled(module, module.parameters(), dynamic=False)
        compiled.assert_same_bits(torch.randn(steps, 3, 4))
        sizes.append(len(compiled.counter.graphs[0].graph.nodes))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_packed_sequences(mode, states):
    module = make_module(Case(mode, bidirectional=True))
    h = torch.randn(2, 3, 7)
    hx = None if not states else (h, h.cos()) if mode == "LSTM" else h

    def call(packed):
        output, state = module(packed, hx)
        return output.data, state

    compiled = Compiled(call, module.parameters())
    for steps in (5, 7, 9):
        x, lengths = torch.randn(steps, 3, 4), torch.tensor([2, steps, steps - 1])
        compiled.assert_same_bits(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert compiled.counter.frame_count <= 2


def test_packed_sequence_whose_sizes_do_not_fit_is_refused_when_it_runs():
    module, h = fastseq.GRU(4, 7), torch.randn(1, 3, 7)

    def call(data, sizes):
        return module(PackedSequence(data, sizes), h)[0].data

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="batch_sizes"):
        compiled(torch.randn(6, 4), torch.tensor([2, 2, 2]))


def test_dropout_between_layers_is_eagers_for_the_same_seed():
    module = fastseq.GRU(4, 7, num_layers=3, dropout=0.5)
    compiled = Compiled(module, module.parameters())
    compiled.assert_same_bits(torch.randn(5, 3, 4))
    assert len(compiled.operators()) == 3


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_autocast_inside(mode):
    module = make_module(Case(mode))
    cls, arguments = cell_class(fastseq, mode)
    cell = cls(4, 7, **arguments)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x), cell(x[0])

    compiled = Compiled(call, [*module.parameters(), *cell.parameters()])
    for steps, batch in LENGTHS[:1]:
        compiled.assert_same_bits(torch.randn(steps, batch, 4))


def test_autocast_around_is_seen_at_each_call():
    module, x = fastseq.GRU(4, 7), torch.randn(5, 3, 4)
    compiled = Compiled(module, module.parameters())
    compiled.assert_same_bits(x)
    with torch.autocast("cpu", torch.bfloat16):
        compiled.assert_same_bits(x)
    compiled.assert_same_bits(x)


def test_functional_forms_and_cells():
    lstm, cell = fastseq.LSTM(4, 7, num_layers=2), fastseq.RNNCell(4, 7)
    weights = lstm.all_weights

    def call(x):
        output, _ = fastseq.functional.lstm(x, weights)
        return output, fastseq.functional.rnn_cell(x[0], None, *cell.parameters())

    compiled = Compiled(call, [*lstm.parameters(), *cell.parameters()])
    compiled.assert_same_bits(torch.randn(5, 3, 4))
    assert len(compiled.operators()) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"window": (3, 0), "return_lse": True},
        {"return_weights": True, "average_weights": True},
        {"deterministic": False},
        {"dropout_p": 0.5},
    ],
    ids=" ".join,
)
def test_attention_is_one_operator_whatever_the_length(options):
    def call(q, k, v):
        return fastseq.scaled_dot_product_attention(q, k, v, **options)

    def data(size):
        return (torch.randn(2, 3, size, 8, requires_grad=True) for _ in range(3))

    compiled = Compiled(call, dynamic=True)
    compiled.assert_same_bits(*data(12))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.assert_same_bits(*data(9))
        compiled.assert_same_bits(*data(200))  # where the backward pass asks what is needed


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_is_one_graph_whatever_the_length(need_weights):
    module = fastseq.MultiheadAttention(8, 2, batch_first=True)

    def call(x, padding):
        return module(x, x, x, key_padding_mask=padding, need_weights=need_weights)

    compiled = Compiled(call, module.parameters(), dynamic=True)
    compiled.assert_same_bits(torch.randn(2, 5, 8), torch.rand(2, 5) > 0.7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.assert_same_bits(torch.randn(3, 11, 8), torch.rand(3, 11) > 0.7)
    assert len(compiled.operators()) == 1


def test_torch_func_inside():
    module = fastseq.GRU(4, 7)
    parameters = {name: x.detach() for name, x in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].sin().sum()

    def call(x):
        return vmap(lambda x: module(x)[0])(x), vmap(grad(loss), in_dims=(None, 0))(parameters, x)

    Compiled(call).assert_same_bits(torch.randn(3, 5, 2, 4))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(7, 11)
        self.recurrent = fastseq.LSTM(4, 7, num_layers=2, batch_first=True)

    def forward(self, tokens):
        return self.linear(self.recurrent(self.embedding(tokens))[0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layer.self_attn = fastseq.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.slow
@pytest.mark.parametrize("model", [LanguageModel, Block])
def test_inductor_compiles_whole_models(model):
    """Torch's own sums may be in another order."""
    model = model()
    compiled = Compiled(model, model.parameters(), backend="inductor", dynamic=True)
    for steps in (5, 9):
        x = torch.randn(2, steps, 8) if isinstance(model, Block) else torch.randint(11, (2, steps))
        for ours, eager in compiled.pairs(x):
            torch.testing.assert_close(ours, eager, **SAME_FLOAT32)
