"""fastseq.explain says what ran, what was saved and why it was not faster, and changes nothing."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
import test_cells
from devices import GPUS, HOPPER, TIGHT_AMPERE
from fastseq import _C, dispatch, ops
from harness import Case, call_module, make_data, make_module, same_bits, states_of
from reference import MODES
from test_threads import exit_code_of_forked

SMALL = Case(hidden_size=20, batch=5)
# Its projection decides about the chunks of its backward pass.
WIDE = Case(steps=2, batch=1, hidden_size=1024, proj_size=8)
NETWORKS = [replace(SMALL, mode=mode) for mode in MODES] + [
    replace(SMALL, num_layers=2),
    replace(SMALL, mode="GRU", bidirectional=True),
    replace(SMALL, proj_size=3, num_layers=2, bidirectional=True),
    replace(SMALL, packed="unsorted"),
    replace(SMALL, mode="GRU", batch_first=True, states=False, bias=False),
    replace(SMALL, batched=False),
    replace(SMALL, dtype=torch.bfloat16),
]


class Everything(nn.Module):
    """A model with layers, a cell and other things between them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 6)
        self.encoder = fastseq.LSTM(6, 8, num_layers=2, dropout=0.5)
        self.cells = nn.ModuleList([fastseq.GRUCell(8, 8)])

    def forward(self, x):
        output, _ = self.encoder(self.embedding(x).relu())
        h = None
        for row in output:
            h = self.cells[0](row, h)
        return h


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch):
    monkeypatch.delenv("FASTSEQ_PLAN", raising=False)


def explain_case(case, module=None):
    module = module or make_module(case)
    return fastseq.explain(lambda: call_module(case, module, make_data(case)))


def cpu_cut(call, backward):
    layer = call.layer
    return _C.recurrent_plan(
        _C.CELLS[call.mode]["code"],
        _C.DTYPES[str(call.dtype).removeprefix("torch.")],
        torch.get_num_threads(),
        layer.steps,
        layer.batch,
        layer.input_size,
        layer.hidden_size,
        layer.width if layer.projected else 0,
        layer.directions,
        backward,
        1,
    )


# ---- what is reported is what there is ----


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_every_layer_is_reported_with_its_sizes(case):
    calls = list(explain_case(case))
    assert [call.weight for call in calls] == [f"module.weight_hh_l{i}" for i in range(case.num_layers)]
    for i, call in enumerate(calls):
        layer = call.layer
        assert (call.operator, call.mode, call.dtype) == ("recurrent", case.mode, case.dtype)
        assert (call.device.type, call.packed) == ("cpu", bool(case.packed))
        assert (layer.steps, layer.batch) == (case.steps, case.batch if case.batched else 1)
        assert (layer.hidden_size, layer.width, layer.directions) == (20, case.width, case.directions)
        assert layer.input_size == (case.width * case.directions if i else case.input_size)


@pytest.mark.parametrize("forced", ["", "2x1x1", "1x2x1x8", "1x1x2"])
@pytest.mark.parametrize("case", [*NETWORKS, WIDE], ids=str)
def test_on_the_cpu_the_partition_is_the_plans(monkeypatch, two_threads, case, forced):
    monkeypatch.setenv("FASTSEQ_PLAN", forced)
    for call in explain_case(case):
        for plan, backward in ((call.plan, False), (call.backward, True)):
            assert plan.partition == cpu_cut(call, backward)
            assert (plan.kernel, plan.architecture) == ("sequence", _C.cpu_info()["isa"])
            assert any("FASTSEQ_PLAN" in reason for reason in plan.reasons) or not forced


TWIN_PLANS = ["cluster:2", "grid:2", "stream:2", "steps"]


