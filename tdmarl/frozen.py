"""What of a module a graph of it would freeze: its Python, and where its tensors are."""

from __future__ import annotations

import contextlib
import enum
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from tdmarl.tracing import Untraceable

_TRUSTED = "torch", "tensordict", "torchrl", "tdmarl"
_WORDS = {bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, OrderedDict, list, tuple, set, frozenset}
_DEPTH, _MOST_ENTRIES = 4, 256  # how far a module's Python is looked through


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def frozen(module: nn.Module, live: bool = False) -> Any:
    """What of a module a graph of it would freeze, in a form that can be compared.

    Where its parameters are, attributes of all its modules and of its own objects, what its functions close over, and
    the numbers and words that its own code finds in the modules that define it.

    Args:
        module (nn.Module): such as a policy or a loss.
        live (bool): the graph reads and writes other tensors among its attributes, too, where they are; without it
            their values are taken to be frozen.

    Raises:
        Untraceable: it has hooks, which may do anything.
    """
    found: list[Any] = [
        (name, x.data_ptr(), x.shape, x.stride(), x.dtype) for name, x in parameters(module).items()
    ]
    for name, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if not all((getattr(hook, "__module__", None) or "").startswith(_TRUSTED) for hook in hooks):
            raise Untraceable(f"the module {name or type(module).__name__!r} has hooks")
        found.append((name, type(part), _plain(vars(part), 0, live)))
        for kind in type(part).__mro__:
            if not kind.__module__.startswith(_TRUSTED):
                found += [
                    _plain(value, 1, live)
                    for value in vars(kind).values()
                    if isinstance(value, types.FunctionType)
                ]
    return found


def plain(value: Any, live: bool = False) -> Any:
    """A value as something that is equal exactly if the value is; see `frozen`."""
    return _plain(value, 0, live)


_OWN = "_parameters", "_buffers", "_modules"


def _plain(value: Any, depth: int, live: bool) -> Any:
    """A value as something that is equal exactly if the value is; objects of others by identity."""
    kind = type(value)  # most of what modules hold are words, numbers and empty dictionaries
    if kind in _WORDS:
        return kind, value
    if kind in _CONTAINERS and not value:
        return kind
    if isinstance(value, (int, float, str, bytes, enum.Enum)):
        return repr(value)  # nan is not equal to itself
    if isinstance(value, Tensor):
        return id(value), None if live else value._version
    if depth > _DEPTH or isinstance(value, (type, types.ModuleType, nn.Module)):
        return id(value)
    if isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > _MOST_ENTRIES:
        return id(value), len(value)
    if isinstance(value, dict):
        return [(str(k), _plain(v, depth + 1, live)) for k, v in list(value.items()) if k not in _OWN]
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_plain(v, depth + 1, live) for v in value]
    if isinstance(value, types.MethodType):
        return _plain(value.__func__, depth, live), _plain(value.__self__, depth + 1, live)
    if isinstance(value, types.FunctionType):
        return _function(value, depth, live)
    if hasattr(value, "__dict__") and not type(value).__module__.startswith(
        ("torch", "tensordict", "torchrl")
    ):
        return id(value), _plain(vars(value), depth + 1, live)
    return id(value)


def _function(function: types.FunctionType, depth: int, live: bool) -> Any:
    if function.__module__.startswith(_TRUSTED):
        reached: list[Any] = []
    else:
        names = [name for name in function.__code__.co_names if name in function.__globals__]
        reached = [(name, _plain(function.__globals__[name], depth + 1, live)) for name in names]
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            cells.append(_plain(cell.cell_contents, depth + 1, live))
    return function.__code__, cells, _plain(function.__defaults__, depth + 1, live), reached
