"""Critics of actions: what they see, whose value is whose, and actions put in the place of stored ones."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, MultiCategorical, OneHot
from toys import ToyEnv

import tdmarl
from tdmarl.critics import JointAction
from tdmarl.keys import Group

G, OWN, VALUE = "agents", ("agents", "own_action"), ("agents", "state_action_value")


def batch_of(env, size=5):
    torch.manual_seed(1)
    td = TensorDict(batch_size=[size])
    for g, spec in env.full_action_spec_unbatched.items():
        n, o = env.observation_spec_unbatched[g, "observation"].shape
        td[g] = {"observation": torch.randn(size, n, o), "action": spec["action"].rand((size,))}
    return td


@pytest.mark.parametrize("share", [False, True, [[0, 1], [2]]])
@pytest.mark.parametrize("choices", [0, 4])
def test_own_actions_replace_stored_ones_one_agent_at_a_time(share, choices):
    env = ToyEnv(choices=choices)
    critic, batch = tdmarl.action_critic(env, share_params=share, twin=True), batch_of(env)
    width = choices or 2
    own = torch.rand(5, 3, width)
    found = critic(batch.copy().set(OWN, own))[VALUE]  # [5, 3, 2]
    assert found.shape == (5, 3, 2)
    stored = batch[G, "action"] if not choices else torch.nn.functional.one_hot(batch[G, "action"], 4).float()
    for i in range(3):
        alone = stored.clone()
        alone[:, i] = own[:, i]
        torch.testing.assert_close(critic(batch.clone().set((G, "action"), alone))[VALUE][:, i], found[:, i])


@pytest.mark.parametrize("scope, seen, done", [
    ("team", {("a", 0), ("a", 1), ("b", 0)}, {("a", 0), ("a", 1), ("b", 0)}),
    ("group", {("a", 0), ("a", 1)}, {("a", 0), ("a", 1)}),
    ("agent", {("a", 0)}, {("a", 0)}),
    ("state", set(), {("a", 0), ("a", 1), ("b", 0)}),
])  # fmt: skip
def test_scopes_say_what_a_critic_sees(scope, seen, done):
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)}, state=True)
    critic, batch = tdmarl.action_critic(env, ("a", "b"), scope=scope), batch_of(env)
    batch["state"] = torch.randn(5, 2)
    value = critic(batch.copy())["a", "state_action_value"][:, 0]  # of the first agent of a
    for g, n in (("a", 2), ("b", 1)):
        for i in range(n):
            for name, expected in (("observation", seen), ("action", done)):
                changed = batch.clone()
                changed[g, name][:, i] += 0.3
                differs = not torch.equal(critic(changed)["a", "state_action_value"][:, 0], value)
                assert differs == ((g, i) in expected), (g, i, name)
    changed = batch.clone().set("state", batch["state"] + 1)
    assert torch.equal(critic(changed)["a", "state_action_value"][:, 0], value) == (scope != "state")


def test_a_shared_critic_tells_agents_apart_only_by_their_identity():
    env, same = ToyEnv(), {}
    for known in (True, False):
        critic = tdmarl.action_critic(env, share_params=True, agent_id=known)
        value = critic(batch_of(env))[VALUE]
        same[known] = torch.equal(value[:, 0], value[:, 1])
    assert same == {True: False, False: True}


@pytest.mark.parametrize("spec, action, expected", [
    (OneHot(3, shape=(2, 3)), [[0, 1, 0], [0, 0, 1]], [0, 1, 0, 0, 0, 1]),
    (OneHot(3, shape=(2, 3), dtype=torch.bool), [[False, True, False], [False, False, True]], [0, 1, 0, 0, 0, 1]),
    (
        MultiCategorical(torch.tensor([2, 3]).expand(2, 2), shape=(2, 2)), [[1, 0], [0, 2]],
        [0, 1, 1, 0, 0, 1, 0, 0, 0, 1],
    ),
])  # fmt: skip
def test_discrete_actions_are_read_as_vectors(spec, action, expected):
    joint = JointAction([Group(G, 2, 1, spec)], Group(G, 2, 1, spec))
    assert joint(torch.tensor(action)).tolist() == expected


def test_what_there_is_not_is_named():
    with pytest.raises(ValueError, match="scope='all'"):
        tdmarl.action_critic(ToyEnv(), scope="all")
    with pytest.raises(ValueError, match="'state'"):
        tdmarl.action_critic(ToyEnv(), scope="state")
    with pytest.raises(ValueError, match="MultiCategorical"):
        spec = Binary(shape=(2, 3))
        JointAction([Group(G, 2, 1, spec)], Group(G, 2, 1, spec))
