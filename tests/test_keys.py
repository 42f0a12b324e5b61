from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from toys import ToyEnv

from tdmarl.actors import gaussian_actor
from tdmarl.collect import Collector
from tdmarl.keys import check_chain, collected, per_agent, team

TWO = {"a": (2, 3, 1), "b": (1, 5, 2)}


def test_a_team_is_read_off_the_specs():
    members = team(ToyEnv(groups=TWO, mortal=True, state=True), ("b", "a"))
    assert members.names == ("b", "a") and members.n_agents == 3 and members.state_size == 2 and len(members) == 2
    b, a = members
    assert (b.n_agents, b.observation_size, tuple(b.action_spec.shape)) == (1, 5, (1, 2))
    assert a.has_mask and not a.has_action_mask
    assert a.key("action") == ("a", "action") and a.next("reward") == ("next", "a", "reward")
    assert team(ToyEnv(choices=3)).groups[0].has_action_mask


def test_sizes_do_not_depend_on_how_many_dimensions_the_batch_has():
    for batch in ((), (4,), (2, 4)):
        (group,) = team(ToyEnv(batch=batch, state=True))
        assert (group.n_agents, group.observation_size) == (3, 4)


def test_errors_list_what_there_is():
    two = ToyEnv(groups=TWO)
    with pytest.raises(ValueError, match=r"several groups, \['a', 'b'\]"):
        team(two)
    with pytest.raises(ValueError, match=r"'c'.*\['a', 'b'\]"):
        team(two, "c")
    with pytest.raises(ValueError, match="each once"):
        team(two, ("a", "a"))
    two.group_map = {}
    with pytest.raises(ValueError, match="group_map"):
        team(two)


def test_an_observation_that_is_no_vector_is_named():
    from torchrl.data import Composite, Unbounded

    env = ToyEnv()
    env.observation_spec = Composite(
        agents=Composite(observation=Unbounded((4, 3, 8, 8)), shape=(4, 3)), shape=(4,)
    )
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*FlattenObservation"):
        team(env)
    env.observation_spec = Composite(agents=Composite(pixels=Unbounded((4, 3, 8)), shape=(4, 3)), shape=(4,))
    with pytest.raises(KeyError, match="observation.*pixels"):
        team(env)


def test_root_ends_are_every_agents():
    done = torch.tensor([[True], [False]])
    td, like = TensorDict({"next": {"done": done}}, [2]), torch.zeros(2, 3, 1)
    assert per_agent(td, "agents", "done", like).squeeze(-1).tolist() == [[True] * 3, [False] * 3]
    td["next", "agents", "done"] = torch.zeros(2, 3, 1, dtype=torch.bool)
    assert not per_agent(td, "agents", "done", like).any()
    with pytest.raises(KeyError, match="terminated"):
        per_agent(td, "agents", "terminated", like)


def test_a_broken_chain_is_named_with_the_part_and_the_key():
    first = TensorDictModule(lambda x: x, in_keys=["x"], out_keys=["y"])
    second = TensorDictModule(lambda y: y, in_keys=["y", ("g", "z")], out_keys=["w"])
    check_chain(["x", ("g", "z")], [("first", first), ("second", second)])
    with pytest.raises(KeyError, match=r"second reads \[\('g', 'z'\)\]"):
        check_chain(["x"], [("first", first), ("second", second)])


def test_collected_is_what_a_batch_holds():
    env = ToyEnv(mortal=True)
    actor = gaussian_actor(env)
    batch = Collector(env, actor, frames_per_batch=8).rollout()
    there = {(k,) if isinstance(k, str) else k for k in batch.keys(True, True)}
    assert there - set(collected(env, actor)) == {("next", "agents", "episode_reward")}
    assert set(collected(env, actor)) <= there
