"""Attention's CUDA kernels, on their host twin and on a GPU: what the tests of attention, which run on both
as they are, do not see. Plans, the order in which threads run, lengths that nobody checks, tf32."""

import math
from dataclasses import replace

import pytest
import torch

import cuda_host
import fastseq
from attention_harness import (
    ALL,
    Case,
    call_fastseq,
    check,
    kept_weights,
    make_data,
    run_fastseq,
    run_reference,
)
from devices import ARITHMETIC, GPUS
from fastseq import attention_ops, cuda_attention, precision
from harness import ProductsInTf32, assert_same_bits
from tolerances import TIMES_TORCH

KINDS = ("float64", "float32", "tf32", "bfloat16", "float16")
FORCED = ["tiles", "decode", "tiles:3", "decode:2"]
# What takes different ways through the kernels.
WAYS = {
    "plain": {},
    "causal from the end": {"causal": "bottom_right", "kv_heads": 2},
    "window": {"window": (30, 5), "sinks": True, "returns": ("lse",)},
    "bool mask and dropout": {"mask": "bool", "dropout": 0.3, "returns": ALL},
    "float mask": {"mask": "float", "mask_dims": "HQK", "softcap": 3.0},
    "mask of keys": {"mask": "float", "mask_dims": "K", "alibi": "BH"},
    "key lengths": {"lengths": True, "returns": ALL, "average": True},
    "packed": {"packed": True, "causal": "top_left"},
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_way = pytest.mark.parametrize("way", WAYS)


def moved(data, where):
    """The same tensors on a device, leaves as before."""
    return {name: x.detach().to(where).requires_grad_(x.requires_grad) for name, x in data.items()}


def run(device, case: Case, data, kind="float32"):
    """Results and gradients on the CPU, with tf32 if that is the kind."""
    with precision.products("tf32" if kind == "tf32" else "ieee"):
        results = run_fastseq(case, moved(data, device.where))
    return {name: x.cpu() for name, x in results.items()}


def case_of(way, kind, **sizes) -> Case:
    sizes = {"batch": 2, "heads": 4, "queries": 37, "keys": 150, "head_size": 40} | sizes
    return Case(ARITHMETIC[kind][0], **{**sizes, **WAYS[way]})


# ----------------------------------------------------------------------------------------- forced plans, tf32


@pytest.mark.parametrize("forced", FORCED)
@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_forced_plan_matches_float64_reference(twin, forced, way, dtype):
    case = replace(case_of(way, "float32"), dtype=dtype)
    with twin.using(attention=forced) as ran:
        check(case)
        of_forward = [plan for plan in ran if plan["pass"] == "forward"]
    assert {plan["kernel"] for plan in of_forward} == {forced.split(":")[0]}
    if ":" in forced and not case.packed:
        assert {plan["parts"] for plan in of_forward} == {int(forced[-1])}


@pytest.mark.parametrize("queries", [1, 70, 150])
@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_match_float64_reference_where_there_are_no_hopper_kernels(twin, dtype, way, queries):
    with twin.using(facts=GPUS["A100"]) as ran:
        check(replace(case_of(way, "float32", queries=queries, head_size=72), dtype=dtype))
        assert "hopper" not in {plan["kernel"] for plan in ran}


@every_way
def test_tf32_is_as_exact_as_products_of_tf32(device, way):
    """By the mean of squares over several draws. float32 is not rounded to tf32 unasked."""
    case = case_of(way, "tf32", batch=3, queries=70, head_size=64)
    squares = {}
    for seed in range(4):
        data = make_data(case, seed)
        keep = kept_weights(case, data)
        exact, _ = run_reference(case, data, keep)
        with ProductsInTf32():
            torchs, _ = run_reference(case, data, keep, torch.float32)
        answers = (torchs, run(device, case, data, "tf32"), run(device, case, data, "float32"))
        for name, x in exact.items():
            seen = x.isfinite()
            errors = [(answer[name].double() - x)[seen].square().sum().item() for answer in answers]
            squares[name] = [a + b for a, b in zip(squares.get(name, [0.0] * 3), errors, strict=True)]
    for name, (of_torch, ours, in_float32) in squares.items():
        assert ours <= TIMES_TORCH**2 * of_torch, name
        assert in_float32 < of_torch / 20**2, name


@every_kind
@pytest.mark.parametrize("head_size", [1, 64, 65, 128, 129, 256])
def test_every_size_of_tiles_matches_float64_reference_over_many_tiles(twin, kind, head_size):
    if kind == "tf32":
        pytest.skip("the tiles are those of float32")
    case = Case(ARITHMETIC[kind][0], 1, 2, 0, 150, 140, head_size, causal="top_left", mask="float")
    check(case)


# ------------------------------------------------------------------------------------------------------- bits


@pytest.mark.cuda_host
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
@every_way
def test_same_bits_in_every_schedule(twin, kind, way):
    case = case_of(way, kind, queries=20, keys=70)
    data = make_data(case)
    expected = run(twin, case, data, kind)
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        assert_same_bits(run(twin, case, data, kind), expected, f" with threads in order {order} {seed}")


@every_kind
@every_way
def test_same_bits_from_run_to_run(device, kind, way):
    case = case_of(way, kind)
    data = make_data(case)
    first = run(device, case, data, kind)
    for _ in range(20 if device.is_gpu else 1):
        assert_same_bits(run(device, case, data, kind), first)


def pass_results(twin, case, data, backward, turn):
    """The bits of one pass in each schedule, without a barrier of this turn; None after an error."""
    for order, seed in cuda_host.SCHEDULES:
        cuda_host.set_schedule(order, seed)
        leaves = moved(data, "cpu")
        try:
            twin.module.leave_out("" if backward or turn < 0 else "sync_block", max(turn, 0))
            results = call_fastseq(case, leaves)
            if backward:
                twin.module.leave_out("sync_block" if turn >= 0 else "", max(turn, 0))
                wanted = [x for x in leaves.values() if x.requires_grad]
                grads = torch.autograd.grad(results["output"].sum(), wanted)
                results = dict(enumerate(grads))
            bits = b"".join(x.detach().view(torch.uint8).numpy().tobytes() for x in results.values())
        except RuntimeError:
            bits = None
        finally:
            twin.module.leave_out("", 0)
        yield bits


@pytest.mark.cuda_host
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_no_barrier_can_be_left_out(twin, kind, backward):
    """Over four tiles: bits change with the schedule, or it is an error."""
    if twin.module.sanitized:
        pytest.skip("AddressSanitizer may end the process")
    case = Case(ARITHMETIC[kind][0], 1, 1, 0, 200, 200, 64)
    data = make_data(case)
    with twin.using(facts=GPUS["A100"]):
        expected, *others = pass_results(twin, case, data, backward, -1)
        assert {expected} == {*others}
        for turn in range(4):
            assert any(bits != expected for bits in pass_results(twin, case, data, backward, turn)), turn


@every_kind
@pytest.mark.parametrize("queries", [1, 40])
def test_a_row_of_the_batch_does_not_depend_on_the_others(device, kind, queries):
    case = Case(ARITHMETIC[kind][0], 3, 2, 0, queries, 700, 40, mask="bool", mask_dims="QK", lengths=True)
    data = make_data(case)
    whole = run(device, case, data, kind)
    for b in range(3):
        part = {name: x if name == "attn_mask" else x.detach()[b : b + 1] for name, x in data.items()}
        part = {name: x.requires_grad_(data[name].requires_grad) for name, x in part.items()}
        alone = run(device, replace(case, batch=1), part, kind)
        assert_same_bits(
            alone,
            {name: whole[name][b : b + 1] for name in alone if name == "output"}
            | {name: x for name, x in alone.items() if name != "output"},
        )


# --------------------------------------------------------------------------------- what nobody checks on CUDA


@pytest.mark.parametrize("queries", [1, 40])
def test_key_lengths_out_of_bounds_are_the_nearest_that_are_not(device, queries):
    case = Case(queries=queries, batch=4, keys=70, lengths=True, causal="bottom_right")
    data = make_data(case)
    results = []
    for lengths in ([-5, 1000, 2**40, 7], [0, 70, 70, 7]):
        results.append(run(device, case, {**data, "key_lengths": torch.tensor(lengths)}))
    assert_same_bits(*results)


STARTS = [
    [0, 10, 20, 30],
    [5, 10, 20, 30],
    [0, 20, 10, 30],
    [0, 10, 20, 2**40],
    [-(2**40), 10, 20, 25],
    [30, 20, 10, 0],
    [2**62, -(2**62), 2**62, -(2**62)],
]


@pytest.mark.cuda_host
@pytest.mark.parametrize("of_keys", STARTS, ids=str)
@pytest.mark.parametrize("of_queries", STARTS, ids=str)
def test_starts_of_packed_sequences_never_lead_out_of_bounds(twin, of_queries, of_keys):
    """On a GPU nobody looks at them before the kernels do; here reading elsewhere would end the process."""
    case = Case(batch=3, packed=True, queries=10, keys=10)
    data = {name: torch.randn(30, 4, 8, requires_grad=True) for name in ("query", "key", "value")}
    data["cu_seqlens_q"], data["cu_seqlens_k"] = torch.tensor(of_queries), torch.tensor(of_keys)
    first, again = run_fastseq(case, data), run_fastseq(case, data)
    if of_queries == of_keys == STARTS[0]:
        assert_same_bits(first, again)


PLAIN = {
    "decoding": {"queries": 1, "keys": 700, "kv_heads": 2},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "small scale": {"scale": 1e-7},
    "features that no tensor map takes": {"head_size": 37},
}


@pytest.mark.parametrize("way", PLAIN)
@every_kind
def test_usual_calls_need_no_operator_and_give_its_bits(device, monkeypatch, kind, way):
    sizes = {"batch": 2, "heads": 4, "queries": 37, "keys": 150, "head_size": 40} | PLAIN[way]
    options = {name: sizes.pop(name) for name in ("is_causal", "scale") if name in sizes}
    data = moved(make_data(Case(ARITHMETIC[kind][0], **sizes)), device.where)

    def call():
        with precision.products("tf32" if kind == "tf32" else "ieee"), torch.no_grad():
            return fastseq.scaled_dot_product_attention(**data, **options, enable_gqa=True)

    with device.using() as ran:
        expected = call()
        assert [plan["pass"] for plan in ran] == ["forward"]
        monkeypatch.setattr(attention_ops, "READS_TENSORS", True)
        monkeypatch.setattr(attention_ops, "attention", None)
        assert torch.equal(call(), expected)


@pytest.fixture
def memory_of_nan():
    """All memory that is handed out holds NaN at first."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_outside_of_all_packed_sequences_see_nothing(device, memory_of_nan, dtype):
    """A buffer of fixed size, of which sequences take a part."""
    data = [torch.randn(50, 2, 8, dtype=dtype, device=device.where, requires_grad=True) for _ in range(3)]
    starts = torch.tensor([3, 20, 20, 41], device=device.where)
    assert torch.empty(3).isnan().all()
    output, lse = fastseq.scaled_dot_product_attention(
        *data, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True
    )
    grads = torch.autograd.grad(output.float().square().sum(), data)
    outside = torch.ones(50, dtype=torch.bool, device=device.where)
    outside[3:41] = False
    assert (lse[:, outside] == -torch.inf).all()
    assert lse[:, ~outside].isfinite().all()
    for result in (output, *grads):
        assert not result[outside].any()
        assert result[~outside].isfinite().all()
        assert result[~outside].any()


@every_kind
def test_dropout_is_that_of_the_cpu_for_the_same_seed(device, kind):
    dtype = ARITHMETIC[kind][0]
    tensors = [torch.randn(2, 3, n, 8, dtype=dtype) for n in (70, 200, 200)]
    options = [None] * 6 + [torch.tensor([2**62 + 12345]), 0.3, 0.0, 0.4, -1, -1, False, True]
    weights = []
    for where in ("cpu", device.where):
        carried = [x.to(where) if isinstance(x, torch.Tensor) else x for x in [*tensors, *options]]
        kernels = CPU if where == "cpu" and not weights else attention_ops.KERNELS[device.where]
        weights.append(kernels.attention(*carried)[2].cpu())
    of_cpu, ours = weights
    assert torch.equal(of_cpu != 0, ours != 0)
    assert 0.55 < (ours != 0).double().mean() < 0.65


CPU = attention_ops.KERNELS["cpu"]  # before a fixture puts the twin there


@pytest.mark.parametrize("backward", [False, True])
def test_heads_of_more_than_256_features_are_a_clear_error(twin, backward):
    x = torch.randn(1, 1, 4, 257, requires_grad=backward)
    with pytest.raises(RuntimeError, match=r"heads of 257 features on CUDA\naccepted: up to 256\ntry: .*cpu"):
        fastseq.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("forced", ["fast", "tiles:", "tiles:0", "tiles:-1", "tiles:1x2", "decode:9999999"])
def test_malformed_forced_plan_is_a_clear_error(twin, forced):
    x = torch.randn(1, 1, 4, 8)
    with twin.using(attention=forced), pytest.raises(RuntimeError, match="FASTSEQ_CUDA_ATTENTION_PLAN"):
        fastseq.scaled_dot_product_attention(x, x, x)


# ------------------------------------------------------------------------------------------------------ plans


def plan(dtype=torch.bfloat16, facts=GPUS["H200"], forced="", backward=False, options=False, **sizes):
    sizes = {"batch": 2, "heads": 8, "kv_heads": 8, "queries": 1000, "keys": 1000, "head_size": 64} | sizes
    sizes.setdefault("value_size", sizes["head_size"])
    rest = {"packed": False, "tf32": False, "weights": False, "of_mask": False, "one_pass": False}
    rest |= {"only_mask": False, "tma": False}
    rest |= {name: sizes.pop(name) for name in list(sizes) if name in cuda_attention.Problem._fields[11:]}
    rest |= {name: sizes.pop(name) for name in ("packed", "tf32") if name in sizes}
    has = {f"mask_has_{name}": False for name in ("batch", "head", "query", "key")}
    code = fastseq.checks.DTYPES[dtype]
    problem = cuda_attention.Problem(
        dtype=code, backward=backward, options=options, **{**has, **rest}, **sizes
    )
    return fastseq._C.cuda_attention_plan(problem, facts, forced).describe()


@pytest.mark.parametrize("facts", GPUS)
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head_size", [1, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("dtype", fastseq.checks.DTYPES, ids=str)
def test_tiles_fit_every_gpu(dtype, head_size, backward, options, facts):
    if dtype is torch.float64 and backward and head_size > 128 and facts == "RTX":
        with pytest.raises(RuntimeError, match="try: smaller heads, or a smaller dtype"):
            plan(dtype, GPUS[facts], "tiles", backward, options, head_size=head_size)
        return
    for one in plan(dtype, GPUS[facts], "tiles", backward, options, head_size=head_size)["passes"].values():
        assert one["shared_bytes"] <= GPUS[facts][3]
        assert one["threads"] <= 256


def test_tiles_that_do_not_fit_are_a_clear_error():
    with pytest.raises(RuntimeError, match=r"in tiles of .* bytes\naccepted: tiles of up to 20000 bytes"):
        plan(torch.float32, (8, 0, 108, 20000, 1 << 20))


@pytest.mark.parametrize(
    ("group", "queries", "kernel"), [(1, 1, "decode"), (4, 4, "decode"), (1, 17, "tiles")]
)
def test_few_rows_of_a_key_head_are_decoded(group, queries, kernel):
    for facts in (GPUS["A100"], GPUS["H200"]):
        assert plan(facts=facts, queries=queries, heads=8 * group)["kernel"] in (kernel, "hopper")


@pytest.mark.parametrize("keys", [1, 256, 257, 1000, 8192, 100_000, 10**7])
def test_parts_of_the_keys_depend_on_their_number_alone_and_cover_it(keys):
    plans = [
        plan(torch.float32, facts, queries=1, keys=keys, batch=b) for facts in GPUS.values() for b in (1, 64)
    ]
    assert len({(p["parts"], p["part_keys"]) for p in plans}) == 1
    parts, size = plans[0]["parts"], plans[0]["part_keys"]
    assert (parts - 1) * size < keys <= parts * size
    assert parts == 1 or size % 64 == 0
    assert parts <= 64


@pytest.mark.parametrize(
    ("queries", "keys", "parts"), [(100, 512, 1), (128, 4096, 16), (16, 512, 2), (17, 512, 1)]
)
def test_keys_are_cut_where_there_are_many_for_each_row(queries, keys, parts):
    for facts in GPUS.values():
        found = plan(torch.float32, facts, queries=queries, keys=keys)
        assert found["parts"] == parts
    assert (plan(queries=queries, keys=keys, tma=True)["kernel"] == "hopper") == (parts == 1)


def test_workspace_holds_what_the_parts_leave():
    found = plan(torch.float32, queries=4, keys=5000, batch=3, kv_heads=2)
    rows = 3 * 8 * 4 * found["parts"]
    assert rows * (64 + 2) * 4 <= found["workspace_bytes"] < rows * (64 + 2) * 4 + 1024
    assert plan(torch.float32)["workspace_bytes"] == 0


@pytest.mark.parametrize("size", [(2**16, 1, 2**31), (1, 1, 2**30 + 1)], ids=str)
def test_more_than_a_launch_can_have_is_a_clear_error(size):
    batch, queries, keys = size
    with pytest.raises(RuntimeError, match="accepted: up to"):
        plan(batch=batch, queries=queries, keys=keys)


def test_blocks_cover_every_row_and_key_once():
    for queries, keys in ((1, 1), (17, 300), (1000, 77)):
        forward = plan(torch.float32, forced="tiles:1", queries=queries, keys=keys)["passes"]["forward"]
        assert forward["blocks"] == 16 * math.ceil(queries / forward["own"])
        passes = plan(torch.float32, queries=queries, keys=keys, backward=True)["passes"]
        assert passes["grad_queries"]["blocks"] == 16 * math.ceil(queries / passes["grad_queries"]["own"])
        assert passes["grad_keys"]["blocks"] == 16 * math.ceil(keys / passes["grad_keys"]["own"])


# ------------------------------------------------------------------------------------------ the one-pass form


ONE_PASS = {
    "plain": {},
    "causal from the end, grouped queries": {"causal": "bottom_right", "kv_heads": 2},
    "all that a score can have": {
        "mask": "float",
        "softcap": 3.0,
        "alibi": "BH",
        "dropout": 0.3,
        "sinks": True,
    },
    "key lengths": {"lengths": True, "window": (30, 5)},
    "packed": {"packed": True, "causal": "top_left"},
}


@pytest.mark.parametrize("head_size", [40, 100, 200])
@pytest.mark.parametrize("option", ONE_PASS)
@every_kind
def test_one_pass_gradients_match_float64_reference(twin, monkeypatch, kind, option, head_size):
    if kind == "tf32":
        pytest.skip("the tiles are those of float32")
    ask = fastseq.scaled_dot_product_attention
    monkeypatch.setattr(
        fastseq, "scaled_dot_product_attention", lambda *args, **kw: ask(*args, deterministic=False, **kw)
    )
    case = Case(ARITHMETIC[kind][0], 3, 4, queries=50, keys=130, head_size=head_size, **ONE_PASS[option])
    with twin.using(attention="tiles") as ran:
        check(case)
        assert {plan["kernel"] for plan in ran if plan["pass"] == "backward"} == {"one_pass"}


def test_one_pass_without_a_query_or_a_key_gives_zeros(twin):
    for queries, keys in ((0, 5), (5, 0)):
        q = torch.randn(2, 3, queries, 8, requires_grad=True)
        k = torch.randn(2, 3, keys, 8, requires_grad=True)
        fastseq.scaled_dot_product_attention(q, k, k, deterministic=False).sum().backward()
        assert not q.grad.any()
        assert not k.grad.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_one_pass_keeps_out_what_is_hidden(twin, poison):
    q, k, v = (torch.randn(1, 2, n, 40, requires_grad=True) for n in (60, 70, 70))
    with torch.no_grad():
        k[:, :, 60:] = poison
        v[:, :, 60:] = poison
    fastseq.scaled_dot_product_attention(q, k, v, is_causal=True, deterministic=False).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert not k.grad[:, :, 60:].any()
