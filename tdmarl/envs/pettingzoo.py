"""PettingZoo environments, parallel or convertible, as batched TorchRL environments over worker processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch.nn.utils.rnn import pad_sequence
from torchrl.data import Bounded, Categorical, MultiCategorical, TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.utils import MarlGroupMapType

from tdmarl import seeds
from tdmarl.envs.batched import ENDS, make_specs
from tdmarl.envs.copies import Layout, views
from tdmarl.envs.groups import make_group_map
from tdmarl.envs.workers import InProcess, Processes

Grouping: TypeAlias = "MarlGroupMapType | dict[str, list[str]]"


class PettingZooEnv(EnvBase):
    """Trains on any PettingZoo environment whose agents act at once, many copies of it, over worker processes.

    The episode is over, at the root, when *every* agent's is. It is then ``truncated`` if that cut off any agent, and
    else ``terminated``. Each agent's own ends stand in its group. An agent that ended before the others is gone:
    ``(group, "mask")`` is False, its observation (after the last one, which is shown) and reward are zero, and its
    action is ignored. ``next`` holds the true last observation, and there ``mask`` stays True for agents that the end
    of the episode cut off.

    Groups are agents with the same spaces whose names are ``<name>_<int>`` with one ``<name>``. Observation boxes keep
    their shape, other spaces are flattened; all are float32. Action masks are taken from dictionary observations
    (``{"observation": ..., "action_mask": ...}``) or from ``infos[agent]["action_mask"]``; an agent without any
    available action acts in vain, and all are shown as available. Infos that are numbers for every agent of a
    group stand under ``(group, "info", name)`` ``[E, n, k]``; zeros where a step has none; others are dropped.
    ``env.state()``, where there is one, is the root ``state`` ``[E, s]``.

    Episodes are reset with seeds of their own, see :meth:`episode_seed`: neither the number of workers nor what
    happened before has an influence. The state of an environment cannot be saved: a run that is resumed starts new
    episodes, and a warning says so. ``tdmarl.evaluate`` needs an environment of its own, apart from the collector's.

    Args:
        make_env (callable): makes one PettingZoo ``ParallelEnv``, or an ``AECEnv`` that PettingZoo can convert.
        num_workers (int): processes that run the copies; 0 runs them in this one.
        max_steps (int, optional): time limit of an episode, ``truncated``; None leaves it to the environment.
        seed (int): of the episodes.
        num_envs (int, optional): number of copies, ``E``; None is one per worker.
        device (torch.device, optional): where the tensors are; None is torch's default device.
        group_map (dict or MarlGroupMapType, optional): names of the agents of each group.
        return_state (bool): False leaves ``env.state()`` alone, which can cost as much as a step.
        pad (bool): agents of one name form a group though their spaces differ, if these are boxes: observations are
            filled up with zeros, actions with dimensions whose bounds are both zero.

    Raises:
        TypeError, ValueError: no function, no PettingZoo environment, one that cannot be converted, a space that
            is not supported, or a group of unlike agents.
        WorkerError: anything that goes wrong in a worker, with its traceback; all workers are then closed.

    Example:
        >>> from mpe2 import simple_spread_v3
        >>> env = PettingZooEnv(simple_spread_v3.parallel_env, num_workers=0, num_envs=2, max_steps=25)
        >>> env.rollout(3)["agents", "observation"].shape
        torch.Size([2, 3, 3, 18])
    """

    def __init__(
        self,
        make_env: Callable[[], Any],
        num_workers: int = 8,
        max_steps: int | None = None,
        seed: int = 0,
        *,
        num_envs: int | None = None,
        device: torch.device | str | None = None,
        group_map: Grouping | None = None,
        return_state: bool = True,
        pad: bool = False,
    ) -> None:
        if not callable(make_env):
            raise TypeError(
                f"make_env is a {type(make_env).__name__}; expected a function that makes an environment, such as "
                "mpe2.simple_spread_v3.parallel_env or lambda: MyEnv(...): each copy needs one of its own."
            )
        num_envs = max(num_workers, 1) if num_envs is None else num_envs
        limit = 1 if max_steps is None else max_steps
        for name, value, least in (
            ("num_workers", num_workers, 0),
            ("num_envs", num_envs, 1),
            ("max_steps", limit, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        device = torch.get_default_device() if device is None else torch.device(device)
        super().__init__(device=device, batch_size=[num_envs])
        self.num_envs, self.max_steps = num_envs, max_steps
        workers: InProcess | Processes
        workers = (
            Processes(make_env, num_envs, min(num_workers, num_envs))
            if num_workers
            else InProcess(make_env, num_envs)
        )
        self._workers, self._finalize = workers, weakref.finalize(self, workers.close)
        try:
            self._bind(group_map, return_state, pad)
            self._set_seed(seed)
        except BaseException:
            self._finalize()
            raise

    def _bind(self, group_map: Grouping | None, return_state: bool, pad: bool) -> None:
        """Groups, arrays and specs from what a copy says of itself."""
        about = self._workers.describe()
        agents = {str(agent): kind for agent, kind in about["agents"].items()}
        sizes = [(kind["observation"], _size(kind["action"])) for kind in agents.values()]
        self.group_map = make_group_map(list(agents), sizes, group_map, pad=pad)
        kinds = {group: [agents[name] for name in names] for group, names in self.group_map.items()}
        layout, size = _layout(self.num_envs, kinds, about["state"] if return_state else None)
        places = {name: (group, i) for group, names in self.group_map.items() for i, name in enumerate(names)}
        places = {agent: places[str(agent)] for agent in about["agents"]}
        arrays = views(self._workers.bind(size, layout, places, self.max_steps), layout)
        self._arrays = {
            group: {k: torch.from_numpy(a) for k, a in own.items()} for group, own in arrays.items()
        }
        actions = {group: _action_spec(own) for group, own in kinds.items()}
        specs = make_specs(self.group_map, actions, self._show())
        self.full_action_spec_unbatched, self.full_observation_spec_unbatched = specs[:2]
        self.full_reward_spec_unbatched, self.full_done_spec_unbatched = specs[2:]

    def episode_seed(self, index: int, episode: int) -> int:
        """What ``reset(seed=...)`` of a copy is given: ``seed`` itself for the first episode of the first copy, and
        unrelated numbers derived from it for all others.

        Args:
            index (int): of the copy.
            episode (int): how many episodes it had since ``seed`` was set.
        """
        return (
            self._seed_given
            if index == episode == 0
            else seeds.derive(self._seed_given, f"{index}/{episode}")
        )

    def _set_seed(self, seed: int | None) -> None:
        """The episodes that start from now on are those of this seed."""
        self._seed_given, self._episodes = 0 if seed is None else seed, [0] * self.num_envs

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Starts episodes in all copies, or those of the root ``_reset`` ``[E, 1]``; others show what they did."""
        mask = None if tensordict is None else tensordict.get("_reset", None)
        chosen = range(self.num_envs) if mask is None else mask.reshape(-1).nonzero().flatten().tolist()
        given = {e: self.episode_seed(e, self._episodes[e]) for e in chosen}
        for e in chosen:
            self._episodes[e] += 1
        if given:
            self._workers.reset(given)
        return self._show()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        for group in self.group_map:
            self._act(tensordict, group)
        self._workers.step()
        shown = self._show()
        for group in self.group_map:
            shown.set((group, "reward"), self._arrays[group]["reward"].to(self.device, copy=True))
        return shown

    def _act(self, tensordict: TensorDictBase, group: str) -> None:
        """Hands the actions of a group to the copies, clipped to their box as a policy may sample outside of it."""
        key, spec = (group, "action"), self.full_action_spec[group, "action"]
        action = tensordict.get(key, None)
        if action is None:
            raise KeyError(f"no {key} in the tensordict; expected an action of shape {tuple(spec.shape)}.")
        if action.shape != spec.shape:
            raise ValueError(f"{key} has shape {tuple(action.shape)}, expected {tuple(spec.shape)}.")
        if isinstance(spec, Bounded):
            action = action.clamp(spec.space.low, spec.space.high)
        action, own = action.detach().cpu(), self._arrays[group]
        wrong = (
            ~action.isfinite() if action.is_floating_point() else (action < 0) | (action >= _choices(spec))
        )
        wrong = wrong.flatten(2).any(-1) if wrong.ndim > 2 else wrong
        if (wrong & own["mask"]).any():
            raise ValueError(f"{key} holds NaN or a choice that its agent does not have; expected {spec}.")
        own["action"].copy_(action)

    def reset_done(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        """What the policy sees after a step: its ``next`` entries, with finished copies reset.

        Args:
            next_tensordict (TensorDict): ``tensordict["next"]`` of the step made last.
        """
        done = self._arrays[""]["done"]
        return (
            self._reset(TensorDict({"_reset": done}, batch_size=self.batch_size))
            if done.any()
            else self._show()
        )

    def _show(self) -> TensorDict:
        entries: dict[str, Any] = {key: a.to(self.device, copy=True) for key, a in self._arrays[""].items()}
        for group, names in self.group_map.items():
            shape = [self.num_envs, len(names)]
            own: dict[str, Any] = {"done": None}
            for key, array in self._arrays[group].items():
                if key.startswith("info/"):
                    own.setdefault("info", {})[key[5:]] = array.to(self.device, copy=True)
                elif key not in ("reward", "action"):
                    own[key] = array.to(self.device, copy=True)
            own["done"] = own["terminated"] | own["truncated"]
            entries[group] = TensorDict(own, batch_size=shape, device=self.device)
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Adds random actions, only available ones."""
        if tensordict is None:
            tensordict = TensorDict(batch_size=self.batch_size, device=self.device)
        for group in self.group_map:
            spec, mask = self.full_action_spec[group, "action"], self._arrays[group].get("action_mask")
            action = spec.rand()
            if mask is not None:
                sizes = _choices(spec).tolist() if isinstance(spec, MultiCategorical) else [mask.shape[-1]]
                picks = [torch.multinomial(m.flatten(0, 1).float(), 1) for m in mask.split(sizes, -1)]
                action = torch.cat(picks, -1).view(action.shape).to(self.device)
            tensordict.set((group, "action"), action)
        return tensordict

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the copies and ends the workers; a second time does nothing."""
        self._finalize()
        self.is_closed = True

    def to(self, device: Any) -> PettingZooEnv:
        """This environment, from now on with its tensors there."""
        return super().to(device)


def _size(action: tuple[Any, ...]) -> Any:
    """What must agree within a group: kind and number of choices, or of dimensions."""
    return (action[0], len(action[1])) if action[0] == "box" else action


def _choices(spec: TensorSpec) -> Any:
    """Number of choices, or one for each dimension ``[d]``."""
    several = isinstance(spec, MultiCategorical)
    return spec.nvec.reshape(-1, spec.nvec.shape[-1])[0].cpu() if several else spec.n  # type: ignore[attr-defined]


def _action_spec(kinds: list[dict[str, Any]]) -> TensorSpec:
    """The spec of a group's actions: ``[n]``, or ``[n, a]``."""
    n, actions = len(kinds), [kind["action"] for kind in kinds]
    if actions[0][0] == "discrete":
        return Categorical(actions[0][1], shape=(n,))
    if actions[0][0] == "multidiscrete":
        nvec = torch.tensor(actions[0][1])
        return MultiCategorical(nvec.expand(n, -1), shape=(n, len(nvec)))
    low, high = (pad_sequence([torch.tensor(action[i]) for action in actions], True) for i in (1, 2))
    return Bounded(low, high, low.shape, dtype=torch.float32)


def _padded(group: str, agents: list[dict[str, Any]]) -> tuple[int, ...]:
    """The shape of a group's observations, that of each agent unless they are filled up."""
    shapes = {agent["observation"] for agent in agents}
    if len(shapes) == 1 and len({_size(agent["action"]) for agent in agents}) == 1:
        return agents[0]["observation"]
    if any(len(shape) != 1 for shape in shapes) or any(agent["action"][0] != "box" for agent in agents):
        found = [(agent["observation"], agent["action"][0]) for agent in agents]
        raise ValueError(f"group {group!r} cannot be filled up to one size: its agents see and do {found}; only boxes "
                         "of one dimension can. Leave pad=True away.")  # fmt: skip
    return max(shapes)


def _layout(num_envs: int, kinds: dict[str, list[dict[str, Any]]], state: int | None) -> tuple[Layout, int]:
    """Where each entry lies in the shared memory, and how large that is."""
    entries: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {"": {end: ((1,), "?") for end in ENDS}}
    if state is not None:
        entries[""]["state"] = (state,), "f4"
    for group, agents in kinds.items():
        n, action = len(agents), agents[0]["action"]
        seen = _padded(group, agents)
        own: dict[str, tuple[tuple[int, ...], str]] = {
            "observation": ((n, *seen), "f4"),
            "reward": ((n, 1), "f4"),
            "terminated": ((n, 1), "?"),
            "truncated": ((n, 1), "?"),
            "mask": ((n,), "?"),
            "action": (
                (n,) if action[0] == "discrete" else (n, max(len(agent["action"][1]) for agent in agents)),
                "f4" if action[0] == "box" else "i8",
            ),
        }
        if any(agent["mask"] for agent in agents):
            own["action_mask"] = (n, action[1] if action[0] == "discrete" else sum(action[1])), "?"
        for key, size in agents[0]["info"].items():
            if all(agent["info"].get(key) == size for agent in agents):
                own[f"info/{key}"] = (n, size), "f4"
        entries[group] = own
    layout: Layout = {}
    offset = 0
    for group, shaped in entries.items():
        layout[group] = {}
        for key, (shape, kind) in shaped.items():
            layout[group][key] = offset, (num_envs, *shape), kind
            size = num_envs * int(np.prod(shape)) * np.dtype(kind).itemsize
            offset += -(-size // 64) * 64
    return layout, offset
