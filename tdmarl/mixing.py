"""The temporal-difference loss of value-based learning in teams: IQL, VDN and QMIX, by the mixer alone."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdmarl import reduce
from tdmarl.keys import per_agent
from tdmarl.losses import huber
from tdmarl.q_actors import best, value_of
from tdmarl.team_values import TeamValues, joined, taken_index


def td_returns(
    reward: Tensor, next_value: Tensor, done: Tensor, *, gamma: float, n_steps: int = 1, lmbda: float = 0.0,
    time_dim: int,
) -> Tensor:  # fmt: skip
    """What a value regresses on: one-step, n-step or lambda-returns within rows of consecutive steps.

        ``G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1})``, and ``r_t + gamma V_{t+1}`` where the episode
        ends or the row does

    The n-step return is the same with ``lambda = 1`` for ``n - 1`` steps. What the actions would have been under
    the present policy is not corrected for, as in the implementations of QMIX that use it (Peng's Q(lambda)).

    Args:
        reward, next_value (Tensor): ``[*B, T, ...]``; the value of a terminal state is 0 already.
        done (Tensor): boolean, of the same shape: the episode ends here, for whatever reason.
        gamma (float): discount.
        n_steps (int): ``n``; rewards added up before the value.
        lmbda (float): ``lambda``.
        time_dim (int): where ``T`` is.

    Example:
        >>> r, v, no = torch.ones(3), torch.tensor([10.0, 20.0, 30.0]), torch.zeros(3, dtype=torch.bool)
        >>> td_returns(r, v, no, gamma=0.5, n_steps=2, time_dim=0)
        tensor([ 6.5000,  9.0000, 16.0000])
    """
    one = reward + gamma * next_value
    if n_steps == 1 and lmbda == 0:
        return one
    stop = done.clone()
    stop.select(time_dim, -1).fill_(True)
    if lmbda == 0:
        returns = one
        for _ in range(n_steps - 1):
            returns = torch.where(stop, one, reward + gamma * returns.roll(-1, time_dim))
        return returns
    running, found = torch.zeros_like(one.select(time_dim, 0)), []
    steps = zip(*(reversed(x.unbind(time_dim)) for x in (reward, next_value, one, stop)))
    for r, v, end, over in steps:
        running = torch.where(over, end, r + gamma * ((1 - lmbda) * v + lmbda * running))
        found.append(running)
    return torch.stack(found[::-1], time_dim)


class MixingLoss(TeamValues):
    """Squared (or Huber) temporal-difference error of each agent's value, or of the team's mixed one.

    Without a mixer, for every agent ``i`` (IQL):

        ``L = mean((y_i - Q_i(o_i, u_i))^2)``,  ``y_i = r_i + gamma (1 - terminated_i) max_u Q_i'(o'_i, u)``

    with a mixer ``f`` (VDN, QMIX), for the team, the square around the mixed value and the reward the team's:

        ``L = mean((y - f(Q_1(o_1, u_1), ..., Q_n(o_n, u_n), s))^2)``,  ``y = r + gamma (1 - terminated) f'(..., s')``

    where primes on ``Q`` and ``f`` mean target networks and the mixed next values are each agent's maximum. With
    ``double_q`` the maximum is *chosen* by the online network and valued by the target, as in the papers' code. A
    time limit does not end the future: only ``terminated`` does.

    TorchRL has ``DQNLoss`` and ``QMixerLoss`` for these. ``DQNLoss`` computes the same number for one group with
    every agent alive and some action available (a test holds the two against each other), but has no mask of dead
    agents, values a state without any available action at about -3e38, and knows neither several groups, nor seeds
    and ranks. ``QMixerLoss`` has, beyond that, no double Q, no importance weights, no padding and no ``reduction``.

    Args:
        actor (TensorDictModuleBase): writes ``(group, "action_value")`` ``[*B, n, K]`` for each group, such as
            :func:`tdmarl.q_actor`.
        mixer (TensorDictModuleBase, optional): reads ``(group, "chosen_action_value")`` ``[*B, n, 1]``, and what it
            wants of the state, writes root ``"chosen_action_value"`` ``[*B, 1]``. None: independent agents.
        gamma (float): discount.
        double_q (bool): see above.
        n_steps (int), lmbda (float): see :func:`td_returns`; other than 1 and 0 they need rows ``[M, L]``.
        huber_delta (float, optional): where the Huber loss turns linear; None is the squared error.
        delay_value (bool): have target networks, which a :class:`~tdmarl.targets.TargetUpdate` or TorchRL's
            ``SoftUpdate`` moves; False bootstraps with the trained networks.
        reduction (str): ``mean`` over what counts, ``sum``, or ``none``: ``[*B, 1]`` (``[*B, N, 1]``), 0 elsewhere.
        reward_norm (nn.Module, optional): standardizes rewards by ``normalize``; see
            :class:`~tdmarl.prepare.RewardNorm`.

    Reads the actor's and the mixer's inputs at root and ``next``, ``(group, "action")``, and of ``next`` the rewards
    (root ``reward`` ``[*B, 1]`` with a mixer, ``(group, "reward")`` ``[*B, n, 1]`` without), ``done`` and
    ``terminated``. Reads where it is there: ``(group, "mask")``, now and next (dead agents have no error, and value
    0 in the mixer), ``(group, "action_mask")`` (an agent without any available action has value 0),
    ``("collector", "mask")`` (False is padding, as TorchRL's samplers write it), ``"priority_weight"``. Writes
    ``loss_value`` and the metrics ``q_taken``, ``q_target``, ``td_error_mean``; into the tensordict it is given
    ``"td_error"`` ``[*B, 1]``, the absolute error (of the worst agent without a mixer), for prioritized replay.
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        mixer: TensorDictModuleBase | None = None,
        *,
        gamma: float = 0.99,
        double_q: bool = True,
        n_steps: int = 1,
        lmbda: float = 0.0,
        huber_delta: float | None = None,
        delay_value: bool = True,
        reduction: str = "mean",
        reward_norm: nn.Module | None = None,
    ) -> None:
        super().__init__(actor, mixer, delay_value)
        _check(gamma, n_steps, lmbda, reduction)
        self.gamma, self.double_q, self.n_steps, self.lmbda = gamma, double_q, n_steps, lmbda
        self.huber_delta, self.reduction, self.reward_norm = huber_delta, reduction, reward_norm
        self.out_keys = ["loss_value", "q_taken", "q_target", "td_error_mean"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        seen = self._pass("local_value_network", tensordict)
        chosen = {}
        for g in self.groups:
            values, action = seen.get((g, "action_value")), tensordict.get((g, "action"))
            taken = taken_index(g, action, values, self.codecs.get(g))
            chosen[g] = value_of(values, taken, self._available(g, tensordict))
        value = self._joint("mixer_network", chosen, tensordict, self._alive(tensordict))
        with torch.no_grad():
            target = self._target(tensordict, seen, chosen)
            counted = self._counted(tensordict, chosen, value)
        error = target - value
        if counted is not None:  # before the square, whose slope at infinity times zero is no number
            error = error.masked_fill(~counted, 0)
        loss = error.square() if self.huber_delta is None else huber(error, self.huber_delta)
        weight = tensordict.get(keys.priority_weight, None)
        if weight is not None:
            loss = loss * weight.reshape(weight.shape + (1,) * (loss.ndim - weight.ndim))
        with torch.no_grad():
            size = error.abs()
            tensordict.set(keys.priority, size if self.mixed else size.amax(-2))
            found = {"q_taken": value, "q_target": target, "td_error_mean": size}
            metrics = {name: reduce.mean(x.detach(), counted) for name, x in found.items()}
        return TensorDict({"loss_value": _reduced(loss, counted, self.reduction), **metrics})

    def _counted(self, tensordict: TensorDictBase, chosen: dict[str, Tensor], value: Tensor) -> Tensor | None:
        """Which errors count, in the values' shape: of the living, no padding, and not what only warms up a state."""
        counted = _alive_entries(self._alive(tensordict), chosen, self.mixed)
        reals = [tensordict.get(key, None) for key in self._loss_mask_keys()]
        if self.burn_in and tensordict.ndim > 1:
            reals.append(
                (torch.arange(tensordict.shape[-1], device=value.device) >= self.burn_in).expand(
                    tensordict.shape
                )
            )
        for real in reals:
            if real is not None:
                real = real.reshape(tensordict.shape + (1,) * (value.ndim - tensordict.ndim))
                counted = real if counted is None else counted & real
        return None if counted is None else counted.expand(value.shape)

    def _target(self, tensordict: TensorDictBase, seen: TensorDictBase, like: dict[str, Tensor]) -> Tensor:
        """What the values regress on, ``[*B, 1]`` or ``[*B, N, 1]``."""
        after = self._after(tensordict)
        states = self._pass("target_local_value_network", tensordict) if self.hidden else seen
        found = self._next_values("target_local_value_network", after, states)
        choosing = self._next_values("local_value_network", after, seen) if self.double_q else found
        alive, chosen = self._alive(after), {}
        for g in self.groups:
            available = self._available(g, after)
            chosen[g] = value_of(found[g], best(choosing[g], available), available)
            ended = tensordict.get(("next", g, "terminated"), None)
            if ended is not None:  # an agent that ended alone is worth nothing to the team any more
                here = ~ended.squeeze(-1)
                alive[g] = here if alive[g] is None else alive[g] & here  # type: ignore[operator]
        following = self._joint("target_mixer_network", chosen, after, alive)
        reward, done, terminated = (
            self._of_step(tensordict, name, like, following) for name in ("reward", "done", "terminated")
        )
        if self.reward_norm is not None:
            reward = self.reward_norm.normalize(reward)  # type: ignore[operator]
        return td_returns(
            reward, following.masked_fill(terminated, 0), done | terminated, gamma=self.gamma, n_steps=self.n_steps,
            lmbda=self.lmbda, time_dim=tensordict.ndim - 1,
        )  # fmt: skip

    def _of_step(
        self, tensordict: TensorDictBase, name: str, like: dict[str, Tensor], joint: Tensor
    ) -> Tensor:
        """The step's ``reward``, ``done`` or ``terminated`` as the values have it."""
        if self.mixed:
            return tensordict.get(("next", getattr(self.tensor_keys, name))).expand(joint.shape)
        parts = [per_agent(tensordict, g, name, value) for g, value in like.items()]
        if name == "done":  # an episode that ended for all has ended for each
            parts = [part | tensordict.get(("next", self.tensor_keys.done)).unsqueeze(-2) for part in parts]
        return joined(parts)


def _reduced(loss: Tensor, counted: Tensor | None, how: str) -> Tensor:
    """As ``reduction`` says; what does not count is 0 already."""
    return reduce.mean(loss, counted) if how == "mean" else loss.sum() if how == "sum" else loss


def _alive_entries(masks: dict[str, Tensor | None], like: dict[str, Tensor], joint: bool) -> Tensor | None:
    """Whose errors count: live agents' ``[*B, N, 1]``, or teams' with one ``[*B, 1]``; None: all."""
    if all(mask is None for mask in masks.values()):
        return None
    alive = []
    for g, mask in masks.items():
        ones = torch.ones_like(like[g], dtype=torch.bool)
        alive.append(ones if mask is None else mask.unsqueeze(-1))
    counted = joined(alive)
    return counted.any(-2) if joint else counted


def _check(gamma: float, n_steps: int, lmbda: float, reduction: str) -> None:
    for name, number in (("gamma", gamma), ("lmbda", lmbda)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}={number} must be between 0 and 1.")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps} must be at least 1.")
    if n_steps > 1 and lmbda > 0:
        raise ValueError(f"n_steps={n_steps} and lmbda={lmbda} are two kinds of returns: choose one.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'.")
