"""Replays functions of tensors as CUDA graphs."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor


class Captured:
    """Replays a function as one CUDA graph, without waiting for the device.

    A graph reads and writes fixed places in memory. Inputs are copied there, except those that are there
    already; what the function carries on to its next call is written back into its inputs; other outputs are
    copied out, so that they stay what they are when the graph is replayed.

    Args:
        function (callable): tensors in, list of tensors out; pure.
        inputs (list of Tensor): examples.
        own (list of int): inputs that are used in place: static inputs of another captured function.
        back (list of pairs): input and the output that is written into it.
        record (callable, optional): for tests, stands for the capture.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: list[Tensor],
        own: list[int],
        back: list[tuple[int, int]],
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self.inputs = [x if i in own else torch.empty_like(x).copy_(x) for i, x in enumerate(inputs)]
        outputs: list[Tensor] = []

        def run() -> None:
            outputs[:] = function(*self.inputs)
            for i, o in back:
                self.inputs[i].copy_(outputs[o])

        saved = [x.clone() for x in self.inputs]
        self._replay = (record or _capture)(run)
        torch._foreach_copy_(self.inputs, saved)  # recording may have run the function
        self._outputs = outputs
        self._carried = {o: self.inputs[i] for i, o in back}
        self._fresh = [o for o in range(len(outputs)) if o not in self._carried]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        moved = [(mine, x) for mine, x in zip(self.inputs, inputs) if mine is not x]
        if moved:
            torch._foreach_copy_([mine for mine, _ in moved], [x for _, x in moved])
        self._replay()
        found = [torch.empty_like(self._outputs[o]) for o in self._fresh]
        if found:
            torch._foreach_copy_(found, [self._outputs[o] for o in self._fresh])
        copies = dict(zip(self._fresh, found))
        return [self._carried[o] if o in self._carried else copies[o] for o in range(len(self._outputs))]


def _capture(run: Callable[[], None]) -> Callable[[], None]:
    """Records what `run` does on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
