"""What calls of attention that is split between processes refuse, send, compute, and leave alone."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention.bias import causal_upper_left
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import attention_ops, exchange
from fastseq.sequence_parts import Part, parts_of, visible_block
from processes import World
from split_attention import Case, call, check, group_of, make_data, part_of, run_part
from tolerances import SAME_FLOAT64

pytestmark = pytest.mark.slow  # it starts processes

ALL = (0, 1, 2)
EVEN = (4, 4, 4)
CAUSAL = Case(EVEN, EVEN, {"is_causal": True})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(3, tmp_path_factory.mktemp("world")) as world:
        yield world


def attend(*arguments, **keywords):
    return fastseq.distributed.scaled_dot_product_attention(*arguments, **keywords)


def rows(*shape, dtype=torch.float64, **more):
    g = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(**more)


# --------------------------------------------------------------------------------------------------- refusals


def wrong_calls():
    """What process 1 passes; the others pass the same without it."""
    x = rows(2, 4, 4, 8, requires_grad=False)
    mask = torch.ones(4, 11, dtype=torch.bool)
    return {
        "dtype": {"query": x.float(), "key": x.float(), "value": x.float()},
        "batch": dict.fromkeys(("query", "key", "value"), x[:1]),
        "head size": {"query": x[..., :4], "key": x[..., :4]},
        "value size": {"value": x[..., :4]},
        "key heads": {"key": x[:, :2], "value": x[:, :2], "enable_gqa": True},
        "no tensor": {"key": [1.0]},
        "sizes that do not fit in one process": {"key": x[:, :, :3]},
        "scale": {"scale": 0.3},
        "causal": {"is_causal": True},
        "window": {"window": (3, 0)},
        "soft cap": {"softcap": 2.0},
        "dropout": {"dropout_p": 0.1},
        "another kind of mask": {"attn_mask": causal_upper_left(4, 12)},
        "an unknown split": {"split": "striped"},
        "another split": {"split": "zigzag"},
        "replicated": {"replicated_query": True},
        "mask": {"attn_mask": torch.ones(4, 12, dtype=torch.bool)},
        "lengths": {"key_lengths": torch.tensor([3, 4])},
        "sinks": {"sinks": torch.zeros(4)},
        "gradients": {"query": x.clone().requires_grad_()},
        "columns of the mask, in all": ({"attn_mask": mask[:, 1:]}, {"attn_mask": mask}),
        "lengths too long": ({"key_lengths": torch.tensor([3, 4])}, {"key_lengths": torch.tensor([3, 13])}),
        "other replicated queries": ({"replicated_query": True}, {"query": x[:, :, :2]}),
        "zigzag of other shares": ({"split": "zigzag"}, {"query": x[:, :, :1]}),
        "bottom right with lengths": (
            {"key_lengths": torch.tensor([3, 4])},
            {"causal": "bottom_right"},
        ),
    }


WRONG = list(wrong_calls())


def refused(name):
    """What is raised here; then a good call."""
    wrong = wrong_calls()[name]
    common, wrong = wrong if isinstance(wrong, tuple) else ({}, wrong)
    x = rows(2, 4, 4, 8, requires_grad=False)
    arguments = {"query": x, "key": x, "value": x} | common | (wrong if dist.get_rank() == 1 else {})
    try:
        attend(**arguments)
    except Exception as error:
        attend(x, x, x)
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("name", WRONG)
def test_what_differs_is_refused_in_every_process_and_the_group_goes_on(world, name):
    raised = world.run(refused, name)
    assert all(raised), f"raised: {raised}"
    for kind, text in raised:
        assert kind in ("RuntimeError", "TypeError", "ValueError", "NotImplementedError")
        assert [line.partition(":")[0] for line in text.splitlines()] == ["given", "accepted", "try"], text


def outside_of_the_group():
    group = group_of((0, 2))
    x = rows(1, 1, 2, 4)
    if dist.get_rank() != 1:
        return attend(x, x, x, group=group).shape == x.shape
    with pytest.raises(RuntimeError, match="no member"):
        attend(x, x, x, group=group)
    return True


def test_only_members_of_the_group_may_call(world):
    assert all(world.run(outside_of_the_group))


def test_no_process_group_is_a_clear_error():
    x = rows(1, 1, 2, 4)
    for function in (lambda: attend(x, x, x), lambda: fastseq.distributed.sequence_positions(4)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            function()


def dtensors():
    x = DTensor.from_local(rows(1, 1, 2, 4), DeviceMesh("cpu", list(ALL)), [Shard(2)])
    with pytest.raises(TypeError, match="to_local"):
        attend(x, x, x)


def test_dtensors_are_refused(world):
    world.run(dtensors)


def derivatives_that_are_not_there():
    x = rows(1, 1, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda q: attend(q, x, x))(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        attend(forward_ad.make_dual(x, x), x, x)


def test_derivatives_that_are_not_there_raise(world):
    world.run(derivatives_that_are_not_there)


def test_import_does_not_need_torch_distributed():
    code = """