@pytest.mark.cuda_host
@pytest.mark.parametrize("facts", [HOPPER, TIGHT_AMPERE], ids=["HOPPER", "TIGHT_AMPERE"])
@pytest.mark.parametrize("forced", ["", *TWIN_PLANS])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_on_the_twin_the_plans_are_those_that_run(twin, mode, forced, facts):
    """Of the call itself, and of the backward pass that follows one like it."""
    case = replace(SMALL, mode=mode, bidirectional=True)
    with twin.using(forced, facts) as ran:
        (call,) = explain_case(case)
        forward = list(ran)
        ran.clear()
        twin.run(case)
        both = list(ran)
    assert forward == [plan for plan in both if plan["pass"] == "forward"]
    for plan, name in ((call.plan, "forward"), (call.backward, "backward")):
        of_pass = [plan for plan in both if plan["pass"] == name]
        assert {p["kernel"] for p in of_pass} == {plan.kernel}
        if plan.kernel != "steps":
            assert of_pass == [{"kernel": plan.kernel, "pass": name, **plan.partition}]
        assert plan.architecture == f"compute capability {facts[0]}.{facts[1]}"
        assert any(forced and f"FASTSEQ_CUDA_PLAN={forced}" in reason for reason in plan.reasons) == bool(
            forced
        )


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_cells_are_reported(mode, save):
    cell, x = test_cells.make_cell(Case(mode)), make_data(Case(mode))["input"][0]
    with torch.set_grad_enabled(save):
        (call,) = fastseq.explain(cell, x)
    assert (call.operator, call.mode, call.plan.kernel) == ("recurrent_cell", mode, "cell")
    assert call.weight == "weight_hh"
    assert call.plan.partition == cpu_cut(call, False)
    assert (call.backward is not None) == save
    assert any(f"fastseq.{mode.split('_')[0]} " in reason for reason in call.plan.reasons)


@pytest.mark.cuda_host
def test_cells_and_calls_without_rows_have_no_plan_on_the_twin(twin):
    (call,) = fastseq.explain(fastseq.GRUCell(3, 4), torch.randn(2, 3))
    assert (call.plan.kernel, call.backward.kernel) == ("cell", "cell")
    (call,) = fastseq.explain(fastseq.GRU(3, 4), torch.randn(2, 0, 3))
    assert (call.plan.kernel, call.plan.partition) == ("none", {})


def test_a_callable_is_reported_in_order_with_its_backward_pass():
    model, x = Everything(), torch.randn(3, 2, 4)
    explanation = fastseq.explain(lambda: model(x).sum().backward())
    layers, cell = ["model.encoder.weight_hh_l0", "model.encoder.weight_hh_l1"], "model.cells.0.weight_hh"
    forward = [call for call in explanation if call.operator != "recurrent_backward"]
    backward = [call for call in explanation if call.operator == "recurrent_backward"]
    assert [call.weight for call in forward] == [*layers, cell, cell, cell]
    assert [call.weight for call in backward] == [cell, cell, cell, *reversed(layers)]
    assert list(explanation) == forward + backward
    assert len(explanation) == 10
    assert explanation[-1].backward is None
    for call, gradients in zip(forward, reversed(backward), strict=True):
        assert call.backward == gradients.plan, "what was foretold is what ran"


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_functions_are_reported(name):
    module, x = getattr(fastseq, name.upper())(3, 4), torch.randn(5, 2, 3)
    (call,) = fastseq.explain(getattr(fastseq.functional, name), x, weights=module.all_weights)
    assert call.mode.startswith(name.upper())
    assert call.weight == ""


HOW = {
    "a module": lambda model: model,
    "its method": lambda model: model.forward,
    "a partial": lambda model: partial(model.forward),
    "a decorated function": lambda model: torch.no_grad()(lambda x: model(x)),
}


@pytest.mark.parametrize("how", HOW)
def test_layers_have_the_names_of_their_weights(how):
    explanation = fastseq.explain(HOW[how](Everything()), torch.randn(3, 2, 4))
    prefix = {"a module": "", "a decorated function": "model."}.get(how, "self.")
    assert explanation[1].weight == f"{prefix}encoder.weight_hh_l1"


# ---- what is saved ----


@contextmanager
def counting():
    """The bytes of every tensor that autograd keeps meanwhile."""
    held = []

    def count(tensor):
        held.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield held


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_bytes_saved_are_those_that_autograd_holds(case):
    """Of one layer, around which nothing else is differentiated."""
    case = replace(case, num_layers=1)
    module, data = make_module(case), make_data(case)
    x = data["input"]
    if case.packed:
        x = pack_padded_sequence(x, torch.tensor([5, 4, 4, 2, 1]))
    with counting() as held:
        (call,) = fastseq.explain(module, x, states_of(data))
    assert call.saved_bytes == sum(call.saved.values()) == sum(held) > 0


