"""Where a simulator made of Python objects keeps its state: the tensors that a step or a reset changes."""

from __future__ import annotations

import types
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

_WALKED = "vmas", "tdmarl", "torch.distributions"
_SKIPPED = (
    "forces_dict",
    "torques_dict",
    "entity_index_map",
    "viewer",
)  # made anew in every step, or not state
_NOT_OWNERS = type, types.FunctionType, types.MethodType, types.ModuleType

Path = tuple[Any, ...]


def walk(root: Any) -> Iterator[tuple[str, Path, Any]]:
    """Every value below `root` with its name and its path, in a fixed order; each object is entered once.

    Entered are containers and the objects of VMAS, of `torch.distributions` and of the root's own package.
    """
    packages = {kind.__module__.partition(".")[0] for kind in type(root).__mro__} - {
        "builtins",
        "abc",
        "torch",
        "",
    }
    walked = (*_WALKED, *packages)
    seen: set[int] = set()
    stack: list[tuple[str, Path, Any]] = [("scenario", (), root)]
    while stack:
        name, path, owner = stack.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, dict):
            items = list(owner.items())
        elif isinstance(owner, (list, tuple)):
            items = list(enumerate(owner))
        elif (
            hasattr(owner, "__dict__")
            and not isinstance(owner, _NOT_OWNERS)
            and (type(owner).__module__.startswith(walked) or type(owner).__module__ == "")
        ):
            items = list(vars(owner).items())
        else:
            continue
        for key, value in items:
            if isinstance(key, str) and key in _SKIPPED:
                continue
            found = f"{name}.{_label(key)}", path + (key,), value
            yield found
            if not isinstance(value, (Tensor, str)):
                stack.append(found)


def _label(key: Any) -> str:
    if isinstance(key, (set, frozenset)):
        return "+".join(sorted(map(str, key)))  # the order of a set of strings changes with the process
    return str(getattr(key, "name", key)).replace(" ", "_")


class Slots:
    """Reads and writes the state of a simulator: every tensor that `moves` change, and every Python number.

    A slot is a path from the root that is resolved at each use, so that a move may replace objects on the
    way. Paths that hold one and the same tensor after every move are one slot and stay one tensor. Whether a
    tensor is written must not depend on values: a move may not branch on them.

    Args:
        moves (list of callables): steps and resets of a twin of the simulator, run in order.
        reset (callable): which of them is the reset; the slots that it writes are `reset_names`.
        twin: root of that twin, which `moves` change.
        envs (int): number of environments of the twin.
    """

    def __init__(
        self, twin: Any, moves: list[Callable[[], Any]], reset: Callable[[], Any], envs: int
    ) -> None:
        by_reset: set[str] = set()
        partitions, first = [_partition(twin)], _tensors(twin)
        numbers, changed, changed_numbers = _numbers(twin), {}, {}
        python = python_values(twin)
        self.changing: list[str] = []
        for move in moves:
            before = {name: (value, value._version) for name, value in _tensors(twin).items()}
            move()
            for name, value in _tensors(twin).items():
                old, version = before.get(name, (None, None))
                if old is not value or version != value._version:
                    changed[name] = value
                    by_reset |= {name} if move == reset else set()
            partitions.append(_partition(twin))
            now = _numbers(twin)
            changed_numbers.update(
                {name: now[name] for name in now.keys() & numbers.keys() if now[name] != numbers[name]}
            )
            numbers = now
            before_python, python = python, python_values(twin)
            self.changing += [
                name
                for name in before_python.keys() | python.keys()
                if before_python.get(name) != python.get(name)
            ]
        last = _tensors(twin)
        groups: dict[Any, list[str]] = {}
        for name in changed:
            if all(name in partition for partition in partitions) and _is_state(
                last[name], first[name], envs
            ):
                groups.setdefault(tuple(partition[name] for partition in partitions), []).append(name)
        self.names = {group[0]: group for group in groups.values()}
        # By the twin's number of environments, which is unlike other sizes.
        self.per_environment = {slot for slot in self.names if last[slot].ndim and last[slot].shape[0] == envs}
        self.reset_names = {slot for slot, group in self.names.items() if not by_reset.isdisjoint(group)}
        self.numbers = [name for name, value in changed_numbers.items() if value == value]

    def bind(self, root: Any) -> None:
        """Points the slots at the simulator whose state they shall be."""
        paths = {name: path for name, path, _ in walk(root)}
        self._root = root
        self._places = _by_owner(
            [(paths[name], slot) for slot, names in self.names.items() for name in names]
        )
        self._number_places = _by_owner([(paths[name], name) for name in self.numbers])

    def read(self) -> dict[str, Tensor]:
        """The tensors of the state themselves, not copies."""
        found = {}
        for owner, places in self._owners(self._places):
            for key, slot in places:
                found[slot] = owner[key]
        return found

    @property
    def are_whole(self) -> bool:
        """Whether each slot's places hold one tensor, as they do after a move; within one they may not."""
        found: dict[str, Tensor] = {}
        places = [(owner[key], slot) for owner, keys in self._owners(self._places) for key, slot in keys]
        return all(found.setdefault(slot, value) is value for value, slot in places)

    def write(self, state: dict[str, Tensor]) -> None:
        """Places the tensors themselves, not copies, wherever each slot is found."""
        for owner, places in self._owners(self._places):
            for key, slot in places:
                owner[key] = state[slot]

    def read_numbers(self) -> dict[str, float]:
        """The Python numbers that the moves change."""
        return {
            name: owner[key] for owner, places in self._owners(self._number_places) for key, name in places
        }

    def write_numbers(self, values: dict[str, float]) -> None:
        """Places Python numbers, each as the type that is there."""
        for owner, places in self._owners(self._number_places):
            for key, name in places:
                owner[key] = type(owner[key])(values[name])

    def _owners(
        self, places: dict[Path, list[tuple[Any, str]]]
    ) -> Iterator[tuple[Any, list[tuple[Any, str]]]]:
        """What holds each place now: a dictionary, a list, or the attributes of an object."""
        known: dict[Path, Any] = {(): self._root}
        for path, found in places.items():
            owner = _resolve(path, known)
            yield (owner if isinstance(owner, (dict, list)) else vars(owner)), found