import sys, types, torch
import fastseq
assert "fastseq.distributed" not in sys.modules, "imported when it is used"
bare = types.ModuleType("torch.distributed")
bare.is_available = lambda: False
sys.modules["torch.distributed"] = torch.distributed = bare
x = torch.zeros(1, 1, 2, 4)
try:
    fastseq.distributed.scaled_dot_product_attention(x, x, x)
except RuntimeError as error:
    assert "without torch.distributed" in str(error)
else:
    raise AssertionError
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr[-2000:]


# ---------------------------------------------------------------------------------- what is sent and computed


def counted(case):
    """Scores computed in the forward and the backward pass, and bytes sent in both, by this process."""
    scores, sent = [0, 0], [0]
    forward, backward = attention_ops.attention, attention_ops.attention_backward
    send = exchange.Transfer.send

    def count(i, query, key):
        scores[i] += query.shape[2] * key.shape[2]

    def count_forward(*arguments):
        count(0, *arguments[:2])
        return forward(*arguments)

    def count_backward(*arguments):
        count(1, *arguments[3:5])
        return backward(*arguments)

    def count_bytes(transfer, to, *tensors):
        sent[0] += sum(x.nbytes for x in tensors)
        send(transfer, to, *tensors)

    attention_ops.attention, attention_ops.attention_backward = count_forward, count_backward
    exchange.Transfer.send = count_bytes
    try:
        run_part(case, ALL)
    finally:
        attention_ops.attention, attention_ops.attention_backward = forward, backward
        exchange.Transfer.send = send
    return scores, sent[0]


ROWS = 40  # of each process, half of them more than what is few
BYTES = 2 * 2 * 4 * ROWS * 8 * 8  # of its keys and values


def test_what_a_causal_mask_hides_whole_is_neither_computed_nor_sent(world):
    case = Case((ROWS,) * 3, (ROWS,) * 3, {"is_causal": True})
    results = world.run(counted, case)
    assert [[n / ROWS**2 for n in scores] for scores, _ in results] == [[1, 1], [2, 2], [3, 3]]
    # Keys and values go twice to those behind, gradients once to those before.
    assert [sent / BYTES for _, sent in results] == [2 * 2 + 0, 2 * 1 + 1, 0 + 2]


