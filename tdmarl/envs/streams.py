"""Random numbers of an environment's own: the global generators are swapped for its streams while it runs."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import numpy.random.mtrand as mtrand
import torch
from torch import Tensor


class Streams:
    """Gives whatever runs inside `with streams:` random numbers that no other code of the process sees or
    moves.

    Simulators draw from the global generators of torch (CPU and the given CUDA device), NumPy and Python.
    Entering puts this environment's streams in their places, leaving takes them out again, so that neither
    side can tell. NumPy's second cached Gaussian is dropped on leaving; that is deterministic, and the outer
    one is kept.

    Args:
        device (torch.device): where the simulator runs; a CUDA device's generator is swapped as well.
        seed (int): starts all streams.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._torch = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            self._torch.append(torch.cuda.default_generators[index])
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Starts all streams afresh."""
        self._states = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self._torch]
        state: Any = np.random.RandomState(seed % 2**32).get_state(legacy=False)
        self._numpy: Any = np.random.MT19937()
        self._numpy.state = state
        self._python = random.Random(seed).getstate()

    def __enter__(self) -> Streams:
        outer = [generator.get_state() for generator in self._torch]
        for generator, state in zip(self._torch, self._states):
            generator.set_state(state)
        outer_numpy = np.random.get_state()
        outer_bits = mtrand.get_bit_generator()
        mtrand.set_bit_generator(self._numpy)
        outer_python = random.getstate()
        random.setstate(self._python)
        self._outer: tuple[Any, ...] = outer, outer_bits, outer_numpy, outer_python
        return self

    def __exit__(self, *_: object) -> None:
        outer, outer_bits, outer_numpy, outer_python = self._outer
        self._states = [generator.get_state() for generator in self._torch]
        for generator, state in zip(self._torch, outer):
            generator.set_state(state)
        mtrand.set_bit_generator(outer_bits)
        if outer_numpy[3]:  # the swap drops a cached Gaussian, which only a full restore brings back
            np.random.set_state(outer_numpy)
        self._python = random.getstate()
        random.setstate(outer_python)

    def state(self) -> dict[str, Tensor]:
        """The streams as tensors on the CPU."""
        bits = self._numpy.state["state"]
        version, words, gauss = self._python
        return {
            **{
                f"torch_{generator.device.type}": state.clone()
                for generator, state in zip(self._torch, self._states)
            },
            "numpy": torch.tensor([*bits["key"].tolist(), bits["pos"]]),  # [625]
            "python": torch.tensor(words),  # [625]
            "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues where `state` was taken; a device that had no stream there gets one that depends on the CPU's."""
        self._states = [self._state_of(generator, state) for generator in self._torch]
        *key, position = state["numpy"].tolist()
        bits = {"key": np.array(key, dtype=np.uint32), "pos": position}
        self._numpy.state = {"bit_generator": "MT19937", "state": bits}
        gauss = state["python_gauss"].item()
        self._python = 3, tuple(state["python"].tolist()), None if gauss != gauss else gauss

    @staticmethod
    def _state_of(generator: torch.Generator, state: dict[str, Tensor]) -> Tensor:
        own = state.get(f"torch_{generator.device.type}")
        if own is None:
            seed = zlib.crc32(state["torch_cpu"].cpu().numpy().tobytes())
            own = torch.Generator(generator.device).manual_seed(seed).get_state()
        return own.cpu().clone()
