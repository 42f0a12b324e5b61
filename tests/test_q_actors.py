"""Greedy actors and exploration: masks, several choices, the schedule, independent coins, and the last action."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, MultiCategorical, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from toys import ToyEnv

import tdmarl
from tdmarl.q_actors import Actions, EpsilonGreedy, best, exploring, q_actor, value_of

G = "agents"


def test_actions_are_numbered_and_written_back():
    several = MultiCategorical(torch.tensor([3, 2]).expand(4, 2), shape=(4, 2))
    for spec, count in ((Categorical(5, shape=(4,)), 5), (OneHot(5, shape=(4, 5)), 5), (several, 6)):
        actions = Actions(spec)
        assert actions.count == count
        index = torch.arange(count).unsqueeze(-1).expand(count, 4)
        written = actions.action(index)
        assert all(spec.is_in(row) for row in written)
        assert torch.equal(actions.index(written), index)
        assert torch.equal(actions.encode(written).argmax(-1), index)
    mask = torch.tensor([True, False, True, False, True])  # of 3 and of 2
    assert actions.available(mask).tolist() == [False, True, False, False, False, True]


def test_the_best_available_action_and_its_value():
    values = torch.tensor([[1.0, 9.0, 3.0]])
    mask = torch.tensor([[True, False, True]])
    assert best(values, None).item() == 1 and best(values, mask).item() == 2
    assert value_of(values, torch.tensor([2]), mask).item() == 3
    assert value_of(values, torch.tensor([2]), mask & False).item() == 0


def test_the_actor_writes_what_torchrls_names_say_and_obeys_masks():
    env = ToyEnv(choices=3)
    actor = q_actor(env)
    td = env.reset()
    td[G, "action_mask"][..., :2] = False
    out = actor(td)
    assert out[G, "action_value"].shape == (4, 3, 3) and out[G, "chosen_action_value"].shape == (4, 3, 1)
    assert (out[G, "action"] == 2).all()
    torch.testing.assert_close(out[G, "chosen_action_value"], out[G, "action_value"][..., 2:])


@pytest.mark.parametrize("frames, epsilon", [
    (0, 1.0), (1, 0.999981), (25_000, 0.525), (49_999, 0.050019), (50_000, 0.05), (10**9, 0.05),
])  # fmt: skip
def test_epsilon_at_any_frame(frames, epsilon):
    """Linear from 1 to 0.05 in 50,000 frames, as pymarl's schedule."""
    explore = EpsilonGreedy(ToyEnv(choices=3), start=1.0, end=0.05, anneal_frames=50_000)
    explore.frames.fill_(frames)
    assert explore.epsilon().item() == pytest.approx(epsilon, abs=1e-6)


def test_the_schedule_moves_by_the_frames_explored_and_is_saved():
    env = ToyEnv(choices=3)
    explore = exploring(q_actor(env), EpsilonGreedy(env, anneal_frames=100))
    schedule = explore[1]
    collector = tdmarl.Collector(env, explore, frames_per_batch=40, init_random_frames=40, seed=0)
    collector.rollout()
    assert schedule.frames == 0  # acting at random is not exploring
    collector.rollout()
    assert schedule.frames == 40
    tdmarl.evaluate(env, explore, episodes=4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        explore(env.reset())
    assert schedule.frames == 40
    other = EpsilonGreedy(env, anneal_frames=100)
    other.load_state_dict(schedule.state_dict())
    assert other.epsilon() == schedule.epsilon() == pytest.approx(1 - 0.95 * 0.4)


def test_every_agent_tosses_its_own_coin_over_available_actions():
    env = ToyEnv(batch=(40_000,), groups={G: (2, 2, 1)}, choices=4)
    explore = EpsilonGreedy(env, start=0.5, end=0.5)
    td = env.reset()
    td[G, "action_mask"][...] = torch.tensor([True, True, False, True])
    td[G, "action"] = torch.zeros(40_000, 2, dtype=torch.int64)
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.RANDOM):
        moved = explore(td)[G, "action"]
    assert not (moved == 2).any()
    share = [(moved == k).float().mean().item() for k in (0, 1, 3)]
    assert share == pytest.approx([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3], abs=0.01)
    changed = (moved != 0).float()  # a third each; both together a ninth, if the coins are independent
    assert changed.prod(-1).mean().item() == pytest.approx(1 / 9, abs=0.01)


