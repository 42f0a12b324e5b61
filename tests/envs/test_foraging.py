"""Foraging beside the package itself."""

from __future__ import annotations

import gymnasium
import lbforaging  # noqa: F401 - registers the names
import numpy as np
import pytest
import torch

import tdmarl
from tdmarl.envs.foraging import foraging

NAME = "Foraging-8x8-2p-3f-v3"


@pytest.mark.parametrize("workers", [0, 2])
def test_is_the_packages_step_by_step(workers):
    env = foraging(NAME, num_envs=2, num_workers=workers, seed=4)
    stock = [gymnasium.make(NAME, disable_env_checker=True).unwrapped for _ in range(2)]
    td, seen = env.reset(), [s.reset(seed=env.episode_seed(e, 0))[0] for e, s in enumerate(stock)]
    torch.manual_seed(0)
    for t in range(50):
        td = env.rand_action(td)
        np.testing.assert_array_equal(td["agents", "observation"], np.array(seen))
        after = env.step(td)["next"]
        results = [s.step(td["agents", "action"][e].tolist()) for e, s in enumerate(stock)]
        seen = [r[0] for r in results]
        np.testing.assert_array_equal(after["agents", "observation"], np.array(seen))
        np.testing.assert_array_equal(
            after["agents", "reward"][..., 0], np.array([r[1] for r in results], np.float32)
        )
        assert after["done"].flatten().tolist() == [r[2] for r in results] == [t == 49] * 2
        td = env.step_mdp(td.set("next", after))
    assert after["truncated"].all() and not after["terminated"].any()  # there, both are terminated
    env.close()


def test_collecting_all_food_terminates_with_a_return_of_one():
    env = foraging("Foraging-5x5-2p-1f-v3", num_envs=8, num_workers=0, seed=0)
    tdmarl.check_env(env)
    torch.manual_seed(0)
    batch = env.rollout(200, break_when_any_done=False)["next"]
    collected = batch["terminated"].squeeze(-1)
    assert (
        collected.any() and batch["truncated"].any() and not (batch["terminated"] & batch["truncated"]).any()
    )
    assert torch.equal(batch["agents", "reward"].sum((-2, -1)) > 0, collected)
    torch.testing.assert_close(
        batch["agents", "reward"].sum((-2, -1))[collected], torch.ones(int(collected.sum()))
    )
    assert torch.equal(batch["agents", "terminated"][..., 0, 0], collected)


def test_options_and_the_limit_go_through():
    env = foraging("Foraging-5x5-2p-1f-v3", num_envs=1, num_workers=0, max_steps=3, sight=1)
    assert env.reset()["agents", "observation"].shape == (1, 2, 9)
    assert env.rollout(10)["next", "truncated"].flatten().tolist() == [False, False, True]
