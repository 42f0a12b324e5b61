"""Graphs and modules as compiled functions of tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, fx, nn

from tdmarl import compiling, cpu_graph, tracing
from tdmarl.cpu_loops import suit_cpu
from tdmarl.cuda_graph import Captured
from tdmarl.frozen import frozen, parameters
from tdmarl.keys import Key, as_tuple

MOST_BUILDS = 3  # of one module: what changes so often is called as it is

Leaves = dict[Key, Tensor]


def leaves(tensordict: TensorDictBase) -> Leaves:
    """Every tensor of a tensordict by its key, a tuple.

    Raises:
        Untraceable: an entry is none.
    """
    found: Leaves = {}
    for key, value in tensordict.items(include_nested=True, leaves_only=True):
        if not isinstance(value, Tensor):
            raise tracing.Untraceable(f"the entry {key} is {type(value).__name__} and no tensor")
        found[as_tuple(key)] = value
    return found


class Layout:
    """How entries nest: the batch sizes of the tensordicts that hold them.

    Args:
        root (TensorDictBase): `[E]`, what a policy sees; its nested tensordicts may have more dimensions.
    """

    def __init__(self, root: TensorDictBase) -> None:
        self.device = root.device
        self._sizes: dict[Key, torch.Size] = {(): root.batch_size}
        for key, value in root.items(include_nested=True):
            if isinstance(value, TensorDictBase):
                self._sizes[as_tuple(key)] = value.batch_size

    def nest(self, entries: Leaves, time: int | None = None) -> TensorDict:
        """A tensordict of the entries, with a dimension of time after the first if there is one.

        It makes no checks, which would cost more than a small policy.
        """
        tree: dict[str, Any] = {}
        for key, value in entries.items():
            owner = tree
            for name in key[:-1]:
                owner = owner.setdefault(name, {})
            owner[key[-1]] = value
        return self._tensordict(tree, (), time)

    def _tensordict(self, tree: dict[str, Any], path: Key, time: int | None) -> TensorDict:
        size = self._sizes.get(path[1:] if path[:1] == ("next",) else path, self._sizes[()])
        if time is not None:
            size = torch.Size([size[0], time, *size[1:]])
        for key, value in tree.items():
            if isinstance(value, dict):
                tree[key] = self._tensordict(value, (*path, key), time)
        return TensorDict._new_unsafe(tree, batch_size=size, device=self.device)


class Function:
    """One function of tensors, recorded and compiled; inputs that it does not need are not passed on.

    Args:
        graph (GraphModule): from `tracing.trace`.
        inputs (list of Tensor): examples, in the order in memory that later inputs have.
        mode (str): "trace" runs the graph as it is, "compile" compiles it, "cudagraph" also captures it.
        carry (set of int): outputs that are the inputs of the same place in the next call.
        shared (set of int): inputs that are another captured function's own and are used where they are.
        streams (context, optional): where random numbers come from, if not from where all do.

    Attributes:
        used (list of int): which inputs it needs.
        draws (bool): whether it draws random numbers.
        operations (int): of the graph.
    """

    # Random numbers as eager PyTorch draws them. A low threshold keeps a CPU's lidar from being recomputed for each
    # of its uses.
    options: dict[str, Any] = {"fallback_random": True, "realize_reads_threshold": 4, "size_asserts": False}

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: list[Tensor],
        mode: str,
        *,
        carry: Collection[int] = (),
        shared: Collection[int] = (),
        streams: Any = None,
    ) -> None:
        outputs = list(range(tracing.outputs(graph)))
        self.used = sorted(tracing.needed(graph, outputs))
        tracing.restrict(graph, self.used, outputs)
        self.draws = tracing.has_draws(graph)
        self._streams: Any = contextlib.nullcontext() if streams is None or not self.draws else streams
        inputs = [inputs[i] for i in self.used]
        self.graph = self._suited(graph, inputs, mode)
        self.operations = tracing.operations(self.graph)
        self._call: Callable[..., Any] = self.graph
        if mode != "trace":
            self._call = cpu_graph.Compiled(self.graph, inputs, self.options)
        self._plain = self._call
        if mode == "cudagraph":
            own = [i for i, place in enumerate(self.used) if place in shared]
            back = [(i, place) for i, place in enumerate(self.used) if place in carry]
            self._call = Captured(self._call, inputs, own, back)

    def _suited(self, graph: fx.GraphModule, inputs: list[Tensor], mode: str) -> fx.GraphModule:
        """The graph as it suits the device."""
        if mode == "compile" and inputs[0].device.type == "cpu":
            suit_cpu(graph)
        return graph

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), self._streams:
            return list(self._call(*[inputs[i] for i in self.used]))

    def inside(self, inputs: list[Tensor]) -> list[Tensor]:
        """The same as a part of another function that is captured as a whole."""
        return list(self._plain(*[inputs[i] for i in self.used]))


class ModuleFunction:
    """A module as one function of tensors: its own parameters, which stay where they are, and what it reads.

    Args:
        module (nn.Module): its parameters and buffers may change in place between calls.
        root (TensorDictBase): what it is given, for its keys and shapes.
        mode (str): see :class:`Function`.

    Attributes:
        parameters (list of Tensor): parameters and buffers.
        changed (list of int): which of them a call changes.

    Raises:
        Untraceable: the module asks the device for something, or is more than tensors and fixed Python.
    """

    def __init__(self, module: nn.Module, root: TensorDictBase, mode: str) -> None:
        self._module, self._layout, self._seen = module, Layout(root), dict.fromkeys(leaves(root), True)
        self._frozen_at = frozen(module)
        self._names = list(parameters(module))
        self.parameters = [x.detach() for x in parameters(module).values()]
        self._written: list[Key] = []
        self.changed: list[int] = []
        inputs = [*self.parameters, *(x.contiguous() for x in leaves(root).values())]
        places, device = set(range(len(self._names))), inputs[-1].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # recording is no draw
            graph = tracing.trace(self._run, inputs)
            if self.is_stale():
                raise tracing.Untraceable("its Python changes from call to call")
            self._function = Function(graph, inputs, mode, shared=places)
        for place, key in enumerate(self._seen, len(self._names)):
            self._seen[key] = place in self._function.used

    def is_stale(self) -> bool:
        """Whether the module's Python has changed since it was recorded, or its parameters were replaced."""
        return frozen(self._module) != self._frozen_at

    def __call__(self, root: Leaves) -> Leaves:
        """What the module writes."""
        outputs = self._function([*self.parameters, *self._given(root)])
        for place, value in zip(self.changed, outputs[len(self._written) :]):
            self.parameters[place].copy_(value)
        return dict(zip(self._written, outputs))

    def inside(self, parameters: list[Tensor], root: Leaves) -> tuple[Leaves, list[Tensor]]:
        """What the module writes, and the parameters that it changes; to be captured."""
        outputs = self._function.inside([*parameters, *self._given(root)])
        return dict(zip(self._written, outputs)), outputs[len(self._written) :]

    def _given(self, root: Leaves) -> list[Tensor]:
        """As it was recorded: compiled code does not look. What it does not read may be as it is."""
        return [root[key].contiguous() if read else root[key] for key, read in self._seen.items()]

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        n, versions = len(self._names), [x._version for x in inputs]
        own, seen = inputs[:n], dict(zip(self._seen, inputs[n:]))
        given = self._layout.nest(dict(seen))
        out = leaves(torch.func.functional_call(self._module, dict(zip(self._names, own)), (given,)))
        changed = [i for i, x in enumerate(inputs) if x._version != versions[i]]
        if any(i >= n for i in changed):
            raise tracing.Untraceable("it writes into a tensor that it is shown")
        written = {key: value for key, value in out.items() if seen.get(key) is not value}
        self._written, self.changed = list(written), changed
        return [*written.values(), *(own[i] for i in changed)]