def test_the_last_action_is_the_one_taken_and_none_where_an_episode_begins():
    env = ToyEnv(choices=3, horizon=5)
    explore = exploring(q_actor(env, last_action=True), EpsilonGreedy(env))
    collector = tdmarl.Collector(env, explore, frames_per_batch=48, init_random_frames=24, seed=0)
    batch = collector.rollout()  # [4, 12]: six steps at random, six exploring
    last, init = batch[G, "last_action"], batch["is_init"]
    assert last.shape == (4, 12, 3, 3) and init[:, [0, 5, 10]].all()
    expected = torch.nn.functional.one_hot(batch[G, "action"][:, :-1], 3).float()
    expected = expected.masked_fill(init[:, 1:].unsqueeze(-1), 0)
    assert torch.equal(last[:, 1:], expected) and not last[:, 0].any()
    actor = explore[0]
    stale = batch.clone()
    stale[G, "last_action"][init.squeeze(-1)] = 7.0  # whatever stands there at a beginning is not read
    torch.testing.assert_close(actor(stale)[G, "action_value"], actor(batch.clone())[G, "action_value"])


def test_an_actor_with_memory_gives_a_row_what_it_gave_step_by_step():
    env = ToyEnv(choices=3, horizon=5)
    actor = q_actor(env, last_action=True, recurrent=8)
    batch = tdmarl.Collector(env, actor, frames_per_batch=48, seed=0).rollout()
    loss = tdmarl.MixingLoss(actor)
    assert loss.hidden == [(G, "actor_hidden")]
    with torch.no_grad(), set_recurrent_mode(True):
        rows = loss._pass("local_value_network", batch)
    torch.testing.assert_close(rows[G, "action_value"], batch[G, "action_value"], atol=1e-5, rtol=1e-4)


def test_values_of_next_states_with_memory_are_those_of_one_more_step():
    """Where the episode goes on they are the following step's; where it ends, the true last observation's."""
    env = ToyEnv(choices=3, horizon=5)
    actor = q_actor(env, recurrent=8)
    batch = tdmarl.Collector(env, actor, frames_per_batch=48, seed=0).rollout()
    loss = tdmarl.MixingLoss(actor)
    with torch.no_grad(), set_recurrent_mode(True):
        seen = loss._pass("local_value_network", batch)
        found = loss._next_values("local_value_network", loss._after(batch), seen)[G]
    goes_on = ~batch["next", "done"][:, :-1].squeeze(-1)
    torch.testing.assert_close(
        found[:, :-1][goes_on], batch[G, "action_value"][:, 1:][goes_on], atol=1e-5, rtol=1e-4
    )
    ends = batch["next", "done"].squeeze(-1)
    last = {
        "observation": batch["next", G, "observation"][ends],
        "actor_hidden": batch["next", G, "actor_hidden"][ends],
    }
    asked = TensorDict({G: last | {"action_mask": batch["next", G, "action_mask"][ends]}}, [int(ends.sum())])
    asked["is_init"] = torch.zeros(len(asked), 1, dtype=torch.bool)
    torch.testing.assert_close(found[ends], actor(asked)[G, "action_value"], atol=1e-5, rtol=1e-4)


def test_several_choices_at_once_and_one_hot_actions_run_in_an_environment():
    env = tdmarl.VmasEnv("simple_reference", num_envs=3, max_steps=5, continuous_actions=False, seed=0)
    algo = tdmarl.vdn(env, tuple(env.group_map), minibatch_size=6, num_updates=1)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=15, seed=0).rollout()
    assert torch.isfinite(algo.learner(batch)["loss_value"])


def test_bad_numbers_are_named():
    for options, words in (({"start": 1.5}, "start=1.5"), ({"anneal_frames": 0}, "anneal_frames=0")):
        with pytest.raises(ValueError, match=words):
            EpsilonGreedy(ToyEnv(choices=3), **options)