@pytest.mark.parametrize("mode", MODES)
def test_bytes_saved_of_a_cell_are_those_that_autograd_holds(mode):
    cell, x = test_cells.make_cell(Case(mode)), make_data(Case(mode))["input"][0].detach()
    with counting() as held:
        (call,) = fastseq.explain(cell, x)
    assert call.saved_bytes == sum(held) > 0


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_without_gradients_nothing_is_saved(case):
    with torch.no_grad():
        explanation = explain_case(case)
    for call in explanation:
        assert (call.saved, call.saved_bytes, call.backward) == ({}, 0, None)
    assert "saved     nothing" in str(explanation)
    frozen = make_module(SMALL).requires_grad_(False)
    (call,) = fastseq.explain(frozen, make_data(SMALL)["input"].detach())
    assert call.backward is None


# ---- why it is not faster ----


def reasons_of(module, *inputs):
    return "\n".join(fastseq.explain(module, *inputs)[0].plan.reasons)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_the_cpu_converts_are_named(dtype):
    reasons = reasons_of(fastseq.GRU(3, 4, dtype=dtype), torch.randn(2, 3, 3, dtype=dtype))
    name, native = str(dtype).removeprefix("torch."), _C.cpu_info()["isa"] == "avx512bf16"
    assert (name in reasons) == (dtype is not torch.bfloat16 or not native)


def test_threads_that_are_not_used_are_explained(monkeypatch):
    """One thread asked for, too little work for more, and threads that wait for each other."""
    large, x = fastseq.GRU(64, 64), torch.randn(200, 64, 64)
    torch.set_num_threads(1)
    several = len(os.sched_getaffinity(0)) > 1
    assert ("torch.set_num_threads" in reasons_of(large, x)) == several
    torch.set_num_threads(4)
    assert "give 2" in reasons_of(fastseq.GRU(512, 16), torch.randn(500, 2, 512))
    assert "1 of 4 threads: the plan's arithmetic" in reasons_of(fastseq.GRU(3, 40), torch.randn(2, 2, 3))
    assert "wait for each other at every step" not in reasons_of(large, x)
    monkeypatch.setenv("FASTSEQ_PLAN", "1x1x2")
    assert "2 threads share each row's hidden units" in reasons_of(large, x)


def test_a_forked_child_has_one_thread():
    module, x = fastseq.GRU(64, 64), torch.randn(200, 64, 64)

    def child():
        (call,) = fastseq.explain(module, x)
        return call.plan.partition["threads"] == 1 and "forked child" in str(call)

    torch.set_num_threads(2)
    with torch.no_grad():
        assert fastseq.explain(module, x)[0].plan.partition["threads"] == 2
        assert exit_code_of_forked(child) == 0


def test_other_reasons_on_the_cpu():
    x = torch.randn(9, 1, 3)
    assert "1 row a step" in reasons_of(fastseq.LSTM(3, 4), x)
    assert "1 row a step" not in reasons_of(fastseq.LSTM(3, 4), x.transpose(0, 1).expand(9, 9, 3))
    assert "fastseq.LSTMCell" in reasons_of(fastseq.LSTM(3, 4), x[:1])
    weights = [w.t().contiguous().t() if w.dim() == 2 else w for w in fastseq.LSTM(3, 4).all_weights[0]]
    assert "weight.contiguous()" in reasons_of(fastseq.functional.lstm, x, [weights])


ISAS = _C.cpu_info()["isas"]


@pytest.mark.parametrize("isa", ISAS)
def test_a_forced_instruction_set_is_named(isa):
    code = "import torch, fastseq; print(fastseq.explain(fastseq.GRU(3, 4), torch.randn(2, 3, 3)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTSEQ_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"sequence, {isa}," in run.stdout
    assert (f"FASTSEQ_ISA={isa}" in run.stdout) == (isa != ISAS[-1])