def _by_owner(paths: list[tuple[Path, str]]) -> dict[Path, list[tuple[Any, str]]]:
    found: dict[Path, list[tuple[Any, str]]] = {}
    for path, name in paths:
        found.setdefault(path[:-1], []).append((path[-1], name))
    return found


def _resolve(path: Path, known: dict[Path, Any]) -> Any:
    if path not in known:
        owner = _resolve(path[:-1], known)
        known[path] = owner[path[-1]] if isinstance(owner, (dict, list, tuple)) else vars(owner)[path[-1]]
    return known[path]


def _tensors(root: Any) -> dict[str, Tensor]:
    return {name: value for name, _, value in walk(root) if isinstance(value, Tensor)}


def _numbers(root: Any) -> dict[str, float]:
    return {name: value for name, _, value in walk(root) if isinstance(value, (bool, int, float))}


def python_values(root: Any) -> dict[str, Any]:
    """What a program's Python holds besides tensors: values, kinds of objects, and which of them are one.

    An object that is found at several places is known by the first. Numbers and words of the modules that
    define the root's methods count, too.
    """
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, _, value in walk(root):
        if isinstance(value, (bool, int, float, str, type(None))):
            found[name] = value if value == value else "nan"
        elif not isinstance(value, Tensor):
            length = len(value) if isinstance(value, (list, tuple)) else None
            found[name] = first.setdefault(id(value), name), type(value), length
    methods = (method for kind in type(root).__mro__ for method in vars(kind).values())
    modules = {id(m.__globals__): m.__globals__ for m in methods if isinstance(m, types.FunctionType)}
    for module in modules.values():
        for name, value in module.items():
            plain = (bool, int, float, str)
            if not name.startswith("__") and isinstance(value, (*plain, list, dict)):
                parts: Any = value.values() if isinstance(value, dict) else value
                held = (
                    value if isinstance(value, plain) else [part for part in parts if isinstance(part, plain)]
                )
                found[f"{module.get('__name__')}.{name}"] = held
    return found


def _partition(root: Any) -> dict[str, frozenset[str]]:
    """For each tensor's name all names of that tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in _tensors(root).items():
        groups.setdefault(id(value), []).append(name)
    return {name: frozenset(group) for group in groups.values() for name in group}


def _is_state(last: Tensor, first: Tensor, envs: int) -> bool:
    """Not what is only made anew with the same values and is one for the batch, such as a colour."""
    per_environment = last.ndim > 0 and last.shape[0] == envs
    return per_environment or last.shape != first.shape or not torch.equal(last, first)
