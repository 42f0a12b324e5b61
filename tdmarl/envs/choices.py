"""A random choice that stock VMAS makes once for the batch, made once per environment instead."""

from __future__ import annotations

import functools
import operator
from typing import Any, Callable, Iterable

import torch
from torch import Tensor


class Choice:
    """What `randint(...).item()` and the entries of `randperm(n).tolist()` become: one index per environment.

    `entities[choice]` is then the entity that each environment chose. Used as a number it falls back to one
    value for the batch, that of the first environment, as stock VMAS has it on a full reset.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index  # [E]

    def __index__(self) -> int:
        return int(self.index[0])

    __int__ = __index__

    def __hash__(self) -> int:
        return hash(int(self))


def _as_number(operation: Callable[..., Any], swap: bool = False) -> Callable[..., Any]:
    def method(self: Choice, *others: Any) -> Any:
        operands = [int(self), *(int(other) if isinstance(other, Choice) else other for other in others)]
        return operation(*(reversed(operands) if swap else operands))

    return method


for _name in "add sub mul floordiv truediv mod pow".split():
    setattr(Choice, f"__{_name}__", _as_number(getattr(operator, _name)))
    setattr(Choice, f"__r{_name}__", _as_number(getattr(operator, _name), swap=True))
for _name in "eq ne lt le gt ge neg".split():
    setattr(Choice, f"__{_name}__", _as_number(getattr(operator, _name)))
setattr(Choice, "__bool__", _as_number(bool))
setattr(Choice, "__float__", _as_number(float))


class Chosen:
    """The entity that each environment chose; reads gather over the candidates, writes scatter to them."""

    def __init__(self, candidates: Iterable[Any], index: Tensor) -> None:
        self.__dict__.update(_candidates=list(candidates), _index=index)

    def _mine(self, candidate: int, like: Tensor) -> Tensor:
        return (self._index == candidate).view(-1, *[1] * (like.ndim - 1))  # [E, 1, ...]

    def _pick(self, name: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            rows = len(self._index)
            values = [v if v.ndim and v.shape[0] == rows else v.expand(rows, *v.shape) for v in values]
            stacked = torch.stack(values)  # [candidates, E, ...]
            index = self._index.view(1, -1, *[1] * (stacked.ndim - 2)).expand(1, *stacked.shape[1:])
            return stacked.gather(0, index)[0]
        if all(value is first for value in values):
            return first
        if isinstance(first, (bool, int, float)):
            return torch.tensor(values, device=self._index.device)[self._index]  # [E]
        if hasattr(first, "__dict__"):
            return Chosen(values, self._index)
        raise NotImplementedError(
            f"'{name}' of type {type(first).__name__} differs between the entities that an"
            " environment can choose: only tensors, numbers and objects made of them can."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        values = [getattr(candidate, name) for candidate in self._candidates]
        if callable(values[0]):
            return functools.partial(self._call, name)
        if name == "collide" and len(set(values)) > 1:
            return True  # `passage` asks in order to hide what does not collide, which only rendering sees
        return self._pick(name, values)

    def _call(self, name: str, value: Tensor | None = None, batch_index: int | None = None) -> None:
        if name == "reset" and value is None:
            for i, candidate in enumerate(self._candidates):
                candidate.reset(self._index == i)
            return
        if not name.startswith("set_") or batch_index is not None or value is None:
            raise NotImplementedError(f"'{name}' of an entity that each environment chose for itself.")
        for i, candidate in enumerate(self._candidates):
            old = getattr(candidate.state, name.removeprefix("set_"))
            getattr(candidate, name)(torch.where(self._mine(i, old), value, old), batch_index=None)

    def __setattr__(self, name: str, value: Any) -> None:
        for i, candidate in enumerate(self._candidates):
            old = getattr(candidate, name, None)
            if old is None:  # set for the first time, so nothing is lost where others were chosen
                setattr(candidate, name, value.clone() if isinstance(value, Tensor) else value)
            elif isinstance(old, Tensor) and isinstance(value, Tensor) and old.shape == value.shape:
                setattr(candidate, name, torch.where(self._mine(i, old), value, old))
            elif name != "color":  # a colour that is one for the batch is for rendering
                raise NotImplementedError(
                    f"assignment to '{name}' of an entity that each environment chose for itself."
                )


class Entities(list):
    """A list of entities that a `Choice` can index."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, Choice):
            return Chosen(self, key.index)
        found = super().__getitem__(key)
        return Entities(found) if isinstance(key, slice) else found

    def __add__(self, other: Any) -> Entities:
        return Entities(super().__add__(other))


class Draws:
    """Stands in for `torch.randint` and `torch.randperm` while a scenario runs, so that choices are per
    environment.

    Only what is read out as Python numbers changes (`.item()`, `.tolist()`): the tensors themselves are
    torch's.

    Attributes:
        drawn (bool): whether a `randint(...).item()` was met, so that colours and the like may be per
            environment.
    """

    def __init__(self, envs: int, device: torch.device) -> None:
        self.envs, self.device, self.drawn = envs, device, False
        self._randint: Callable[..., Tensor] = torch.randint
        self._randperm: Callable[..., Tensor] = torch.randperm

    def randint(self, *args: Any, **kwargs: Any) -> Tensor:
        """`torch.randint`; `.item()` of a draw of size (1,) is a `Choice`."""
        found = self._randint(*args, **kwargs)
        if tuple(found.shape) == (1,):
            bounds = [a for a in args if not isinstance(a, (tuple, list))]
            limits = {k: v for k, v in kwargs.items() if k in ("low", "high")}

            def item() -> Choice:
                self.drawn = True
                return Choice(self._randint(*bounds, **limits, size=(self.envs,), device=self.device))

            found.item = item  # type: ignore[assignment,method-assign]
            found.tolist = lambda: [item()]  # type: ignore[method-assign]
        return found

    def randperm(self, n: int, **kwargs: Any) -> Tensor:
        """`torch.randperm`; `.tolist()` is a permutation per environment."""
        found = self._randperm(n, **kwargs)

        def tolist() -> list[Choice]:
            order = torch.rand(self.envs, n, device=self.device).argsort(1)  # [E, n]
            return [Choice(order[:, i]) for i in range(n)]

        found.tolist = tolist  # type: ignore[method-assign]
        return found

    def repeat(self, tensor: Tensor, *sizes: Any) -> Tensor:
        """`Tensor.repeat`; what is one row per environment already is not repeated over the batch again."""
        if sizes == (self.envs, 1) and tensor.ndim == 2 and tensor.shape[0] == self.envs:
            return tensor
        return torch._C.TensorBase.repeat(tensor, *sizes)
