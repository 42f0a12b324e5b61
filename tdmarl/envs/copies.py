"""Copies of a PettingZoo environment that write what they show into arrays; also the program a worker process runs.

This file needs only the standard library and NumPy, and a worker runs it by its path: it starts in the time that the
environment itself takes to import, without torch and without the program that started it. For that, commands and
answers hold nothing but numbers, texts and containers: anything defined in tdmarl would import all of it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Places = dict[str, tuple[str, int]]  # agent: its group, and its index there
Layout = dict[
    str, dict[str, tuple[int, tuple[int, ...], str]]
]  # group, entry: offset, shape, type; "" is the root


def views(buffer: Any, layout: Layout) -> dict[str, dict[str, Array]]:
    """The arrays of a buffer: by group and entry, ``[E, n, ...]``; those of the root, ``[E, ...]``, under ''."""
    found: dict[str, dict[str, Array]] = {}
    for group, entries in layout.items():
        found[group] = {}
        for key, (offset, shape, kind) in entries.items():
            count = int(np.prod(shape))
            found[group][key] = np.frombuffer(buffer, kind, count, offset).reshape(shape)
    return found


def as_parallel(env: Any) -> Any:
    """The environment itself, or its parallel form from PettingZoo's conversion if agents act in turn (AEC).

    Raises:
        ValueError: PettingZoo cannot convert it.
        TypeError: it is no PettingZoo environment.
    """
    kind = getattr(env, "metadata", {}).get("name", type(env).__name__)
    if hasattr(env, "agent_iter"):
        from pettingzoo.utils.conversions import aec_to_parallel

        try:
            return aec_to_parallel(env)
        except AssertionError as error:
            raise ValueError(
                f"{kind} is an AEC environment that PettingZoo cannot make parallel: its metadata lacks "
                "'is_parallelizable', for its agents see each other's moves within a cycle. For games in strict turns "
                "let the factory return pettingzoo.utils.conversions.turn_based_aec_to_parallel(env)."
            ) from error
    missing = [
        k
        for k in ("reset", "step", "possible_agents", "observation_space", "action_space")
        if not hasattr(env, k)
    ]
    if missing:
        raise TypeError(f"{kind} has no {', '.join(missing)}; expected a pettingzoo.ParallelEnv or AECEnv.")
    return env


def _observation(space: Any, agent: str) -> tuple[tuple[int, ...], Callable[[Any], Array]]:
    """Shape and encoder: a box is what it is, all else is flattened as Gymnasium does."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict) and "action_mask" in space.spaces:
        inner = {key: s for key, s in space.spaces.items() if key != "action_mask"}
        if list(inner) == ["observation"]:
            shape, encode = _observation(inner["observation"], agent)
            return shape, lambda value: encode(value["observation"])
        shape, encode = _observation(spaces.Dict(inner), agent)
        return shape, lambda value: encode({key: value[key] for key in inner})
    if isinstance(space, spaces.Box):
        shape = space.shape or (1,)
        return shape, lambda value: np.asarray(value, np.float32).reshape(shape)
    try:
        size = spaces.flatdim(space)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"the observation space {space} of {agent} has no fixed size; expected a Box, or what Gymnasium flattens."
        ) from error
    return (size,), lambda value: np.asarray(spaces.flatten(space, value), np.float32)


def _action(space: Any, agent: str) -> tuple[tuple[Any, ...], Callable[[Array], Any]]:
    """A description that needs no Gymnasium, and the decoder of an action's array."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return ("discrete", int(space.n)), lambda row: int(row) + start
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        first = space.start
        return ("multidiscrete", tuple(map(int, space.nvec))), lambda row: (row + first).astype(space.dtype)
    if isinstance(space, spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        low, high = (tuple(map(float, bound.ravel())) for bound in (space.low, space.high))
        size = len(low)  # a row may be filled up
        return ("box", low, high), lambda row: row[:size].reshape(space.shape).astype(space.dtype)
    raise ValueError(
        f"the action space {space} of {agent} is not supported; expected Discrete, MultiDiscrete with one axis, or a "
        "Box with finite bounds."
    )


def _mask(observation: Any, info: Any) -> Any:
    """Available actions, where PettingZoo's environments put them: the observation, or else the info."""
    if isinstance(observation, dict) and "action_mask" in observation:
        return observation["action_mask"]
    return info.get("action_mask") if isinstance(info, dict) else None


def _flat(mask: Any) -> Array:
    """One row; Gymnasium's mask of several choices is a tuple with one row for each."""
    return np.concatenate(mask) if isinstance(mask, tuple) else np.asarray(mask)


