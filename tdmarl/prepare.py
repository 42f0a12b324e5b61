"""What is computed once per collected batch, before learning: batch in, batch with more entries out, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdmarl import reduce
from tdmarl.keys import per_agent


def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    gamma: float,
    lmbda: float,
    time_dim: int = -3,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation that cuts at ``done`` and bootstraps wherever the episode did not terminate.

        ``delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)``
        ``A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}``,  ``R_t = A_t + V(s_t)``

    ``s'_t`` is the true next state, also where the time limit ended the episode. Source: Schulman et al. 2016.

    Args:
        reward, value, next_value (Tensor): ``[*B, T, n, 1]``.
        done, terminated (Tensor): boolean, of the same shape.
        gamma (float): discount.
        lmbda (float): weight of long returns.
        time_dim (int): where ``T`` is.

    Returns:
        tuple[Tensor, Tensor]: advantage and lambda-return, ``[*B, T, n, 1]``.
    """
    delta = reward + gamma * torch.where(terminated, 0, next_value) - value
    keep = torch.where(done, 0.0, gamma * lmbda)
    deltas, keeps = delta.unbind(time_dim), keep.unbind(time_dim)
    running = torch.zeros_like(deltas[0])
    advantages = []
    for d, k in zip(reversed(deltas), reversed(keeps)):
        running = torch.addcmul(d, k, running)
        advantages.append(running)
    advantage = torch.stack(advantages[::-1], time_dim)
    return advantage, advantage + value


def on_host(device: torch.device) -> bool:
    """Whether reading a tensor's values waits for nothing."""
    return device.type == "cpu"


class Advantage(TensorDictModuleBase):
    """Values the batch with the critic and writes the advantages and targets that PPO's losses read.

    The value of a next state is that of the following row, except where an episode ends or the batch does: there
    the critic is asked about ``next``. A critic that reads actions (``other_actions``) is given what the agents
    did next, and at such ends what ``actor`` would do.

    Args:
        critic (TensorDictModuleBase): writes ``(group, "state_value")`` for each group.
        groups (sequence of str): the team's groups.
        gamma, lmbda (float): see :func:`generalized_advantage`.
        standardize ("group", "agent" or None): advantages to mean 0 and standard deviation 1 over the live agents
            of the group, over each agent apart, or not at all; once per batch.
        actor (TensorDictModuleBase, optional): needed by a critic that reads actions.

    Reads the critic's inputs at root and ``next``, ``("next", group, reward | done | terminated)`` (a root
    ``done``, ``terminated`` or ``reward`` serves a group that has none) and ``(group, mask)`` if there. The batch is
    ``[*B, T]``. Writes ``(group, state_value | advantage | value_target)`` ``[*B, T, n, 1]`` and what else the
    critic writes.
    """

    def __init__(
        self,
        critic: TensorDictModuleBase,
        groups: Sequence[str],
        *,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        standardize: str | None = "group",
        actor: TensorDictModuleBase | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0 <= number <= 1:
                raise ValueError(f"{name}={number} must be between 0 and 1.")
        if standardize not in ("group", "agent", None):
            raise ValueError(f"standardize={standardize!r} must be 'group', 'agent' or None.")
        self.groups, self.gamma, self.lmbda, self.standardize = tuple(groups), gamma, lmbda, standardize
        self.__dict__["critic"], self.__dict__["actor"] = critic, actor  # owned, and saved, by the losses
        self.reads_actions = any((g, "action") in critic.in_keys for g in self.groups)
        if self.reads_actions and actor is None:
            raise ValueError(
                "The critic reads actions: Advantage needs actor= to know those after the last step."
            )
        states = [key for key in critic.in_keys if not self._is_action(key)]
        self.recurrent = "is_init" in critic.in_keys
        self.in_keys = [*critic.in_keys, *(("next", *((k,) if isinstance(k, str) else k)) for k in states)]
        self.out_keys = [
            *critic.out_keys,
            *((g, k) for g in self.groups for k in ("advantage", "value_target")),
        ]

    def _is_action(self, key: object) -> bool:
        return any(key == (g, "action") for g in self.groups)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        valued = self.critic(tensordict.select(*self.critic.in_keys))
        written = valued.select(*self.critic.out_keys)
        after = self._next_values(tensordict, written)
        for group in self.groups:
            value, next_value = written.get((group, "state_value")), after.get((group, "state_value"))
            reward, done, terminated = (
                per_agent(tensordict, group, name, value) for name in ("reward", "done", "terminated")
            )
            advantage, target = generalized_advantage(
                reward, value, next_value, done, terminated, gamma=self.gamma, lmbda=self.lmbda
            )
            mask = tensordict.get((group, "mask"), None)
            if self.standardize is not None:
                advantage = reduce.standardize(advantage, mask, per_agent=self.standardize == "agent")
            tensordict.set((group, "advantage"), advantage)
            tensordict.set((group, "value_target"), target)
        return tensordict.update(written)

    def _next_values(self, batch: TensorDictBase, written: TensorDictBase) -> TensorDictBase:
        """The critic's values of the next states, ``[*B, T]``."""
        done = batch.get(("next", "done"))
        end = done.squeeze(-1).clone()  # [*B, T]
        end[..., -1] = True
        following = batch.get("next").select(
            *(k for k in self.critic.in_keys if not self._is_action(k)), strict=False
        )
        values = [(g, "state_value") for g in self.groups]
        if self.recurrent:  # a sequence cannot be cut where it ends
            init = torch.zeros_like(done)
            return self.critic(self._with_actions(following.set("is_init", init), batch)).select(*values)
        time = end.ndim - 1
        shifted = written.select(*values).apply(lambda v: v.roll(-1, time))
        if (
            on_host(end.device) and not reduce.has_seed_axis()
        ):  # reading costs nothing here, and few rows are ends
            where = end.nonzero(as_tuple=True)
            ends = self._with_actions(following[where], batch[where] if self.reads_actions else batch)
            shifted[where] = self.critic(ends).select(*values)
            return shifted
        asked = self.critic(self._with_actions(following.copy(), batch)).select(*values)
        return shifted.apply(
            lambda s, a: torch.where(end.reshape(end.shape + (1,) * (s.ndim - end.ndim)), a, s), asked
        )

    def _with_actions(self, following: TensorDictBase, batch: TensorDictBase) -> TensorDictBase:
        if not self.reads_actions:
            return following
        assert self.actor is not None
        state = batch.get("next").select(*self.actor.in_keys, strict=False)
        with set_exploration_type(ExplorationType.RANDOM):
            acted = self.actor(state)
        return following.update(acted.select(*((g, "action") for g in self.groups)))


class TeamReward(TensorDictModuleBase):
    """Writes the team's reward at the root, ``("next", "reward")`` ``[*B, 1]``, added up as you say.

    Args:
        groups (sequence of str): the team's groups.
        how ("sum" or "mean"): over all agents of the team. Nothing is ever taken from one agent alone.
    """

    def __init__(self, groups: Sequence[str], how: str) -> None:
        super().__init__()
        if how not in ("sum", "mean"):
            raise ValueError(f"how={how!r} must be 'sum' or 'mean'.")
        self.groups, self.how = tuple(groups), how
        self.in_keys = [("next", g, "reward") for g in self.groups]
        self.out_keys = [("next", "reward")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        rewards = torch.cat([tensordict.get(key) for key in self.in_keys], -2)  # [*B, n, 1]
        total = rewards.sum(-2)
        return tensordict.set(("next", "reward"), total if self.how == "sum" else total / rewards.shape[-2])
