"""Multi-Agent MuJoCo beside the package's own environment, all its partitions, and the 17 joints of the humanoid."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch

import tdmarl
from tdmarl.envs import robot
from tdmarl.envs.mamujoco import PARTITIONS, check
from tdmarl.envs.workers import WorkerError

SHIPPED = [(scenario, partition) for scenario, known in PARTITIONS.items() for partition in known]
MORE = [("ManySegmentSwimmer", "3x2"), ("ManySegmentAnt", "2x1"), ("InvertedPendulum", None), ("Ant", None)]
GATHERED = {s for s, _ in SHIPPED + MORE} - {"CoupledHalfCheetah", "Pusher", "Reacher"}


def stock(scenario, partition, obsk=1, **options):
    with contextlib.redirect_stderr(io.StringIO()):
        from gymnasium_robotics.envs.multiagent_mujoco import mujoco_multi
    env = mujoco_multi.MultiAgentMujocoEnv(scenario, partition, obsk, **options)
    for near in getattr(env, "k_dicts", ()):  # joints of one name stand in any order, another one in each process
        near.update({k: sorted(nodes, key=lambda n: (n.label, n.act_ids)) for k, nodes in near.items()})
    return env


@pytest.mark.parametrize("obsk", [0, 1, 2])
@pytest.mark.parametrize("scenario, partition", SHIPPED + MORE, ids=str)
def test_a_robot_shows_what_the_packages_own_does(scenario, partition, obsk):
    """Observations, state, reward and ends to the last bit, through falls that end episodes."""
    mine = robot.Robot(scenario, partition, None if partition is None else obsk, {})
    package = stock(scenario, partition, obsk)
    assert (mine.gather is not None) == (scenario in GATHERED and partition is not None)
    random = np.random.default_rng(0)
    for episode in range(2):
        shown = (mine.reset(seed=episode), package.reset(seed=episode))
        for t in range(25):
            for agent in package.possible_agents:
                np.testing.assert_array_equal(shown[0][0][agent], shown[1][0][agent])
            np.testing.assert_array_equal(mine.state(), package.state())
            spaces = {agent: package.action_space(agent) for agent in package.possible_agents}
            actions = {a: random.uniform(s.low, s.high).astype(s.dtype) for a, s in spaces.items()}
            shown = (mine.step(actions), package.step(actions))
            assert shown[0][1:4] == shown[1][1:4] and mine.agents == package.agents
            if not mine.agents:
                break


@pytest.mark.parametrize("workers", [0, 2])
def test_is_the_package_over_workers(workers):
    env = tdmarl.mamujoco("Ant", "4x2", num_envs=2, num_workers=workers, seed=5)
    assert env.group_map == {"agents": [f"agent_{i}" for i in range(4)]}
    package = [stock("Ant", "4x2") for _ in range(2)]
    seen = [p.reset(seed=env.episode_seed(e, 0))[0] for e, p in enumerate(package)]
    td = env.reset()
    torch.manual_seed(0)
    for _ in range(5):
        td = env.rand_action(td)
        after = env.step(td)["next"]
        for e, p in enumerate(package):
            names = p.possible_agents
            np.testing.assert_array_equal(
                td["agents", "observation"][e], np.array([*seen[e].values()], np.float32)
            )
            rows = dict(zip(names, td["agents", "action"][e].numpy()))
            seen[e], rewards, _, _, infos = p.step(rows)
            np.testing.assert_array_equal(after["agents", "reward"][e, :, 0], np.float32([*rewards.values()]))
            np.testing.assert_array_equal(after["state"][e], np.float32(p.state()))
            for name in ("x_velocity", "reward_ctrl"):
                number = np.float32(infos["agent_0"][name])
                assert (after["agents", "info", name][e].numpy() == number).all()
        td = env.step_mdp(td.set("next", after))
    env.close()


def test_robots_of_segments_are_made_in_several_processes_at_once():
    """Each makes a file of one name in the package's folder, reads and removes it."""
    env = tdmarl.mamujoco("ManySegmentAnt", "2x1", num_envs=16, num_workers=4)
    assert len(env.group_map) == 2 and env.reset()["state"].shape[0] == 16
    env.close()


def test_seventeen_agents_move_one_joint_each():
    env = tdmarl.mamujoco("Humanoid", "17x1", num_workers=0, infos=False)
    names = [name for group in env.group_map.values() for name in group]
    assert sorted(names) == sorted(f"agent_{i}" for i in range(17)) and len(env.group_map) > 1
    assert env.observation_spec["state"].shape == (1, 348)
    package = stock("Humanoid", "9|8").single_agent_env
    td, (state, _) = env.reset(), package.reset(seed=0)
    places = {name: (g, i) for g, members in env.group_map.items() for i, name in enumerate(members)}
    for joint in range(17):  # agent i moves the actuator i of Gymnasium's humanoid
        action = np.zeros(17, np.float32)
        action[joint] = 0.3
        for name, (group, i) in places.items():
            if i == 0:
                td[group, "action"] = torch.zeros(env.full_action_spec[group, "action"].shape)
            td[group, "action"][0, i] = float(action[int(name.split("_")[1])])
        after, (state, *_) = env.step(td)["next"], package.step(action)
        np.testing.assert_array_equal(after["state"][0], np.float32(state))
        td = env.step_mdp(td.set("next", after))
    with pytest.raises(ValueError, match="9|8.*17 joints"):
        tdmarl.mamujoco("Humanoid", "5x3", num_workers=0)