def loop_plan(gpu, mode="LSTM", dtype=torch.bfloat16, backward=False, **sizes):
    """The plan of a layer on a GPU, by the kernels of a device that is like it; nothing runs."""
    from fastseq.explain_calls import _plan

    case = Case(mode, dtype, **{"input_size": 8, "steps": 512} | sizes)
    weights = [w for group in make_module(case).all_weights for w in group]
    layer = ops.check_layer(
        torch.empty(1, 1, 8, dtype=dtype), None, None, None, weights, mode, case.directions, True
    )._replace(steps=case.steps, batch=case.batch, rows=case.steps * case.batch)
    return _plan(mode, layer, torch.empty(0, dtype=dtype), weights, False, False, backward)


WHY = {  # the GPU, the layer, the kernel that it gets, and what the reasons say
    "a cluster": ("H200", {"hidden_size": 256}, "cluster", []),
    "too large for a cluster": ("H200", {"hidden_size": 1024}, "grid", ["not cluster", "16 blocks"]),
    "a GPU without clusters": ("A100", {"hidden_size": 256}, "grid", ["compute capability 9.0, this is 8.0"]),
    "too slow in a cluster": ("H200", {"hidden_size": 512, "batch": 256}, "grid", ["it fits, but takes"]),
    "too large for the GPU": (
        "H200",
        {"hidden_size": 2048, "backward": True},
        "stream",
        ["not grid", "memory of 132 blocks", "from L2 at every step"],
    ),
    "two products": ("H200", {"hidden_size": 1024, "mode": "GRU_RESET_BEFORE"}, "grid", ["not cluster"]),
    "products worth a launch": (
        "H200",
        {"hidden_size": 2048, "batch": 256, "bidirectional": True},
        "steps",
        [
            "not stream: it fits, but takes",
            "no shape is handed to cuDNN",
            "has not been measured",
            "66 blocks, for each direction",
        ],
    ),
    "exact float32": (
        "H200",
        {"hidden_size": 512, "dtype": torch.float32},
        "grid",
        ["lets tensor cores do it"],
    ),
    "float64": ("H200", {"hidden_size": 64, "dtype": torch.float64}, "cluster", ["float64 does not run on"]),
    "more groups than room": (
        "H200",
        {"hidden_size": 512, "batch": 32, "dtype": torch.float64},
        "grid",
        ["8 groups of", "on 32 blocks each, 4 at a time", "2 rounds"],
    ),
}


@pytest.mark.cuda_host
@pytest.mark.parametrize("what", WHY)
def test_reasons_on_a_gpu(twin, what):
    gpu, sizes, kernel, words = WHY[what]
    with twin.using("", GPUS[gpu]):
        plan = loop_plan(gpu, **sizes)
    assert plan.kernel == kernel
    text = "\n".join([*plan.words, *plan.reasons])
    assert not [word for word in words if word not in text], text
    assert words or not plan.reasons, text
    assert "by arithmetic for an H200, not measured" in text


@pytest.mark.cuda_host
@pytest.mark.parametrize("forced", ["grid:2", "stream:1", "steps"])
def test_beside_a_forced_plan_is_the_one_that_there_would_be(twin, forced):
    with twin.using("", HOPPER):
        (free,) = explain_case(SMALL)
    with twin.using(forced, HOPPER):
        (call,) = explain_case(SMALL)
    assert call.plan.kernel != free.plan.kernel
    assert f"forces this plan; without it {free.plan.kernel}" in call.plan.reasons[0]


@pytest.mark.cuda_host
def test_tf32_is_a_reason_only_where_it_is_not_allowed(twin):
    for tf32 in (False, True):
        with twin.using("", HOPPER, tf32=tf32):
            (call,) = explain_case(SMALL)
        assert any("lets tensor cores" in reason for reason in call.plan.reasons) != tf32


@pytest.mark.cuda_host
def test_a_backward_pass_that_would_fail_is_foretold(twin):
    """A plan may fit the forward pass alone."""
    module, x = fastseq.GRU(4, 136), torch.randn(3, 2, 4)
    with twin.using("grid:4", (8, 0, 8, 40000, 1048576)):
        (call,) = fastseq.explain(module, x)
        assert call.plan.kernel == "grid"
        assert call.backward.kernel == "none"
        assert "it will fail" in str(call)
        with pytest.raises(RuntimeError):
            module(x)[0].sum().backward()


