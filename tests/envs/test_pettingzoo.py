"""The adapter beside stock PettingZoo, its ends, masks and groups, and what happens when a worker fails."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from gymnasium import spaces
from mpe2 import simple_speaker_listener_v4, simple_spread_v3, simple_tag_v3
from pettingzoo.butterfly import knights_archers_zombies_v11
from pettingzoo.classic import tictactoe_v3
from pettingzoo.utils.conversions import turn_based_aec_to_parallel
from torchrl.data import Bounded, Categorical, MultiCategorical
from torchrl.envs.utils import check_env_specs
from zoo import Spaces, Turns, Zoo

import tdmarl
from tdmarl.envs.pettingzoo import PettingZooEnv
from tdmarl.envs.workers import WorkerError

ENDS = ("done", "terminated", "truncated")
LOCAL = {"num_workers": 0}


def advance(env, td):
    """One step with random available actions, and what is seen next."""
    td = env.step(env.rand_action(td))
    return td, env.step_mdp(td)


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "module, workers",
    [(simple_spread_v3, 2), (simple_speaker_listener_v4, 0), (simple_tag_v3, 0)],
    ids=["spread", "speaker_listener", "tag"],
)
def test_mpe2_is_stock_mpe2_step_by_step(module, workers, continuous):
    make = functools.partial(module.parallel_env, max_cycles=6, continuous_actions=continuous)
    env = PettingZooEnv(make, num_workers=workers, num_envs=2, seed=11)
    td = env.reset()
    torch.manual_seed(0)
    stock = [make(), make()]
    assert env.episode_seed(0, 0) == 11
    for episode in range(2):
        shown = [s.reset(seed=env.episode_seed(e, episode))[0] for e, s in enumerate(stock)]
        for t in range(6):
            td = env.rand_action(td)
            after = env.step(td)["next"]
            for e, s in enumerate(stock):
                places = {name: (g, i) for g, names in env.group_map.items() for i, name in enumerate(names)}
                assert set(places) == set(s.possible_agents)
                actions = {a: td[g, "action"][e, i].numpy() for a, (g, i) in places.items()}
                for a, (g, i) in places.items():
                    np.testing.assert_array_equal(td[g, "observation"][e, i], shown[e][a])
                shown[e], rewards, _, truncated, _ = s.step(actions)
                np.testing.assert_array_equal(after["state"][e], s.state())
                for a, (g, i) in places.items():
                    np.testing.assert_array_equal(after[g, "observation"][e, i], shown[e][a])
                    assert after[g, "reward"][e, i] == np.float32(rewards[a])
                    assert after[g, "truncated"][e, i] == truncated[a] == (t == 5)
                    assert not after[g, "terminated"][e, i] and after[g, "mask"][e, i]
            assert after["done"].all() == after["truncated"].all() == (t == 5)
            td = env.reset_done(after)
    env.close()


def test_groups_by_space_and_name():
    tag = PettingZooEnv(simple_tag_v3.parallel_env, **LOCAL)
    assert tag.group_map == {"adversary": [f"adversary_{i}" for i in range(3)], "agent": ["agent_0"]}
    spread = PettingZooEnv(functools.partial(simple_spread_v3.parallel_env, N=2), **LOCAL)
    assert spread.group_map == {"agents": ["agent_0", "agent_1"]} and spread.batch_size == (1,)
    given = {"all": ["guard_0", "runner_1", "runner_0"]}
    env = PettingZooEnv(Zoo, group_map=given, max_steps=3, **LOCAL)
    assert env.group_map == given
    rewards = [advance(env, env.reset())[0]["next", "all", "reward"].flatten().tolist()]
    assert rewards == [[21, 11, 1]]
    with pytest.raises(ValueError, match="agents of unlike"):
        PettingZooEnv(
            simple_tag_v3.parallel_env, group_map={"all": [*tag.group_map["adversary"], "agent_0"]}, **LOCAL
        )


@pytest.mark.parametrize("masks", ["", "info", "observation"])
@pytest.mark.parametrize("limit", [None, 3])
def test_keeps_the_conventions(masks, limit):
    env = PettingZooEnv(functools.partial(Zoo, masks=masks), num_envs=3, max_steps=limit, **LOCAL)
    tdmarl.check_env(env, steps=7)
    check_env_specs(env)


@pytest.mark.parametrize("keep", [False, True])
def test_agents_end_apart_and_the_episode_with_the_last(keep):
    env = PettingZooEnv(functools.partial(Zoo, keep=keep), num_envs=2, **LOCAL)
    assert env.group_map == {"runner": ["runner_0", "runner_1"], "guard": ["guard_0"]}
    td, steps = env.reset(), []
    for _ in range(5):
        step, td = advance(env, td)
        steps.append(step[1])
    batch = torch.stack(
        steps
    )  # runner_0 terminates in step 2, runner_1 in step 4, guard_0 is cut off in step 5
    after = batch["next"]
    assert batch["runner", "mask"].int().tolist() == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 0]]
    assert after["runner", "mask"].int().tolist() == [[1, 1], [0, 1], [0, 1], [0, 0], [0, 0]]
    assert after["guard", "mask"].all()  # also where it is cut off: its value there is bootstrapped
    assert after["runner", "terminated"][..., 0].int().tolist() == [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
    assert not after["runner", "truncated"].any() and not after["guard", "terminated"].any()
    assert after["guard", "truncated"].flatten().tolist() == [False] * 4 + [True]
    assert after["runner", "reward"][..., 0].tolist() == [[1, 11], [2, 12], [0, 13], [0, 14], [0, 0]]
    assert after["guard", "reward"].flatten().tolist() == [21, 22, 23, 24, 25]
    assert after["runner", "observation"][1, 0, 1] == 2  # the true last observation, then zeros
    assert (after["runner", "observation"][2:, 0] == 0).all() and (
        after["runner", "observation"][4, 1] == 0
    ).all()
    assert [after[end].flatten().tolist() for end in ENDS] == [
        [False] * 4 + [True],
        [False] * 5,
        [False] * 4 + [True],
    ]
    assert after["guard", "observation"][:, 0, 2].tolist() == (batch["guard", "action"][:, 0] + 5).tolist()


def test_the_episode_is_terminated_when_nobody_was_cut_off():
    ends = {"a_0": (1, "truncated"), "a_1": (2, "terminated")}
    for ends, terminated in ((ends, False), ({**ends, "a_0": (1, "terminated")}, True)):
        env = PettingZooEnv(functools.partial(Zoo, ends), **LOCAL)
        _, td = advance(env, env.reset())
        assert not td["done"] and td["a", "mask"].tolist() == [[False, True]]
        td, _ = advance(env, td)
        assert td["next", "done"] and td["next", "terminated"] == terminated != bool(td["next", "truncated"])


def test_a_limit_cuts_off_who_is_there():
    env = PettingZooEnv(Zoo, num_envs=2, max_steps=3, **LOCAL)
    td = env.reset()
    for _ in range(3):
        step, td = advance(env, td)
    after = step["next"]
    assert after["done"].all() and after["truncated"].all() and not after["terminated"].any()
    assert after["runner", "terminated"][0].flatten().tolist() == [True, False]
    assert after["runner", "truncated"][0].flatten().tolist() == [False, True]
    assert after["runner", "mask"][0].tolist() == [False, True]
    td, _ = advance(env, td)  # stepped on without a reset it stands still
    assert not td["next", "runner", "reward"].any() and td["next", "done"].all()


def test_resets_by_mask_with_seeds_of_their_own():
    env = PettingZooEnv(functools.partial(Zoo, {"a_0": (9, "terminated")}), num_envs=3, seed=5, num_workers=2)
    first = env.reset()["a", "observation"][..., 0].flatten().tolist()
    assert first == [env.episode_seed(e, 0) % 1000 for e in range(3)] and len(set(first)) == 3
    _, td = advance(env, env.reset())
    td = env._reset(td.set("_reset", torch.tensor([[False], [True], [False]])))
    assert td["a", "observation"][..., 1].flatten().tolist() == [1, 0, 1]
    seen = [env.episode_seed(0, 1), env.episode_seed(1, 2), env.episode_seed(2, 1)]
    assert td["a", "observation"][..., 0].flatten().tolist() == [s % 1000 for s in seen]
    assert len(env._workers._workers) == 2
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


@pytest.mark.parametrize("masks", ["info", "observation"])
def test_action_masks(masks):
    env = PettingZooEnv(functools.partial(Zoo, masks=masks), num_envs=2, max_steps=4, **LOCAL)
    td = env.reset()
    assert td["runner", "observation"].shape == (2, 2, 4)
    assert (~td["runner", "action_mask"][0]).nonzero().tolist() == [[0, 0], [1, 1]]
    assert (~td["guard", "action_mask"][0]).nonzero().tolist() == [[0, 2]]
    for _ in range(2):
        _, td = advance(env, td)
    assert td["runner", "action_mask"][0].tolist() == [
        [True] * 4,
        [True, True, True, False],
    ]  # gone; time 2, index 1
    algo = tdmarl.mappo(env, "runner")  # the environment raises on an unavailable action
    guard = tdmarl.ippo(env, "guard").explore
    explore = torch.nn.Sequential(algo.explore, guard)
    batch = tdmarl.Collector(env, explore, frames_per_batch=80, init_random_frames=40).rollout()
    assert batch["runner", "action_mask"].gather(-1, batch["runner", "action"].unsqueeze(-1)).all()


def test_infos_that_are_numbers_for_every_agent_are_kept():
    env = PettingZooEnv(Zoo, **LOCAL)
    td, _ = advance(env, env.reset())
    runner, guard = td["next", "runner", "info"], td["next", "guard", "info"]
    assert set(runner.keys()) == {"time", "pair"} and set(guard.keys()) == {"time", "pair", "own"}
    assert runner["pair"].tolist() == [[[1, 1], [1, 1]]] and guard["own"].tolist() == [[[1]]]
    assert (td["runner", "info", "time"] == 0).all() and (runner["time"] == 1).all()


def test_spaces_of_all_kinds():
    box = spaces.Box(np.array([[0, -2]], np.float32), np.array([[1, 2]], np.float32))
    env = PettingZooEnv(lambda: Spaces(box), num_workers=1)
    spec = env.full_action_spec_unbatched["agents", "action"]
    assert isinstance(spec, Bounded) and spec.space.low.tolist() == [[0, -2]] * 2
    td = env.reset()
    assert td["agents", "observation"].tolist() == [
        [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
    ]  # kind, where
    td["agents", "action"] = torch.tensor([[[0.5, 1.0], [7.0, -9.0]]])  # the second is clipped to (1, -2)
    td = env.step(td)["next"]
    assert td["agents", "info", "did"].flatten().tolist() == [0.75, -0.5]
    assert td["state"].tolist() == [[1, 2, 3, 4]]
    td["agents", "action"] = torch.full((1, 2, 2), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        env._step(td)
    env.close()
    env = PettingZooEnv(lambda: Spaces(spaces.MultiDiscrete([3, 2])), return_state=False, **LOCAL)
    assert isinstance(env.full_action_spec_unbatched["agents", "action"], MultiCategorical)
    tdmarl.check_env(env)
    td = env.reset()
    assert "state" not in td.keys()
    td["agents", "action"] = torch.tensor([[[2, 1], [0, 1]]])
    assert env.step(td)["next", "agents", "info", "did"].flatten().tolist() == [1.5, 0.5]
    td["agents", "action"] = torch.tensor([[[2, 2], [0, 1]]])
    with pytest.raises(ValueError, match="a choice that its agent does not have"):
        env._step(td)


def test_agents_in_turn_through_pettingzoos_conversion():
    env = PettingZooEnv(lambda: Turns(True), num_envs=2, **LOCAL)
    td = env.reset()
    assert td["player", "observation"].tolist() == [[[1, 0, 0]] * 2] * 2  # no move yet, one-hot
    td, _ = advance(env, td)
    assert (td["next", "player", "reward"] == 1).all() and td["next", "terminated"].all()
    with pytest.raises(ValueError, match="turns_v0 is an AEC environment.*is_parallelizable.*turn_based_aec"):
        PettingZooEnv(lambda: Turns(False), **LOCAL)
    env = PettingZooEnv(lambda: turn_based_aec_to_parallel(tictactoe_v3.env()), **LOCAL)
    tdmarl.check_env(env)  # who is not on turn has no available action, and acts in vain
    td = env.reset()
    td["player", "action"] = torch.tensor([[4, 0]])
    td = env.step(td)["next"]
    assert (
        td["player", "action_mask"][0].sum(-1).tolist() == [9, 8] and not td["player", "action_mask"][0, 1, 4]
    )


def test_a_converted_environment_with_deaths():
    torch.manual_seed(0)
    make = functools.partial(knights_archers_zombies_v11.env, spawn_delay=3)
    env = PettingZooEnv(make, max_steps=400, return_state=False, **LOCAL)
    assert env.group_map == {"archer": ["archer_0", "archer_1"], "knight": ["knight_0", "knight_1"]}
    batch = env.rollout(400)
    knights = batch["knight", "mask"][0]
    assert not knights.all() and knights[0].all() and batch["next", "done"].sum() == 1
    died = torch.cat([batch[g, "mask"][0, :-1] & ~batch[g, "mask"][0, 1:] for g in env.group_map], -1)
    ends = torch.cat([batch["next", g, "terminated"][0, :-1, :, 0] for g in env.group_map], -1)
    assert died.any() and ends[died].all()
    gone = ~knights[:-1]  # its last observation is shown in the step after, then zeros
    assert gone.any() and not batch["knight", "observation"][0, 1:][gone].any()


def test_collects_evaluates_and_resumes_with_new_episodes():
    make = functools.partial(simple_spread_v3.parallel_env, N=2, max_cycles=5)
    env = PettingZooEnv(make, num_envs=2, seed=0, **LOCAL)
    algo = tdmarl.mappo(env, minibatch_size=10)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=20)
    batch = collector.rollout()
    assert batch.shape == (2, 10) and algo.learner(batch).batch_size == ()
    assert batch["is_init"][0].flatten().nonzero().flatten().tolist() == [0, 5]
    episode = batch["next", "agents", "reward"][:, :5].sum(1)
    torch.testing.assert_close(batch["next", "agents", "episode_reward"][:, 4], episode)
    with pytest.raises(RuntimeError, match="no explicit state"):
        tdmarl.evaluate(env, algo.policy, episodes=2)
    own = [PettingZooEnv(make, num_envs=2, seed=seed, **LOCAL) for seed in (1, 2)]
    returns = [tdmarl.evaluate(e, algo.policy, episodes=5, seed=3) for e in own]
    assert (returns[0] == returns[1]).all() and (returns[0]["length"] == 5).all()
    assert len(set(returns[0]["return_sum_agents"].tolist())) == 5
    resumed = tdmarl.Collector(PettingZooEnv(make, num_envs=2, **LOCAL), algo.explore, frames_per_batch=20)
    with pytest.warns(UserWarning, match="new episodes"):
        resumed.load_state_dict(collector.state_dict())
    assert resumed.rollout()["is_init"][:, 0].all() and resumed.frames == 40


@pytest.mark.parametrize(
    "fail, text",
    [
        (
            "error",
            r"(?s)worker 0 \(environments 0 to 1\) failed in 'step'.*in step.*FloatingPointError: the simulator",
        ),
        ("exit", "worker 0 .* ended with exit code 7 in 'step'"),
        ("kill", "worker 0 .* ended with exit code -9 in 'step'"),
    ],
)
def test_a_worker_that_fails_says_why_and_all_are_closed(fail, text):
    env = PettingZooEnv(functools.partial(Zoo, fail=fail), num_workers=2, num_envs=3)
    processes = list(env._workers._workers)
    td = env.reset()
    for _ in range(2):
        _, td = advance(env, td)
    with pytest.raises(WorkerError, match=text):
        advance(env, td)
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


class Unbounded(Zoo):
    def action_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (2,))


@pytest.mark.parametrize(
    "make, error, text",
    [
        (Zoo(), TypeError, "is a Zoo; expected a function"),
        (lambda: object(), TypeError, "object has no reset, step, possible_agents"),
        (Unbounded, ValueError, "of runner_0 is not supported; expected Discrete, MultiDiscrete"),
    ],
)
def test_what_cannot_be_used_is_explained(make, error, text):
    with pytest.raises(error, match=text):
        PettingZooEnv(make, **LOCAL)
    with pytest.raises(ValueError, match="num_envs=0"):
        PettingZooEnv(Zoo, num_envs=0)


def test_a_factory_that_fails_in_a_worker_is_shown():
    with pytest.raises(WorkerError, match="(?s)failed in 'start'.*ZeroDivisionError"):
        PettingZooEnv(lambda: 1 / 0, num_workers=1)


def test_missing_actions_are_named():
    env = PettingZooEnv(Zoo, **LOCAL)
    with pytest.raises(KeyError, match=r"no \('runner', 'action'\)"):
        env._step(env.reset())
    td = env.rand_action(env.reset())
    td["runner"] = td["runner"].exclude("action").reshape(1, 2)
    td["guard", "action"] = torch.tensor([[4]])
    td["runner", "action"] = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="a choice that its agent does not have"):
        env._step(td)
    assert isinstance(env.full_action_spec_unbatched["guard", "action"], Categorical)


SCRIPT = """
import sys, time
from zoo import Zoo
from tdmarl.envs.pettingzoo import PettingZooEnv
env = PettingZooEnv(lambda: Zoo({"a_0": (10**9, "terminated")}), num_workers=2)  # no guard for __main__
print(*[w.pid for w in env._workers._workers], flush=True)
td = env.reset()
while True:
    td = env.step_mdp(env.step(env.rand_action(td)))
"""


def _gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:  # a zombie is over, if nobody waits for it
        return file.read().rpartition(")")[2].split()[0] == "Z"


def test_no_worker_is_left_behind():
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command, pipe = [sys.executable, "-W", "ignore", "-c", SCRIPT], subprocess.PIPE

    def heed() -> None:  # a test run in the background has its children ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"stdout": pipe, "stderr": pipe, "env": environ, "start_new_session": True, "preexec_fn": heed}
    interrupted, killed = (subprocess.Popen(command, **options) for _ in range(2))
    try:
        workers = [int(pid) for main in (interrupted, killed) for pid in main.stdout.readline().split()]
        assert len(workers) == 4
        time.sleep(0.3)
        os.killpg(interrupted.pid, signal.SIGINT)  # what Ctrl-C does: every process of the group gets it
        os.kill(killed.pid, signal.SIGKILL)
        assert "KeyboardInterrupt" in interrupted.communicate(timeout=20)[1].decode()
        killed.communicate(timeout=20)
        until = time.monotonic() + 10
        while time.monotonic() < until and not all(map(_gone, workers)):
            time.sleep(0.05)
        assert all(map(_gone, workers))
    finally:  # a failure leaves nothing behind either
        for main in (interrupted, killed):
            main.kill()
