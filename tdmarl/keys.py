"""The entries of a group and of a team: their names, their shapes, and how to read them off an environment.

``*B`` is any batch: ``[E, T]`` in a collected batch (``E`` environments, ``T`` steps), ``[M]`` or ``[M, L]`` in a
minibatch (``M`` rows of length ``L``). ``n`` is the number of agents of the group, ``o``, ``a`` and ``K`` the sizes
of an observation, of a continuous action and the number of discrete actions.

=====================================  ==================  =========================================================
entry                                  shape               meaning
=====================================  ==================  =========================================================
``(group, "observation")``             ``[*B, n, o]``      what each agent sees
``(group, "action")``                  ``[*B, n, a]``      continuous; ``[*B, n]`` for discrete indices
``(group, "action_log_prob")``         ``[*B, n]``         summed over action dimensions, at collection time
``(group, "action_mask")``             ``[*B, n, K]``      True where an action is available (optional)
``(group, "mask")``                    ``[*B, n]``         True where the agent is alive at this observation (optional)
``(group, "state_value")``             ``[*B, n, 1]``      the critic's estimate in reward units
``(group, "state_value_normalized")``  ``[*B, n, 1]``      what the critic's network regresses
``(group, "advantage")``               ``[*B, n, 1]``      standardized generalized advantage
``(group, "value_target")``            ``[*B, n, 1]``      lambda-return in reward units
``(group, "action_value")``            ``[*B, n, K]``      value of each discrete action
``(group, "chosen_action_value")``     ``[*B, n, 1]``      of the action chosen; of the team at the root, ``[*B, 1]``
``(group, "state_action_value")``      ``[*B, n, 1]``      of the actions of all agents, to each of the group
``(group, "own_action")``              ``[*B, n, a]``      in place of each agent's stored action, for a critic
``(group, "last_action")``             ``[*B, n, K]``      of the step before, one-hot; zeros where there is none
``("next", group, "reward")``          ``[*B, n, 1]``      reward of the step; the team's at the root, ``[*B, 1]``
``("next", group, "done")``            ``[*B, n, 1]``      the agent's episode is over; also its kinds
``("next", group, "episode_reward")``  ``[*B, n, 1]``      undiscounted return of the running episode so far
``("next", "done")``                   ``[*B, 1]``         the environment's episode is over; also ``terminated`` ...
``"state"``                            ``[*B, s]``         global state (optional)
``"is_init"``                          ``[*B, 1]``         first step of an episode
``(group, "actor_hidden")``            ``[*B, n, l, h]``   a recurrent actor's state before the step, of ``l`` layers;
                                                           after it under ``next``; also ``critic_hidden``
=====================================  ==================  =========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Binary, Composite, TensorSpec
from torchrl.envs import EnvBase

Key = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """What an algorithm needs to know of a group of agents; read from the specs, never by a step.

    Args:
        name (str): the group's key in every tensordict.
        n_agents (int): how many agents it stacks, ``n``.
        observation_size (int): ``o``.
        action_spec (TensorSpec): unbatched, ``[n, a]`` or ``[n]``.
        has_action_mask (bool): whether the environment writes ``(name, "action_mask")``.
        has_mask (bool): whether the environment writes ``(name, "mask")``.
        device (torch.device): where the environment's data lives.
    """

    name: str
    n_agents: int
    observation_size: int
    action_spec: TensorSpec
    has_action_mask: bool = False
    has_mask: bool = False
    device: torch.device = torch.device("cpu")

    def key(self, name: str) -> Key:
        """The key of the group's entry ``name``."""
        return (self.name, name)

    def next(self, name: str) -> Key:
        """The key of the group's entry ``name`` after the step."""
        return ("next", self.name, name)


