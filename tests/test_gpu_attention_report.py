"""Measuring attention on a GPU, as far as a machine without one can tell: the grid, its runner rehearsed on
the CPU, where two of torch's backends refuse everything, the goals, the summary, README's tables, figures."""

import itertools
import json
import math
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastseq
from benchmark_runs import BENCHMARKS, PNG, README, rehearse, run, run_out_of_time

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Of a rehearsal, whose lengths are 64 times smaller: three cases with a goal, and one without.
CASES = "attention: full .* bfloat16 B2 H16 S128 D128|decoding: .* B1 H32/8 S1x16 |masks: trained .* S32 D64"


@pytest.fixture
def modules(monkeypatch):
    """The modules beside the runner that draw nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention_exact
    import gpu_attention_grid
    import gpu_attention_run
    import gpu_attention_summary
    import gpu_attention_table
    import gpu_runner
    import paired
    import records
    import timers

    found = (attention_exact, gpu_attention_grid, gpu_attention_run, gpu_attention_summary)
    found += (gpu_attention_table, gpu_runner, paired, records, timers)
    return {m.__name__: m for m in found}


@pytest.fixture
def grid(modules):
    return modules["gpu_attention_grid"]


# ------------------------------------------------------------------------------------------------ the cases


def test_grid_has_the_cases_that_the_project_is_judged_by(grid):
    names = {case.name for case in grid.cases()}
    assert len(names) == len(grid.cases())
    modes, kinds = ("inference", "training"), ("full", "causal")
    attention = {
        f"attention: {kind} {mode} {dtype} B{16384 // length} H{2048 // size} S{length} D{size}"
        for kind, mode, length in itertools.product(kinds, modes, LENGTHS)
        for dtype, size in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 64))
    }
    masks = {
        f"masks: {kind} mask {mode} bfloat16 B{16384 // length} H{2048 // size} S{length} D{size}"
        for kind, mode, length, size in itertools.product(
            ("boolean", "additive", "trained"), modes, (2048, 4096), (64, 128)
        )
        if (kind, mode) != ("trained", "inference")
    }
    options = {
        f"options: {kind} {mode} bfloat16 B4 H{2048 // size} S4096 D{size}"
        for kind, mode, size in itertools.product(
            ("window 256", "softcap", "alibi", "key_lengths", "dropout 0.1", "packed"), modes, (64, 128)
        )
    }
    decoding = {name for name in names if name.startswith("decoding: ")}
    assert names == attention | masks | options | decoding
    for heads, queries, batch, keys in itertools.product(
        ("H32/8", "H32"), (1, 4), (1, 8, 64), (1024, 4096, 16384, 65536, 131072)
    ):
        fits = heads == "H32/8" or batch < 64 or keys < 65536
        name = f"decoding: full inference bfloat16 B{batch} {heads} S{queries}x{keys} D128"
        assert (name in decoding) == fits, name


def test_a_rehearsal_has_as_many_cases_as_the_grid_and_the_same_order(grid):
    small, large = grid.cases(grid.REHEARSAL), grid.cases()
    assert [(c.group, c.kind, c.mode, c.dtype) for c in small] == [
        (c.group, c.kind, c.mode, c.dtype) for c in large
    ]
    assert {c.shape.queries for c in small if c.group == "attention"} == {n // 64 for n in LENGTHS}


def test_grid_starts_with_the_goals_and_any_part_of_the_rest_is_a_fair_sample(grid):
    cases = grid.cases()
    assert cases == grid.cases(), "the same order every time"
    first = {(c.kind, c.mode, c.shape.queries) for c in cases[:7]}
    assert first == {
        ("causal", "inference", 16384),
        *itertools.product(["full"], ("inference", "training"), (4096, 8192, 16384)),
    }
    assert {(c.group, c.dtype, c.shape.head_size) for c in cases[:7]} == {("attention", "bfloat16", 128)}
    ranks = [grid.has_ratio(case) for case in cases[7:]]
    assert ranks == sorted(ranks, reverse=True)
    rest = cases[7 + sum(ranks) :]
    without_goal = [case.group == "options" for case in rest]
    assert without_goal == sorted(without_goal)
    rest = rest[: without_goal.index(True)]
    for key in (lambda c: c.group, lambda c: c.mode):
        assert set(map(key, rest[:20])) == set(map(key, rest))


def test_operations_and_bytes_are_those_of_what_is_seen(grid):
    shape = grid.Shape(2, 3, 1000, 10)
    full = 4 * 2 * 3 * 1000 * 1000 * 10

    def case(kind, mode="inference", group="attention"):
        return grid.Case(group, kind, mode, "bfloat16", shape)

    assert case("full").flops == full
    assert case("causal").flops == full / 2
    assert case("full", "training").flops == 3.5 * full, "the backward pass has two and a half times as many"
    assert case("causal", "backward").flops == 2.5 * full / 2
    packed = case("packed", group="options")
    lengths = packed.lengths
    assert packed.flops == pytest.approx(4 * 3 * 10 * sum(n * n for n in lengths))
    assert packed.flops_of("unmasked") == full
    cached = replace(case("full"), shape=grid.Shape(2, 8, 1, 10, keys=500, kv_heads=2))
    assert cached.bytes_of_cache == 2 * (2 * 2 * 500 * 10) * 2


def test_packed_sequences_are_the_tokens_that_lengths_leave(grid):
    packed = grid.Case("options", "packed", "inference", "float32", grid.Shape(2, 3, 12, 8))
    padded = replace(packed, kind="key_lengths")
    (x, *_), options = packed.arguments()
    (y, *_), other = padded.arguments()
    assert options["cu_seqlens_q"].tolist() == [0, *itertools.accumulate(other["key_lengths"].tolist())]
    length = packed.lengths[0]
    torch.testing.assert_close(x[:length], y[0, :, :length].transpose(0, 1), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ one case


@pytest.fixture
def measured_small(modules, grid):
    """A function that measures a small case of a kind on the CPU; the record."""

    class Timer(modules["timers"].HostTimer):
        enough = 0  # one call is a sample

    def measure(group, kind, mode, dtype="float32", shape=None):
        shape = shape or grid.Shape(2, 4, 20, 8)
        case = grid.Case(group, kind, mode, dtype, shape)
        return modules["gpu_attention_run"].measure_case(case, "cpu", Timer(), 1e-4, 5)

    return measure


def test_every_kind_of_case_is_measured_and_right(modules, grid, measured_small):
    shapes = {"decoding": grid.Shape(2, 4, 4, 8, keys=40, kv_heads=2)}
    for group, kind, mode in dict.fromkeys((c.group, c.kind, c.mode) for c in grid.cases()):
        record = measured_small(group, kind, mode, shape=shapes.get(group))
        json.dumps(record)
        ran = {"fastseq", *record["ratios"]}
        assert set(record["milliseconds"]) == ran
        assert set(record["refused"]) == set(grid.AGAINST[group]) - ran
        assert ("gigabytes_per_second" in record) == (group == "decoding") == ("tflops" not in record)
        assert not modules["gpu_attention_summary"].is_wrong(record), record
        assert (record["errors"] is None) == kind.startswith("dropout"), "all others are checked"
        assert ("default" in ran) == (group != "options") == (record["difference"] is not None)
        short = group == "decoding" and record["milliseconds"]["fastseq"] < 0.5
        beside = {"backward": (group, mode) == ("attention", "training"), "replayed": short}
        for name, there in beside.items():
            assert (record[name] is not None) == there
            assert not there or set(record[name]["milliseconds"]) == ran


def test_a_backend_that_refuses_is_recorded_with_its_reason(grid, measured_small):
    record = measured_small("attention", "full", "training")
    assert set(record["refused"]) == {"efficient", "cudnn"}, "the CPU has neither"
    assert all("No viable backend" in why for why in record["refused"].values())
    assert set(record["ratios"]) == {"default", "flash"}
    assert record["default_is"] == "flash"


class Broken:
    """A timer of a GPU that every call of `wait` finds lost."""

    def wait(self):
        raise RuntimeError("an illegal memory access was encountered")


def test_what_torch_says_of_a_backend_is_its_reason(modules, grid):
    first_results, timer = modules["gpu_attention_run"].first_results, modules["timers"].HostTimer()

    def refuses():
        import warnings

        warnings.warn("cuDNN attention kernel not used because: (Triggered internally at x)", stacklevel=1)
        warnings.warn("cuDNN attention does not like Mondays. (Triggered internally at x)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    calls = {"fastseq": grid.Call(lambda: (1,)), "cudnn": grid.Call(refuses)}
    results, refused = first_results(calls, timer, 5)
    assert results == {"fastseq": (1,)}
    assert refused["cudnn"].startswith("cuDNN attention does not like Mondays.; RuntimeError: No available")
    with pytest.raises(RuntimeError, match="No available"):
        first_results({"fastseq": grid.Call(refuses)}, timer, 5)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        first_results({"cudnn": grid.Call(refuses)}, Broken(), 5)


def test_a_backend_that_takes_too_long_is_left_out_alone(modules, grid):
    run_, timer = modules["gpu_attention_run"], modules["timers"].HostTimer()
    calls = {"flash": grid.Call(lambda: (1,))}
    assert run_.first_results(calls, timer, 0)[1]["flash"].startswith("one call of flash takes")
    with pytest.raises(modules["gpu_runner"].LeftOut):
        run_.first_results({"fastseq": calls["flash"]}, timer, 0)


def test_libraries_are_timed_in_turn_with_their_backend_chosen_before_the_clock_runs(modules, grid):
    seen, clock = [], []

    class Timer:
        enough, long = 0, 1

        def sample(self, function, repeats):
            clock.append(torch.backends.cuda.flash_sdp_enabled())
            function()
            return 1e-3

    calls = {
        name: grid.Call(lambda name=name: seen.append(name), grid.BACKENDS.get(name))
        for name in ("fastseq", "efficient", "flash")
    }
    rounds = modules["paired"].in_turn(calls, None, 0, 3, grid.BackendTimer(Timer()))
    assert seen[-9:] == ["fastseq", "efficient", "flash"] * 3
    assert clock[-9:] == [True, False, True] * 3
    assert rounds.ratios("flash", "fastseq") == [1, 1, 1]
    assert isinstance(grid.Call(print).chosen(), nullcontext), "torch's own choice"


def test_the_backward_pass_alone_goes_back_through_one_forward_pass(modules, grid, monkeypatch):
    case = grid.Case("attention", "full", "backward", "float32", grid.Shape(2, 3, 20, 8))
    forward, calls = fastseq.scaled_dot_product_attention, []
    monkeypatch.setattr(
        fastseq, "scaled_dot_product_attention", lambda *x, **y: calls.append(1) or forward(*x, **y)
    )
    inputs, options = case.arguments()
    alone = case.ours(inputs, options)
    grads = [alone() for _ in range(3)]
    assert len(calls) == 1
    both = replace(case, mode="training").ours(inputs, options)()
    for found in grads:
        torch.testing.assert_close(found, both[1:], rtol=0, atol=0)


def test_what_cannot_be_replayed_from_a_graph_is_left_out_alone(modules, grid):
    class Timer(modules["timers"].HostTimer):
        def replayed(self, function):
            if function is print:
                raise RuntimeError("operation not permitted when stream is capturing")
            return lambda: ("replayed", function())

    calls = {"fastseq": grid.Call(lambda: 1), "flash": grid.Call(print), "default": grid.Call(lambda: 2)}
    found = grid.BackendTimer(Timer()).replays(calls)
    assert {name: call() for name, call in found.items()} == {
        "fastseq": ("replayed", 1),
        "default": ("replayed", 2),
    }


def test_after_a_case_that_hung_no_kernel_for_hopper_gpus_runs(modules, grid, monkeypatch, tmp_path):
    run_ = modules["gpu_attention_run"]
    monkeypatch.setattr(modules["gpu_runner"].os, "_exit", lambda status: None)
    monkeypatch.setenv(run_.FORCED, "")  # so that it is restored
    monkeypatch.delenv(run_.FORCED)
    shape = grid.Shape(1, 2, 20, 8)
    float32, decoding, half = (
        grid.Case(group, "full", "inference", dtype, shape)
        for group, dtype in (("attention", "float32"), ("decoding", "bfloat16"), ("attention", "bfloat16"))
    )
    arguments = SimpleNamespace(seconds=100, hang=30, dry_run_on_cpu=True, resume=True)

    def plans(*hung):
        run = run_.AttentionRun(arguments, tmp_path, [], "cpu", modules["timers"].HostTimer())
        found = []
        for case in (float32, decoding, half):
            run.before(case)
            found.append(os.environ.get(run_.FORCED, ""))
            if case in hung:
                run.abandon(lambda why: None, "it hung")
        return found

    assert plans(float32, decoding) == ["", "", ""], "other kernels"
    assert plans(half) == ["", "", ""]
    assert plans() == ["", "", "tiles"], "of the process that goes on"
    monkeypatch.setenv(run_.FORCED, "tiles:2")
    assert plans() == ["tiles:2"] * 3, "what the user wants"


@pytest.mark.parametrize("kind", ["full", "causal", "trained mask"])
def test_a_sample_tells_results_that_are_wrong_in_one_place(modules, grid, kind):
    case = grid.Case("masks", kind, "training", "float32", grid.Shape(3, 4, 30, 8))
    inputs, options = case.arguments()
    results = list(case.ours(inputs, options)())
    compare = modules["gpu_attention_run"].compare
    assert compare(case, inputs, options, {"fastseq": results})[1]["fastseq"] < 1e-5
    for i in range(len(results)):
        wrong = [x.clone() for x in results]
        wrong[i][-1, -1, -1] += 0.1 * wrong[i].abs().max()
        assert compare(case, inputs, options, {"fastseq": wrong})[1]["fastseq"] > 1e-3, i
        all_but_sampled = [x.clone() for x in results]
        all_but_sampled[i][:, 0] = math.nan  # of another head: the comparison with torch tells
        found = {"fastseq": all_but_sampled, "flash": results}
        assert math.isnan(compare(case, inputs, options, found)[0])


# ------------------------------------------------------------------------------------------------ a rehearsal


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder and the output of rehearse()."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("gpu") / "results"
    return folder, rehearse("gpu_attention_run.py", "attention.json", CASES, folder)


def test_a_run_goes_on_after_a_case_that_hung_and_ends_with_figures_and_goals(rehearsal):
    folder, output = rehearsal
    results = json.loads((folder / "attention.json").read_text())
    assert list(results["left_out"]) == ["attention: full training bfloat16 B2 H16 S128 D128"]
    assert [r["group"] for r in results["cases"]] == ["attention", "masks", "decoding"]
    assert (results["planned"], results["complete"], results["dry_run"]) == (4, True, True)
    assert results["environment"].keys() >= {"gpu", "clocks_before", "clocks_after", "tf32", "commit"}
    assert (folder / "attention_inference.png").read_bytes().startswith(PNG)
    assert not list(folder.glob("*.partial"))
    assert not (folder / "results.json").exists(), "which is of recurrent networks"
    summary = re.search(r"^-- attention grid\n(.*)^-- end of attention grid$", output, flags=re.S | re.M)[1]
    lost = "attention: full training bfloat16 B2 H16 S128 D128 hung or broke the GPU"
    assert f"FASTSEQ_CUDA_ATTENTION_PLAN=tiles from then on: {lost}" in summary
    assert re.search(r"slowest against torch's default +\| >= 1x +\| [\d.]+x +\| (yes|no)", summary)
    assert re.search(r"forward, D 128, full, S >= 4096 +\| >= 576 TFLOP/s \| not measured \| \?", summary)
    assert re.search(r"^efficient refused 2 cases, mostly: .*No viable backend", summary, flags=re.M)


def test_a_run_that_is_out_of_time_keeps_what_it_has(tmp_path):
    results = run_out_of_time("gpu_attention_run.py", "attention.json", CASES, tmp_path)
    assert (results["complete"], results["cases"], results["planned"]) == (False, [], 4)


def test_small_cases_are_right(tmp_path):
    pattern = "S130 D64|S1x300|S300"
    code, output = run("gpu_attention_run.py", "--smoke", "--dry-run-on-cpu", "--case", pattern, cwd=tmp_path)
    assert code == 0, output
    assert "32 of 32 small cases" in output


# ------------------------------------------------------------------------------------------------ the goals


def measured(grid, tflops=700.0, ratio=3.0, **changed):
    """Records of every case, all with the same results; what torch has for float32 is efficient alone."""
    records = []
    for case in grid.cases():
        libraries = case.against
        if case.dtype == "float32":
            libraries = ("default", "efficient")
        shape, seconds = case.shape, case.flops / tflops / 1e12
        record = case.facts | {
            "batch": shape.batch,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads or shape.heads,
            "queries": shape.queries,
            "keys": case.keys,
            "head_size": shape.head_size,
            "ratios": dict.fromkeys(libraries, ratio),
            "milliseconds": {"fastseq": seconds * 1e3},
            "refused": {name: "too small" for name in case.against if name not in libraries},
            "difference": 1e-7,
            "errors": dict.fromkeys(("fastseq", *libraries), 1e-7),
            "backward": None,
            "replayed": None,
            "default_is": "cudnn" if "cudnn" in libraries else None,
            "plan": "forward tma",
        }
        speeds = {"fastseq": tflops} | dict.fromkeys(libraries, tflops / ratio)
        record |= {"gigabytes_per_second": speeds} if case.group == "decoding" else {"tflops": speeds}
        record |= changed
        if case.group == "attention" and case.mode == "training":
            record["backward"] = {"tflops": speeds, "ratios": record["ratios"]}
        elif case.group == "decoding" and case.keys <= 4096:
            record["replayed"] = {
                "gigabytes_per_second": {n: 2 * x for n, x in speeds.items()},
                "ratios": record["ratios"],
            }
        records.append(record)
    return records


def with_changes(records, changes, **wanted):
    """The records, some of them with other values."""
    return [r | changes if all(r[k] == v for k, v in wanted.items()) else r for r in records]


def reached(modules, records):
    return {row["goal"]: row["reached"] for row in modules["gpu_attention_summary"].goals(records)}


def missed(modules, records):
    return {re.split(r"[,:]", name)[0] for name, done in reached(modules, records).items() if not done}


def test_goals_are_reached_or_missed_by_what_was_measured(modules, grid):
    good = measured(grid)
    assert set(reached(modules, good).values()) == {True}
    assert set(reached(modules, []).values()) == {None}
    slow = reached(modules, measured(grid, tflops=100, ratio=0.9, difference=math.nan))
    assert set(slow.values()) == {False}
    assert modules["gpu_attention_summary"].goals(good)[0]["measured"] == "700 / 700 / 700", "4k, 8k, 16k"


@pytest.mark.parametrize(
    ("where", "speed", "least", "goal"),
    [
        ({"kind": "full", "queries": 4096}, "forward", 576, "full, S >= 4096"),
        ({"kind": "full", "queries": 2048}, "forward", 0, "full, S >= 4096"),
        ({"kind": "causal", "queries": 16384}, "forward", 504, "causal, S 16384"),
        ({"kind": "full", "queries": 8192}, "backward", 450, "full, S >= 4096"),
    ],
)
def test_goals_in_tflops_are_those_of_the_best_kernels(modules, grid, where, speed, least, goal):
    mode = "inference" if speed == "forward" else "training"
    wanted = {"group": "attention", "dtype": "bfloat16", "head_size": 128, "mode": mode} | where
    for offset, done in ((0.5, True), (-0.5, least == 0)):
        value = max(1.0, least + offset)
        found = measured(grid)
        (record,) = [r for r in found if all(r[k] == v for k, v in wanted.items())]
        (record if speed == "forward" else record["backward"])["tflops"] = {"fastseq": value}
        (row,) = [
            r
            for r in modules["gpu_attention_summary"].goals(found)
            if r["goal"].startswith(speed) and r["goal"].endswith(goal)
        ]
        assert row["reached"] == done, (row, offset)


@pytest.mark.parametrize(
    ("where", "ratios", "goals"),
    [
        ({"group": "decoding", "keys": 1024}, {"default": 0.99}, {"slowest against torch's default"}),
        ({"group": "masks"}, {"efficient": 1.99, "default": 1}, {"slowest with a mask or bias"}),
        ({"group": "attention", "dtype": "float32"}, {"efficient": 1.49}, {"slowest in float32"}),
        ({"head_size": 64, "mode": "inference", "queries": 8192}, {"cudnn": 0.99}, {"slowest forward pass"}),
        ({"head_size": 64, "mode": "training", "queries": 8192}, {"cudnn": 0.99}, set()),
        ({"head_size": 256, "queries": 1024}, {"cudnn": 1.0}, {"slowest up to S 1024"}),
        ({"head_size": 256, "queries": 1024}, {"cudnn": 1.01}, set()),
        ({"group": "options"}, {"unmasked": 0.1}, set()),
    ],
)
def test_every_case_has_to_reach_the_ratio_of_its_goal(modules, grid, where, ratios, goals):
    wanted = {"group": "attention", "dtype": "bfloat16"} | where
    wanted = where if "group" in where else wanted
    found = missed(modules, with_changes(measured(grid), {"ratios": ratios}, **wanted))
    assert {name for name in found if any(name.startswith(goal) for goal in goals)} == found
    assert len(found) == len(goals)


@pytest.mark.parametrize(
    ("wrong", "changes"),
    [
        (True, {"difference": 0.2}),
        (True, {"difference": math.nan}),
        (True, {"errors": {"fastseq": 0.05, "default": 1e-3}}),
        (True, {"errors": {"fastseq": math.nan, "default": 1e-3}}),
        (True, {"errors": {"fastseq": 0.05}}),
        (False, {"errors": {"fastseq": 2e-3, "default": 1e-3}}),
        (False, {"errors": {"fastseq": 2e-3, "default": math.nan, "flash": 1e-3}}),  # known of cuDNN
        (False, {"errors": None, "difference": None}),
    ],
)
def test_wrong_results_count(modules, wrong, changes):
    known = {"dtype": "bfloat16", "difference": 1e-3, "errors": {"fastseq": 1e-3, "default": 1e-3}}
    assert modules["gpu_attention_summary"].is_wrong(known | changes) == wrong


# ------------------------------------------------------------------------------------ the summary and README


def results_of(records, left_out=()):
    facts = {"gpu": "H200", "driver": "1", "torch": "2.13", "cudnn": 91000, "python": "3.11"}
    facts |= {"date": "2026-01-01T00:00:00+00:00", "commit": "c" * 40, "fastseq": "1"}
    return {
        "environment": facts,
        "dry_run": False,
        "complete": not left_out,
        "planned": len(records) + len(left_out),
        "ceilings": {"copy_terabytes_per_second": 4.0, "bfloat16_product_tflops": 800.0},
        "left_out": dict.fromkeys(left_out, "it hung"),
        "cases": records,
    }


def test_summary_tells_speeds_refusals_missed_cases_and_goals(modules, grid):
    records = with_changes(
        measured(grid), {"ratios": {"default": 0.9, "flash": 0.9}}, group="decoding", keys=4096
    )
    records = with_changes(records, {"difference": 0.5}, kind="softcap", mode="training", head_size=64)
    lines = list(modules["gpu_attention_summary"].text(results_of(records, ["a case"])))
    text = "\n".join(lines)

    def has(pattern):
        return re.search(f"^{pattern}$", text, flags=re.M)

    assert f"{len(records)} of {len(records) + 1} cases measured, 1 left out" in text
    for mode in ("inference", "training", "backward"):
        assert has(rf"bfloat16 D128 full {mode} +(700\( 3.00\) *){{6}}")
    assert has(r"  trained mask training +2k D64 3.00x 3.00x; 4k D64 .*")
    assert has(r"  window 256 +D64 inference 3.00x; .*")
    assert has(r"  4 x 32/32 heads B64 +18% \(3.00\) +18% \(0.90\) +18% \(3.00\) +- +-")
    assert has(r"  4 x 32/32 heads B64 +35% \(3.00\) +35% \(3.00\)"), "from a CUDA graph"
    assert has(r"torch's own choice: cudnn in 72 cases")
    assert has(r"flash refused 24 cases, mostly: too small")
    assert "under 1x: against torch's default: 12" in text
    assert "wrong results: 1" in text
    assert "a case: it hung" in text
    assert lines[-1].startswith("cases whose results are wrong")
    assert max(map(len, lines)) < 140
    assert len(text) < 9000, "the script shows no more"


def test_summary_of_nothing_tells_why(modules):
    text = "\n".join(modules["gpu_attention_summary"].text(results_of([], ["a case"])))
    assert "a case: it hung" in text


def test_section_has_a_table_for_each_kind_of_case(modules, grid):
    section = modules["gpu_attention_table"].section
    text = section([("folder", results_of(measured(grid))), ("other", results_of(measured(grid)))])
    for mode in ("training", "backward"):
        assert text.count(f"| bfloat16, D 256, causal, {mode} | 700 (3.0x) |") == 1
    assert "| float32, D 64, full, inference |" in text
    assert "| trained mask, D 128, S 4k |  |  | 3.0x | 3.0x |" in text
    assert "| packed | 3.0x | 3.0x | 3.0x | 3.0x |" in text
    assert re.search(
        r"^\| 4 queries, 32 key heads, batch 64 \| 700, 18% \(3.0x\) .*\|  \|  \|$", text, flags=re.M
    )
    assert "| forward, D 128, causal, S 16384 | >= 504 TFLOP/s | 700 | yes |" in text
    assert "](folder/attention_inference.png)" in text
    assert "On H200, driver 1" in text.partition("folder/attention_inference.png")[2]
    assert "yet measured on a GPU" in section([])


def test_section_of_part_of_a_run_has_part_of_the_tables(modules, grid):
    records = [r for r in measured(grid) if r["group"] == "decoding"]
    text = modules["gpu_attention_table"].section([("folder", results_of(records))])
    assert "| 1 query, 8 key heads, batch 1 |" in text
    assert "boolean mask" not in text
    assert ".png" not in text


def test_figures_are_drawn_of_what_there_is(modules, grid, tmp_path):
    pytest.importorskip("matplotlib")
    import gpu_attention_figures

    records = [r for r in measured(grid) if r["mode"] == "inference" and r["head_size"] != 256]
    (path,) = gpu_attention_figures.draw(results_of(records), tmp_path)
    assert path.name == "attention_inference.png"
    assert path.read_bytes().startswith(PNG)


def test_panels_have_the_lines_that_were_measured_and_the_lengths_of_all(modules, grid, monkeypatch):
    pytest.importorskip("matplotlib")
    import gpu_attention_figures

    figures = []
    monkeypatch.setattr(gpu_attention_figures, "finish", lambda figure, *_: figures.append(figure))
    records = [r for r in measured(grid) if r["mode"] == "training"]
    records = [r for r in records if (r["dtype"], r["kind"]) != ("float32", "causal")]
    gpu_attention_figures.draw(results_of(records), BENCHMARKS)
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    lines = {title: len(axes.lines) for title, axes in panels.items()}
    assert lines == {
        **{f"{kind}, bfloat16, D = {size}": 4 for kind in ("full", "causal") for size in (64, 128, 256)},
        "full, float32, D = 64": 2,
        "causal, float32, D = 64": 0,
    }
    for axes in panels.values():
        assert axes.get_xticks().tolist() == list(LENGTHS)


def test_readme_says_so_where_attention_was_not_measured_on_a_gpu(modules):
    kept = [json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("*/attention.json")]
    text = README.read_text(encoding="utf-8")
    block = re.search(r"<!-- gpu-attention:begin -->\n(.*)\n<!-- gpu-attention:end -->", text, flags=re.S)[1]
    timed = any("gpu" in results["environment"] for results in kept)
    assert ("not yet measured on a GPU" in " ".join(block.split())) == (not timed)
    assert (block == modules["gpu_attention_table"].section([])) == (not timed)


def test_report_puts_the_tables_into_a_readme_and_nothing_else(rehearsal, tmp_path):
    folder, copy = rehearsal[0], tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ("--readme", copy, "--gpu-attention-results", folder)
    code, output = run("report.py", *arguments, "--check", cwd=tmp_path)
    assert code == 1, output
    code, output = run("report.py", *arguments, cwd=tmp_path)
    assert code == 0, output
    markers = r"(<!-- gpu-attention:begin -->|<!-- gpu-attention:end -->)"
    old, new = (re.split(markers, path.read_text(encoding="utf-8")) for path in (README, copy))
    assert [*new[:2], *new[3:]] == [*old[:2], *old[3:]]
    assert "| bfloat16, D 128, full, inference |" in new[2]
    assert "| goal | asked | measured | reached |" in new[2]
    assert "a rehearsal on the CPU" in new[2]
    code, output = run("report.py", *arguments, "--check", cwd=tmp_path)
    assert code == 0, output
