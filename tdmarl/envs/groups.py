"""Agents of one size and kind as one group: who belongs together, and what the group shows and does."""

from __future__ import annotations

import re
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs.utils import MarlGroupMapType, check_marl_grouping

from tdmarl.envs.actions import ActionOptions, ContinuousActions, DiscreteActions, action_size, make_actions
from tdmarl.envs.simulation import Action, Out


def make_group_map(
    names: list[str], sizes: list[Any], given: MarlGroupMapType | dict[str, list[str]] | None, pad: bool
) -> dict[str, list[str]]:
    """Which agents form a group: by default those named `<name>_<int>` with one `<name>` and one size.

    Args:
        names (list of str): of all agents.
        sizes (list): for each agent, what must agree within a group.
        given (dict or MarlGroupMapType, optional): the user's own groups.
        pad (bool): unlike sizes may share a group.

    Raises:
        ValueError: a given group holds agents of unlike sizes and `pad` is False.
    """
    size = dict(zip(names, sizes))
    if given is not None:
        groups = given.get_group_map(names) if isinstance(given, MarlGroupMapType) else dict(given)
        check_marl_grouping(groups, names)
        for group, members in groups.items():
            if not pad and any(size[name] != size[members[0]] for name in members):
                found = ", ".join(f"{name}: {size[name]}" for name in members)
                raise ValueError(
                    f"group '{group}' has agents of unlike (observation, action) sizes ({found});"
                    " split it in group_map, or pass pad=True."
                )
        return groups
    groups = {}
    if all(re.fullmatch(r".*_\d+", name) for name in names):
        for name in names:
            groups.setdefault(name.rpartition("_")[0], []).append(name)
    else:
        groups = {"agents": list(names)}
    if list(groups) == ["agent"]:
        groups = {"agents": groups["agent"]}
    return groups if pad else _split(groups, size)


def _split(groups: dict[str, list[str]], size: dict[str, Any]) -> dict[str, list[str]]:
    """Groups of one size each; parts of a group are numbered, and one of a single agent has its name."""
    found: dict[str, list[str]] = {}
    for group, members in groups.items():
        parts: dict[Any, list[str]] = {}
        for name in members:
            parts.setdefault(size[name], []).append(name)
        for i, part in enumerate(parts.values()):
            name = group if len(parts) == 1 else part[0] if len(part) == 1 else f"{group}_{i}"
            found[name if name not in found else f"{name}_group"] = part
    return found


def shapes(observation: Any) -> Any:
    """The sizes of an agent's observation, hashable: `(o,)`, or a pair per entry of a dictionary."""
    if isinstance(observation, Tensor):
        return tuple(_rows(observation).shape[1:])
    return tuple((key, shapes(value)) for key, value in sorted(observation.items()))


class Group:
    """Stacks what a group's agents observe and earn, and turns the group's action into theirs.

    Args:
        name (str): of the group.
        indices (list of int): of its agents among all.
        actions (ContinuousActions or DiscreteActions): their actions.
        out (Out): anything that was shown, for its sizes.
        envs (int): number of environments.
    """

    def __init__(
        self, name: str, indices: list[int], actions: ContinuousActions | DiscreteActions, out: Out, envs: int
    ) -> None:
        self.name, self.indices, self.actions = name, indices, actions
        self._envs, self._device = envs, out.terminated.device
        self._width = _widths([out.observation[i] for i in indices], name)
        infos = [{key: _rows(value).shape for key, value in out.info[i].items()} for i in indices]
        self._infos = [
            key for key, shape in infos[0].items() if all(info.get(key) == shape for info in infos)
        ]
        self._mask = None if actions.mask is None else actions.mask.expand(envs, *actions.mask.shape)

    def show(self, out: Out) -> dict[str, Any]:
        """The group's observation and, where there are any, info and action mask; all `[E, n, ...]`."""
        entries = {"observation": self._stack([out.observation[i] for i in self.indices], self._width)}
        if self._infos:
            infos = [out.info[i] for i in self.indices]
            entries["info"] = {
                key: torch.stack([_rows(info[key]) for info in infos], 1) for key in self._infos
            }
        if self._mask is not None:
            entries["action_mask"] = self._mask
        return entries

    def reward(self, out: Out) -> Tensor:
        """`[E, n, 1]`."""
        return (
            torch.stack([out.reward[i] for i in self.indices], 1).reshape(self._envs, -1, 1).to(torch.float32)
        )

    def act(self, tensordict: TensorDictBase, check: bool) -> list[Action]:
        """What each agent of the group does.

        Raises:
            KeyError: there is no action for this group.
            ValueError: it has a wrong shape or, if `check`, an entry that is NaN or no valid choice.
        """
        action = self.action(tensordict)
        if check:
            self.refuse_unless(~self.actions.invalid(action).any())
        return self.actions.decode(action)

    def action(self, tensordict: Any) -> Tensor:
        """The group's entry of a tensordict, or of a dictionary by tuples, its shape checked."""
        key, spec = (self.name, "action"), self.actions.spec
        expected = (self._envs, *spec.shape)
        action = tensordict.get(key, None)
        if action is None:
            raise KeyError(f"no {key} in the tensordict; expected an action of shape {expected}.")
        if action.shape != expected:
            raise ValueError(f"{key} has shape {tuple(action.shape)}, expected {expected}.")
        return action.contiguous()  # compiled code relies on it, and agents' own networks stack theirs otherwise

    def refuse_unless(self, valid: Tensor) -> None:
        """Raises ValueError unless `valid` []; on a GPU asynchronously, and nowhere by a read of ours."""
        message = f"{(self.name, 'action')} holds NaN or a choice that its agent does not have"
        try:
            torch._assert_async(valid, message)
        except RuntimeError:
            raise ValueError(f"{message}; expected {self.actions.spec}.") from None

    def specs(self, out: Out) -> tuple[Composite, Composite, Composite, Composite]:
        """Specs of action, observation, reward and done, without the environments' dimension."""
        n, device = len(self.indices), self._device
        shown = TensorDict(self.show(out), batch_size=[self._envs, n])
        observation = Composite(shape=(n,), device=device)
        for key, value in shown.items(True, True):
            shape = value.shape[1:]
            observation[key] = (
                Categorical(2, shape=shape, device=device, dtype=torch.bool)
                if value.dtype == torch.bool
                else Unbounded(shape, device=device, dtype=value.dtype)
            )
        flag = Categorical(2, shape=(n, 1), device=device, dtype=torch.bool)
        done = {key: flag.clone() for key in ("done", "terminated", "truncated")}
        return (
            Composite(action=self.actions.spec, shape=(n,), device=device),
            observation,
            Composite(reward=Unbounded((n, 1), device=device), shape=(n,), device=device),
            Composite(done, shape=(n,), device=device),
        )

    def _stack(self, values: list[Any], width: Any) -> Any:
        if isinstance(width, dict):
            return {key: self._stack([v[key] for v in values], w) for key, w in width.items()}
        rows = [_rows(value) for value in values]
        if any(row.shape[-1] != width for row in rows):
            rows = [torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows]
        return torch.stack(rows, 1)  # [E, n, o]