@dataclass(frozen=True)
class Team:
    """One or more groups that share reward, critic and update order.

    Agents are ordered by group, then by index. Iterating yields the groups.
    """

    groups: tuple[Group, ...]
    state_size: int | None = None

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def n_agents(self) -> int:
        """How many agents all groups have together."""
        return sum(group.n_agents for group in self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names in order."""
        return tuple(group.name for group in self.groups)


def team(env: EnvBase, group: str | Sequence[str] | None = None) -> Team:
    """Reads a team off an environment's specs.

    Args:
        env (EnvBase): any TorchRL environment with a ``group_map``.
        group (str or sequence of str, optional): the team's groups; ``None`` means the only one.

    Raises:
        ValueError: if ``group`` is None and there are several groups, or if a group is unknown.
        KeyError: if a group lacks ``observation`` or ``action``.
    """
    group_map = getattr(env, "group_map", None)
    if not group_map:
        raise ValueError(
            f"{type(env).__name__} has no group_map: tdmarl needs agents in groups, {{group: [agent, ...]}}, "
            "with entries under (group, ...), as torchrl.envs.VmasEnv and tdmarl.VmasEnv have them."
        )
    known = list(group_map)
    if group is None:
        if len(known) > 1:
            raise ValueError(
                f"The environment has several groups, {known}: name the one to train with group=..., or a tuple of "
                "them to train as one team."
            )
        group = known[0]
    names = (group,) if isinstance(group, str) else tuple(group)
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown group {name!r}: the environment's groups are {known}.")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"group={names!r} must name at least one group, each once; there are {known}.")
    state = env.full_observation_spec.get("state", None)
    return Team(
        groups=tuple(_read_group(env, name) for name in names),
        state_size=None if state is None else state.shape[env.batch_dims :].numel(),
    )


def _read_group(env: EnvBase, name: str) -> Group:
    observations, actions = env.full_observation_spec, env.full_action_spec_unbatched
    observation = _entry(observations, name, "observation", "[n_agents, observation_size]").shape[
        env.batch_dims :
    ]
    action = _entry(actions, name, "action", "[n_agents, ...]")
    if len(observation) != 2:
        raise ValueError(
            f"({name!r}, 'observation') has shape {tuple(observation)}; expected [n_agents, observation_size]. "
            "Flatten each agent's observation (torchrl.envs.FlattenObservation) or give your own actor and critic."
        )
    if action.shape[:1] != observation[:1]:
        raise ValueError(
            f"({name!r}, 'action') has shape {tuple(action.shape)} but ({name!r}, 'observation') has "
            f"{tuple(observation)}: both must start with the number of agents."
        )
    has = set(observations[name].keys())
    return Group(
        name=name,
        n_agents=observation[0],
        observation_size=observation[1],
        action_spec=action,
        has_action_mask="action_mask" in has,
        has_mask="mask" in has,
        device=action.device or torch.device("cpu"),
    )


def _entry(spec: TensorSpec, group: str, name: str, shape: str) -> TensorSpec:
    found = spec[group].get(name, None) if group in spec.keys() else None
    if found is None:
        here = sorted(map(str, spec.keys(True, True)))
        raise KeyError(
            f"The environment's specs have no ({group!r}, {name!r}) of shape {shape}; they have {here}."
        )
    return found


def entry(group: str | None, name: str) -> NestedKey:
    """The key of a group's entry; of the team's, which stands at the root, for None.

    Example:
        >>> entry("agents", "advantage"), entry(None, "advantage")
        (('agents', 'advantage'), 'advantage')
    """
    return name if group is None else (group, name)


def per_agent(batch: TensorDictBase, group: str | None, name: str, like: Tensor) -> Tensor:
    """The group's ``("next", group, name)``, or the root's ``("next", name)`` given to every agent.

    Args:
        batch (TensorDictBase): ``[*B]``.
        group (str, optional): the group; None is the team, which has the root's entries only.
        name (str): ``done``, ``terminated``, ``truncated`` or ``reward``.
        like (Tensor): ``[*B, n, 1]``, the shape wanted.

    Raises:
        KeyError: if neither entry exists.
    """
    if group is None:
        return batch.get(("next", name)).expand(like.shape)
    found = batch.get(("next", group, name), None)
    if found is None:
        root = batch.get(("next", name), None)
        if root is None:
            raise KeyError(f"The batch has neither ('next', {group!r}, {name!r}) nor ('next', {name!r}).")
        found = root.unsqueeze(-2)  # [*B, 1, 1]
    return found.expand(like.shape)


def unbatched(spec: TensorSpec, batch_dims: int) -> TensorSpec:
    """A spec without the environments' dimensions.

    As ``EnvBase``'s ``*_spec_unbatched``, which cannot drop the dimensions of a ``Binary`` such as a mask's.
    """
    if isinstance(spec, Composite):
        entries = {key: unbatched(entry, batch_dims) for key, entry in spec.items() if entry is not None}
        return Composite(entries, shape=spec.shape[batch_dims:], device=spec.device)
    if isinstance(spec, Binary):
        return Binary(shape=spec.shape[batch_dims:], dtype=spec.dtype, device=spec.device)
    return spec[(0,) * batch_dims] if batch_dims else spec


def check_chain(available: Iterable[NestedKey], parts: Iterable[tuple[str, Any]]) -> None:
    """Checks before the first step that every part finds what it reads.

    Args:
        available (iterable of NestedKey): what the collector writes.
        parts (iterable of (name, module)): in order; each module's ``out_keys`` are there for the next ones.

    Raises:
        KeyError: naming the part, the key it misses, and what there is.
    """
    here = {as_tuple(key) for key in available}
    for name, part in parts:
        missing = [key for key in map(as_tuple, part.in_keys) if key not in here]
        if missing:
            raise KeyError(
                f"{name} reads {missing}, which nothing before it writes. There is {sorted(here)}."
            )
        here |= {as_tuple(key) for key in getattr(part, "out_keys", ())}


def as_tuple(key: NestedKey) -> Key:
    """A key as a tuple."""
    return (key,) if isinstance(key, str) else tuple(key)


def collected(env: EnvBase, policy: Any) -> list[Key]:
    """The entries of a batch that ``policy`` collects in ``env``, as far as the specs tell."""
    root = list(map(as_tuple, env.full_observation_spec.keys(True, True)))
    root += list(map(as_tuple, env.full_done_spec.keys(True, True)))
    after = root + list(map(as_tuple, env.full_reward_spec.keys(True, True)))
    written = list(map(as_tuple, policy.out_keys))
    carried = [key[1:] for key in written if key[0] == "next"]  # to the next step
    return [*root, ("is_init",), *(("next", *key) for key in after), *written, *carried]


def present(tensordict: TensorDictBase, keys: Sequence[NestedKey]) -> list[Tensor]:
    """A module's entries.

    Raises:
        KeyError: naming the one that is not there, and what is.
    """
    found = [tensordict.get(key, None) for key in keys]
    for key, value in zip(keys, found):
        if value is None:
            here = sorted(map(str, tensordict.keys(True, True)))
            raise KeyError(f"The module reads {key}, which is not in the tensordict. There is {here}.")
    return found  # type: ignore[return-value]
