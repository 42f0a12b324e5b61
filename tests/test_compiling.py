from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest

import tdmarl
from tdmarl.compiled_step import CompiledStep
from tdmarl.compiling import Clock, announced
from tdmarl.log import Bar, read_metrics
from tdmarl.options import Options


def test_clocks_hear_what_is_compiled_and_how_long_it_takes():
    said = []
    clock, silent = Clock(said.append), Clock(lambda text: None)
    silent.stop()
    with pytest.raises(ZeroDivisionError), announced("one"):
        with announced("a part of it"):
            time.sleep(0.02)
        1 / 0
    assert said == ["compiling one", ""]
    assert 0.02 <= clock.lap() < 2 and clock.lap() == 0 == silent.seconds
    clock.stop()
    clock.stop()
    with announced("two"):
        pass
    assert len(said) == 2


def test_a_run_says_that_it_compiles_and_writes_down_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the first row: simulation, policy and updates; a row without compiling has no such time."""
    said = []
    monkeypatch.setattr("tdmarl.log.Bar.say", lambda self, text: said.append(text))
    env = tdmarl.VmasEnv("simple", num_envs=4, max_steps=5, seed=0, mode="trace")
    algo = tdmarl.mappo(env, minibatch_size=10, num_epochs=1, hidden=(8,))
    algo.learner.accelerated = CompiledStep(algo.learner.step, "trace")
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=20, total_frames=60)
    options = Options(out=str(tmp_path / "run"), scenario="simple", total_frames=60, device="cpu", progress=False)
    begun = time.monotonic()
    with tdmarl.Run(
        options, algorithm="mappo", arguments={}, env=env, policy=algo.policy, learner=algo.learner,
        collector=collector,
    ) as run:  # fmt: skip
        for batch in collector:
            run.log(batch, algo.learner(batch))
    passed = time.monotonic() - begun
    assert said == ["compiling the simulation", "", "compiling the policy", "", "compiling updates", ""]
    times = [row["compile_seconds"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert 0 < float(times[0]) < passed and times[1:] == ["", ""]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_it_until_it_is_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = Bar(True, "mappo", 100, 0)
    bar.advance({"frames": 50, "frames_per_second": 10.0})
    with announced("updates"):
        assert terminal.getvalue().split("\r")[-1].endswith(", compiling updates]")
    assert "compiling" not in terminal.getvalue().split("\r")[-1]
    assert bar.compiled()["compile_seconds"] >= 0 and bar.compiled() == {}
    bar.close()
    with announced("something else"):
        pass
    assert "something else" not in terminal.getvalue()
