"""The deterministic policy gradient in teams: the losses of MADDPG, and of IDDPG and MATD3 by its options."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdmarl import reduce
from tdmarl.keys import per_agent
from tdmarl.losses import huber
from tdmarl.mixing import td_returns
from tdmarl.team_actions import TeamActions

VALUE_KEYS = ("loss_value", "q_taken", "q_target", "td_error_mean")
ACTOR_KEYS = ("loss_actor", "q_policy")
OTHERS = ("buffer", "policy", "joint")


class MADDPGLoss(TeamActions):
    """MADDPG's regression of each agent's critic, and each actor's ascent on its own critic.

    For agent ``i`` with ``x`` all that its critic sees of the state and ``u_1, ..., u_n`` all actions:

        critic: ``L_i = mean((y_i - Q_i(x, u_1, ..., u_n))^2)``,
        ``y_i = r_i + gamma (1 - terminated_i) Q_i'(x', mu_1'(o_1'), ..., mu_n'(o_n'))``

        actor: ``J_i = mean(Q_i(x, u_1, ..., mu_i(o_i), ..., u_n))``

    where primes on ``Q`` and ``mu`` mean target networks, of every agent; the actions of the others are those in the
    batch, and the gradient of ``J_i`` goes through ``mu_i`` alone. A time limit does not end the future: only
    ``terminated`` does, and terminal transitions are learnt from like all others.

    Discrete actions enter critics as one-hot vectors; ``mu`` then is a draw by Gumbel-softmax from the actor's logits,
    in targets as in the gradient (as in the official code, which sends the soft vector to its environment, too).

    TorchRL's ``DDPGLoss`` computes something else for a group of agents: it replaces *all* actions at once and
    averages all agents' values, so that actor ``j`` gets the gradient of ``Q_i``; for agents that want different things
    its fixed point is another (``others="joint"`` here). By default it also bootstraps with the online actor.

    Sources: Lowe et al. 2017, "Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments", and its code;
    Fujimoto et al. 2018 (TD3) and Ackermann et al. 2019 (MATD3) for twins and smoothing.

    Args:
        actor (TensorDictModuleBase): writes ``(group, "action")`` for each group, differentiably, or
            ``(group, "logits")`` of discrete actions, such as :func:`tdmarl.deterministic_actor`.
        critic (TensorDictModuleBase): reads actions of these groups, writes ``(group, "state_action_value")``
            ``[*B, n, 1]``, or ``[*B, n, k]`` of ``k`` critics whose least counts, such as
            :func:`tdmarl.action_critic`. Any other module is evaluated once for each agent in the actor's loss.
        gamma (float): discount.
        others ("buffer", "policy" or "joint"): what the other agents do in ``J_i``: what they did (the paper), or what
            their present policies would do, without gradient; ``joint`` lets the gradient of all ``J`` go through all
            actors at once, which is right for agents that share one reward only.
        relaxation ("straight_through" or "soft"): of discrete actions; see
            :func:`~tdmarl.deterministic_actors.relaxed`.
        temperature (float): of the relaxation.
        action_reg (float): adds so much of the mean square of the actor's logits, or of its actions before the tanh
            (official code: 1e-3).
        target_noise, target_noise_clip (float): smooth the targets of continuous actions by clipped normal noise, in
            units of half the action range (TD3: .2 and .5); 0 does not.
        huber_delta (float, optional): where the critic's Huber loss turns linear; None is the squared error.
        n_steps (int): rewards added up before the value; more than one needs rows ``[M, L]``; see
            :func:`~tdmarl.mixing.td_returns`.
        delay_actor, delay_value (bool): have target networks; without, the trained ones take their place.
        reward_norm (nn.Module, optional): standardizes rewards by ``normalize``.

    Reads the networks' inputs at root and ``next``, ``(group, "action")``, and of ``next`` ``(group, "reward")``
    ``[*B, n, 1]``, ``done`` and ``terminated``. Reads where it is there: ``(group, "mask")`` (dead agents have no
    loss, and who is dead in ``next`` no future), ``(group, "action_mask")``, ``"priority_weight"``. Writes
    ``loss_value``, ``loss_actor`` and the metrics ``q_taken``, ``q_target``, ``td_error_mean``, ``q_policy``, with
    ``_<group>`` appended where there are several groups; into the tensordict it is given ``"td_error"`` ``[*B, 1]``,
    of the worst agent, for prioritized replay.

    Calling the loss computes all of it on one state of the networks, and the two losses' gradients do not mix.
    :meth:`parts` gives them apart, for a :class:`~tdmarl.step.Step` that trains critics first, as MADDPG does.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.continuous_game(lambda u: -(u - 0.5).square(), n_agents=2, num_envs=4)
        >>> loss = MADDPGLoss(tdmarl.deterministic_actor(env), tdmarl.action_critic(env))
        >>> sorted(key for key in loss(env.rand_step(env.reset())).keys() if key.startswith("loss"))
        ['loss_actor', 'loss_value']
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        critic: TensorDictModuleBase,
        *,
        gamma: float = 0.99,
        others: str = "buffer",
        relaxation: str = "straight_through",
        temperature: float = 1.0,
        action_reg: float = 0.0,
        target_noise: float = 0.0,
        target_noise_clip: float = 0.5,
        huber_delta: float | None = None,
        n_steps: int = 1,
        delay_actor: bool = True,
        delay_value: bool = True,
        reward_norm: nn.Module | None = None,
    ) -> None:
        _check(gamma, others, target_noise, target_noise_clip, n_steps)
        super().__init__(
            actor, critic, relaxation=relaxation, temperature=temperature, delay_actor=delay_actor,
            delay_value=delay_value,
        )  # fmt: skip
        self.gamma, self.others = gamma, others
        self.target_noise, self.target_noise_clip, self.action_reg = (
            target_noise,
            target_noise_clip,
            action_reg,
        )
        self.huber_delta, self.n_steps, self.reward_norm = huber_delta, n_steps, reward_norm
        self._check_actions(actor)
        self.out_keys = [self._name(name, g) for g in self.groups for name in VALUE_KEYS + ACTOR_KEYS]

    def _check_actions(self, actor: TensorDictModuleBase) -> None:
        continuous = [g for g in self.groups if not self.discrete[g]]
        for g in continuous if self.target_noise > 0 else ():
            if g not in self.boxes:
                raise ValueError(
                    f"target_noise={self.target_noise} needs the bounds of ({g!r}, 'action'), which only the actors of "
                    "tdmarl.deterministic_actor know: use one, or target_noise=0."
                )
        if self.target_noise > 0 and not continuous:
            raise ValueError(
                f"target_noise={self.target_noise} smooths continuous actions; those of {self.groups} are discrete, "
                "and a draw from the target policy smooths them already."
            )
        if self.action_reg > 0:
            for g in self.groups:
                if not {(g, "logits"), (g, "loc")} & set(actor.out_keys):
                    raise KeyError(
                        f"action_reg={self.action_reg} needs the actor to write ({g!r}, 'logits') or ({g!r}, 'loc'), "
                        f"what its actions are made of; it writes {actor.out_keys}."
                    )

    def parts(self) -> tuple[TensorDictModuleBase, TensorDictModuleBase]:
        """The critics' loss and the actors', as two modules on the networks of this one.

        The first owns this loss (it is its ``state_dict``); the second only refers to it.
        """
        return _ValuePart(self), _ActorPart(self)

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        out = self.value_loss(tensordict)
        return out.update(self.actor_loss(tensordict))  # type: ignore[return-value]

    def value_loss(self, tensordict: TensorDictBase) -> TensorDict:
        """The critics' loss and metrics; writes the errors into the tensordict."""
        if self.n_steps > 1 and tensordict.ndim < 2 + reduce.has_seed_axis():
            raise ValueError(
                f"n_steps={self.n_steps} adds up rewards along rows [M, L]; the minibatch is {list(tensordict.shape)}: "
                f"store sequences, tdmarl.Replay(..., sequence_length={self.n_steps})."
            )
        critic = self.network("value_network")
        values = critic(self._seen(critic, tensordict))
        with torch.no_grad():
            targets = self._targets(tensordict)
        weight = tensordict.get(self.tensor_keys.priority_weight, None)
        out, worst = {}, []
        for g, target in targets.items():
            value, alive = values.get((g, "state_action_value")), tensordict.get((g, "mask"), None)
            error = target - value  # [*B, n, k]
            if alive is not None:  # before the square, whose slope at infinity times zero is no number
                error = error.masked_fill(~alive.unsqueeze(-1), 0)
            loss = error.square() if self.huber_delta is None else huber(error, self.huber_delta)
            loss = loss.sum(-1, keepdim=True)  # of all critics of an agent
            if weight is not None:
                loss = loss * weight.reshape(weight.shape + (1,) * (loss.ndim - weight.ndim))
            out[self._name("loss_value", g)] = reduce.mean(loss, alive)
            with torch.no_grad():
                worst.append(error.abs().amax((-2, -1)))
                found = {
                    "q_taken": value.amin(-1, keepdim=True),
                    "q_target": target,
                    "td_error_mean": error.abs(),
                }
                out |= {self._name(name, g): reduce.mean(x.detach(), alive) for name, x in found.items()}
        with torch.no_grad():
            tensordict.set(self.tensor_keys.priority, torch.stack(worst).amax(0).unsqueeze(-1))
        return TensorDict(out)

    def actor_loss(self, tensordict: TensorDictBase) -> TensorDict:
        """The actors' loss and metrics; critics and targets get no gradient."""
        actor = self.network("actor_network")
        seen = actor(tensordict.select(*actor.in_keys, *self._masks(), strict=False))
        own = {g: self._action(g, seen) for g in self.groups}
        critic = self.__dict__["_frozen"]
        given = self._seen(critic, tensordict)
        if self.others != "buffer":
            for g, action in own.items():
                given.set((g, "action"), action if self.others == "joint" else action.detach())
        if self.others == "joint":
            seen_values = critic(given)
            values = {g: seen_values.get((g, "state_action_value"))[..., :1] for g in self.groups}
        else:
            values = self._values_of_own(critic, given, own)
        out = {}
        for g, value in values.items():
            alive = tensordict.get((g, "mask"), None)
            gain = reduce.mean(value, alive)
            loss = -gain
            if self.action_reg > 0:
                made_of = seen.get((g, "logits" if self.discrete[g] else "loc"))
                loss = loss + self.action_reg * reduce.mean(made_of.square(), alive)
            out[self._name("loss_actor", g)] = loss
            out[self._name("q_policy", g)] = gain.detach()
        return TensorDict(out)

    def _targets(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """What each agent's critics regress on, ``[*B, n, 1]``."""
        critic, after = self.network("target_value_network"), self._target_actions(tensordict)
        for g in self.groups if self.target_noise > 0 else ():
            if not self.discrete[g]:
                box, action = self.boxes[g], after.get((g, "action"))
                noise = self.target_noise * torch.randn_like(action)
                noise = noise.clamp(-self.target_noise_clip, self.target_noise_clip)
                after.set((g, "action"), box.clip(action + box.half_range * noise))
        values = critic(after.select(*critic.in_keys))
        return {g: self._returns(tensordict, g, values.get((g, "state_action_value"))) for g in self.groups}

    def _returns(self, tensordict: TensorDictBase, group: str, following: Tensor) -> Tensor:
        following, keys = following.amin(-1, keepdim=True), self.tensor_keys
        reward, done, gone = (
            per_agent(tensordict, group, name, following) for name in ("reward", keys.done, keys.terminated)
        )
        done = done | tensordict.get(("next", keys.done)).unsqueeze(-2)
        alive = tensordict.get(("next", group, "mask"), None)
        if alive is not None:  # who died in this step has no future, whether or not its episode goes on
            gone = gone | ~alive.unsqueeze(-1)
        if self.reward_norm is not None:
            reward = self.reward_norm.normalize(reward)  # type: ignore[operator]
        return td_returns(
            reward, following.masked_fill(gone, 0), done | gone, gamma=self.gamma, n_steps=self.n_steps,
            time_dim=tensordict.ndim - 1,
        )  # fmt: skip

    def _name(self, name: str, group: str) -> str:
        return name if len(self.groups) == 1 else f"{name}_{group}"


class _ValuePart(TensorDictModuleBase):
    """The critics' half of a loss, which it owns."""

    def __init__(self, loss: MADDPGLoss) -> None:
        super().__init__()
        self.whole = loss
        self.in_keys, self.optional_keys = loss.in_keys, loss.optional_keys
        self.out_keys = [loss._name(name, g) for g in loss.groups for name in VALUE_KEYS]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        return self.whole.value_loss(tensordict)


class _ActorPart(TensorDictModuleBase):
    """The actors' half of a loss, which the other half owns."""

    def __init__(self, loss: MADDPGLoss) -> None:
        super().__init__()
        self.__dict__["whole"] = loss
        actor, critic = loss.network("actor_network"), loss.network("value_network")
        self.in_keys = list(dict.fromkeys([*actor.in_keys, *critic.in_keys]))
        self.optional_keys = [(g, name) for g in loss.groups for name in ("mask", "action_mask")]
        self.out_keys = [loss._name(name, g) for g in loss.groups for name in ACTOR_KEYS]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        return self.__dict__["whole"].actor_loss(tensordict)


def _check(gamma: float, others: str, noise: float, clip: float, n_steps: int) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must be between 0 and 1.")
    if others not in OTHERS:
        raise ValueError(f"others={others!r} must be one of {OTHERS}.")
    if noise < 0 or clip <= 0 or n_steps < 1:
        raise ValueError(
            f"target_noise={noise} must not be negative, target_noise_clip={clip} positive, and n_steps={n_steps} at "
            "least 1."
        )