class Accelerated:
    """Calls a module, compiled for tensordicts of the first layout that it is given; others are for the module itself.

    Args:
        module (TensorDictModuleBase): reads and writes tensordicts; no gradient goes through it here.
        name (str): how the progress bar and a warning call it.

    Attributes:
        reason (str): why the module is called as it is, if it is.
    """

    def __init__(self, module: TensorDictModuleBase, name: str) -> None:
        self.module, self.name, self.reason = module, name, ""
        self._function: ModuleFunction | None = None
        self._layout: Any = None
        self._builds = 0

    def begin(self) -> None:
        """Looks whether the module's Python has changed, so that it is compiled anew."""
        if self._function is not None and self._function.is_stale():
            self._function = None

    @torch.no_grad()
    def __call__(self, given: TensorDictBase) -> TensorDictBase:
        """What the module writes, ``[*given.shape]``."""
        names = list(self.module.out_keys)
        if self.reason:
            return self.module(given).select(*names)
        given = given.select(*self.module.in_keys, strict=False)
        seen = {key: x.contiguous() for key, x in leaves(given).items()}
        layout = given.shape, [(key, x.shape, x.dtype) for key, x in seen.items()]
        if self._function is None:
            self._make(given, layout)
        if self._function is None or layout != self._layout:
            return self.module(given).select(*names)
        found = self._function(seen)
        return Layout(given).nest({key: found[key] for key in map(as_tuple, names)})

    def _make(self, given: TensorDictBase, layout: Any) -> None:
        self._builds += 1
        try:
            if self._builds > MOST_BUILDS:
                raise tracing.Untraceable(f"its Python changed {MOST_BUILDS} times")
            with compiling.announced(self.name):
                self._function, self._layout = ModuleFunction(self.module, given, "compile"), layout
        except Exception as error:  # whatever recording and compiling come upon; calling it always works
            self.reason = str(error)
            warnings.warn(
                f"{self.name[0].upper()}{self.name[1:]} run as mode='eager': {error}.", stacklevel=3
            )