# ---- nothing else changes ----


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_results_modes_and_random_state_are_as_without(training, grad):
    model, x, results = Everything().train(training), torch.randn(3, 2, 4), []
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        fastseq.explain(lambda: results.append(model(x)))
        assert torch.equal(torch.get_rng_state(), state), "dropout has drawn numbers meanwhile"
        assert same_bits(results[0], model(x))
    assert all(module.training == training for module in model.modules())
    assert results[0].requires_grad == grad
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_errors_pass_through_and_the_recorder_is_gone():
    state = torch.get_rng_state()
    seen = []

    def fail():
        seen.append(torch._C._len_torch_dispatch_stack())
        torch.randn(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fastseq.explain(fail)
    assert seen == [1]
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError) as error:
        fastseq.explain(fastseq.GRU(3, 4), torch.randn(2, 2, 5))
    assert str(error.value).startswith("given: ")


def test_nothing_is_recorded_outside():
    module, x = fastseq.GRU(3, 4), torch.randn(2, 2, 3)
    explanation = fastseq.explain(module, x)
    module(x)
    assert len(explanation) == 1
    assert dispatch.nobody_listens()


def test_a_mode_of_the_caller_still_sees_the_operators():
    from torch.utils.flop_counter import FlopCounterMode

    layer, linear = fastseq.GRU(3, 4), nn.Linear(4, 5)
    with FlopCounterMode(display=False) as counter:
        explanation = fastseq.explain(lambda: linear(layer(torch.randn(2, 2, 3))[0]))
    assert len(explanation) == 1
    assert counter.get_total_flops() > 0


def test_a_compiled_model_is_explained_and_stays_compiled():
    module, x, graphs = fastseq.GRU(3, 4), torch.randn(2, 2, 3), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert len(fastseq.explain(compiled, x)) == 1
    assert not graphs
    assert same_bits(compiled(x)[0].detach(), module(x)[0].detach())
    assert len(graphs) == 1


def test_tensors_without_data_are_explained_too():
    (call,) = fastseq.explain(fastseq.GRU(3, 4, device="meta"), torch.randn(2, 2, 3, device="meta"))
    assert (call.plan.kernel, call.backward.kernel) == ("none", "none")
    assert "nothing is computed on device meta" in str(call)


# ---- what people read ----


def test_without_a_kernel_it_says_so_and_what_could_be_replaced():
    x = torch.randn(3, 2, 4)
    explanation = fastseq.explain(nn.LSTM(4, 5), x)
    assert (len(explanation), explanation.replaceable) == (0, ("torch.nn.LSTM with fastseq.LSTM",))
    assert str(explanation).startswith("no fastseq kernel was called\n")
    model = nn.ModuleDict({"old": nn.GRU(4, 5), "new": fastseq.GRU(5, 6), "cell": nn.LSTMCell(4, 5)})
    explanation = fastseq.explain(lambda: model["new"](model["old"](x)[0]))
    assert len(explanation) == 1
    assert explanation.replaceable == (
        "model.old, torch.nn.GRU with fastseq.GRU",
        "model.cell, torch.nn.LSTMCell with fastseq.LSTMCell",
    )
    assert str(fastseq.explain(torch.relu, x)) == "no fastseq kernel was called"


def test_the_text_has_the_numbers_and_names_calls_once():
    model, x = Everything(), torch.randn(7, 2, 4)
    explanation = fastseq.explain(model, x)
    text = str(explanation)
    assert repr(explanation) == text
    assert "LSTM, float32 on cpu, T 7, B 2, I 6, H 8 (encoder.weight_hh_l0)" in text
    assert "6 calls, each: GRU, float32 on cpu, B 2, I 8, H 8 (cells.0.weight_hh)" in text, (
        "all but the first"
    )
    assert text.count("(cells.0.weight_hh)") == 2
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("nothing", [None, 3, torch.zeros(2)], ids=["None", "3", "a tensor"])
def test_what_cannot_be_called_is_an_error(nothing):
    with pytest.raises(TypeError) as error:
        fastseq.explain(nothing, torch.randn(3))
    assert len(str(error.value).splitlines()) == 3
    assert "module_or_function" in str(error.value)


def test_arguments_go_to_the_callable_whatever_their_names():
    def function(x, *, module_or_function, kwargs):
        return x + module_or_function + kwargs

    assert len(fastseq.explain(function, 1, module_or_function=2, kwargs=3)) == 0
