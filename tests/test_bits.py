"""Results are the same bits from run to run, whatever the thread count and whatever else is in the batch."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastseq
from harness import (
    DTYPES,
    Case,
    assert_same_bits,
    call_module,
    cell_class,
    make_data,
    make_module,
    run_module,
    threads,
)
from reference import MODES

SIZES = [  # few rows and many; hidden sizes smaller and larger than a vector, and no multiple of one
    Case(steps=6, batch=2, input_size=5, hidden_size=3),
    Case(steps=6, batch=5, input_size=33, hidden_size=257),
    Case(steps=6, batch=67, input_size=17, hidden_size=65),
]
SMOKE = SIZES[-1]  # on every instruction set: rows and units fill no tile, and some tests pack this size


def sizes(cases):
    """The cases as parameters, those of the size SMOKE marked as smoke tests."""
    return [
        pytest.param(case, marks=[pytest.mark.smoke] * (case.batch == SMOKE.batch), id=str(case))
        for case in cases
    ]


EVERY = [replace(size, mode=mode) for size in SIZES for mode in MODES]
EVERY += [replace(size, proj_size=2, bidirectional=True) for size in SIZES]


def every_case(test):
    test = pytest.mark.parametrize("case", sizes(EVERY))(test)
    return pytest.mark.parametrize("dtype", DTYPES, ids=str)(test)


def forward(case, module, data):
    with torch.no_grad():
        return call_module(case, module, data)


def row(case, results, b):
    """Row b of a batch, as a batch of one."""
    return {name: x[:, b : b + 1] for name, x in results.items()}


@every_case
def test_same_bits_from_run_to_run(case, dtype, two_threads):
    """Results and gradients alike."""
    case = replace(case, dtype=dtype, packed="unsorted" if case.batch == SMOKE.batch else "")
    module, data = make_module(case), make_data(case)
    first = run_module(case, module, data)
    for _ in range(3):
        assert_same_bits(first, run_module(case, module, data))


@every_case
def test_same_forward_bits_whatever_the_thread_count(case, dtype):
    case = replace(case, dtype=dtype, packed="unsorted" if case.batch == SMOKE.batch else "")
    module, data = make_module(case), make_data(case)
    with threads(1):
        first = forward(case, module, data)
    for count in (2, 3, 5):
        with threads(count):
            assert_same_bits(first, forward(case, module, data))


@every_case
def test_a_row_does_not_depend_on_the_rest_of_the_batch(case, dtype, two_threads):
    """Alone, in part of the batch, and beside rows that are not even numbers, a row has the same bits."""
    case = replace(case, dtype=dtype, batch=64)
    module, data = make_module(case), make_data(case)
    whole = forward(case, module, data)
    for batch in (1, 7, 33):
        part = {name: x[:, -batch:] for name, x in data.items()}
        results = forward(replace(case, batch=batch), module, part)
        assert_same_bits(row(case, results, batch - 1), row(case, whole, 63))
        assert_same_bits(row(case, results, 0), row(case, whole, 64 - batch))
    poisoned = {name: x.detach().clone() for name, x in data.items()}
    for x in poisoned.values():
        x[:, :10] = float("nan")
    results = forward(case, module, poisoned)
    assert results["output"][:, :10].isnan().all() or case.mode == "RNN_RELU"
    assert_same_bits({k: x[:, 10:] for k, x in results.items()}, {k: x[:, 10:] for k, x in whole.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", sizes(c for c in EVERY if not c.bidirectional))
def test_a_sequence_in_pieces_with_the_state_carried_has_the_same_bits(case, dtype, two_threads):
    case = replace(case, dtype=dtype, steps=7)
    module, data = make_module(case), make_data(case)
    whole = forward(case, module, data)
    outputs, states = [], {name: data[name] for name in data if name != "input"}
    for piece in data["input"].split([1, 4, 2]):
        results = forward(replace(case, steps=len(piece)), module, {"input": piece, **states})
        outputs.append(results["output"])
        states = {name: results[name.replace("0", "_n")] for name in states}
    assert_same_bits({"output": torch.cat(outputs)}, {"output": whole["output"]})
    assert_same_bits(results | {"output": whole["output"]}, whole)


@every_case
def test_a_row_of_a_packed_sequence_has_the_bits_of_the_row_alone(case, dtype, two_threads):
    case = replace(case, dtype=dtype, bidirectional=True)
    module, data = make_module(case), make_data(case)
    packed = forward(replace(case, packed="unsorted"), module, data)
    lengths = replace(case, packed="unsorted").lengths().tolist()
    for b in {0, 1, case.batch // 2, case.batch - 1}:
        alone = {name: x[:, b : b + 1] for name, x in data.items()}
        alone["input"] = alone["input"][: lengths[b]]
        results = forward(replace(case, steps=lengths[b], batch=1), module, alone)
        expected = row(case, packed, b)
        expected["output"] = expected["output"][: lengths[b]]
        assert_same_bits(results, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_of_one_length_have_the_bits_of_the_padded_batch(mode, two_threads):
    case = Case(mode, batch=9, hidden_size=33)
    module, data = make_module(case), make_data(case)
    padded, _ = module(data["input"])
    packed, _ = module(pack_sequence(list(data["input"].unbind(1))))
    assert_same_bits({"output": packed.data.view_as(padded)}, {"output": padded})


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
def test_batch_first_is_only_a_layout(mode, two_threads):
    case = Case(mode, batch=9, hidden_size=33, num_layers=2, bidirectional=True)
    first = replace(case, batch_first=True)
    data = make_data(case)
    a = forward(case, make_module(case), data)
    b = forward(first, make_module(first), {**data, "input": data["input"].transpose(0, 1)})
    b["output"] = b["output"].transpose(0, 1)
    assert_same_bits(a, b)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_cells_have_the_same_bits_alone_and_in_a_batch_of_any_size(mode, dtype):
    cls, arguments = cell_class(fastseq, mode)
    cell = cls(17, 65, dtype=dtype, **arguments)
    x, h, c = (torch.randn(48, size, dtype=dtype) for size in (17, 65, 65))

    def step(rows, states):
        hx = (h[rows], c[rows]) if mode == "LSTM" else h[rows]
        result = cell(x[rows], hx if states else None)
        return dict(zip("hc", result, strict=True)) if mode == "LSTM" else {"h": result}

    with torch.no_grad(), threads(2):
        for states in (True, False):
            whole = step(slice(None), states)
            for rows in (slice(0, 1), slice(47, 48), slice(3, 9), slice(5, 38)):
                assert_same_bits(step(rows, states), {name: y[rows] for name, y in whole.items()})
