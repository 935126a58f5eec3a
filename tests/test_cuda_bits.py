"""The CUDA kernels give the same bits: from run to run, in every order in which their threads may run,
whatever else is in the batch, and however the tensors lie."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import cuda_host
from devices import ARITHMETIC
from fastseq import ops
from harness import assert_same_bits, call_module, make_data, make_module, move
from test_cuda_recurrent import NETWORKS, WAYS, every, network
from test_shapes import LAYOUTS
from tolerances import assert_as_accurate_as_torch

# One column of tiles, or what there is: more of them only repeat what is done with one.
SOME_BLOCKS = {"cluster": (1, 2, 4), "grid": (3,), "stream": (3,)}
AND_STEPS = SOME_BLOCKS | {"steps": ()}
KINDS = ("float64", "float32", "tf32", "bfloat16")  # float16 runs as bfloat16 does


def assert_same_in_every_schedule(device, case):
    module, data = make_module(case), make_data(case)
    expected = device.run(case, module, data)
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        assert_same_bits(device.run(case, module, data), expected, f" with threads in order {order} {seed}")


@pytest.mark.cuda_host
@every(KINDS, AND_STEPS)
def test_same_bits_in_every_schedule(twin, name, arithmetic, plan):
    """Results and gradients, of rows of different lengths in both directions."""
    case = network(name, arithmetic, packed="unsorted", bidirectional=True, steps=3)
    with twin.using(plan, tf32=ARITHMETIC[arithmetic][1]):
        assert_same_in_every_schedule(twin, case)


@pytest.mark.cuda_host
@pytest.mark.parametrize("way", WAYS)
def test_same_bits_in_every_schedule_on_every_way(twin, way):
    _, arithmetic, plan, facts, name, *hidden_size = WAYS[way]
    case = network(name, arithmetic, steps=4)
    case = replace(case, hidden_size=hidden_size[0]) if hidden_size else case
    with twin.using(plan, facts, ARITHMETIC[arithmetic][1]):
        assert_same_in_every_schedule(twin, case)


@every()
def test_same_bits_from_run_to_run(device, name, arithmetic, plan):
    case = network(name, arithmetic, packed="unsorted", bidirectional=True)
    module, data = make_module(case), make_data(case)
    with device.using(plan, tf32=ARITHMETIC[arithmetic][1]):
        first = device.run(case, module, data)
        for _ in range(20 if device.is_gpu else 1):
            assert_same_bits(device.run(case, module, data), first)


# ---- parts of a batch and of a sequence ----
#
# W x of all steps is torch's product, whose bits may depend on the number of rows. So here the input and its
# weights are numbers of few bits, whose products and sums are exact; then every difference is the kernels'.


def exact_input(case):
    module, data = make_module(case), make_data(case)
    with torch.no_grad():
        data["input"].copy_(data["input"].sign())
        for weight_name, weight in module.named_parameters():
            if "weight_ih" in weight_name or "bias_ih" in weight_name:
                weight.mul_(64).round_().div_(64)
    return module, data


def forward(device, case, module, data):
    with torch.no_grad():
        return {name: x.cpu() for name, x in call_module(case, *move(module, data, device.where)).items()}


def rows_of(results, rows):
    return {name: x[:, rows] for name, x in results.items()}


@every(blocks=SOME_BLOCKS)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(device, name, arithmetic, plan):
    """Alone, in part of the batch, and beside rows that are not even numbers, a row has the same bits."""
    case = network(name, arithmetic, bidirectional=True, batch=40)
    module, data = exact_input(case)
    with device.using(plan, tf32=ARITHMETIC[arithmetic][1]):
        whole = forward(device, case, module, data)
        for batch in (1, 7, 18):
            part = forward(device, replace(case, batch=batch), module, rows_of(data, slice(-batch, None)))
            assert_same_bits(part, rows_of(whole, slice(-batch, None)))
        for x in data.values():
            x.data[:, 3:10] = float("nan")
        poisoned = forward(device, case, module, data)
    assert poisoned["output"][:, 3:10].isnan().all() or case.mode == "RNN_RELU"
    others = [b for b in range(40) if not 3 <= b < 10]
    assert_same_bits(rows_of(poisoned, others), rows_of(whole, others))


def keeps_states(name, arithmetic):
    """Whether the states that a layer returns are those that it keeps between steps: c is kept in float."""
    return not (name.startswith("LSTM") and arithmetic in ("bfloat16", "float16"))


def assert_same_bits_in_pieces(device, case, module, data, pieces):
    """Of a sequence in one call, and in pieces of so many steps, each with the states that the last one left.
    The plan must be forced: the number of steps is one of the things that it goes by."""
    whole = forward(device, case, module, data)
    outputs, states = [], {name: x for name, x in data.items() if name != "input"}
    for piece in data["input"].split(pieces):
        results = forward(device, replace(case, steps=len(piece)), module, {"input": piece, **states})
        outputs.append(results["output"])
        states = {name: results[name.replace("0", "_n")] for name in states}
    assert_same_bits(results | {"output": torch.cat(outputs)}, whole)


@every(blocks=SOME_BLOCKS, when=keeps_states)
def test_a_sequence_in_pieces_with_the_state_carried_has_the_same_bits(device, name, arithmetic, plan):
    case = network(name, arithmetic, steps=7, batch=11)
    module, data = exact_input(case)
    with device.using(plan, tf32=ARITHMETIC[arithmetic][1]):
        assert_same_bits_in_pieces(device, case, module, data, [1, 4, 2])


@every(blocks=SOME_BLOCKS)
def test_a_row_of_a_packed_sequence_has_the_bits_of_the_row_alone(device, name, arithmetic, plan):
    case = network(name, arithmetic, bidirectional=True, batch=11, steps=5)
    unsorted = replace(case, packed="unsorted")
    module, data = exact_input(case)
    with device.using(plan, tf32=ARITHMETIC[arithmetic][1]):
        packed = forward(device, unsorted, module, data)
        for b, length in list(enumerate(unsorted.lengths().tolist()))[::3]:
            alone = rows_of(data, slice(b, b + 1))
            alone["input"] = alone["input"][:length]
            results = forward(device, replace(case, steps=length, batch=1), module, alone)
            expected = rows_of(packed, slice(b, b + 1))
            assert not expected["output"][length:].any()
            assert_same_bits(results, expected | {"output": expected["output"][:length]})


# ---- layouts ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_strides_do_not_change_a_bit(device, name, arithmetic, layout):
    """Of the input, the states, the weights and the incoming gradients. The gradient of weight_ih alone is
    torch's product with the input as it lies, whose sums may be in another order."""
    case = network(name, arithmetic, bidirectional=True, batch=6)
    module, data = move(make_module(case), make_data(case), device.where)

    def lay_out(x):
        """The same values in another layout; 1-d and 2-d tensors are seen as 3-d ones."""
        y = LAYOUTS[layout](x.detach().reshape(*[1] * (3 - x.dim()), *x.shape))
        for _ in range(3 - x.dim()):
            y = y[0]
        return y.requires_grad_()

    def run(data, change=lambda x: x):
        outputs = call_module(case, module, data)
        leaves = {**data, **dict(module.named_parameters())}
        g = torch.Generator().manual_seed(2)
        incoming = [torch.randn(x.shape, generator=g).to(x) for x in outputs.values()]
        incoming = [change(x).detach() for x in incoming]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), incoming)
        results = [*outputs.values(), *gradients]
        return {name: x.detach() for name, x in zip([*outputs, *leaves], results, strict=True)}

    expected = run(data)
    for key, weight in list(module.named_parameters()):
        setattr(module, key, nn.Parameter(lay_out(weight)))
    results = run({key: lay_out(x) for key, x in data.items()}, lay_out)
    for key in [key for key in results if key.startswith("weight_ih")]:
        theirs = expected.pop(key)
        assert_as_accurate_as_torch(results.pop(key), theirs, theirs, case.dtype, key)
    assert_same_bits(results, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_expanded_tensors(device, name):
    """Strides of 0: one row for the whole batch, one step for the whole sequence, one gradient for all."""
    case = network(name, "float64", steps=5, batch=4, bidirectional=True)
    module = make_module(case).to(device.where)
    h, c = (torch.randn(2, 1, n, dtype=case.dtype) for n in (case.width, case.hidden_size))
    h, c = h.to(device.where).expand(2, 4, -1), c.to(device.where).expand(2, 4, -1)
    for shape in [(1, 4, 5), (5, 1, 5), (5, 4, 1), (1, 1, 1)]:
        x = torch.randn(shape, dtype=case.dtype).to(device.where).expand(5, 4, 5)
        results = []
        for dense in (lambda x: x, lambda x: x.contiguous()):
            input = dense(x).detach().requires_grad_()
            output, hidden = module(input, (dense(h), dense(c)) if case.mode == "LSTM" else dense(h))
            last = hidden[0] if case.mode == "LSTM" else hidden
            loss = output.sum() + last.sum()  # whose gradients are expanded too
            gradients = torch.autograd.grad(loss, [input, *module.parameters()])
            results.append({str(i): x.detach() for i, x in enumerate([output, *gradients])})
        assert_same_bits(*results)


def far_apart(path, shape, strides):
    """A tensor with strides beyond 32 bits, in a file with holes that takes no room."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    with open(path, "wb") as file:
        file.truncate(elements * 4)
    return torch.from_file(str(path), shared=True, size=elements).as_strided(shape, strides)


@pytest.mark.cuda_host
@pytest.mark.parametrize("plan", ["cluster:2", "stream:2", "steps"])
@pytest.mark.parametrize("name", NETWORKS)
def test_strides_beyond_32_bits(twin, tmp_path, monkeypatch, name, plan):
    """Of the incoming gradient, and of the output, which the backward pass reads."""
    case = network(name, "float32", steps=3, batch=2, hidden_size=11, bidirectional=True)
    case = replace(case, proj_size=7 if case.proj_size else 0)
    module, data = make_module(case), make_data(case)
    leaves = [*data.values(), *module.parameters()]
    shape = (3, 2, 2 * case.width)
    incoming = torch.randn(shape)

    def run(incoming):
        outputs = call_module(case, module, data)
        gradients = torch.autograd.grad(outputs["output"], leaves, incoming)
        return {str(i): x.detach() for i, x in enumerate([*outputs.values(), *gradients])}

    with twin.using(plan):
        expected = run(incoming)
        for strides in [(3 * 2**30, 50, 1), (1, 3, 2**29)]:
            far = far_apart(tmp_path / "gradient", shape, strides)
            assert_same_bits(run(far.copy_(incoming)), expected)
        output = far_apart(tmp_path / "output", shape, (3 * 2**30, 50, 1))
        allocate = ops._allocate_layer
        monkeypatch.setattr(ops, "_allocate_layer", lambda *layer: (output, *allocate(*layer)[1:]))
        assert_same_bits(run(incoming), expected)
