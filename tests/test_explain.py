from __future__ import annotations

import pytest
from toys import ToyEnv

import tdmarl
from tdmarl import explain
from tdmarl.compiled_step import CompiledStep

OFF_POLICY = {"num_updates": 1, "minibatch_size": 8, "buffer_size": 100}


def test_what_runs_eagerly_and_with_which_shapes(capsys):
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    teams = tdmarl.per_group(
        a=tdmarl.happo(env, group="a", minibatch_size=4),
        b=tdmarl.maddpg(env, group="b", scope="agent", **OFF_POLICY),
    )
    collector = tdmarl.Collector(env, teams.explore, frames_per_batch=20)
    text = explain(teams, env, collector)
    assert capsys.readouterr().out == text + "\n"
    assert "4 environments" in text and "2 agents, observation (3,), action (1,)" in text
    assert "the ordinary loop: 5 steps a batch" in text
    assert text.count("update a a") == 2 and "minibatches of 4 rows" in text and "ValuePart" in text


def test_what_is_compiled_says_so_before_and_after_its_first_use():
    env = tdmarl.VmasEnv("balance", num_envs=4, seed=0, mode="trace")
    algo = tdmarl.mappo(env, minibatch_size=8, num_epochs=1, hidden=(8,), mode="compile")
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=16)
    before = explain(algo, env, collector)
    assert "trace (at its first use): VmasEnv of balance" in before
    assert "compile (at its first minibatch)" in before
    algo.learner.accelerated = CompiledStep(algo.learner.step, "trace")
    algo.learner(collector.rollout())
    after = explain(algo, env, collector)
    assert "step of " in after and "the policy compiled, too" in after and "operations): PolicyLoss" in after


def test_why_something_does_not_run_compiled():
    env = ToyEnv()
    algo = tdmarl.mappo(env, minibatch_size=8, num_epochs=1, hidden=(8,), mode="compile")
    algo.learner.step.parts[0].loss.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="has hooks"):
        algo.learner(tdmarl.Collector(env, algo.explore, frames_per_batch=20).rollout())
    assert "update      eager (the module 'PolicyLoss' has hooks)" in explain(algo, env)


@pytest.mark.parametrize("make", [tdmarl.mappo, tdmarl.maddpg])
def test_what_is_rounded(make):
    env = ToyEnv()
    plain, rounded = (explain(make(env, precision=name), env) for name in ("float32", "bfloat16"))
    assert "bfloat16" not in plain and "networks    hidden layers multiply in bfloat16\n" in rounded
