"""The benchmarks run and write what they promise."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import simulate

    return simulate


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import simulate_summary

    return simulate_summary


def written(tmp_path: Path, program: str, *arguments: str, out: str = "--out") -> dict[str, Any]:
    """What a program writes into its file; it draws its picture beside it."""
    file = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / program), *arguments, out, str(file)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(simulate: Any, *arguments: Any) -> int:
    tiny = "--modes trace --seconds 0.02 --repetitions 2 --warmup 1 --steps 2"
    return simulate.main([*tiny.split(), *map(str, arguments)])


def test_simulate_writes_its_figures_and_goes_on_from_them(simulate: Any, tmp_path: Path) -> None:
    out = tmp_path / "simulate.json"
    assert run(simulate, "--scenarios", "simple_adversary", "--num-envs", 4, "--out", out) == 0
    result = json.loads(out.read_text())
    assert {"versions", "cpu", "cores"} <= result["machine"].keys()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    (case,) = result["cases"]
    assert case["groups"] == {"adversary": 1, "agent": 2} and case["failed"] == {}
    ours = case["measured"]["tdmarl trace"]
    assert ours["mode"] == "trace" and ours["operations"] > 100 and ours["compile_seconds"] > 0
    assert ours["alone_seconds"]["median"].keys() == {"policy", "step", "reset_one", "reset_half"}
    for one in case["measured"].values():
        speeds = [row["frames"] / row["seconds"] for row in one["repetitions"]]
        assert min(speeds) <= one["frames_per_second"] <= max(speeds) and len(speeds) == 2
        assert one["seconds_per_step"] == pytest.approx(4 / one["frames_per_second"])
    assert case["ratios"]["tdmarl trace"].keys() == {"torchrl", "vmas"}

    # What is there is left out; what takes too long is recorded and stops nothing.
    again = ["--scenarios", "simple_adversary", "dropout", "--num-envs", 4, "--resume-from", out]
    assert run(simulate, *again, "--timeout", 0.01) == 0
    cases = json.loads(out.read_text())["cases"]
    assert cases[0] == case and cases[1]["scenario"] == "dropout" and cases[1]["measured"] == {}
    assert cases[1]["failed"]["process"].startswith("took more than 0.01 s")
    assert run(simulate, *again, "--threads", 2) == 2


def test_simulate_says_why_a_process_ended(
    simulate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "crashes"
    stub.write_text("#!/bin/sh\necho warming up torchrl >&2\nkill -SEGV $$\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    settings = simulate.cases(simulate.parse(["--scenarios", "balance"]))[0]
    case = simulate.measure(settings, timeout=60, warm_cache=True)
    assert case["failed"]["process"] == "exit code -11; last said: warming up torchrl"
    assert simulate.is_there(case, settings) and case["ratios"] == {}


def test_large_cases_have_batches_that_fit(simulate: Any) -> None:
    arguments = "--scenarios wheel dropout --num-envs 64 65536 --agents 2 3".split()
    found = simulate.cases(simulate.parse(arguments))
    assert len(found) == 8 and {(case["num_envs"], case["steps"]) for case in found} == {(64, 32), (65536, 8)}


def test_ratios_compare_turns_that_follow_each_other(summary: Any) -> None:
    def measured(*seconds: float) -> dict[str, Any]:
        return {"repetitions": [{"frames": 10, "seconds": s, "cpu_seconds": s / 2} for s in seconds]}

    contenders = {"tdmarl compile": measured(1, 2, 4), "torchrl": measured(2, 10, 12)}  # 2, 5 and 3 times
    found = summary.ratios(contenders)["tdmarl compile"]
    assert found == {"torchrl": {"median": 3, "least": 2, "greatest": 5, "cpu": 3}}


def test_exponents_of_growth(summary: Any) -> None:
    assert summary.exponent([(n, 3 * n**1.5) for n in (2, 4, 64)]) == pytest.approx(1.5)
    assert summary.exponent([(2, 1.0)]) is None

    def case(num_envs: int, n_agents: int | None) -> dict[str, Any]:
        n, few = n_agents or 1, (n_agents or 1) <= 16
        one = {
            "mode": "compile",
            "seconds_per_step": 1e-6 * num_envs * (n if few else n**2 / 16),
            "operations": 100 * n**0.5,
            "compile_seconds": 7.0,
        }
        return {
            "scenario": "simple_spread",
            "num_envs": num_envs,
            "n_agents": n_agents,
            "measured": {"tdmarl compile": one},
            "ratios": {},
            "failed": {},
        }

    sizes, agents = (64, 1024, 4096, 65536), (2, 4, 8, 16, 64)
    found = summary.summary([case(size, None) for size in sizes] + [case(1024, n) for n in agents])
    (environments,), (over_agents,) = found["over_environments"], found["over_agents"]
    assert environments["num_envs"] == [1024, 4096, 65536]  # below a thousand, overhead is all there is
    assert environments["time_exponent"] == pytest.approx(1)
    assert over_agents["time_exponent_to_16"] == pytest.approx(1) and over_agents["time_exponent"] > 1
    assert over_agents["operations_exponent"] == pytest.approx(0.5)
    assert over_agents["compile_exponent"] == pytest.approx(0)
    assert "exponent 1.00" in summary.text(found)


def test_happo_train_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "happo_train.json"
    sizes = ["--num-envs", "4", "--steps", "10", "--minibatch-size", "20", "--width", "8", "--rounds", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "happo_train.py"), *sizes, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    written = json.loads(out.read_text())
    results = written["results"]
    assert list(results) == ["mappo unshared", "happo", "happo without factor", "haa2c", "hatrpo"]
    assert results["mappo unshared"]["times_the_first"]["cpu"] == 1 and written["settings"]["agents"] == 3
    for one in results.values():
        assert one["seconds"]["cpu"] == pytest.approx(
            one["seconds"]["collect_cpu"] + one["seconds"]["learn_cpu"]
        )


HEAD = {"date", "commit", "machine", "settings"}


def test_scale_writes_its_figures(tmp_path: Path) -> None:
    sizes = "--num-envs 4 8 --steps 4 --minibatch-size 16 --rounds 1 --at 4 2 8".split()
    found = written(tmp_path, "scale.py", "--algorithms", "mappo", "--axes", "num_envs", *sizes)
    assert HEAD <= found.keys() and found["settings"]["mode"] == "eager"
    (study,) = found["studies"]
    assert study["failed"] == {} and [row["frames"] for row in study["sizes"]] == [16, 32]
    assert study["exponents"].keys() == {"collect_seconds", "learn_seconds", "seconds", "peak"}
    small, large = (row["memory"] for row in study["sizes"])
    assert large["batch"] == 2 * small["batch"] and large["parameters"] == small["parameters"]
    assert (
        small["needed"] == small["batch"] + small["parameters"] + small["optimizer"]
    )  # rows are the batch's
    assert small["optimizer"] > 3 * (
        small["parameters"] - 100
    )  # two moments and a gradient for each parameter


def test_growth_is_of_medians(benchmarks: Any) -> None:
    def row(n: int) -> dict[str, Any]:
        times = [
            {"collect_seconds": 2.0 * n, "learn_seconds": 1.0 * n**2, "seconds": x * n} for x in (1, 3, 99)
        ]
        return {"width": n, "iterations": times, "memory": {"peak": 12 * n, "needed": 10 * n}}

    rows = [row(n) for n in (1, 4, 8)]
    powers = benchmarks("scale").growth(rows, "width")["exponents"]
    assert powers == pytest.approx({"collect_seconds": 1, "learn_seconds": 2, "seconds": 1, "peak": 1})
    assert rows[1]["seconds"] == 12 and rows[1]["peak_over_needed"] == pytest.approx(1.2)


def test_bytes_are_counted_once(benchmarks: Any) -> None:
    x = torch.zeros(3, 4)
    assert (
        benchmarks("scale_worker").nbytes([x, x[1], x.view(12), torch.zeros(2, dtype=torch.bool)]) == 48 + 2
    )


def test_a_simulator_moves_its_state_twice_and_a_batch_once(benchmarks: Any) -> None:
    state = TensorDict({"pos": torch.zeros(5, 2)}, [5])  # 40 bytes
    batch = TensorDict(
        {"o": torch.zeros(5, 3, 4), "next": TensorDict({"done": torch.zeros(5, 3, 1).bool()}, [5, 3])}
    )
    assert benchmarks("roofline").moved(state, batch, 3) == 2 * 40 + (240 + 15) // 3


def test_the_products_of_an_update_are_those_of_its_networks(benchmarks: Any) -> None:
    """Four agents see 18 numbers and do 2 things. Each layer has a product forward, one for its weights' gradient and,
    but for the first, one for its input's. The critic's first layer is asked once for all agents."""
    roofline = benchmarks("roofline")
    args = roofline.parse("--num-envs 4 --steps 2 --width 8".split())
    rows, all_rows = 8, 32
    actor = 2 * all_rows * (2 * 18 * 8 + 3 * 8 * 8 + 3 * 8 * 4)
    critic = 2 * rows * 2 * 72 * 8 + 2 * all_rows * (3 * 8 * 8 + 3 * 8 * 1)
    assert sum(product.operations for product in roofline.products_of("mappo", args)) == actor + critic
    bare = roofline.Bare(roofline.products_of("mappo", args), "cpu")
    bare()
    assert len(bare._calls) == 16


def test_roofline_writes_its_figures(tmp_path: Path) -> None:
    sizes = (
        "--num-envs 4 --steps 2 --width 8 --simulated-envs 4 8 --scenarios simple_spread --rounds 1".split()
    )
    found = written(tmp_path, "roofline.py", *sizes, "--simulation", "eager")
    assert HEAD <= found.keys()
    assert [one["algorithm"] for one in found["updates"]] == ["mappo", "qmix", "maddpg"]
    assert [one["num_envs"] for one in found["simulators"]] == [4, 8]
    for one in found["updates"]:
        assert one["over_products"]["median"] > 0 and one["frames"] == 8


def test_a_stopwatch_counts_each_part_alone(benchmarks: Any) -> None:
    now = iter([0.0, 1.0, 4.0, 9.0])
    watch = benchmarks("where_time_goes").Stopwatch(lambda: None, lambda: next(now))
    watch.timed("outer", watch.timed("inner", lambda: None))()
    assert watch.spent == {"inner": 3.0, "outer": 6.0}


def test_ippo_writes_its_figures(tmp_path: Path) -> None:
    found = written(tmp_path, "ippo.py", *"--sizes 4x8 2x4 --modes eager --rounds 2 --warmup 1".split())
    assert HEAD <= found.keys() and list(found["sizes"]) == ["4x8", "2x4"]
    for one in found["sizes"].values():
        for speed in (one["eager"]["frames_per_second"], one["product_gflops"]):
            assert 0 < speed["least"] <= speed["median"] <= speed["greatest"]


def test_where_time_goes_writes_its_figures(tmp_path: Path) -> None:
    sizes = (
        "--num-envs 4 --steps 4 --width 8 --epochs 1 --minibatch-size 8 --rounds 1 --simulation eager".split()
    )
    found = written(tmp_path, "where_time_goes.py", *sizes)
    assert HEAD <= found.keys()
    for one in found["iterations"]:
        assert {"policy", "simulation", "resets", "forward", "backward", "optimizer"} <= one["parts"].keys()
        assert sum(one["rounds"][0].values()) == pytest.approx(one["seconds"])


@pytest.mark.parametrize("algorithm", ["mappo", "qmix", "maddpg"])
def test_train_writes_its_figures(tmp_path: Path, algorithm: str) -> None:
    """Beside TorchRL's loop; BenchMARL needs an environment of its own."""
    sizes = "--num-envs 4 --max-steps 4 --minibatch-size 8 --updates 2 --hidden 8 --iterations 2 --episodes 2".split()
    others = ["--contenders", "tdmarl", "torchrl", "--threads", "1"]
    found = written(tmp_path, "train.py", "--algorithm", algorithm, *sizes, *others, out="--output")
    (run,) = found["runs"]
    assert HEAD <= run.keys() and run["failures"] == {} and run["ratios"]["torchrl"]["total"]["median"] > 0
    ours, theirs = (run["contenders"][name] for name in ("tdmarl", "torchrl"))
    assert sum(ours["about"]["parameters"].values()) == sum(theirs["about"]["parameters"].values())
    assert [len(one["evaluations"]) for one in (ours, theirs)] == [2, 2]