class Display:
    """What an environment shows, as nested entries: the groups' own, and the ends at the root and per group.

    Args:
        groups (list of Group): all of them.
        max_steps (int, optional): time limit of an episode.
        time_limit (str): "truncate" or "terminate".
    """

    def __init__(self, groups: list[Group], max_steps: int | None, time_limit: str) -> None:
        self.groups, self._max_steps, self._time_limit = groups, max_steps, time_limit

    def __call__(self, out: Out, steps: Tensor) -> dict[str, Any]:
        """Entries after a step or a reset, without rewards; `steps` [E] are those of the episodes."""
        terminated = out.terminated.reshape(-1, 1).clone()  # [E, 1], not an inference tensor
        if self._max_steps is None:
            truncated = torch.zeros_like(terminated)
        else:
            truncated = steps.unsqueeze(-1) >= self._max_steps
        if self._time_limit == "terminate":
            terminated = terminated | truncated
        shown: dict[str, Any] = {group.name: group.show(out) for group in self.groups}
        return shown | {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}

    def rewards(self, out: Out) -> dict[str, Any]:
        """The groups' rewards, nested as the entries are."""
        return {group.name: {"reward": group.reward(out)} for group in self.groups}

    def with_ends(self, shown: dict[str, Any]) -> dict[str, Any]:
        """The same entries, and each end for each agent as well."""
        found = dict(shown)
        for group in self.groups:
            n = len(group.indices)
            ends = {key: shown[key].unsqueeze(1).repeat(1, n, 1) for key in ENDS}  # [E, n, 1]
            found[group.name] = shown[group.name] | ends
        return found


ENDS = "done", "terminated", "truncated"


def _rows(value: Tensor) -> Tensor:
    """Float `[E, k]` from `[E]` or `[E, k]`."""
    value = value if value.ndim > 1 else value.unsqueeze(-1)
    return value if value.dtype == torch.float32 else value.to(torch.float32)


def _widths(observations: list[Any], group: str) -> Any:
    """The largest last size, for each entry if they are dictionaries."""
    if isinstance(observations[0], Tensor):
        return max(_rows(observation).shape[-1] for observation in observations)
    keys = observations[0].keys()
    if any(observation.keys() != keys for observation in observations):
        found = [sorted(observation) for observation in observations]
        raise ValueError(
            f"agents of group '{group}' observe different entries {found}; put them in groups of their own."
        )
    return {key: _widths([observation[key] for observation in observations], group) for key in keys}


def make_groups(
    agents: list[Any],
    world: Any,
    out: Out,
    group_map: MarlGroupMapType | dict[str, list[str]] | None,
    pad: bool,
    options: ActionOptions,
) -> list[Group]:
    """The groups of all agents.

    Args:
        agents (list): VMAS agents that act by policy.
        world (World): theirs.
        out (Out): anything that was shown, for its sizes.
        group_map (dict or MarlGroupMapType, optional): the user's own groups.
        pad (bool): unlike agents may share a group.
        options (ActionOptions): how actions are given.
    """
    names = [agent.name for agent in agents]
    kinds = [action_size(agent, world, options.continuous) for agent in agents]
    sizes = [(shapes(observation), kind) for observation, kind in zip(out.observation, kinds)]
    groups = []
    for name, members in make_group_map(names, sizes, group_map, pad).items():
        indices = [names.index(member) for member in members]
        actions = make_actions([agents[i] for i in indices], world, options)
        groups.append(Group(name, indices, actions, out, world.batch_dim))
    return groups


def make_specs(
    groups: list[Group], out: Out, device: torch.device
) -> tuple[Composite, Composite, Composite, Composite]:
    """Specs of action, observation, reward and done for all groups, without the environments' dimension."""
    specs = {group.name: group.specs(out) for group in groups}
    action, observation, reward, done = (
        Composite({name: spec[i] for name, spec in specs.items()}, device=device) for i in range(4)
    )
    for key in ("done", "terminated", "truncated"):
        done[key] = Categorical(2, shape=(1,), device=device, dtype=torch.bool)
    return action, observation, reward, done
