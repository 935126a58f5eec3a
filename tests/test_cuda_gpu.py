"""What only a GPU can show: the caller's stream, CUDA graphs, no waiting for the device, memory that does not
grow, sizes that fit nowhere else, and torch.nn on cuDNN beside it."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from devices import ARITHMETIC, expected, plans_of
from fastseq import ops
from harness import (
    Case,
    as_leaves,
    assert_all_as_accurate_as_torch,
    assert_same_bits,
    call_module,
    make_data,
    make_module,
    module_class,
    move,
    named_outputs,
    run_module,
    states_of,
)
from reference import MODES
from test_bad_input import assert_three_lines, error_of
from test_cuda_bits import assert_same_bits_in_pieces
from test_gradcheck import gradcheck_module
from tolerances import SAME_FLOAT32, largest

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

CUDNN_MODES = sorted(set(MODES) - {"GRU_RESET_BEFORE"})
MIDDLE = Case(steps=20, batch=24, input_size=40, hidden_size=200, num_layers=2, bidirectional=True)
NETWORKS = [replace(MIDDLE, mode=mode) for mode in MODES] + [replace(MIDDLE, proj_size=56)]


@pytest.fixture
def own_plans(gpu, monkeypatch):
    """The kernels as they come, nothing put in their place by these tests."""
    monkeypatch.delenv("FASTSEQ_CUDA_PLAN", raising=False)
    monkeypatch.setitem(ops.KERNELS, "cuda", ops.loop_kernels(ops.loops.CUDA))


def on_gpu(case):
    return move(make_module(case), make_data(case), "cuda")


def training_step(module, input, states):
    """Results and gradients of a loss of all results, with gradients that are summed up in place."""
    output, hidden = module(input, states)
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    loss = output.square().sum() + sum(h.square().sum() for h in hidden)
    loss.backward()
    return output, *hidden


def named_gradients(module, data):
    leaves = {**data, **dict(module.named_parameters())}
    return {f"grad of {name}": x.grad for name, x in leaves.items() if x.grad is not None}


# -------------------------------------------------------------------------------------------- beside torch.nn


@pytest.mark.parametrize("mode", CUDNN_MODES)
def test_cuda_is_all_that_a_user_calls(own_plans, monkeypatch, mode):
    """A module with torch.nn's state_dict gives cuDNN's numbers; without tf32, in which both round anew."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = replace(MIDDLE, mode=mode)
    theirs = make_module(case, nn).cuda()
    cls, arguments = module_class(fastseq, mode)
    sizes = (case.input_size, case.hidden_size, case.num_layers)
    ours = cls(*sizes, bidirectional=True, **arguments).cuda()
    ours.load_state_dict(theirs.state_dict())
    _, data = on_gpu(case)
    results = [call_module(case, module, data) for module in (ours, theirs)]
    for name, x in results[0].items():
        assert x.is_cuda
        torch.testing.assert_close(x, results[1][name], **SAME_FLOAT32)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_layers_of_middling_size_match_float64_reference(gpu, case, arithmetic):
    gpu.check(replace(case, dtype=ARITHMETIC[arithmetic][0]), arithmetic)


BLOCKS = {"cluster": (1, 2, 4, 8, 16), "grid": (1, 5, 25), "stream": (1, 5, 25), "steps": ()}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_every_kernel_that_fits_matches_float64_reference(gpu, network, arithmetic, backward):
    """Each number of blocks and of columns; what the plan refuses has too little shared memory."""
    dtype, tf32 = ARITHMETIC[arithmetic]
    case = replace(network, dtype=dtype, num_layers=1, packed="unsorted" if backward else "")
    module, data = make_module(case), make_data(case)
    torchs, exact = expected(case, tf32, "cuda")
    names = [name for name in exact if backward or not name.startswith("grad of")]
    ran = 0
    for plan in plans_of(case, arithmetic, BLOCKS):
        if plan.startswith("cluster") and gpu.facts[0] < 9:
            continue
        with gpu.using(plan, tf32=tf32):
            run = gpu.run if backward else call_on_gpu
            try:
                ours = run(case, module, data)
            except RuntimeError as error:
                if "a forced plan" in str(error):
                    continue
                raise
        ran += 1
        chosen = ({name: x[name] for name in names} for x in (ours, torchs, exact))
        assert_all_as_accurate_as_torch(*chosen, dtype, f" with FASTSEQ_CUDA_PLAN={plan}")
    assert ran > 0


