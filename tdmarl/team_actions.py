"""What a team's actors and action critics make of a minibatch: what they would do, and what that is worth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdmarl.action_critics import ActionCritic
from tdmarl.critics import encoded
from tdmarl.deterministic_actors import Box, Choose, DeterministicHead, relaxed
from tdmarl.keys import as_tuple
from tdmarl.recurrent import hidden_keys
from tdmarl.targets import DelayedLoss


class TeamActions(DelayedLoss):
    """The part of a deterministic policy gradient that runs networks: actors and critics, trained and target.

    Args:
        actor, critic, relaxation, temperature, delay_actor, delay_value: see :class:`~tdmarl.maddpg_loss.MADDPGLoss`.
    """

    @dataclass
    class _AcceptedKeys:
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        actor: TensorDictModuleBase,
        critic: TensorDictModuleBase,
        *,
        relaxation: str,
        temperature: float,
        delay_actor: bool,
        delay_value: bool,
    ) -> None:
        super().__init__()
        if relaxation not in ("straight_through", "soft") or not temperature > 0:
            raise ValueError(
                f"relaxation={relaxation!r} must be 'straight_through' or 'soft', temperature={temperature} positive."
            )
        self.groups = _groups(actor, critic)
        self.hard, self.temperature = relaxation != "soft", temperature
        self.discrete = {g: (g, "logits") in actor.out_keys for g in self.groups}
        self.choices, self.boxes = _choices(actor), _boxes(actor)
        for leaf in _leaves(critic):
            if isinstance(leaf, ActionCritic):
                self._check_kinds(leaf, actor)
        self.own("actor_network", actor, delay_actor)
        self.own("value_network", critic, delay_value)
        self._freeze()
        self._read_keys(actor, critic)

    def _check_kinds(self, critic: ActionCritic, actor: TensorDictModuleBase) -> None:
        for key, nvec in zip(critic.actions.in_keys, critic.actions.encoders):
            if nvec is not None and not self.discrete[key[0]]:
                raise KeyError(
                    f"{key} is discrete, and the actor writes {actor.out_keys}: it must write ({key[0]!r}, 'logits'), "
                    "through which the gradient goes, as tdmarl.deterministic_actor does."
                )

    def _freeze(self) -> None:
        """The critic on the same memory without gradients of its own: what the actors ascend on."""
        twin = copy.deepcopy(self.network("value_network"))
        for mine, whole in zip(twin.modules(), self.network("value_network").modules()):
            for name, parameter in whole.named_parameters(recurse=False):
                setattr(mine, name, nn.Parameter(parameter.data, requires_grad=False))
            mine._buffers.update(whole._buffers)
        self.__dict__["_frozen"] = twin

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> TeamActions:  # type: ignore[override]
        super()._apply(fn)
        self._freeze()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TeamActions:
        twin: Any = super().__deepcopy__(memo)
        twin._freeze()
        return twin

    def _read_keys(self, actor: TensorDictModuleBase, critic: TensorDictModuleBase) -> None:
        keys, groups = self.tensor_keys, self.groups
        actions = [(g, "action") for g in groups]
        seen = list(dict.fromkeys(key for key in [*actor.in_keys, *critic.in_keys] if key not in actions))
        masks = [(g, "action_mask") for g in groups]
        after = [("next", *as_tuple(key)) for key in seen]
        rewards = [("next", g, "reward") for g in groups]
        self.in_keys = [*seen, *actions, *after, *rewards, ("next", keys.done), ("next", keys.terminated)]
        masks += [(g, "mask") for g in groups]
        optional = [*masks, *(("next", *key) for key in masks)]
        optional += [("next", g, name) for g in groups for name in ("done", "terminated")]
        optional.append(keys.priority_weight)
        self.optional_keys = [key for key in optional if key not in self.in_keys]

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """TorchRL calls this when keys change."""
        self._read_keys(self.network("actor_network"), self.network("value_network"))

    def _seen(self, critic: TensorDictModuleBase, tensordict: TensorDictBase) -> TensorDictBase:
        """What a critic reads of a minibatch, discrete actions one-hot."""
        given = tensordict.select(*critic.in_keys)
        for g, (nvec, vectors) in self.choices.items():
            action = given.get((g, "action"), None)
            if action is not None:
                given.set((g, "action"), encoded(action, None if vectors else nvec))
        return given

    def _action(self, group: str, seen: TensorDictBase) -> Tensor:
        """What the actor's pass makes the agents do, as critics read it and gradients go through it."""
        if not self.discrete[group]:
            return seen.get((group, "action"))
        return relaxed(
            seen.get((group, "logits")), seen.get((group, "action_mask"), None), nvec=self.choices[group][0],
            temperature=self.temperature, hard=self.hard,
        )  # fmt: skip

    def _target_actions(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the target actors see of the next state and do there, as critics read it."""
        actor, critic = self.network("target_actor_network"), self.network("target_value_network")
        actions = [(g, "action") for g in self.groups]
        wanted = [key for key in [*actor.in_keys, *critic.in_keys, *self._masks()] if key not in actions]
        after = tensordict.get("next").select(*dict.fromkeys(wanted), strict=False)
        chosen = actor(after)
        for g in self.groups:
            after.set((g, "action"), self._action(g, chosen))
        return after

    def _values_of_own(
        self, critic: TensorDictModuleBase, given: TensorDictBase, own: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each agent's value if it alone did as ``own`` says, ``[*B, n, 1]``; of the first of several critics."""
        if all(isinstance(m, ActionCritic) for m in _leaves(critic)):
            for g, action in own.items():
                given.set((g, "own_action"), action)
            out = critic(given)
            return {g: out.get((g, "state_action_value"))[..., :1] for g in self.groups}
        found = {}
        for g, action in own.items():  # any module: once for each agent
            stored, n = given.get((g, "action")), action.shape[given.ndim]
            agents = torch.arange(n, device=action.device).unsqueeze(-1)  # [n, 1]
            values = []
            for i in range(n):
                each = given.copy().set((g, "action"), torch.where(agents == i, action, stored))
                values.append(critic(each).get((g, "state_action_value"))[..., i, :1])
            found[g] = torch.stack(values, -2)
        return found

    def _masks(self) -> list[NestedKey]:
        return [(g, "action_mask") for g in self.groups if self.discrete[g]]


def _groups(actor: TensorDictModuleBase, critic: TensorDictModuleBase) -> list[str]:
    """The groups that are trained, if actor and critic speak of the same ones."""
    acting = [key[0] for key in actor.out_keys if isinstance(key, tuple) and key[1:] == ("action",)]
    valued = [
        key[0] for key in critic.out_keys if isinstance(key, tuple) and key[1:] == ("state_action_value",)
    ]
    read = [key[0] for key in critic.in_keys if isinstance(key, tuple) and key[1:] == ("action",)]
    if not acting:
        raise KeyError(f"The actor writes {actor.out_keys}; the loss needs it to write (group, 'action').")
    remembered = [*hidden_keys(actor), *hidden_keys(critic)]
    if remembered:
        raise ValueError(
            f"The deterministic policy gradient learns from single steps: networks with memory ({remembered}) are not "
            "supported. Use a feed-forward actor and critic, or tdmarl.mappo with recurrent='gru'."
        )
    if sorted(acting) != sorted(valued):
        raise KeyError(
            f"The critic writes {critic.out_keys}; the loss needs (group, 'state_action_value') [*B, n, 1] for each of "
            f"{acting}, the groups whose actions the actor writes."
        )
    strangers = sorted(set(read) - set(acting))
    if strangers:
        every = tuple(dict.fromkeys([*acting, *read]))
        raise ValueError(
            f"The critic reads the actions of {strangers}, which this actor does not choose: its target needs their "
            f"next actions by their own target actors. Train the groups together: group={every!r}."
        )
    if not read:
        raise KeyError(
            f"The critic reads {critic.in_keys}: no (group, 'action'), so it has no gradient for an actor."
        )
    return acting


def _boxes(actor: TensorDictModuleBase) -> dict[str, Box]:
    """The boxes of each group's continuous actions, as the actor knows them."""
    found: dict[str, Box] = {}
    for module in actor.modules():
        head: Any = getattr(module, "module", None)
        if isinstance(head, DeterministicHead):
            keys: Any = module.out_keys
            found |= {key[0]: head.box for key in keys if key[-1] == "action"}
    return found


def _choices(actor: TensorDictModuleBase) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The sizes of each group's discrete choices, and whether a choice is a one-hot vector, as the actor knows them."""
    found = {m.group: (m.nvec, m.one_hot) for m in actor.modules() if isinstance(m, Choose)}
    for module in actor.modules():
        options = getattr(module, "distribution_kwargs", {})
        if "nvec" in options:  # of a categorical_actor
            how = (tuple(options["nvec"]), bool(options["one_hot"]))
            found |= {key[0]: how for key in module.out_keys if key[-1] == "action"}  # type: ignore[union-attr]
    for key in actor.out_keys:
        if key[-1] == "logits" and key[0] not in found:
            raise ValueError(
                f"The actor writes {key}, but it is not known how many actions each choice has: build it with "
                "tdmarl.deterministic_actor or tdmarl.categorical_actor."
            )
    return found


def _leaves(module: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    if isinstance(module, TensorDictSequential):
        return [leaf for part in module for leaf in _leaves(part)]
    return [module]
