"""What a team's networks make of a minibatch: the values of the actions taken, and of the next states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor

from tdmarl.keys import as_tuple
from tdmarl.q_actors import Actions
from tdmarl.recurrent import Recurrent, hidden_keys
from tdmarl.targets import DelayedLoss


class TeamValues(DelayedLoss):
    """The part of a value-based loss that runs networks: each agent's and the mixer, trained and target.

    Args:
        actor (TensorDictModuleBase): writes ``(group, "action_value")`` for each group.
        mixer (TensorDictModuleBase, optional): see :class:`~tdmarl.mixing.MixingLoss`.
        delay_value (bool): have targets.
    """

    @dataclass
    class _AcceptedKeys:
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        global_value: NestedKey = "chosen_action_value"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self, actor: TensorDictModuleBase, mixer: TensorDictModuleBase | None, delay_value: bool
    ) -> None:
        super().__init__()
        self.groups = [
            key[0] for key in actor.out_keys if isinstance(key, tuple) and key[1:] == ("action_value",)
        ]
        if not self.groups:
            raise KeyError(
                f"The actor writes {actor.out_keys}; MixingLoss needs it to write (group, 'action_value') "
                "[*B, n_agents, n_actions], as tdmarl.q_actor does."
            )
        self.codecs = {
            m.group: m.actions for m in actor.modules() if hasattr(m, "actions") and hasattr(m, "group")
        }
        if isinstance(actor, TensorDictSequential):  # without the choice of an action
            actor = actor.select_subsequence(out_keys=[(g, "action_value") for g in self.groups])
        memories = [m for m in actor.modules() if isinstance(m, Recurrent)]
        self.hidden, self.burn_in = hidden_keys(actor), max((m.burn_in for m in memories), default=0)
        self._unstored = [m.hidden for m in memories if m.start == "zero"]
        self.own("local_value_network", actor, delay_value)
        if mixer is not None:
            self.own("mixer_network", mixer, delay_value)
        self.mixed = mixer is not None
        self._read_keys(actor, mixer)

    def _read_keys(self, actor: TensorDictModuleBase, mixer: TensorDictModuleBase | None) -> None:
        """What is read of a minibatch, and which of it at the next state."""
        keys, groups = self.tensor_keys, self.groups
        carried = {(g, "last_action") for g in groups} | {"is_init", *self.hidden}
        seen = [key for key in actor.in_keys if key not in self._unstored]
        if mixer is not None:
            seen += [key for key in mixer.in_keys if key not in [(g, "chosen_action_value") for g in groups]]
        seen = list(dict.fromkeys(seen))
        self._next_keys = [key for key in seen if key not in carried]
        ends = [("next", keys.done), ("next", keys.terminated)]
        rewards = [("next", keys.reward)] if self.mixed else [("next", g, "reward") for g in groups]
        self.in_keys = [
            *seen, *((g, "action") for g in groups), *(("next", *as_tuple(k)) for k in self._next_keys),
            *rewards, *ends,
        ]  # fmt: skip
        masks = [(g, name) for g in groups for name in ("mask", "action_mask")]
        optional = [*masks, *(("next", *key) for key in masks), ("collector", "mask"), keys.priority_weight]
        optional += [("next", g, name) for g in groups for name in ("done", "terminated")]
        self.optional_keys = [key for key in optional if key not in self.in_keys]

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """TorchRL calls this when keys change."""
        self._read_keys(self.network("local_value_network"), self.__dict__.get("mixer_network"))

    def _pass(self, network: str, seen: TensorDictBase) -> TensorDictBase:
        """What a network makes of a minibatch: ``(group, "action_value")`` ``[*B, n, K]``, and states."""
        module = self.network(network)
        return module(seen.select(*module.in_keys, strict=False))

    def _available(self, group: str, seen: TensorDictBase) -> Tensor | None:
        mask = seen.get((group, "action_mask"), None)
        return self.codecs[group].available(mask) if group in self.codecs else mask

    def _alive(self, seen: TensorDictBase) -> dict[str, Tensor | None]:
        return {g: seen.get((g, "mask"), None) for g in self.groups}

    def _joint(
        self, network: str, chosen: dict[str, Tensor], seen: TensorDictBase, alive: dict[str, Tensor | None]
    ) -> Tensor:
        """The team's value ``[*B, 1]``; without a mixer all agents', ``[*B, N, 1]``."""
        for g, mask in alive.items():
            if mask is not None:
                chosen[g] = chosen[g].masked_fill(~mask.unsqueeze(-1), 0)
        if not self.mixed:
            return joined(list(chosen.values()))
        mixer = self.network(network)
        state = seen.select(*mixer.in_keys, strict=False)
        for g, value in chosen.items():
            state.set((g, "chosen_action_value"), value)
        return mixer(state).get(self.tensor_keys.global_value)

    def _next_values(self, network: str, after: TensorDictBase, states: TensorDictBase) -> dict[str, Tensor]:
        """Each group's values in the next states; one more step from the states that the network itself had."""
        if self.hidden:  # as steps: a sequence could not show what would have come after an end
            after = after.copy()
            for key in self.hidden:
                after.set(key, states.get(("next", *as_tuple(key))))
            after = after.reshape(-1)
        out = self._pass(network, after)
        return {
            g: out.get((g, "action_value")).reshape(
                *states.shape, *out.get((g, "action_value")).shape[out.ndim :]
            )
            for g in self.groups
        }

    def _after(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the networks see of the next state."""
        after = tensordict.get("next")
        masks = [(g, name) for g in self.groups for name in ("mask", "action_mask")]
        after = after.select(*dict.fromkeys([*self._next_keys, *masks]), strict=False)
        inputs = self.network("local_value_network").in_keys
        for g in self.groups:
            if (g, "last_action") in inputs:
                after.set((g, "last_action"), self.codecs[g].encode(tensordict.get((g, "action"))))
        if "is_init" in inputs:
            after.set("is_init", torch.zeros_like(tensordict.get("is_init")))
        return after


def taken_index(group: str, action: Tensor, values: Tensor, actions: Actions | None) -> Tensor:
    """The number of each agent's action, ``[*B, n]``, however it was stored."""
    if action.shape[-1:] == (1,) and action.ndim == values.ndim and values.shape[-1] > 1:
        action = action.squeeze(-1)
    if actions is not None:
        action = actions.index(action)
    elif action.shape == values.shape:
        action = action.to(torch.uint8).argmax(-1)  # one-hot
    if action.shape != values.shape[:-1]:
        raise ValueError(
            f"({group!r}, 'action') comes to {tuple(action.shape)}; with values {tuple(values.shape)} it must be "
            f"indices {tuple(values.shape[:-1])} or one-hot {tuple(values.shape)}."
        )
    return action


def joined(parts: list[Tensor]) -> Tensor:
    """All groups' agents side by side, ``[*B, N, 1]``."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)
