"""Separate streams of random numbers from one seed, and a way to route torch's global stream through one of them.

A run has the streams ``init``, ``env``, ``acting``, ``learning`` and ``evaluation``; drawing from one never moves
another. Where torch takes no generator (distributions, initializers) the global stream is swapped for the time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive(seed: int, stream: str) -> int:
    """The seed of a named stream: equal on every machine, unrelated for unlike names or seeds.

    Args:
        seed (int): the run's seed.
        stream (str): the stream's name.

    Example:
        >>> derive(0, "env") == derive(0, "env"), derive(0, "env") == derive(0, "acting")
        (True, False)
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one stream on ``device``."""
    return started(derive(seed, stream), device)


def started(seed: int, device: torch.device | str | None = None) -> torch.Generator:
    """A generator that starts at ``seed``, for tensors on ``device``; ``meta``, which draws nothing, gets a CPU's."""
    device = torch.device("cpu" if device is None else device)
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


@contextlib.contextmanager
def routed(source: torch.Generator | None) -> Iterator[None]:
    """Lets torch's global generator on ``source``'s device continue ``source``'s stream inside the block.

    The global stream is as before afterwards, and ``source`` has moved by what was drawn. None: nothing happens.
    """
    if source is None:
        yield
        return
    cuda = source.device.type == "cuda"
    saved = torch.cuda.get_rng_state(source.device) if cuda else torch.get_rng_state()

    def put(state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, source.device) if cuda else torch.set_rng_state(state)

    put(source.get_state())
    try:
        yield
    finally:
        source.set_state(torch.cuda.get_rng_state(source.device) if cuda else torch.get_rng_state())
        put(saved)
