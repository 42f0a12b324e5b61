"""The benchmarks run and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_simulate_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "simulate.json"
    sizes = ["--num-envs", "8", "--steps", "2", "--warmup", "0", "--repetitions", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "simulate.py"), *sizes, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    result = json.loads(out.read_text())
    assert result["ratio"]["torchrl"] == 1.0 and result["frames_per_second"]["tdmarl_step"] > 0
    assert {"versions", "commit", "cpu"} <= result["machine"].keys() and result["reset_ratio"] >= 1


def test_q_train_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "q_train.json"
    sizes = ["--setting", "small", "--num-envs", "4", "--timed", "2", "--rounds", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "q_train.py"), *sizes, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    result = json.loads(out.read_text())["results"]["small"]
    assert {"collection_wall", "update_cpu", "total_wall"} <= result["tdmarl_is_faster_by"].keys()
    assert result["settings"]["updates"] == 64 and result["update_over_bare"]["update_cpu"] > 0
