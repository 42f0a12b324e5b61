"""What is computed once per collected batch, before learning: batch in, batch with more entries out, no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from tdmarl import host, reduce
from tdmarl.functions import Accelerated
from tdmarl.keys import entry, per_agent
from tdmarl.recurrent import after, hidden_keys


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
    delta = reward + gamma * next_value.masked_fill(terminated, 0) - value
    advantage, keeps = delta, (gamma * lmbda * torch.ones_like(delta)).masked_fill(done, 0)
    steps, reach = delta.shape[time_dim], 1
    while reach < steps:  # of how many steps the sums are doubles each time
        later = advantage.narrow(time_dim, reach, steps - reach)
        kept = keeps.narrow(time_dim, 0, steps - reach)
        # what comes after an end may hold anything
        more = (kept * later).masked_fill(kept == 0, 0)
        last = advantage.narrow(time_dim, steps - reach, reach)
        advantage = torch.cat([advantage.narrow(time_dim, 0, steps - reach) + more, last], time_dim)
        further = keeps.narrow(time_dim, reach, steps - reach)
        keeps = torch.cat([kept * further, keeps.narrow(time_dim, steps - reach, reach)], time_dim)
        reach *= 2
    return advantage, advantage + value


class _Pieces(NamedTuple):
    """How much of a batch is worked on at a time."""

    rows: int  # a critic is asked about so many at least,
    parts: int  # and of a batch in so many parts at most
    entries: int  # for which advantages are estimated at a time


_ON_CPU, _ELSEWHERE = _Pieces(2_048, 256, 2**16), _Pieces(8_192, 64, 2**19)  # a GPU's calls cost as much as many rows


def _pieces(device: torch.device | None) -> _Pieces:
    return _ELSEWHERE if device is not None and device.type != "cpu" else _ON_CPU


class Advantage(TensorDictModuleBase):
    """Values the batch with the critic and writes the advantages and targets that PPO's losses read.

    The value of a next state is that of the following row, except where an episode ends or the batch does: there
    the critic is asked about ``next``. A critic that reads actions (``other_actions``) is given what the agents
    did next, and at such ends what ``actor`` would do.

    A recurrent critic goes through ``[*B, T]`` in one pass from its state at the first step. At an end it is asked
    about the true next observation with the state after that step. Its states before every step replace those in the
    batch, so that rows cut from it start right.

    Args:
        critic (TensorDictModuleBase): writes ``(group, "state_value")`` for each group.
        groups (sequence of str or None): the team's groups; ``[None]`` for one value of the team, at the root.
        gamma, lmbda (float): see :func:`generalized_advantage`.
        standardize ("group", "agent" or None): advantages to mean 0 and standard deviation 1 over the live agents
            of the group, over each agent apart, or not at all; once per batch.
        actor (TensorDictModuleBase, optional): needed by a critic that reads actions.
        mode (str): in ``compile`` and ``cudagraph`` a feed-forward critic is compiled for the batch's many rows.

    Reads the critic's inputs at root and ``next``, ``("next", group, reward | done | terminated)`` (a root
    ``done``, ``terminated`` or ``reward`` serves a group that has none) and ``(group, mask)`` if there. The batch is
    ``[*B, T]``. Writes ``(group, state_value | advantage | value_target)`` ``[*B, T, n, 1]`` and what else the
    critic writes.
    """

    def __init__(
        self,
        critic: TensorDictModuleBase,
        groups: Sequence[str | None],
        *,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        standardize: str | None = "group",
        actor: TensorDictModuleBase | None = None,
        mode: str = "eager",
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
        self.hidden = hidden_keys(critic)
        is_fast = mode in ("compile", "cudagraph") and not self.hidden
        self.accelerated = Accelerated(critic, "values") if is_fast else None
        carried = {"is_init", *self.hidden}
        states = [key for key in critic.in_keys if not self._is_action(key) and key not in carried]
        self.in_keys = [*critic.in_keys, *(after(key) for key in states)]
        written = [key for key in critic.out_keys if key not in list(map(after, self.hidden))]
        self.out_keys = [
            *written,
            *(entry(g, k) for g in self.groups for k in ("advantage", "value_target")),
        ]

    def _is_action(self, key: object) -> bool:
        return any(key == (g, "action") for g in self.groups)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        fast = None if reduce.has_seed_axis() else self.accelerated
        if fast is not None:
            fast.begin()
        with set_recurrent_mode(True):
            valued = self._ask(tensordict.select(*self.critic.in_keys, strict=False), fast)
        states = {key: valued.get(after(key)) for key in self.hidden}  # after each step
        written = valued.select(*(key for key in self.critic.out_keys if key in self.out_keys))
        with set_recurrent_mode(False):  # single steps, each with its own state
            following = self._next_values(tensordict, written, states)
        for group in self.groups:
            value, next_value = (td.get(entry(group, "state_value")) for td in (written, following))
            reward, done, terminated = (
                per_agent(tensordict, group, name, value) for name in ("reward", "done", "terminated")
            )
            if group is not None:  # an episode that ended for all has ended for each
                done = done | tensordict.get(("next", "done")).unsqueeze(-2)
            advantage, target = self._estimated(
                [reward, value, next_value, done, terminated], tensordict.ndim - 1
            )
            del next_value
            following.pop(entry(group, "state_value"))
            mask = None if group is None else tensordict.get((group, "mask"), None)
            if self.standardize is not None:
                advantage = reduce.standardize(advantage, mask, per_agent=self.standardize == "agent")
            tensordict.set(entry(group, "advantage"), advantage)
            tensordict.set(entry(group, "value_target"), target)
        time = tensordict.ndim - 1
        for key, state in states.items():
            first, begins = tensordict.get(key).narrow(time, 0, 1), tensordict.get("is_init")
            before = torch.cat([first, state.narrow(time, 0, state.shape[time] - 1)], time)
            begins = begins.reshape(begins.shape[:-1] + (1,) * (before.ndim - begins.ndim + 1))
            tensordict.set(key, before.masked_fill(begins, 0))
        return tensordict.update(written)

    def _estimated(self, given: list[Tensor], time_dim: int) -> tuple[Tensor, Tensor]:
        """The advantages and targets, of some rows at a time: what they are computed by is several times as large."""
        value, first = given[1], int(reduce.has_seed_axis())
        rows, row = value.shape[first], max(1, value.numel() // max(1, value.shape[first]))
        size = max(1, _pieces(value.device).entries // row)
        options: dict[str, Any] = {"gamma": self.gamma, "lmbda": self.lmbda, "time_dim": time_dim}
        if time_dim == first or size >= rows:
            return generalized_advantage(*given, **options)
        found = torch.empty_like(value), torch.empty_like(value)
        for start in range(0, rows, size):
            part = [x.narrow(first, start, min(size, rows - start)) for x in given]
            for whole, x in zip(found, generalized_advantage(*part, **options)):
                whole.narrow(first, start, x.shape[first]).copy_(x)
        return found

    def _ask(self, given: TensorDictBase, fast: Accelerated | None = None) -> TensorDictBase:
        """What the critic writes, some rows at a time: its layers' outputs may be far larger than the batch."""
        ask = fast or (lambda part: self.critic(part).select(*self.critic.out_keys))
        first = int(reduce.has_seed_axis())
        pieces = _pieces(given.device)
        size = given.shape[first] * max(pieces.rows, given.numel() // pieces.parts) // max(1, given.numel())
        in_time = bool(self.hidden) and given.ndim == first + 1  # a recurrent critic goes through it in one pass
        if in_time or size >= given.shape[first]:
            return ask(given)
        found: TensorDictBase | None = None
        before = (slice(None),) * first
        for start in range(0, given.shape[first], max(1, size)):
            here = *before, slice(start, start + max(1, size))
            answer = ask(given[here])
            if found is None:
                found = torch.empty_like(answer[(*before, slice(1))].expand(given.shape))
            found[here] = answer
        assert found is not None
        return found

    def _next_values(
        self, batch: TensorDictBase, written: TensorDictBase, states: dict[NestedKey, Tensor]
    ) -> TensorDictBase:
        """The critic's values of the next states, ``[*B, T]``."""
        done = batch.get(("next", "done"))
        end = done.squeeze(-1).clone()  # [*B, T]
        end[..., -1] = True
        following = batch.get("next").select(
            *(k for k in self.critic.in_keys if not self._is_action(k)), strict=False
        )
        following.set("is_init", torch.zeros_like(done))  # the step goes on from the episode's last one
        for key, state in states.items():
            following.set(key, state)
        values = [entry(g, "state_value") for g in self.groups]
        time = end.ndim - 1
        shifted = written.select(*values).apply(lambda v: v.roll(-1, time))
        if host.is_free(end.device) and not reduce.has_seed_axis():  # reading costs nothing, and few rows are ends
            where = end.nonzero(as_tuple=True)
            ends = self._with_actions(following[where], batch[where] if self.reads_actions else batch)
            shifted[where] = self._ask(ends).select(*values)
            return shifted
        asked = self._ask(self._with_actions(following.copy(), batch)).select(*values)
        return shifted.apply(
            lambda s, a: torch.where(end.reshape(end.shape + (1,) * (s.ndim - end.ndim)), a, s), asked
        )

    def _with_actions(self, following: TensorDictBase, batch: TensorDictBase) -> TensorDictBase:
        if not self.reads_actions:
            return following
        assert self.actor is not None
        state = batch.get("next").select(*self.actor.in_keys, strict=False)
        state.set("is_init", torch.zeros_like(batch.get(("next", "done"))))
        with set_exploration_type(ExplorationType.RANDOM):
            acted = self.actor(state)
        return following.update(acted.select(*((g, "action") for g in self.groups)))


class RewardNorm(nn.Module):
    """Running moments of all rewards collected so far, by which a loss standardizes those it replays.

        ``r <- (r - mean) / max(std, eps)``

    as EPyMARL does by default. Subtracting the mean changes what is optimal where the length of an episode depends
    on the actions: then a constant is paid for every step more. The moments are exact (Chan et al. 1979), over live
    agents and all ranks.

    Args:
        eps (float): the least standard deviation.
        device (torch.device, optional): where the moments live.

    Example:
        >>> norm = RewardNorm()
        >>> norm.update(torch.tensor([[1.0], [3.0]]))
        >>> norm.update(torch.tensor([[5.0], [7.0]]))
        >>> norm.mean.item(), norm.variance.item()
        (4.0, 5.0)
    """

    def __init__(self, eps: float = 1e-4, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.count: Tensor
        self.mean: Tensor
        self.variance: Tensor
        for name in ("count", "mean", "variance"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=device))

    @torch.no_grad()
    def update(self, reward: Tensor, mask: Tensor | None = None) -> None:
        """Takes in a batch of rewards ``[*B, 1]`` or ``[*B, n, 1]`` where ``mask`` is True."""
        rewards = reward.double()
        mean, variance = (x.reshape(()) for x in reduce.moments(rewards, mask))
        count = reduce.total(torch.ones_like(rewards), mask)
        share = count / (self.count + count).clamp_min(1)
        delta = mean - self.mean
        self.variance.lerp_(variance + delta.square() * (1 - share), share)
        self.mean.lerp_(mean, share)
        self.count += count

    def normalize(self, reward: Tensor) -> Tensor:
        """Standardized by what has been taken in; as they are before anything was."""
        std = self.variance.sqrt().clamp_min(self.eps)
        std = std.masked_fill(self.count == 0, 1)
        return (reward - self.mean.to(reward.dtype)) / std.to(reward.dtype)


class TeamReward(TensorDictModuleBase):
    """Writes the team's reward at the root, ``("next", "reward")`` ``[*B, 1]``, added up as you say.

    Args:
        groups (sequence of str): the team's groups.
        how ("sum" or "mean"): over the agents of the team that are alive, by ``(group, "mask")`` where it is there.
            Nothing is ever taken from one agent alone.
    """

    def __init__(self, groups: Sequence[str], how: str) -> None:
        super().__init__()
        if how not in ("sum", "mean"):
            raise ValueError(f"how={how!r} must be 'sum' or 'mean'.")
        self.groups, self.how = tuple(groups), how
        self.in_keys = [("next", g, "reward") for g in self.groups]
        self.out_keys = [("next", "reward")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        rewards, alive = [], []
        for group, key in zip(self.groups, self.in_keys):
            reward = tensordict.get(key)  # [*B, n, 1]
            mask = tensordict.get((group, "mask"), None)
            mask = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask.unsqueeze(-1)
            rewards.append(reward.masked_fill(~mask, 0))
            alive.append(mask)
        total, count = torch.cat(rewards, -2).sum(-2), torch.cat(alive, -2).sum(-2)
        return tensordict.set(("next", "reward"), total if self.how == "sum" else total / count.clamp_min(1))


class HAPPOFactor(TensorDictModuleBase):
    """Multiplies the compound ratio of the agents that were updated already: HAPPO's factor.

        ``M <- M * prod_i pi_new(u_i | o_i) / pi_old(u_i | o_i)``

    over the agents just updated, whose log-probabilities of the whole batch before and after their update are
    given. It is detached and unclipped, added up as logarithms, and a dead agent leaves it as it is.

    Source: Kuba et al. 2022, "Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning"; the
    definition that prints ``i_{1:m-1}-1`` means the agents ``i_1`` to ``i_{m-1}``.

    Args:
        group (str): the group of the agents just updated.
        team (sequence of str, optional): the groups whose ``factor`` is multiplied; only ``group`` if None.
        aggregate ("prod" or "mean"): of the ratios of an action's dimensions, where log-probabilities are given per
            dimension; the product is the ratio of the action.

    Reads ``(group, log_prob_before | log_prob_after)`` ``[*B, k]`` or ``[*B, k, d]`` of ``k`` agents with ``d``
    action dimensions, ``(group, updated_mask)`` ``[*B, k]`` if there, and each group's ``factor`` ``[*B, n, 1]``,
    which it writes back into the batch.

    Example:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"g": {"factor": torch.ones(1, 2, 1), "log_prob_before": torch.tensor([[0.5]]).log(),
        ...     "log_prob_after": torch.tensor([[0.7]]).log()}}, [1])
        >>> HAPPOFactor("g")(td)["g", "factor"].flatten()
        tensor([1.4000, 1.4000])
    """

    def __init__(self, group: str, team: Sequence[str] | None = None, *, aggregate: str = "prod") -> None:
        super().__init__()
        if aggregate not in ("prod", "mean"):
            raise ValueError(f"aggregate={aggregate!r} must be 'prod' or 'mean'.")
        self.group, self.team, self.aggregate = group, tuple(team or (group,)), aggregate
        self.out_keys = [(g, "factor") for g in self.team]
        self.in_keys = [(group, "log_prob_before"), (group, "log_prob_after"), *self.out_keys]
        self.optional_keys = [(group, "updated_mask")]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        before, after = (tensordict.get(key) for key in self.in_keys[:2])
        log_ratio = after - before
        if log_ratio.ndim > tensordict.ndim + 1:  # [*B, k, d]
            if self.aggregate == "prod":
                log_ratio = log_ratio.sum(-1)
            else:
                log_ratio = (log_ratio.exp().sum(-1) / log_ratio.shape[-1]).log()
        elif self.aggregate == "mean":
            raise ValueError(
                f"aggregate='mean' needs {self.in_keys[0]} per action dimension, [*B, k, d]; it has "
                f"{tuple(before.shape)}, already summed."
            )
        mask = tensordict.get((self.group, "updated_mask"), None)
        if mask is not None:
            log_ratio = log_ratio.masked_fill(~mask, 0)
        ratio = log_ratio.sum(-1).exp().reshape(*tensordict.shape, 1, 1)
        for key in self.out_keys:
            tensordict.set(key, tensordict.get(key) * ratio)
        return tensordict


class JointAdvantage(TensorDictModuleBase):
    """One advantage of the joint action for the whole team, as HAPPO and HATRPO need it, and a factor of one.

    The rewards of all agents become the team's, as you say how; the critic values the team; each agent's advantage
    is the joint one, standardized over the entries at which that agent is alive.

    Args:
        critic (TensorDictModuleBase): writes ``"state_value"`` ``[*B, 1]`` at the root.
        groups (sequence of str): the team's groups.
        sizes (sequence of int): how many agents each group has.
        team_reward ("mean" or "sum"): over all agents.
        gamma, lmbda (float): see :func:`generalized_advantage`.
        standardize (bool): to mean 0 and standard deviation 1, once per batch.
        mode (str): see :class:`Advantage`.

    Writes root ``state_value | value_target`` ``[*B, T, 1]``, ``(group, advantage | factor)`` ``[*B, T, n, 1]``.
    """

    def __init__(
        self,
        critic: TensorDictModuleBase,
        groups: Sequence[str],
        sizes: Sequence[int],
        *,
        team_reward: str = "mean",
        gamma: float = 0.99,
        lmbda: float = 0.95,
        standardize: bool = True,
        mode: str = "eager",
    ) -> None:
        super().__init__()
        self.groups, self.sizes, self.standardize = tuple(groups), tuple(sizes), standardize
        self.reward = TeamReward(groups, team_reward)
        self.advantage = Advantage(critic, [None], gamma=gamma, lmbda=lmbda, standardize=None, mode=mode)
        self.in_keys = [*self.advantage.in_keys, *self.reward.in_keys]
        written = [(g, name) for g in self.groups for name in ("advantage", "factor")]
        self.out_keys = [*self.advantage.out_keys, *written]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict = self.advantage(self.reward(tensordict))
        joint = tensordict.get("advantage").unsqueeze(-2)  # [*B, T, 1, 1]
        for group, n in zip(self.groups, self.sizes):
            advantage = joint.expand(*joint.shape[:-2], n, 1)
            if self.standardize:
                advantage = reduce.standardize(
                    advantage, tensordict.get((group, "mask"), None), per_agent=True
                )
            tensordict.set((group, "advantage"), advantage)
            tensordict.set((group, "factor"), torch.ones_like(advantage))
        return tensordict
