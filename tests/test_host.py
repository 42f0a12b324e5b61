"""No algorithm's iteration reads a tensor on the host: collected by `next(collector)`, learned by `learner(batch)`.

On a CPU some things are read, because that waits for nothing; here `tdmarl.host` says that it does, so that everything
goes the way it goes on a GPU. A recorded step runs operation by operation, so that its reads would be seen, too.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from test_compiled_step import accelerate
from toys import NoHostRead, OnMeta
from torchrl.envs import EnvBase

import tdmarl
from tdmarl import host

OFF_POLICY = {"num_updates": 2, "minibatch_size": 8, "buffer_size": 60}
SMALL = {"hidden": (8,), "minibatch_size": 8}
GRU = {"hidden": (8,), "minibatch_size": 2, "recurrent": "gru", "chunk_length": 5}
MEMORY = {"recurrent": "gru", "sequence_length": 5, "num_updates": 2, "minibatch_size": 2, "buffer_size": 50}


def continuous(device):
    return tdmarl.continuous_game(lambda a: -(a - 0.5).square(), num_envs=4, device=device)


def discrete(device):
    return tdmarl.memory_game(4, device=device)


def mortal(device):
    """With a state, masks of actions and agents that die."""
    return tdmarl.combat(4, device=device)


CASES = {
    "mappo": (continuous, lambda env: tdmarl.mappo(env, num_epochs=2, max_kl=0.01, anneal_frames=1000, **SMALL)),
    "mappo, others' actions": (discrete, lambda env: tdmarl.mappo(env, num_epochs=1, other_actions=True, **SMALL)),
    "mappo, own rows": (mortal, lambda env: tdmarl.mappo(env, num_epochs=1, share_buffer=False, **SMALL)),
    "mappo, gru": (discrete, lambda env: tdmarl.mappo(env, num_epochs=1, **GRU)),
    "ippo": (discrete, lambda env: tdmarl.ippo(env, num_epochs=2, **SMALL)),
    "ippo, gru": (mortal, lambda env: tdmarl.ippo(env, num_epochs=1, **GRU)),
    "happo": (continuous, lambda env: tdmarl.happo(env, num_epochs=2, anneal_frames=1000, **SMALL)),
    "happo, mortal": (mortal, lambda env: tdmarl.happo(env, num_epochs=1, **SMALL)),
    "happo, gru": (discrete, lambda env: tdmarl.happo(env, num_epochs=1, **GRU)),
    "hatrpo": (continuous, lambda env: tdmarl.hatrpo(env, num_epochs=1, **SMALL)),
    "haa2c": (discrete, lambda env: tdmarl.haa2c(env, num_epochs=1, **SMALL)),
    "iql": (discrete, lambda env: tdmarl.iql(env, tau=0.1, standardize_reward=True, hidden=(8,), **OFF_POLICY)),
    "vdn": (mortal, lambda env: tdmarl.vdn(env, target_every=3, hidden=(8,), **OFF_POLICY)),
    "qmix": (mortal, lambda env: tdmarl.qmix(env, prioritized=True, anneal_frames=1000, hidden=(8,), **OFF_POLICY)),
    "qmix, gru": (discrete, lambda env: tdmarl.qmix(env, hidden=(8,), **MEMORY)),
    "maddpg": (continuous, lambda env: tdmarl.maddpg(env, hidden=(8,), **OFF_POLICY)),
    "maddpg, discrete": (discrete, lambda env: tdmarl.maddpg(env, share_buffer=False, hidden=(8,), **OFF_POLICY)),
    "matd3": (continuous, lambda env: tdmarl.maddpg(
        env, twin=True, actor_every=2, target_noise=0.2, prioritized=True, noise="ou", hidden=(8,), **OFF_POLICY
    )),
    "iddpg": (discrete, lambda env: tdmarl.maddpg(env, scope="agent", epsilon_start=0.5, hidden=(8,), **OFF_POLICY)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """Nothing is free to read, and recurrent units go through sequences as on a GPU."""
    monkeypatch.setattr(host, "is_free", lambda device: False)
    monkeypatch.setattr(tdmarl.gru, "cells", tdmarl.gru.fused)


def iterate(env, algo, mode="eager"):
    """A loop that is warmed up: two iterations were made, so that steps are recorded and a replay buffer is full."""
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0)
    steps = accelerate(algo.learner, "trace") if mode == "trace" else []
    batches = iter(collector)
    for _ in range(2):
        algo.learner(next(batches))
    return batches, steps


@pytest.mark.parametrize("mode", ["eager", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_an_iteration_reads_nothing(name, mode):
    make_env, make = CASES[name]
    env = make_env("cpu")
    algo = make(env)
    batches, steps = iterate(env, algo, mode)
    with NoHostRead():
        metrics = algo.learner(next(batches))
    assert all(step.reason is None for step in steps)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_runs_on_meta_and_copies_nothing_to_it(name, monkeypatch):
    """There is no value to read there, by whatever function; the third iteration, after two that may be told some."""
    make_env, make = CASES[name]
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(EnvBase, "_reset_check_done", lambda *args: None)  # after the first reset
    with OnMeta(answers=True):
        env = make_env("meta")
        algo = make(env)
        batches, _ = iterate(env, algo)
    with OnMeta() as mode:
        batch = next(batches)
        metrics = algo.learner(batch)
    assert batch.device.type == "meta" and all(value.is_meta for value in metrics.values())
    assert len(metrics.keys()) > 1 and not mode.copied


@pytest.mark.parametrize("read", [bool, float, lambda x: x.nonzero(), lambda x: x[x > 0]])
def test_who_reads_is_found(read):
    with pytest.raises(AssertionError, match="the host reads"), NoHostRead():
        read(torch.ones(1))
    with pytest.raises(RuntimeError, match="meta"), OnMeta():
        read(torch.ones(1, device="meta"))


@pytest.mark.parametrize("send", [
    lambda x: x + torch.tensor(1.0, device="meta"), lambda x: x.new_tensor([1.0]), lambda x: torch.ones(2).to("meta"),
    lambda x: x.copy_(torch.ones(2)),
])  # fmt: skip
def test_who_sends_numbers_is_found(send):
    with OnMeta() as mode:
        send(torch.ones(2, device="meta") * 3 + torch.arange(2, device="meta"))
    assert len(mode.copied) == 1


SIMULATED = {
    "mappo": (True, lambda env: tdmarl.mappo(env, num_epochs=2, minibatch_size=8, hidden=(8,))),
    "mappo, gru": (True, lambda env: tdmarl.mappo(env, num_epochs=1, **GRU)),
    "happo": (True, lambda env: tdmarl.happo(env, num_epochs=1, **SMALL)),
    "qmix": (False, lambda env: tdmarl.qmix(env, hidden=(8,), **OFF_POLICY)),
    "maddpg": (True, lambda env: tdmarl.maddpg(env, hidden=(8,), **OFF_POLICY)),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_with_a_compiled_simulator_an_iteration_reads_nothing(name):
    is_continuous, make = SIMULATED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = tdmarl.VmasEnv(
            "simple", num_envs=4, max_steps=3, seed=0, mode="trace", continuous_actions=is_continuous
        )
        algo = make(env)
        batches, steps = iterate(env, algo, "trace")
    with NoHostRead():
        algo.learner(next(batches))
    assert env.mode == "trace" and all(step.reason is None for step in steps)


@pytest.mark.parametrize("name", ["navigation", "simple_tag"])
def test_with_an_eager_simulator_an_iteration_reads_nothing(name):
    env = tdmarl.VmasEnv(name, num_envs=4, max_steps=3, seed=0, mode="eager", check_nan=False)
    algo = tdmarl.mappo(env, tuple(env.group_map), num_epochs=1, **SMALL)
    batches, _ = iterate(env, algo)
    with NoHostRead():
        algo.learner(next(batches))


def test_flags_are_looked_at_only_where_that_is_free(monkeypatch):
    flags = torch.zeros(3, dtype=torch.bool)
    assert not host.is_surely_false(flags)
    monkeypatch.undo()
    assert host.is_surely_false(flags) and not host.is_surely_false(~flags)
    assert not host.is_surely_false(flags.to("meta"))
