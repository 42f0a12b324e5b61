"""`check_env` accepts what follows the conventions and names what does not."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from tdmarl.envs.check import EnvError, check_env

ENVS, AGENTS = 3, 2


class Walk(EnvBase):
    """Two agents on a line; every convention can be broken on purpose."""

    def __init__(self, fault: str = "") -> None:
        super().__init__(device="cpu", batch_size=[ENVS])
        self.fault, self.group_map = fault, {"agents": ["a", "b"]}
        self.generator = torch.Generator()
        if fault == "no groups":
            self.group_map = {}
        action = Unbounded((AGENTS, 1)) if fault == "action spec" else Bounded(-1, 1, (AGENTS, 1))
        self.full_action_spec_unbatched = Composite(agents=Composite(action=action, shape=(AGENTS,)))
        observation = {"observation": Unbounded((AGENTS, 1))}
        if fault == "mask":
            observation["action_mask"] = Categorical(2, shape=(AGENTS, 2), dtype=torch.bool)
        self.full_observation_spec_unbatched = Composite(agents=Composite(observation, shape=(AGENTS,)))
        reward = Unbounded((AGENTS,) if fault == "reward spec" else (AGENTS, 1))
        self.full_reward_spec_unbatched = Composite(agents=Composite(reward=reward, shape=(AGENTS,)))
        ends = ["done", "terminated"] + ([] if fault == "no truncated" else ["truncated"])
        flags = {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in ends}
        each = {key: Categorical(2, shape=(AGENTS, 1), dtype=torch.bool) for key in ends}
        group = {} if fault == "no group done" else {"agents": Composite(each, shape=(AGENTS,))}
        self.full_done_spec_unbatched = Composite({**flags, **group})
        self.place = torch.zeros(ENVS, AGENTS, 1)

    def _shown(self) -> TensorDict:
        ended = self.place.abs().amax(1) > 2
        ends = {"done": ended, "terminated": ended, "truncated": torch.zeros_like(ended)}
        group: dict[str, Any] = {"observation": self.place.clone()}
        if self.fault == "shape":
            group["observation"] = group["observation"].squeeze(-1)
        if self.fault == "dtype":
            group["observation"] = group["observation"].double()
        if self.fault == "mask":
            group["action_mask"] = torch.zeros(ENVS, AGENTS, 2, dtype=torch.bool)
        for key, value in ends.items():
            group[key] = value.unsqueeze(1).repeat(1, AGENTS, 1)
        return TensorDict({"agents": TensorDict(group, [ENVS, AGENTS]), **ends}, [ENVS])

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        fresh = torch.rand(ENVS, AGENTS, 1, generator=None if self.fault == "seed" else self.generator)
        if self.fault == "seed":
            fresh = fresh + torch.seed() % 1000 / 1000
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.place = fresh if mask is None else torch.where(mask.unsqueeze(-1), fresh, self.place)
        return self._shown()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.place = self.place + tensordict["agents", "action"]
        shown = self._shown()
        shown["agents", "reward"] = -self.place.abs()
        if self.fault == "done":
            shown["truncated"] = ~shown["truncated"]
        return shown

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)


def test_what_follows_the_conventions_passes_and_the_global_generator_stays() -> None:
    state = torch.get_rng_state()
    check_env(Walk())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "fault, message",
    [
        ("no groups", r"group_map is \{\}"),
        ("no truncated", r"no \('truncated',\) in the specs"),
        ("action spec", r"\('agents', 'action'\) is Unbounded\w*\(2, 1\); expected one of Bounded"),
        ("reward spec", r"\('agents', 'reward'\) has shape \(2,\), expected \(2, 1\)"),
        ("shape", r"\('agents', 'observation'\) has shape \(3, 2\), expected \(3, 2, 1\): found after reset"),
        ("dtype", r"\('agents', 'observation'\) after reset is torch.float64; expected torch.float32"),
        ("done", r"\('done',\) in 'next' of step 0 is not terminated \| truncated"),
        ("mask", r"\('agents', 'action_mask'\) after reset leaves an agent that is alive without any choice"),
        ("seed", r"\('agents', 'observation'\) differs between two rollouts after set_seed\(0\)"),
    ],
)
def test_what_breaks_a_convention_is_named(fault: str, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        check_env(Walk(fault))


def test_torchrls_own_vmas_environment_is_told_what_it_lacks() -> None:
    from torchrl.envs import VmasEnv

    with pytest.raises(EnvError, match="truncated"):
        check_env(VmasEnv("balance", num_envs=2))
