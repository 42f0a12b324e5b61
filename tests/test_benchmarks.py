"""The benchmarks run and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_q_train_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "q_train.json"
    sizes = ["--setting", "small", "--num-envs", "4", "--timed", "2", "--rounds", "1", "--mode", "eager"]
    command = [sys.executable, str(ROOT / "benchmarks" / "q_train.py"), *sizes, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    result = json.loads(out.read_text())["results"]["small"]
    assert {"collection_wall", "update_cpu", "total_wall"} <= result["tdmarl_is_faster_by"].keys()
    assert result["settings"]["updates"] == 64 and result["update_over_bare"]["update_cpu"] > 0


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
        assert one["seconds"]["cpu"] == pytest.approx(one["seconds"]["collect_cpu"] + one["seconds"]["learn_cpu"])
