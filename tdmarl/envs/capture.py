"""Turns recorded graphs of environments into functions that run fast: environments last in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, fx

from tdmarl import functions, tracing
from tdmarl.cpu_loops import keep_no_masks, keep_what_repeats, move_masks_as_they_are
from tdmarl.cuda_graph import Captured
from tdmarl.envs.layout import environments_last, is_wide

# Where environments are last, loops over few agents are no vectors: masked loads and stores cost more than plain ones.
_ENVIRONMENTS_LAST = {"cpp.enable_loop_tail_vec": False}


class Part(NamedTuple):
    """What compiling one function took."""

    operations: int
    trace_seconds: float
    compile_seconds: float


class Function(functions.Function):
    """A function of an environment's tensors, laid out and compiled; see `tdmarl.functions.Function`.

    Args:
        graph (GraphModule): from `trace`.
        inputs (list of Tensor): examples, in the order in memory that later inputs have.
        envs (int): number of environments.
        carry (set of int): outputs that are the inputs of the same place in the next call.
        mode (str): "trace" runs the graph as it is, "compile" compiles it, "cudagraph" also captures it.
        streams (context): where random numbers come from.
        shown (set of int): which outputs become as `rows` has them; others have environments last.
        shared (set of int): inputs that are another captured function's own and are used where they are.
    """

    options = functions.Function.options | _ENVIRONMENTS_LAST

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: list[Tensor],
        envs: int,
        carry: set[int],
        mode: str,
        streams: Any,
        shown: set[int],
        shared: set[int],
    ) -> None:
        self._envs, self._shown = envs, shown
        super().__init__(graph, inputs, mode, carry=carry, shared=shared, streams=streams)

    def _suited(self, graph: fx.GraphModule, inputs: list[Tensor], mode: str) -> fx.GraphModule:
        shapes = tracing.output_shapes(graph)
        contiguous = {i for i in self._shown if is_wide(shapes[i], self._envs)}
        graph = environments_last(graph, inputs, self._envs, contiguous)
        if mode == "compile" and inputs[0].device.type == "cpu":
            keep_what_repeats(graph)
            keep_no_masks(graph)
            move_masks_as_they_are(graph)
        return graph

    def own(self, inputs: list[Tensor]) -> list[Tensor]:
        """The inputs, those that a captured graph keeps in fixed places replaced by these places."""
        found = list(inputs)
        if isinstance(self._call, Captured):
            for place, static in zip(self.used, self._call.inputs):
                found[place] = static
        return found
