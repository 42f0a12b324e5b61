"""The games against their authors' tables, and what every batched environment promises."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs
from toys import NoHostRead

import tdmarl
from tdmarl.envs.games import continuous_game, matrix_game, memory_game, two_step_game

CLIMBING = [[11.0, -30.0, 0.0], [-30.0, 7.0, 0.0], [0.0, 6.0, 5.0]]
ENDS = ("done", "terminated", "truncated")
GAMES = {
    "matrix": lambda **o: matrix_game(CLIMBING, 6, 3, **o),
    "unequal": lambda **o: matrix_game([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], 6, 2, **o),
    "endless": lambda **o: matrix_game([1.0, 0.0], 6, None, max_steps=2, **o),
    "two_step": lambda **o: two_step_game(6, **o),
    "continuous": lambda **o: continuous_game(lambda a: -(a - 0.5).square() - a.flip(-1), 2, 6, **o),
    "memory": lambda **o: memory_game(6, n_agents=3, cues=4, delay=2, **o),
}


def play(env, *joint):
    """Rewards ``[len(joint), n]`` and the last ``next`` of one joint action per step, in every environment."""
    td, rewards = env.reset(), []
    for action in joint:
        action = torch.tensor(action)
        td["agents", "action"] = action.expand(env.num_envs, *action.shape).clone()
        after = env.step(td)["next"]
        assert (after["agents", "reward"] == after["agents", "reward"][:1]).all()
        rewards.append(after["agents", "reward"][0, :, 0])
        td = after.select("agents", *ENDS).exclude(("agents", "reward"))
    return torch.stack(rewards).tolist(), after


@pytest.mark.parametrize("name", GAMES)
def test_keeps_the_conventions(name):
    env = GAMES[name](seed=3)
    tdmarl.check_env(env, steps=5)
    check_env_specs(env)


def test_matrix_game_pays_what_the_table_says_and_ends_after_steps():
    env = matrix_game(CLIMBING, 2, steps=3)
    rewards, last = play(env, [0, 0], [2, 1], [0, 1])
    assert rewards == [[11, 11], [6, 6], [-30, -30]]
    for where in ((), ("agents",)):
        flags = [bool(last[(*where, end)].all()) for end in ENDS]
        assert flags == [True, True, False]


def test_a_payoff_per_agent():
    dilemma = [torch.tensor([[-1.0, -3.0], [0.0, -2.0]]), torch.tensor([[-1.0, 0.0], [-3.0, -2.0]])]
    assert play(matrix_game(dilemma, 2, 4), [0, 0], [0, 1], [1, 0], [1, 1])[0] == [
        [-1, -1],
        [-3, 0],
        [0, -3],
        [-2, -2],
    ]


def test_three_agents_share_a_payoff_of_three_axes():
    a, b, c = torch.meshgrid(*[torch.arange(2.0)] * 3, indexing="ij")
    payoff = 4 * a + 2 * b + c - 3 * a * b - 2 * b * c + 1.5 * a * c
    assert payoff.mean() == 2.625  # the mean return of uniformly random agents, by hand
    assert play(matrix_game(payoff, 2, 2), [1, 0, 1], [1, 1, 1])[0] == [[6.5] * 3, [3.5] * 3]


def test_agents_with_fewer_choices_are_masked():
    env = GAMES["unequal"]()
    assert env.reset()["agents", "action_mask"][0].tolist() == [[True, True, False], [True, True, True]]
    assert play(env, [1, 2])[0] == [[6, 6]]
    with pytest.raises(RuntimeError, match="choice that is not there"):
        play(env, [2, 0])
    assert env.rollout(200, break_when_any_done=False)["agents", "action"].flatten(0, 1).amax(0).tolist() == [
        1,
        2,
    ]


def test_an_endless_game_is_truncated_by_its_limit():
    _, last = play(GAMES["endless"](), [0], [0])
    assert last["truncated"].all() and last["done"].all() and not last["terminated"].any()
    assert last["agents", "truncated"].all() and not last["agents", "terminated"].any()


@pytest.mark.parametrize(
    "payoff, text",
    [
        (3.0, "one axis per agent"),
        ([[1.0, 2.0], [3.0]], "no table of numbers"),
        ([[1.0, float("nan")]], "finite"),
        ([torch.zeros(2, 2), torch.zeros(2, 3)], r"\[\(2, 2\), \(2, 3\)\]; expected one shape with 2 axes"),
        ([torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)], "expected one shape with 2 axes"),
        (torch.zeros(2, 0), "as long as its number of choices"),
    ],
)
def test_a_wrong_payoff_is_explained(payoff, text):
    with pytest.raises(ValueError, match=text):
        matrix_game(payoff, 2)


def test_wrong_numbers_are_explained():
    with pytest.raises(ValueError, match="num_envs=0"):
        matrix_game(CLIMBING, 0)
    with pytest.raises(ValueError, match="steps=0"):
        matrix_game(CLIMBING, 1, 0)
    with pytest.raises(ValueError, match="max_steps=0"):
        two_step_game(1, max_steps=0)
    with pytest.raises(ValueError, match=r"expected torch.float32 \(3, 2\)"):
        continuous_game(lambda a: a.sum(-1))
    with pytest.raises(ValueError, match="delay=0"):
        memory_game(1, delay=0)
    env = two_step_game(2)
    with pytest.raises(KeyError, match="expected an action of shape"):
        env._step(env.reset())
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 2\)"):
        env._step(env.reset().set("agents", TensorDict(action=torch.zeros(2, 3))))


def test_two_step_game_is_the_papers():
    env, table = two_step_game(2), {}
    for first in (0, 1):
        for second in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            rewards, last = play(env, [first, 1 - first], second)
            assert rewards[0] == [0, 0] and last["terminated"].all()
            assert last["state"][0].tolist() == [0.0, float(first == 0), float(first == 1)]
            assert (last["agents", "observation"] == last["state"].unsqueeze(1)).all()
            table[first, second] = rewards[1][0]
    assert [table[0, s] for s in [(0, 0), (0, 1), (1, 0), (1, 1)]] == [7, 7, 7, 7]
    assert [table[1, s] for s in [(0, 0), (0, 1), (1, 0), (1, 1)]] == [0, 1, 1, 8]
    assert env.reset()["state"].tolist() == [[1, 0, 0]] * 2


def test_continuous_game_clips_and_pays():
    rewards, last = play(GAMES["continuous"](), [[0.5], [-3.0]])
    assert rewards == [[1.0, -2.75]]  # 0 + 1 and -(1.5)^2 - 0.5, with the second action clipped to -1
    assert last["terminated"].all()


def test_memory_game_shows_the_cue_once_and_pays_for_it_last():
    env = memory_game(500, n_agents=2, cues=3, delay=3, seed=1)
    td = env.reset()
    cue = td["agents", "observation"][..., :3].argmax(-1)
    assert sorted(cue.unique().tolist()) == [0, 1, 2] and (cue[:, 0] != cue[:, 1]).any()
    for t in range(4):
        seen = td["agents", "observation"]
        assert torch.equal(seen[..., 3], torch.full((500, 2), float(t == 3)))
        assert (seen[..., :3].sum(-1) == float(t == 0)).all()
        td["agents", "action"] = torch.stack([cue[:, 0], torch.zeros_like(cue[:, 1])], -1)
        after = env.step(td)["next"]
        paid = (1 + (cue[:, 1] == 0).float()) / 2 if t == 3 else torch.zeros(500)
        assert torch.equal(after["agents", "reward"][..., 0], paid.unsqueeze(-1).expand(-1, 2))
        assert bool(after["terminated"].all()) == bool(after["done"].any()) == (t == 3)
        td = after.select("agents", *ENDS).exclude(("agents", "reward"))


def test_a_batched_game_resumes_to_the_last_bit():
    one, other = memory_game(5, delay=2, seed=0), memory_game(5, delay=2, seed=9)
    one.rollout(2)
    other.load_state_dict(one.state_dict())
    mask = torch.tensor([True, False, True, False, True]).unsqueeze(-1)
    for env in (one, other):
        env.shown = env._reset(TensorDict({"_reset": mask}, [5]))
    assert (one.shown == other.shown).all()
    assert one.get_state()["steps"].flatten().tolist() == [0, 2, 0, 2, 0]
    for env in (one, other):
        env.set_state(one.get_state())
        env.set_seed(4)
    assert (one.reset() == other.reset()).all()


def test_evaluate_and_collector_take_a_game():
    env = memory_game(8, seed=0)
    algo = tdmarl.mappo(env)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=80).rollout()
    assert batch.shape == (8, 10)
    assert batch["is_init"][0, :, 0].nonzero().flatten().tolist() == [0, 5]
    returns = tdmarl.evaluate(two_step_game(4), tdmarl.ippo(two_step_game(4)).policy, episodes=10)
    assert set(returns["return_mean_agents"].tolist()) <= {0.0, 1.0, 7.0, 8.0}
    assert (returns["length"] == 2).all()
    assert torch.equal(returns["return_sum_agents"], 2 * returns["return_mean_agents"])


@pytest.mark.parametrize("name", GAMES)
def test_step_and_masked_reset_read_nothing_on_the_host(name):
    env = GAMES[name]()
    td = env.rand_action(env.reset())
    mask = torch.arange(6).remainder(2).bool().unsqueeze(-1)
    with NoHostRead():
        after = env._step(td)
        env._reset(TensorDict({"_reset": mask}, [6]))
    assert after["agents", "reward"].shape[0] == 6


def test_a_game_stays_on_its_device():
    env = two_step_game(2)
    assert env.to("cpu") is env
    with pytest.raises(NotImplementedError, match="device='meta'"):
        env.to("meta")