def test_padded_agents_form_one_group_and_do_what_the_unpadded_do():
    torch.manual_seed(0)
    plain, padded = (
        tdmarl.mamujoco("Hopper", "3x1", num_workers=0, pad=pad, seed=2) for pad in (False, True)
    )
    assert plain.group_map == {"agents_0": ["agent_0", "agent_2"], "agent_1": ["agent_1"]}
    assert padded.group_map == {"agents": ["agent_0", "agent_1", "agent_2"]}
    one, two = plain.reset(), padded.reset()
    assert two["agents", "observation"].shape == (1, 3, 9)
    two["agents", "action"] = torch.rand(1, 3, 1) * 2 - 1
    one["agents_0", "action"] = two["agents", "action"][:, [0, 2]]
    one["agent_1", "action"] = two["agents", "action"][:, [1]]
    one, two = plain.step(one)["next"], padded.step(two)["next"]
    assert torch.equal(one["state"], two["state"])
    assert torch.equal(one["agents_0", "observation"], two["agents", "observation"][:, [0, 2], :8])
    assert torch.equal(one["agent_1", "observation"], two["agents", "observation"][:, [1]])
    assert not two["agents", "observation"][:, [0, 2], 8:].any()
    wide = tdmarl.mamujoco("Humanoid", "9|8", num_workers=0, pad=True)
    bounds = wide.full_action_spec["agents", "action"].space
    assert bounds.high[0, 1, -1] == bounds.low[0, 1, -1] == 0 and (bounds.high[0, :, :8] > 0.39).all()
    actor = tdmarl.gaussian_actor(wide, distribution="clipped")
    assert not actor(wide.reset())["agents", "action"][0, 1, -1]
    tdmarl.check_env(padded)


def test_a_partition_of_ones_own():
    joints = robot.split("Ant", "4x2", 2) | {"edges": []}
    env = tdmarl.mamujoco("Ant", "halves", num_workers=1, agent_factorization=joints)
    assert env.reset()["agents", "observation"].shape == (1, 2, 4 * 2 + 7 * 6 + 11)  # joints, bodies, root
    env.close()
    with pytest.raises(ValueError, match="joints"):
        robot.split("Ant", "4x2", 3)


def test_time_limits_truncate_and_falls_terminate():
    env = tdmarl.mamujoco("HalfCheetah", "2x3", num_envs=2, num_workers=0, max_steps=4)
    last = env.rollout(10)["next"][:, -1]
    assert last["truncated"].all() and not last["terminated"].any() and last["agents", "truncated"].all()
    env = tdmarl.mamujoco("Hopper", "3x1", num_envs=2, num_workers=0)
    torch.manual_seed(0)
    ended = env.rollout(400, break_when_any_done=True)["next"][:, -1]
    assert ended["terminated"].any() and not ended["truncated"].any()
    assert PARTITIONS.keys() == {s for s, _ in SHIPPED} | {s for s, known in PARTITIONS.items() if not known}


def test_mistakes_are_told_what_there_is():
    with pytest.raises(ValueError, match="HalfCheetah, Hopper, Humanoid"):
        tdmarl.mamujoco("Cheetah", "2x3", num_workers=0)
    with pytest.raises(ValueError, match=r"'2x4', '2x4d', '4x2', '<agents>x<joints>' of 8 joints, None"):
        tdmarl.mamujoco("Ant", "3x2", num_workers=0)
    with pytest.raises(ValueError, match="<segments>"):
        tdmarl.mamujoco("ManySegmentAnt", "two", num_workers=0)
    with pytest.raises(ValueError, match="agent_obsk=-1"):
        tdmarl.mamujoco("Ant", "4x2", num_workers=0, agent_obsk=-1)
    with pytest.raises(WorkerError, match="no_such_option"):
        tdmarl.mamujoco("Ant", "4x2", num_workers=1, no_such_option=1)
    assert check("Walker2d", "6x1") == 6 and check("HalfCheetah", "6x1") is None


def test_happo_trains_unlike_joints_as_one_team():
    env = tdmarl.mamujoco("Hopper", "3x1", num_envs=2, num_workers=0, infos=False)
    algo = tdmarl.happo(env, tuple(env.group_map), hidden=(8,), num_epochs=1, critic_scope="state")
    metrics = algo.learner(tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0).rollout())
    assert torch.isfinite(metrics["loss_objective"]) and metrics["entropy"] > 0
