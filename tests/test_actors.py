from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from toys import ToyEnv

from tdmarl.actors import categorical_actor, gaussian_actor


@pytest.mark.parametrize("distribution", ["tanh", "clipped"])
@pytest.mark.parametrize("std", ["state", "free"])
@pytest.mark.parametrize("share", [True, False, [[0, 1], [2]]])
def test_gaussian_actor_acts_in_its_box_and_starts_where_it_says(distribution, std, share):
    torch.manual_seed(0)  # weights drawn otherwise put a scale just outside the tolerance now and then
    env = ToyEnv()
    actor = gaussian_actor(env, share_params=share, distribution=distribution, std=std, init_std=0.5)
    td = actor(env.reset())
    assert td["agents", "action"].shape == (4, 3, 2) and td["agents", "action_log_prob"].shape == (4, 3)
    torch.testing.assert_close(td["agents", "scale"], torch.full((4, 3, 2), 0.5), atol=0.05, rtol=0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        one, two = actor(env.reset()), actor(env.reset())
        td = env.reset()
        assert torch.equal(actor(td.clone())["agents", "action"], actor(td.clone())["agents", "action"])
    assert one["agents", "action"].abs().max() <= 1 and two["agents", "action"].abs().max() <= 1


def test_categorical_actor_never_does_what_is_forbidden():
    env = ToyEnv(choices=3)
    td = env.rollout(20, categorical_actor(env), break_when_any_done=False)
    taken = td["agents", "action_mask"].gather(-1, td["agents", "action"].unsqueeze(-1))
    assert taken.all() and not td["agents", "action_mask"].all()


def test_unlike_spaces_and_options_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="categorical_actor"):
        gaussian_actor(ToyEnv(choices=3))
    with pytest.raises(ValueError, match="tanh"):
        gaussian_actor(ToyEnv(), distribution="beta")
    two = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        gaussian_actor(two)
    td = gaussian_actor(two, ("a", "b"))(two.reset())
    assert td["a", "action"].shape == (4, 2, 1) and td["b", "action"].shape == (4, 1, 2)


def test_the_box_moves_with_the_actor():
    actor = gaussian_actor(ToyEnv()).to("meta")
    out = actor(TensorDict({"agents": {"observation": torch.zeros(4, 3, 4, device="meta")}}, [4]))
    assert out["agents", "action"].device.type == "meta"