def test_zigzag_gives_every_process_the_same_work(world):
    case = Case((ROWS,) * 3, (ROWS,) * 3, {"is_causal": True}, split="zigzag")
    half = (ROWS // 2) ** 2
    for scores, _ in world.run(counted, case):  # of its own halves two on the diagonal and a square,
        assert scores == [(2 + 1 + 2 * 2) * half] * 2  # and two squares with each other process


def test_a_window_is_sent_to_neighbours_only(world):
    case = Case((ROWS,) * 3, (ROWS,) * 3, {"is_causal": True, "window": (20, None)})
    results = world.run(counted, case)
    assert [sent / BYTES for _, sent in results] == [2, 2 + 1, 1]
    for rank, (scores, _) in enumerate(results):
        assert scores == [ROWS**2 + (20 * 20 if rank else 0)] * 2, "only the keys and rows that meet"


def test_a_whole_replicated_query_sends_no_keys(world):
    results = world.run(counted, Case((5,) * 3, (ROWS,) * 3, replicated=True))
    assert [sent for _, sent in results] == [0, 0, 0]


# -------------------------------------------------------------------------------------- places, by themselves


@pytest.mark.parametrize("left", [-1, 0, 3])
@pytest.mark.parametrize("right", [-1, 0, 2])
def test_blocks_see_what_the_whole_sequence_lets_them(left, right):
    queries, keys, offset = 7, 5, -1
    for first_query in range(8):
        for first_key in range(8):
            q, k = Part(first_query, queries, 100), Part(first_key, keys, 50)
            seen = {
                (i, j)
                for i in range(queries)
                for j in range(keys)
                if (right < 0 or first_key + j <= first_query + i + offset + right)
                and (left < 0 or first_key + j >= first_query + i + offset - left)
            }
            block = visible_block(q, k, left, right, offset)
            if block is None:
                assert not seen
                continue
            rows = range(block.queries.start - 100, block.queries.stop - 100)
            columns = range(block.keys.start, block.keys.stop)
            assert seen == {
                (i, j)
                for a, i in enumerate(rows)
                for b, j in enumerate(columns)
                if (block.left < 0 or b >= a - block.left) and (block.right < 0 or b <= a + block.right)
            }
            assert {i for i, _ in seen} == set(rows), "every row of a block sees something"
            assert {j for _, j in seen} == set(columns), "every key of a block is seen"


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
def test_parts_cover_the_sequence_once(split):
    for length in range(20):
        for size in (1, 2, 3, 4):
            lengths = [len(range(rank, length, size)) for rank in range(size)]
            parts = [part for of_process in parts_of(lengths, split) for part in of_process]
            seen = [place for start, count, _ in parts for place in range(start, start + count)]
            assert sorted(seen) == list(range(length))


def positions(length, split):
    return fastseq.distributed.sequence_positions(length, split=split)


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
def test_positions_are_those_of_the_split(world, split):
    for length in (12, 11, 2):
        held = world.run(positions, length, split)
        assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    assert [x.tolist() for x in world.run(positions, 12, "zigzag")] == [
        [0, 1, 10, 11],
        [2, 3, 8, 9],
        [4, 5, 6, 7],
    ]


# --------------------------------------------------------------------------------------------------- the rest


def some_gradients(wanted):
    """Of the inputs of this process that `wanted` names: beside those of a call that wants all."""
    data = part_of(CAUSAL, make_data(CAUSAL), dist.get_rank())
    everything = call(CAUSAL, data, attend)
    leaves = {
        name: data[name].clone().requires_grad_(name in wanted[dist.get_rank()])
        for name in ("query", "key", "value")
    }
    output, lse = attend(**leaves, is_causal=True, return_lse=True)
    torch.autograd.backward([output, lse], [data["grad of output"], data["grad of lse"]])
    for name, leaf in leaves.items():
        if name in wanted[dist.get_rank()]:
            torch.testing.assert_close(leaf.grad, everything[f"grad of {name}"], **SAME_FLOAT64)


@pytest.mark.parametrize(
    "wanted",
    [["query"] * 3, ["key"] * 3, ["value", "query", "key"], ["query", ["key", "value"], "value"]],
    ids=str,
)
def test_processes_may_want_different_gradients(world, wanted):
    world.run(some_gradients, wanted)


def other_shapes():
    rank = dist.get_rank()
    for q, k, v in [
        ((4, 8), (4, 8), (4, 8)),
        ((3, 4, 8), (3, 4, 8), (3, 4, 8)),
        ((2, 1, 3, 4, 8), (5, 3, 4, 8), (3, 4, 8)),
    ]:
        g = torch.Generator().manual_seed(3)
        tensors = [
            torch.randn((*s[:-2], 12, 8), generator=g, dtype=torch.float64).requires_grad_()
            for s in (q, k, v)
        ]
        whole = fastseq.scaled_dot_product_attention(*tensors, is_causal=True, return_lse=True)
        mine = [x[..., 4 * rank : 4 * rank + 4, :] for x in tensors]
        ours = attend(*mine, is_causal=True, return_lse=True)
        torch.testing.assert_close(ours[0], whole[0][..., 4 * rank : 4 * rank + 4, :], **SAME_FLOAT64)
        torch.testing.assert_close(ours[1], whole[1][..., 4 * rank : 4 * rank + 4], **SAME_FLOAT64)
        of_ours = torch.autograd.grad(ours[0].square().sum(), tensors)
        of_whole = torch.autograd.grad(whole[0].square().sum(), tensors)
        for name, ours, theirs in zip("qkv", of_ours, of_whole, strict=True):
            dist.all_reduce(ours)
            torch.testing.assert_close(ours, theirs, **SAME_FLOAT64, msg=lambda text, n=name: n + text)


def test_any_rank_and_broadcast_batches(world):
    world.run(other_shapes)


def layouts():
    x = rows(2, 5, 4, 8).transpose(1, 2)
    output = attend(x, x, x)
    assert output.stride() == x.stride()


def test_output_lies_in_memory_as_query_does(world):
    world.run(layouts)


def nan_ahead():
    """The last process's keys and values are NaN, which a causal mask hides from all others' queries."""
    data = part_of(CAUSAL, make_data(CAUSAL), dist.get_rank())
    clean = call(CAUSAL, data, attend)
    if dist.get_rank() == 2:
        data = data | {name: torch.full_like(data[name], torch.nan) for name in ("key", "value")}
        data["grad of output"] = data["grad of output"] * 0
    dirty = call(CAUSAL, data, attend)
    if dist.get_rank() == 2:
        assert dirty["output"].isnan().all()
        return
    for name in ("output", "lse", "grad of query"):
        torch.testing.assert_close(dirty[name], clean[name], **SAME_FLOAT64)


def test_nan_in_keys_that_are_hidden_reaches_nothing(world):
    world.run(nan_ahead)


def same_bits():
    data = part_of(CAUSAL, make_data(CAUSAL), dist.get_rank())
    first, second = (call(CAUSAL, data, attend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_results_have_the_same_bits_every_time(world):
    world.run(same_bits)


def dropped(p):
    """With values of one every row of output is the sum of the weights that are left."""
    torch.manual_seed(7)  # the same in all processes, which draw different weights nevertheless
    q, k = torch.zeros(1, 2, 32, 4, requires_grad=True), torch.zeros(1, 2, 32, 4)
    v = torch.ones(1, 2, 32, 4, requires_grad=True)
    output = attend(q, k, v, dropout_p=p)
    incoming = torch.ones_like(output)
    grads = torch.autograd.grad(output, (q, v), incoming)
    products = torch.stack([(output * incoming).sum(), (grads[1] * v).sum()]).detach()
    dist.all_reduce(products)
    return output.detach(), products


def test_dropout_drops_other_weights_everywhere_and_the_same_in_the_backward_pass(world):
    results = world.run(dropped, 0.25)
    outputs = torch.cat([output for output, _ in results], dim=2)
    kept = outputs[..., 0] * 96 * 0.75  # of 96 keys
    assert (kept.sum() / kept.numel() / 96 - 0.75).abs() < 0.02
    assert not torch.equal(results[0][0], results[1][0])
    for _, (forward, backward) in results:  # output is linear in value
        torch.testing.assert_close(forward, backward)
    assert not any(output.any() for output, _ in world.run(dropped, 1.0))


def within(how):
    data = part_of(CAUSAL, make_data(CAUSAL), dist.get_rank())
    expected = call(CAUSAL, data, attend)
    leaves = [data[name].clone().requires_grad_() for name in ("query", "key", "value")]

    def layer(*tensors):
        group = DeviceMesh("cpu", list(ALL)) if how == "mesh" else None
        return attend(*tensors, is_causal=True, return_lse=True, group=group)

    if how == "autocast":  # as in one process: float32 becomes bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(*(x.float() for x in leaves))[0].dtype is torch.bfloat16
        return
    if how == "compile":
        layer = torch.compile(layer, backend="aot_eager")
    with torch.inference_mode() if how == "inference" else nullcontext():
        outputs = checkpoint(layer, *leaves, use_reentrant=False) if how == "checkpoint" else layer(*leaves)
    torch.testing.assert_close(outputs[0].detach().clone(), expected["output"], **SAME_FLOAT64)
    if how != "inference":
        torch.autograd.backward(outputs, [data["grad of output"], data["grad of lse"]])
        torch.testing.assert_close(leaves[1].grad, expected["grad of key"], **SAME_FLOAT64)


@pytest.mark.parametrize("how", ["checkpoint", "autocast", "inference", "mesh", "compile"])
def test_it_works_within(world, how):
    world.run(within, how)


class Layer(torch.nn.Module):
    def forward(self, x):
        return attend(x, x, x)


def captured(how):
    x = rows(1, 1, 2, 4)
    try:
        if how == "compile":
            torch.compile(Layer(), backend="eager", fullgraph=True)(x)
        else:
            torch.export.export(Layer(), (x,), strict=how == "strict export")
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["compile", "export", "strict export"])
def test_a_graph_that_may_not_break_is_a_clear_error(world, how):
    assert all("attention that is split between processes" in text for text in world.run(captured, how))


def test_parts_as_long_as_what_kernels_call_few(world):
    """Of up to 16 keys the operators make delta of weights, and of more of output."""
    for keys, lengths in (((15, 17, 16), (48, 20)), ((40, 16, 1), (48, 20)), ((20, 30, 20), (25, 60))):
        case = Case((17, 3, 20), keys, {"is_causal": True}, lengths=lengths)
        check(case, world.run(run_part, case, ALL))


def guide(text):
    names = {}
    for block in text:
        exec(compile(block, "docs/guide/distributed.md", "exec"), names)


def test_examples_of_the_guide_run(world):
    text = (Path(__file__).parents[1] / "docs" / "guide" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 4
    world.run(guide, blocks)