def call_on_gpu(case, module, data):
    with torch.no_grad():
        return {name: x.cpu() for name, x in call_module(case, *move(module, data, "cuda")).items()}


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_allow_tf32_is_obeyed(gpu, case):
    """By the loop and by the products around it."""
    module, data = make_module(case), make_data(case)
    results = {}
    for tf32 in (True, False, True):
        with gpu.using(tf32=tf32):
            results.setdefault(tf32, []).append(gpu.run(case, module, data))
    assert_same_bits(*results[True])
    for name, x in results[False][0].items():
        assert not torch.equal(x, results[True][0][name]), f"{name}: the same with and without tf32"


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_after_double_and_cuda(own_plans, mode):
    case = Case(mode, steps=3, batch=2, input_size=2, hidden_size=5, bidirectional=True)
    module = make_module(case).double().cuda()
    data = as_leaves(make_data(case), torch.float64, "cuda")
    assert gradcheck_module(case, module, data)


# -------------------------------------------------------------------------------- streams, graphs, no waiting


def captured(call):
    """A CUDA graph of a call, after a warm-up on a side stream as torch advises, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_captured_inference_gives_the_same_bits(own_plans, case, dtype):
    case = replace(case, dtype=dtype)
    module, data = on_gpu(case)

    @torch.no_grad()
    def call():
        output, hidden = module(data["input"], states_of(data))
        return named_outputs(output, hidden)

    graph, results = captured(call)
    for seed in (3, 4):
        with torch.no_grad():
            data["input"].copy_(make_data(case, seed)["input"])
        graph.replay()
        assert_same_bits({name: x.clone() for name, x in results.items()}, call())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_captured_training_gives_the_same_bits(own_plans, case, packed):
    """Forward and backward in one graph; batch_sizes are read when it is captured."""
    case = replace(case, packed="sorted" if packed else "")
    module, data = on_gpu(case)
    input = data["input"]
    if packed:
        sequence = pack_padded_sequence(input.detach(), case.lengths(), enforce_sorted=True)
        values = sequence.data.clone().requires_grad_()
        input = nn.utils.rnn.PackedSequence(values, sequence.batch_sizes)
        data = {**data, "input": values}
    leaves = [*data.values(), *module.parameters()]

    def call():
        for x in leaves:
            x.grad = None
        output, *hidden = training_step_of(module, input, states_of(data))
        results = {str(i): x.detach() for i, x in enumerate([output, *hidden])}
        return results | named_gradients(module, data)

    graph, results = captured(call)
    for _ in range(2):
        graph.replay()
    replayed = {name: x.clone() for name, x in results.items()}
    assert_same_bits(replayed, call())


def training_step_of(module, input, states):
    """training_step of padded and of packed input."""
    if isinstance(input, torch.Tensor):
        return training_step(module, input, states)

    class Values(nn.Module):
        def forward(self, input, states):
            output, hidden = module(input, states)
            return output.data, hidden

    return training_step(Values(), input, states)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_kernels_run_on_the_callers_stream(own_plans, case):
    """What comes before on a side stream is there, what comes after waits; the default stream is held up
    meanwhile, so that work on it could not be in time."""
    module, data = on_gpu(case)
    with torch.no_grad():
        expected_output = call_module(case, module, data)["output"].clone()
        values = data["input"].detach().clone()
        data["input"].zero_()
        torch.cuda.synchronize()
        side, done = torch.cuda.Stream(), torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)  # about a second of the default stream
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            data["input"].copy_(values)
            output = call_module(case, module, data)["output"].clone()
            done.record()
        done.synchronize()
        busy = not torch.cuda.default_stream().query()
        assert busy, "it waited for the default stream"
        with torch.cuda.stream(side):
            assert torch.equal(output, expected_output)
    torch.cuda.synchronize()


@pytest.fixture
def no_waiting():
    """Any call of torch that waits for the device is an error."""

    class Watched:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Watched()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_no_call_waits_for_the_device(own_plans, no_waiting, case):
    """Layers and cells, forward and backward, from the first call on. torch sees only its own waits; that the
    kernels' launches do not wait either is seen by the host being back while the device is still busy."""
    module, data = on_gpu(case)
    cell = getattr(fastseq, module_class(fastseq, case.mode)[0].__name__ + "Cell")(8, 16).cuda()
    x = torch.randn(4, 8, device="cuda")
    for attempt in range(2):
        with no_waiting:
            torch.cuda._sleep(1_000_000_000)
            training_step(module, data["input"], states_of(data))
            state = cell(x)
            (state[0] if isinstance(state, tuple) else state).sum().backward()
            assert attempt == 0 or not torch.cuda.current_stream().query(), "the host waited"


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_packed_sequences_wait_for_nothing_after_packing(own_plans, no_waiting, case):
    module, data = on_gpu(case)
    lengths = replace(case, packed="unsorted").lengths()
    packed = pack_padded_sequence(data["input"], lengths, enforce_sorted=False)
    with no_waiting:
        output, _ = module(packed, states_of(data))
        output.data.sum().backward()
    assert pad_packed_sequence(output)[1].tolist() == lengths.tolist()


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_same_bits_from_run_to_run_while_the_gpu_is_busy(own_plans, case):
    """With other work beside it, whose blocks come between those of a grid."""
    case = replace(case, packed="unsorted")
    module, data = make_module(case), make_data(case)
    first = run_module(case, module, data, "cuda")
    side, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(10):
        with torch.cuda.stream(side):
            for _ in range(20):
                a @ a
        assert_same_bits(run_module(case, module, data, "cuda"), first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", MODES)
def test_kernels_run_on_the_device_of_the_tensors(own_plans, mode):
    """Not on the current one."""
    case = replace(MIDDLE, mode=mode)
    module, data = make_module(case), make_data(case)
    first = run_module(case, module, data, "cuda:0")
    assert_same_bits(run_module(case, module, data, "cuda:1"), first)
    assert torch.cuda.current_device() == 0
    error = error_of(module.to("cuda:0"), data["input"].to("cuda:1"))
    assert isinstance(error, RuntimeError)
    assert_three_lines(error)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_compiled_training_matches_eager(own_plans, mode):
    """torch.compile(fullgraph=True), forward and backward."""
    module, data = on_gpu(replace(MIDDLE, mode=mode))
    compiled = torch.compile(module, fullgraph=True)
    results = []
    for call in (module, compiled):
        for x in [*data.values(), *module.parameters()]:
            x.grad = None
        outputs = training_step(call, data["input"], states_of(data))
        named = {str(i): x.detach() for i, x in enumerate(outputs)}
        results.append(named | named_gradients(module, data))
    for name, x in results[0].items():
        size = largest(x)  # of gradients, which are sums over all rows
        torch.testing.assert_close(results[1][name] / size, x / size, **SAME_FLOAT32)


# ------------------------------------------------------------------------------------------ sizes and memory


def needs(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize("plan", ["cluster:2", "grid:2"])
@pytest.mark.parametrize("mode", MODES)
def test_seventy_thousand_steps_in_pieces_are_the_same_bits(gpu, mode, plan):
    """There is no input, whose product might be rounded by the number of its rows."""
    case = Case(mode, steps=70_000, batch=2, input_size=0, hidden_size=24)
    with gpu.using(plan) as ran:
        assert_same_bits_in_pieces(gpu, case, make_module(case), make_data(case), [1, 69_998, 1])
    assert [one["kernel"] for one in ran] == [plan.partition(":")[0]] * 4


# Steps and rows. Neither takes long, so they are among the tests that gpu_report.sh runs.
BEYOND_32_BITS = [(40, 70_000), (70_000, 32)]


def assert_halves_match_whole(device, case, plan):
    """The forward pass over all rows of a batch has the bits that it has over each half. W x is a single
    number here, so that its bits do not depend on the number of rows."""
    module = make_module(case).to(device.where)
    x = torch.randn(case.steps, case.batch, 1, dtype=case.dtype, device=device.where)
    half = case.batch // 2
    with torch.no_grad(), device.using(plan) as ran:
        output, h_n = module(x)
        for rows in (slice(half), slice(half, None)):
            part, part_h = module(x[:, rows].contiguous())
            assert torch.equal(output[:, rows], part)
            assert torch.equal(h_n[:, rows], part_h)
            del part
    assert torch.equal(output[-1], h_n[0])
    assert [one["kernel"] for one in ran] == [plan.partition(":")[0]] * 3


def assert_close_to_largest(actual, expected, part):
    """Apart by no more than this part of the largest expected value: sums of several orders and roundings."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=part * largest(expected))


def assert_gradients_of_halves_match_whole(device, case, plan):
    """The gradient of h0, which is the loop's alone, has the bits that it has over each half. Those of the
    input and weights are torch's products of what the loop wrote; the weights' are sums over both halves."""
    module = make_module(case).to(device.where)
    sizes = {"dtype": case.dtype, "device": device.where}
    x = torch.randn(case.steps, case.batch, 1, **sizes)
    h0 = torch.randn(1, case.batch, case.hidden_size, **sizes).tanh()
    grad = torch.randn(case.steps, case.batch, case.hidden_size, **sizes)

    def gradients(rows):
        leaves = [t[:, rows].contiguous().requires_grad_() for t in (x, h0)]
        output, _ = module(*leaves)
        return torch.autograd.grad(output, [*leaves, *module.parameters()], grad[:, rows])

    half = case.batch // 2
    with device.using(plan) as ran:
        of_x, of_h0, *of_weights = gradients(slice(None))
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in of_weights]
        for rows in (slice(half), slice(half, None)):
            part_x, part_h0, *parts = gradients(rows)
            assert torch.equal(of_h0[:, rows], part_h0)
            assert_close_to_largest(part_x, of_x[:, rows], 1e-2)
            for total, part in zip(sums, parts, strict=True):
                total += part
    for total, whole in zip(sums, of_weights, strict=True):
        assert_close_to_largest(whole.float(), total, 5e-2)
    assert [one["kernel"] for one in ran] == [plan.partition(":")[0]] * 6


@pytest.mark.parametrize(("steps", "batch"), BEYOND_32_BITS)
def test_more_than_2_to_the_31_elements(gpu, steps, batch):
    case = Case("RNN_TANH", torch.bfloat16, steps=steps, batch=batch, input_size=1, hidden_size=1024)
    elements = case.steps * case.batch * case.hidden_size
    assert elements > 2**31
    needs(4 * elements * 2 / 2**30)  # output and W x, of the whole and of a half, and some room
    assert_halves_match_whole(gpu, case, "stream:16x4")


@pytest.mark.parametrize(("steps", "batch"), BEYOND_32_BITS)
def test_gradients_of_more_than_2_to_the_31_elements(gpu, steps, batch):
    case = Case("RNN_TANH", torch.bfloat16, steps=steps, batch=batch, input_size=1, hidden_size=1024)
    elements = case.steps * case.batch * case.hidden_size
    assert elements > 2**31
    needs(8 * elements * 2 / 2**30)  # also the incoming gradient, that of W x, and all previous states
    assert_gradients_of_halves_match_whole(gpu, case, "stream:16x4")


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_memory_does_not_grow_over_many_calls(own_plans, case):
    module, data = on_gpu(case)

    def call():
        for x in [*data.values(), *module.parameters()]:
            x.grad = None
        training_step(module, data["input"], states_of(data))

    def used():
        gc.collect()
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free

    for _ in range(3):
        call()
    allocated, reserved, free = used()
    for _ in range(100):
        call()
    after = used()
    assert after[:2] == (allocated, reserved)
    assert after[2] >= free - 2**25, "memory that torch does not know of"


# -------------------------------------------------------------------------------------------------- failures

FAILURES = {
    "input on the CPU": lambda module, x: module(x.cpu()),
    "states on the CPU": lambda module, x: module(x, torch.zeros(1, 3, 7)),
    "another dtype": lambda module, x: module(x.double()),
    "wrong features": lambda module, x: module(x[..., :2]),
    "wrong batch of the states": lambda module, x: module(x, torch.zeros(1, 2, 7, device="cuda")),
}


@pytest.mark.parametrize("what", FAILURES)
def test_failing_call_leaves_no_error_behind_in_cuda(own_plans, what):
    module, data = on_gpu(Case("GRU"))
    expected_output = module(data["input"])[0].detach()
    error = error_of(FAILURES[what], module, data["input"])
    assert error is not None
    assert_three_lines(error)
    torch.cuda.synchronize()  # would raise what a kernel has done
    assert torch.equal(module(data["input"])[0], expected_output)
    assert torch.randn(3, device="cuda").add(1).isfinite().all()


@pytest.mark.parametrize("plan", ["grid:999", "best", "cluster:3"])
def test_plan_that_does_not_fit_leaves_no_error_behind_in_cuda(gpu, plan):
    module, data = on_gpu(Case("GRU"))
    expected_output = module(data["input"])[0].detach()
    with gpu.using(plan):
        error = error_of(module, data["input"])
    assert isinstance(error, RuntimeError)
    assert "FASTSEQ_CUDA_PLAN" in str(error)
    torch.cuda.synchronize()
    assert torch.equal(module(data["input"])[0], expected_output)


def test_launch_that_fails_is_an_error_once_and_leaves_none_behind(gpu):
    """More shared memory than there is: the plan is made for a GPU that is not this one."""
    facts = (*gpu.facts[:3], 2**22, gpu.facts[4])
    case = Case("LSTM", dtype=torch.float64, hidden_size=300, batch=40)
    module, data = on_gpu(case)
    x = data["input"]
    with gpu.using():
        expected_output = module(x)[0].detach()
        gpu.facts, own = facts, gpu.facts
        try:
            with gpu.using("grid:1"):
                error = error_of(module, x)
        finally:
            gpu.facts = own
        assert isinstance(error, RuntimeError)
        assert_three_lines(error)
        assert "CUDA says" in str(error)
        torch.cuda.synchronize()
        assert torch.equal(module(x)[0], expected_output)
