"""Losses that TorchRL lacks, or has without masks, seeds and ranks: each a ``LossModule`` of one group.

Both losses of the PPO family read the group's ``mask`` where the batch has one: what a dead or padded agent did or
received has no part in value or gradient, nor what it saw, as long as the networks' outputs for it are finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.common import LossModule

from tdmarl import reduce
from tdmarl.critics import ValueNorm
from tdmarl.keys import entry


class PolicyLoss(ClipPPOLoss):
    """PPO's clipped objective and entropy bonus for the actor of one group.

        ``L = -mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) - c H``,  ``r = prod_d pi(u_d | o) / pi_old(u_d | o)``

    TorchRL's ``ClipPPOLoss`` without its critic, with three differences: means are over live agents, all ranks and
    each seed apart; the entropy is taken as the distribution gives it, without a host read or a random draw; the
    advantage is used as it comes (it is standardized once per batch, not per minibatch).

    Sources: Schulman et al. 2017; de Witt et al. 2020 (IPPO); Yu et al. 2022 (MAPPO).

    Args:
        actor (TensorDictModuleBase): a ``ProbabilisticActor`` of the group.
        group (str, optional): the group; None for entries at the root, such as those of one agent alone.
        clip_epsilon (float, optional): ``eps``; None does not clip: the loss of an advantage actor-critic.
        entropy_coeff (float): ``c``; a buffer that a schedule may change.

    Reads ``(group, advantage)`` ``[*B, n, 1]``, ``(group, action)``, ``(group, action_log_prob)`` ``[*B, n]``, the
    actor's inputs, and ``(group, mask)`` ``[*B, n]`` if there. Writes ``loss_objective``, ``loss_entropy``,
    ``entropy``, ``kl_approx`` (the estimator ``r - 1 - log r``, never negative) and ``clip_fraction``.
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        group: str | None,
        *,
        clip_epsilon: float | None = 0.2,
        entropy_coeff: float = 0.01,
    ) -> None:
        if clip_epsilon is not None and not 0 < clip_epsilon < 1:
            raise ValueError(f"clip_epsilon={clip_epsilon} must be between 0 and 1.")
        super().__init__(
            actor,
            None,
            clip_epsilon=0.2 if clip_epsilon is None else clip_epsilon,
            entropy_coeff=entropy_coeff,
            normalize_advantage=False,
            functional=False,
        )
        self.group, self.clips = group, clip_epsilon is not None
        self.set_keys(advantage=entry(group, "advantage"))
        keys = self.tensor_keys
        self.in_keys = [*actor.in_keys, keys.action, keys.sample_log_prob, keys.advantage]
        self.optional_keys: list[NestedKey] = [entry(group, "mask")]
        self.out_keys = ["loss_objective", "loss_entropy", "entropy", "kl_approx", "clip_fraction"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        advantage = tensordict.get(self.tensor_keys.advantage)  # [*B, n, 1]
        mask = tensordict.get(entry(self.group, "mask"), None)  # [*B, n]
        log_ratio, dist, *_ = self._log_weight(
            tensordict.copy(), adv_shape=advantage.shape[:-1]
        )  # [*B, n, 1]
        if log_ratio.shape != advantage.shape:
            raise ValueError(
                f"{self.tensor_keys.sample_log_prob} gives ratios of shape {tuple(log_ratio.shape)}, but "
                f"{self.tensor_keys.advantage} has {tuple(advantage.shape)}: the actor's log-probability must be one "
                "number for each agent, summed over action dimensions."
            )
        if mask is not None:  # before the exponential: a dead agent's entries may hold anything
            log_ratio = log_ratio.masked_fill(~mask.unsqueeze(-1), 0)
        ratio = log_ratio.exp()
        clipped = log_ratio.clamp(*self._clip_bounds) if self.clips else log_ratio
        gain = torch.minimum(ratio * advantage, clipped.exp() * advantage)
        entropy = reduce.mean(dist.entropy(), mask)
        with torch.no_grad():
            kl = reduce.mean(ratio - 1 - log_ratio, mask)
            clip_fraction = reduce.mean((clipped != log_ratio).to(gain.dtype), mask)
        return TensorDict(
            loss_objective=-reduce.mean(gain, mask),
            loss_entropy=-self.entropy_coeff * entropy,
            entropy=entropy.detach(),
            kl_approx=kl,
            clip_fraction=clip_fraction,
        )


def huber(error: Tensor, delta: float) -> Tensor:
    """``e^2 / 2`` up to ``|e| = delta``, then linear: ``delta (|e| - delta / 2)``; infinity is half the square."""
    size = error.abs()
    quadratic = size.clamp_max(delta)
    return 0.5 * quadratic.square() + (size - quadratic) * min(delta, torch.finfo(error.dtype).max)


class ValueLoss(LossModule):
    """The critic's clipped regression on lambda-returns, in normalized units if the critic has them.

        ``L = mean(max(h(R - V), h(R - V_clip)))``,  ``V_clip = V_old + clip(V - V_old, -eps, eps)``

    with ``h`` the Huber loss and ``V_old`` the rollout's prediction. The maximum is what every implementation has,
    OpenAI's baselines included; the minimum that is printed in some descriptions of IPPO would let the clip *reward*
    a large error. MAPPO's critic minimizes this (descriptions that print ``argmax`` mean ``argmin``).

    With value normalization the moments take in each minibatch before it is normalized, as MAPPO's code does, and
    ``R``, ``V`` and ``V_old`` are in the network's unit.

    Sources: Yu et al. 2022 (MAPPO) and its code.

    Args:
        critic (TensorDictModuleBase): writes ``(group, "state_value")``, and ``(group, "state_value_normalized")``
            if it is a :class:`~tdmarl.critics.NormalizedCritic`.
        group (str, optional): the group; None for the team's value, at the root.
        clip_epsilon (float, optional): ``eps``; None does not clip.
        huber_delta (float): where the Huber loss turns linear; infinity is half the squared error.
        value_norm (ValueNorm, optional): the moments of the group's returns.

    Reads ``(group, value_target)`` ``[*B, n, 1]`` in reward units, the critic's inputs, the rollout's value for the
    clip, and ``(group, mask)`` ``[*B, n]`` if there. Writes ``loss_critic`` and ``explained_variance``.
    """

    @dataclass
    class _AcceptedKeys:
        value: NestedKey = "state_value"
        value_target: NestedKey = "value_target"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        critic: TensorDictModuleBase,
        group: str | None,
        *,
        clip_epsilon: float | None = 0.2,
        huber_delta: float = 10.0,
        value_norm: ValueNorm | None = None,
    ) -> None:
        super().__init__()
        self.critic, self.value_norm, self.group = critic, value_norm, group
        self.clip_epsilon, self.huber_delta = clip_epsilon, huber_delta
        value = entry(group, "state_value" if value_norm is None else "state_value_normalized")
        if value not in critic.out_keys:
            raise KeyError(f"The critic writes {critic.out_keys}; ValueLoss needs it to write {value}.")
        self.set_keys(value=value, value_target=entry(group, "value_target"))
        self.in_keys = [*critic.in_keys, self.tensor_keys.value_target]
        if clip_epsilon is not None:
            self.in_keys.append(value)
        self.optional_keys: list[NestedKey] = [entry(group, "mask")]
        self.out_keys = ["loss_critic", "explained_variance"]

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """TorchRL calls this when keys change; this loss has no estimator of its own to tell."""

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        target = tensordict.get(keys.value_target)  # [*B, n, 1]
        mask = tensordict.get(entry(self.group, "mask"), None)  # [*B, n]
        if self.value_norm is not None:
            self.value_norm.update(target, mask)
            target = self.value_norm.normalize(target)
        value = self.critic(tensordict.copy()).get(keys.value)
        loss = huber(target - value, self.huber_delta)
        if self.clip_epsilon is not None:
            old = tensordict.get(keys.value)
            clipped = old + (value - old).clamp(-self.clip_epsilon, self.clip_epsilon)
            loss = torch.maximum(loss, huber(target - clipped, self.huber_delta))
        with torch.no_grad():
            residual, total = reduce.mean((target - value).square(), mask), reduce.moments(target, mask)[1]
            explained = 1 - residual / total.reshape(residual.shape).clamp_min(1e-8)
        return TensorDict(loss_critic=reduce.mean(loss, mask), explained_variance=explained)
