"""Turns recorded graphs into functions that run fast: laid out and compiled, or replayed as CUDA graphs."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, fx

from tdmarl import cpu_graph, tracing
from tdmarl.cpu_loops import suit_cpu
from tdmarl.cuda_graph import Captured
from tdmarl.envs.layout import environments_last, is_wide

# Random numbers as eager PyTorch draws them. A low threshold keeps a CPU's lidar from being recomputed for each
# of its uses.
_INDUCTOR = {"fallback_random": True, "realize_reads_threshold": 4, "size_asserts": False}
# Where environments are last, loops over few agents are no vectors: masked loads and stores cost more than plain ones.
_ENVIRONMENTS_LAST = {"cpp.enable_loop_tail_vec": False}


class Part(NamedTuple):
    """What compiling one function took."""

    operations: int
    trace_seconds: float
    compile_seconds: float


class Function:
    """One function of tensors, recorded, laid out and compiled; inputs that it does not need are not passed on.

    Args:
        graph (GraphModule): from `trace`.
        inputs (list of Tensor): examples, in the order in memory that later inputs have.
        envs (int): number of environments.
        carry (set of int): outputs that are the inputs of the same place in the next call.
        mode (str): "trace" runs the graph as it is, "compile" compiles it, "cudagraph" also captures it.
        streams (context): where random numbers come from.
        shown (set of int, optional): which outputs become as `rows` has them; others have environments last.
            None leaves the graph's order in memory as it is.
        shared (set of int): inputs that are another captured function's own and are used where they are.

    Attributes:
        used (list of int): which inputs it needs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: list[Tensor],
        envs: int,
        carry: set[int],
        mode: str,
        streams: Any,
        shown: set[int] | None,
        shared: set[int],
    ) -> None:
        outputs = list(range(tracing.outputs(graph)))
        self.used = sorted(tracing.needed(graph, outputs))
        tracing.restrict(graph, self.used, outputs)
        self.draws = tracing.has_draws(graph)
        self._streams: Any = streams if self.draws else contextlib.nullcontext()
        inputs = [inputs[i] for i in self.used]
        if shown is not None:
            shapes = tracing.output_shapes(graph)
            contiguous = {i for i in shown if is_wide(shapes[i], envs)}
            graph = environments_last(graph, inputs, envs, contiguous)
        self.operations = tracing.operations(graph)
        self._call: Callable[..., Any] = graph
        if mode != "trace":
            if mode == "compile" and shown is None and inputs[0].device.type == "cpu":  # a policy, no physics
                suit_cpu(graph)
            options = _INDUCTOR if shown is None else _INDUCTOR | _ENVIRONMENTS_LAST
            self._call = cpu_graph.Compiled(graph, inputs, options)
        self.graph, self._plain = graph, self._call
        if mode == "cudagraph":
            own = [i for i, place in enumerate(self.used) if place in shared]
            back = [(i, place) for i, place in enumerate(self.used) if place in carry]
            self._call = Captured(self._call, inputs, own, back)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), self._streams:
            return list(self._call(*[inputs[i] for i in self.used]))

    def inside(self, inputs: list[Tensor]) -> list[Tensor]:
        """The same as a part of another function that is captured as a whole."""
        return list(self._plain(*[inputs[i] for i in self.used]))

    def own(self, inputs: list[Tensor]) -> list[Tensor]:
        """The inputs, those that a captured graph keeps in fixed places replaced by these places."""
        found = list(inputs)
        if isinstance(self._call, Captured):
            for place, static in zip(self.used, self._call.inputs):
                found[place] = static
        return found
