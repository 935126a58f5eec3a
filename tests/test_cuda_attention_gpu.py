"""What only a GPU can show of attention: CUDA graphs, the caller's stream, no waiting for the device, sizes
beyond 32 bits, and torch's own kernels beside it."""

import pytest
import torch
import torch.nn.functional as F

import fastseq
from attention_harness import ALL, Case, call_fastseq, make_data
from harness import assert_same_bits
from test_cuda_attention import WAYS, moved
from test_cuda_gpu import captured, no_waiting  # noqa: F401 - a fixture
from tolerances import assert_as_accurate_as_torch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

OPTIONS = WAYS | {"one query": {"queries": 1}, "all results": {"returns": ALL, "sinks": True}}
every_option = pytest.mark.parametrize("option", OPTIONS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def case_of(option, dtype=torch.bfloat16) -> Case:
    sizes = {"batch": 3, "heads": 4, "queries": 300, "keys": 500, "head_size": 64}
    return Case(dtype, **{**sizes, **OPTIONS[option]})


@every_dtype
@every_option
def test_captured_training_gives_the_same_bits(option, dtype):
    case = case_of(option, dtype)
    if case.dropout:
        pytest.skip("each replay drops others: the test below")
    data = moved(make_data(case), "cuda")
    leaves = [x for x in data.values() if x.requires_grad]

    def call():
        for x in leaves:
            x.grad = None
        results = call_fastseq(case, data)
        sum(x.nan_to_num(0, 0, 0).float().square().sum() for x in results.values()).backward()
        results = {name: x.detach() for name, x in results.items()}
        return results | {str(i): x.grad for i, x in enumerate(leaves)}

    graph, results = captured(call)
    with torch.no_grad():
        data["value"].mul_(1.5)
    graph.replay()
    assert_same_bits({name: x.clone() for name, x in results.items()}, call())


def test_each_replay_of_a_graph_drops_other_weights():
    q, k, v = (torch.randn(2, 4, 100, 64, device="cuda") for _ in range(3))
    graph, output = captured(lambda: fastseq.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(output.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@every_option
def test_no_call_waits_for_the_device(no_waiting, option):  # noqa: F811
    case = case_of(option)
    data = moved(make_data(case), "cuda")
    for attempt in range(2):
        with no_waiting:
            torch.cuda._sleep(1_000_000_000)
            results = call_fastseq(case, data)
            sum(x.float().sum() for x in results.values()).backward()
            assert attempt == 0 or not torch.cuda.current_stream().query(), "the host waited"


@every_option
def test_kernels_run_on_the_callers_stream(option):
    case = case_of(option)
    data = moved(make_data(case), "cuda")
    with torch.no_grad():
        expected = call_fastseq(case, data)["output"].clone()
        values = data["value"].detach().clone()
        data["value"].zero_()
        torch.cuda.synchronize()
        side, done = torch.cuda.Stream(), torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)  # about a second of the default stream
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            data["value"].copy_(values)
            output = call_fastseq(case, data)["output"].clone()
            done.record()
        done.synchronize()
        assert not torch.cuda.default_stream().query(), "it waited for the default stream"
        with torch.cuda.stream(side):
            assert torch.equal(output, expected)
    torch.cuda.synchronize()


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_long_sequences_match_torchs_kernels(dtype, causal, head_size):
    """Against torch's in float64, by the error of torch's in this dtype."""
    g = torch.Generator("cuda").manual_seed(1)
    tensors = [torch.randn(1, 2, 2500, head_size, generator=g, device="cuda").to(dtype) for _ in range(4)]

    def run(attend, dtype):
        q, k, v, grad = (x.to(dtype).requires_grad_() for x in tensors)
        output = attend(q, k, v, is_causal=causal)
        return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad)]

    exact = run(F.scaled_dot_product_attention, torch.float64)
    torchs = run(F.scaled_dot_product_attention, dtype)
    ours = run(fastseq.scaled_dot_product_attention, dtype)
    for name, a, b, c in zip(("output", "query", "key", "value"), ours, torchs, exact, strict=True):
        assert_as_accurate_as_torch(a, b, c, dtype, name)


def test_tensors_of_more_than_2_to_the_31_elements():
    """The last head is that of a tensor of its own."""
    free, _ = torch.cuda.mem_get_info()
    heads, rows, size = 260, 2**16 + 128, 128
    assert heads * rows * size > 2**31
    if free < 7 * heads * rows * size * 2:
        pytest.skip("too little memory")
    q, k, v = (torch.randn(1, heads, rows, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    part = [x[:, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
    whole = [x.requires_grad_() for x in (q, k, v)]
    outputs = [fastseq.scaled_dot_product_attention(*x, window=(64, 0)) for x in (whole, part)]
    grad = torch.randn_like(outputs[1])
    assert torch.equal(outputs[0][:, -1:], outputs[1])
    ours = torch.autograd.grad(outputs[0], whole, grad.expand_as(outputs[0]))
    alone = torch.autograd.grad(outputs[1], part, grad)
    assert all(torch.equal(a[:, -1:], b) for a, b in zip(ours, alone, strict=True))
