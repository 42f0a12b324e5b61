"""The combat game's rules by hand, its masks and deaths, and how good known teams are."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs.utils import check_env_specs
from toys import NoHostRead

import tdmarl
from tdmarl.envs.combat import combat, scripted

UP, DOWN, RIGHT, LEFT = 2, 3, 4, 5


def fight(allies, enemies, action, ally_health=(), enemy_health=()):
    """One step of one environment; places as given, health 12 where none is; returns env and ``next``."""
    env = combat(1, len(allies), len(enemies))
    env.reset()
    state = env.get_state()
    for name, places, health in (("ally", allies, ally_health), ("enemy", enemies, enemy_health)):
        state[f"{name}_position"] = torch.tensor([places], dtype=torch.float32)
        given = [*health, *[12] * (len(places) - len(health))]
        state[f"{name}_health"] = torch.tensor([given], dtype=torch.float32)
    env.set_state(state)
    return env, env._step(
        TensorDict(agents=TensorDict(action=torch.tensor([action]), batch_size=[1, len(allies)]))
    )


def test_keeps_the_conventions():
    env = combat(16, 3, 4, seed=1, max_steps=9)
    tdmarl.check_env(env, steps=12)
    check_env_specs(env)
    td = env.reset()
    assert td["agents", "observation"].shape == (16, 3, 4 + 4 + 3 + 5 * 4 + 5 * 2)
    assert td["state"].shape == (16, 3 * 7) and td["agents", "action_mask"].shape == (16, 3, 10)


def test_moves_and_attacks_by_hand():
    env, after = fight([[5, 5], [1, 1], [15.5, 9.5]], [[7, 5], [5, 9]], [6, LEFT, DOWN])
    state = env.get_state()
    assert state["ally_position"][0].tolist() == [[5, 5], [0, 1], [15.5, 8.5]]
    assert state["enemy_health"][0].tolist() == [11, 12]
    assert state["ally_health"][0].tolist() == [11, 12, 12]  # the first enemy reaches the first agent, 2 away
    assert state["enemy_position"][0].tolist() == [[7, 5], [5, 8]]  # the second is 4 away, and comes down
    torch.testing.assert_close(after["agents", "reward"], torch.full((1, 3, 1), 10 / 24))  # one of 24
    assert not after["done"].any() and after["agents", "mask"].all()


def test_a_kill_a_victory_and_a_defeat():
    env, after = fight([[5, 5], [5, 6]], [[6, 5], [15, 5]], [6, 6], enemy_health=[1])
    torch.testing.assert_close(
        after["agents", "reward"][0], torch.full((2, 1), 10 / 24 + 1.0)
    )  # overkill pays no more
    assert env.get_state()["enemy_health"][0].tolist() == [0, 12] and not after["done"]
    assert not after["agents", "action_mask"][0, :, 6].any()  # who is dead cannot be attacked
    _, after = fight([[5, 5]], [[6, 5]], [6], enemy_health=[1])
    torch.testing.assert_close(after["agents", "reward"], torch.full((1, 1, 1), 10 / 12 + 2 + 8))
    assert after["terminated"] and after["agents", "terminated"].all() and not after["truncated"]
    assert after["agents", "info", "battle_won"].all() and after["agents", "mask"].all()
    _, after = fight([[5, 5]], [[6, 5]], [6], ally_health=[1], enemy_health=[1])  # both fall: no victory
    torch.testing.assert_close(after["agents", "reward"], torch.full((1, 1, 1), 10 / 12 + 2))
    assert after["terminated"] and not after["agents", "info", "battle_won"].any()


def test_the_dead_can_do_nothing_and_see_nothing():
    env, after = fight([[5, 5], [3, 5]], [[6, 5]], [1, 1], ally_health=[1])
    assert after["agents", "mask"].tolist() == [[False, True]] and not after["done"]
    assert not after["agents", "done"].any()  # its team can still win
    assert after["agents", "action_mask"][0, 0].tolist() == [True] + [False] * 6
    assert not after["agents", "observation"][0, 0].any() and not after["state"][0, :3].any()
    assert not after["agents", "observation"][0, 1, -5:].any()  # nor is it seen
    td = env.rand_action(after.select("agents"))
    td["agents", "action"] = torch.tensor([[0, 6]])
    after = env._step(td)
    assert after["agents", "reward"].flatten().tolist() == pytest.approx([10 / 12] * 2)
    state = env.get_state()
    assert state["enemy_health"].tolist() == [[11]] and state["ally_health"].tolist() == [[0, 11]]
    td["agents", "action"] = torch.tensor([[6, 6]])
    with pytest.raises(RuntimeError, match="where .*action_mask.* is True"):
        env._step(td)


def test_what_is_available_and_what_is_seen():
    _, after = fight([[0.5, 9.5], [5, 5]], [[3, 9.5], [12, 4]], [1, UP])
    mask = after["agents", "action_mask"][0].tolist()
    assert mask[0] == [False, True, False, True, True, False, True, False]  # in a corner, an enemy 2.5 away
    assert mask[1] == [
        False,
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]  # now at (5, 6), the enemies 4.0 and 7 away
    seen = after["agents", "observation"][0, 1]
    expected = [1, 1, 1, 1, 0, 0, 1, 5 / 16, 0.6, 1, (4 + 12.25) ** 0.5 / 7, -2 / 7, 3.5 / 7, 1]
    torch.testing.assert_close(seen[:14], torch.tensor(expected))
    torch.testing.assert_close(seen[14:19], torch.tensor([1, 40**0.5 / 7, 6 / 7, -2 / 7, 1.0]))
    torch.testing.assert_close(
        seen[19:], torch.tensor([1, (4.5**2 + 3.5**2) ** 0.5 / 7, -4.5 / 7, 3.5 / 7, 11 / 12])
    )
    assert after["state"][0].tolist()[3:9] == pytest.approx([1, 5 / 16, 0.6, 1, 3 / 16, 0.95])
    _, after = fight([[0, 0]], [[7.5, 0]], [1])
    assert after["agents", "observation"][0, 0, 8] == 1  # 6.5 away after the enemy's step
    _, after = fight([[0, 0]], [[8.5, 0]], [1])
    assert not after["agents", "observation"][0, 0, 8:].any()  # 7.5 away is out of sight


def test_rules_are_a_function_of_the_state():
    env = combat(32, seed=0)
    env.rollout(12)
    state = env.get_state().exclude("steps", "terminated")
    before, action = state.clone(), env.rand_action()["agents", "action"]
    one, other = env.game.step(state, {"agents": action}), env.game.step(state, {"agents": action})
    assert (state == before).all() and (one[0] == other[0]).all()
    other = combat(32, seed=9)
    other.load_state_dict(env.state_dict())
    torch.manual_seed(0)
    first = env.rollout(40, break_when_any_done=False)
    torch.manual_seed(0)
    second = other.rollout(40, break_when_any_done=False)
    assert (first == second).all() and first["next", "done"].any()


def test_nothing_is_read_on_the_host():
    env, policy = combat(8, max_steps=3), scripted()
    td = env.reset()
    with NoHostRead():
        for _ in range(4):
            after = env._step(policy(td))
            td = env._reset(TensorDict({"_reset": after["done"]}, [8]))
    assert (env.get_state()["steps"] == 1).all()


def gather_and_concentrate(n, m):
    """Stands together and waits; who can reach enemies attacks the weakest; all others then join."""

    def act(state, mask):
        units = state.unflatten(-1, (n + m, 3))
        alive, place = units[:, :n, 0] > 0, units[:, :n, 1:] * state.new_tensor([16.0, 10.0])
        weakest = (units[:, None, n:, 0]).expand_as(mask[..., 6:]).masked_fill(~mask[..., 6:], torch.inf)
        health, target = weakest.min(-1)
        middle = place.sum(-2, keepdim=True) / alive.sum(-1).clamp_min(1)[:, None, None]
        way = middle - place
        flat = way[..., 0].abs() > way[..., 1].abs()
        move = torch.where(flat, RIGHT + (way[..., 0] < 0).long(), UP + (way[..., 1] < 0).long())
        move = torch.where(way.abs().amax(-1) > 0.5, move, 1)
        join = scripted(n, m)(TensorDict({"state": state, "agents": {"action_mask": mask}}, [len(state)]))
        engaged = mask[..., 6:].flatten(-2).any(-1, keepdim=True)
        action = torch.where(
            health.isfinite(), 6 + target, torch.where(engaged, join["agents", "action"], move)
        )
        return torch.where(mask.gather(-1, action.unsqueeze(-1)).squeeze(-1), action, mask[..., 1].long())

    return TensorDictModule(act, ["state", ("agents", "action_mask")], [("agents", "action")])


@pytest.mark.parametrize(
    "team, wins, returns",
    [
        ("random", (0.0, 0.005), (1.5, 2.1)),
        ("scripted", (0.42, 0.56), (14.0, 15.7)),
        ("best", (0.93, 0.99), (19.3, 19.9)),
    ],
)
def test_known_teams(team, wins, returns):
    env = combat(500, seed=0)
    policy = {"random": env.rand_action, "scripted": scripted(), "best": gather_and_concentrate(5, 5)}[team]
    found = tdmarl.evaluate(env, policy, episodes=1000)
    won = found["return_mean_agents"] > 19.999  # only a victory pays 20
    assert wins[0] <= won.float().mean() <= wins[1]
    assert returns[0] <= found["return_mean_agents"].mean() <= returns[1]
    assert (found["return_mean_agents"][~won] < 12.001).all() and (found["length"] <= 60).all()


def test_masks_and_deaths_reach_an_algorithm():
    env = combat(32, max_steps=25, seed=0)
    algo = tdmarl.mappo(env, num_epochs=1)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=32 * 25, init_random_frames=400).rollout()
    assert batch["agents", "action_mask"].gather(-1, batch["agents", "action"].unsqueeze(-1)).all()
    assert not batch["agents", "mask"].all()
    assert all(value.isfinite().all() for value in algo.learner(batch).values())


def test_wrong_numbers_are_explained():
    with pytest.raises(ValueError, match="n_enemies=0"):
        combat(2, 1, 0)