def _first(kind: tuple[Any, ...], mask: Any) -> Array:
    """The first available action, as an array's row."""
    if kind[0] == "box":
        return np.asarray(kind[1])
    sizes = [kind[1]] if kind[0] == "discrete" else list(kind[1])
    flat = np.ones(sum(sizes), bool) if mask is None else _flat(mask)
    picks = [int(np.argmax(part)) for part in np.split(flat, np.cumsum(sizes)[:-1])]
    return np.asarray(picks[0] if kind[0] == "discrete" else picks)


def _numeric(value: Any) -> int | None:
    """How many numbers an info's value holds, or None if it holds anything else."""
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        array = np.asarray(value)
        return array.size if array.dtype.kind in "biuf" else None
    return None


class Copies:
    """Some copies of an environment, one after the other in one process.

    Args:
        make (callable): makes a copy.
        first (int): index of the first copy among all.
        count (int): how many.
    """

    def __init__(self, make: Callable[[], Any], first: int, count: int) -> None:
        self.first = first
        self.envs = [as_parallel(make()) for _ in range(count)]
        agents = list(self.envs[0].possible_agents)
        self.spaces = {a: _observation(self.envs[0].observation_space(a), str(a)) for a in agents}
        self.choices = {a: _action(self.envs[0].action_space(a), str(a)) for a in agents}

    def describe(self) -> dict[str, Any]:
        """Sizes of all that is shown, seen in a first step with the first available actions.

        Returns:
            dict: ``agents``: name to observation shape, action, whether there is a mask, and shapes of its numeric
            infos; ``state``: its size or None.
        """
        env = self.envs[0]
        observations, infos = env.reset(seed=0)
        masks = {a: _mask(observations.get(a), infos.get(a)) for a in self.spaces}
        actions = {a: self.choices[a][1](_first(self.choices[a][0], masks[a])) for a in env.agents}
        _, _, _, _, later = env.step(actions)
        agents = {}
        for a, (shape, _) in self.spaces.items():
            info = later.get(a)
            numeric = {k: _numeric(v) for k, v in info.items()} if isinstance(info, dict) else {}
            kept = {k: v for k, v in numeric.items() if v is not None and k != "action_mask"}
            agents[a] = {
                "observation": shape,
                "action": self.choices[a][0],
                "mask": masks[a] is not None,
                "info": kept,
            }
        try:
            state = int(np.size(env.state()))
        except (NotImplementedError, AttributeError, TypeError):  # some keep a dictionary of that name
            state = None
        return {"agents": agents, "state": state}

    def bind(self, buffer: Any, layout: Layout, places: Places, max_steps: int | None) -> None:
        """Names the arrays to write to, each agent's place in them, and the time limit."""
        self.views, self.places, self.max_steps = views(buffer, layout), places, max_steps
        self.infos = {
            group: [key.removeprefix("info/") for key in entries if key.startswith("info/")]
            for group, entries in self.views.items()
        }
        self.steps = [0] * len(self.envs)
        self.whole = [False] * len(self.envs)  # all agents are there and none has ended
        self.parts = {
            agent: {key: array[:, i] for key, array in self.views[group].items()}
            for agent, (group, i) in places.items()
        }
        for agent, part in self.parts.items():  # the group's may be filled up
            shape = self.spaces[agent][0]
            part["observation"] = part["observation"][(slice(None), *map(slice, shape))]

    def reset(self, seeds: dict[int, int]) -> None:
        """Starts an episode in the copies named, each from its seed."""
        for e, seed in seeds.items():
            env, root = self.envs[e - self.first], self.views[""]
            observations, infos = env.reset(seed=seed)
            self.steps[e - self.first] = 0
            self.whole[e - self.first] = set(env.agents) == set(self.places)
            for agent, (group, i) in self.places.items():
                own = self.views[group]
                own["reward"][e, i] = own["terminated"][e, i] = own["truncated"][e, i] = 0
                own["mask"][e, i] = agent in env.agents
                self._observe(e, agent, observations, infos)
            self._inform(e, infos)
            root["done"][e] = root["terminated"][e] = root["truncated"][e] = False
            self._state(e)

    def step(self) -> None:
        """Steps every copy; one whose episode is over stands still."""
        for local, env in enumerate(self.envs):
            e = self.first + local
            if self.views[""]["done"][e, 0]:
                for group, i in self.places.values():
                    self.views[group]["reward"][e, i] = 0
                continue
            rows = {a: self._own(a, "action")[e] for a in env.agents}
            acting = set(env.agents)
            if not self.whole[local]:  # some keep the dead in the list
                acting = {a for a in acting if not self._ended(e, a)}
            shown = env.step({a: self.choices[a][1](row) for a, row in rows.items()})
            self.steps[local] += 1
            limit = self.max_steps is not None and self.steps[local] >= self.max_steps
            ended = any(shown[2].values()) or any(shown[3].values()) or acting.symmetric_difference(env.agents)
            if ended or limit or not self.whole[local]:  # else nothing of what follows changes
                self.whole[local] = False
                self._ends(e, acting, shown[2], shown[3], limit)
            for agent in self.places:
                self._own(agent, "reward")[e] = shown[1].get(agent, 0) if agent in acting else 0
                there = agent in acting or self._own(agent, "mask")[e]
                self._observe(e, agent, shown[0] if there else {}, shown[4])
            self._inform(e, shown[4])
            self._state(e)

    def _own(self, agent: str, key: str) -> Array:
        """An agent's part of an array, ``[E, ...]``."""
        return self.parts[agent][key]

    def _ended(self, e: int, agent: str) -> bool:
        return bool(self._own(agent, "terminated")[e, 0] or self._own(agent, "truncated")[e, 0])

    def _ends(self, e: int, acting: set[Any], terminated: Any, truncated: Any, limit: bool) -> None:
        """Who ended, who is alive, and whether all ended: then the episode did, by truncation if that cut any off."""
        env, root = self.envs[e - self.first], self.views[""]
        for agent in acting:
            cut = bool(truncated.get(agent, False))
            self._own(agent, "terminated")[e] = terminated.get(agent, agent not in env.agents and not cut)
            self._own(agent, "truncated")[e] = cut
        alive = [a for a in env.agents if not self._ended(e, a)]
        if limit:
            for agent in alive:
                self._own(agent, "truncated")[e] = True
        for agent in self.places:
            self._own(agent, "mask")[e] = agent in alive
        if alive and not limit:
            return
        ended = [a for a in self.places if self._ended(e, a)]
        cut_off = [a for a in ended if not self._own(a, "terminated")[e, 0]]
        for agent in set(self.places) - set(ended):  # it never came
            self._own(agent, "truncated" if cut_off else "terminated")[e] = True
        for agent in set(cut_off) & {
            *acting,
            *alive,
        }:  # what would have followed is estimated from what it sees last
            self._own(agent, "mask")[e] = True
        root["done"][e], root["terminated"][e], root["truncated"][e] = True, not cut_off, bool(cut_off)

    def _observe(self, e: int, agent: str, observations: Any, infos: Any) -> None:
        """What an agent sees; zeros for one that is gone, whose actions are all available and do nothing."""
        own, observation = self.parts[agent], observations.get(agent)
        here = observation is not None
        own["observation"][e] = self.spaces[agent][1](observation) if here else 0
        if "action_mask" in own:
            mask = _mask(observation, infos.get(agent)) if own["mask"][e] else None
            available = True if mask is None else _flat(mask)
            own["action_mask"][e] = available if np.any(available) else True  # not on turn: acts in vain

    def _inform(self, e: int, infos: Any) -> None:
        """The numbers among the infos; at once for all agents of a group that were handed the same ones."""
        for group, keys in self.infos.items():
            if not keys:
                continue
            members = [agent for agent, (name, _) in self.places.items() if name == group]
            given = [infos.get(agent) for agent in members]
            if all(info is given[0] for info in given):
                members, given = [""], given[:1]
            for agent, info in zip(members, given):
                info = info if isinstance(info, dict) else {}
                to = self.parts[agent] if agent else self.views[group]
                for key in keys:
                    to[f"info/{key}"][e] = np.reshape(info.get(key, 0), -1)

    def _state(self, e: int) -> None:
        if "state" in self.views[""]:
            self.views[""]["state"][e] = np.ravel(self.envs[e - self.first].state())

    def close(self) -> None:
        """Closes the copies."""
        for env in self.envs:
            if hasattr(env, "close"):
                env.close()


def mapped(path: str) -> Any:
    """The memory that all processes share."""
    import mmap

    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def serve() -> None:
    """What a worker process does: obeys the commands that arrive on its input until that is closed.

    An environment that prints writes to the error stream, so that it cannot garble the answers. Ctrl-C is the business
    of the process that started this one; when that is gone, so is the input, and this one ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    copies: Any = None
    while True:
        try:
            command, arguments = pickle.load(commands)
        except (EOFError, pickle.UnpicklingError):  # the other side is gone, perhaps within a command
            break
        try:
            answer = None
            if command == "start":
                path, make, first, count = arguments
                sys.path[:] = path
                copies = Copies(pickle.loads(make), first, count)
            elif command == "bind":
                copies.bind(mapped(arguments[0]), *arguments[1:])
            else:
                answer = getattr(copies, command)(*arguments)
            reply = True, answer
        except Exception:
            reply = False, traceback.format_exc()
        try:
            pickle.dump(reply, answers)
            answers.flush()
        except BrokenPipeError:
            break
    if copies is not None:
        copies.close()


if __name__ == "tdmarl_worker":
    serve()
