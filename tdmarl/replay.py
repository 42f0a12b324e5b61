"""Replay: the past on the device, drawn uniformly or by priority; TorchRL's buffer without its detours."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl._utils import logger as torchrl_logger
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    PrioritizedSampler,
    RandomSampler,
    Storage,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from tdmarl import seeds
from tdmarl.buffers import block_masks, cut_rows, take_rows
from tdmarl.keys import as_tuple

STORAGES = ("device", "cpu", "memmap")


class ProportionalSampler(PrioritizedSampler):
    """Draws rows in proportion to ``priority ** alpha``, on the device and without reading anything back.

        ``P(i) = p_i^alpha / sum_k p_k^alpha``,  weight ``w_i = (N P(i))^-beta / max_j w_j``

    with the maximum over the rows drawn. New rows have the largest priority so far, so that each is drawn soon. In
    place of the trees of TorchRL's sampler, whose compiled part has to match torch's version, one cumulative sum
    and a binary search are taken per draw: on a million rows a millisecond on a CPU, much less on a GPU.

    Source: Schaul et al. 2016, "Prioritized Experience Replay".

    Args:
        capacity (int): the storage's.
        alpha (float): how much priorities matter; 0 draws uniformly.
        beta (float): how much of the bias the weights take back; 1 is all.
        eps (float): added to every priority, so that none is zero.
        reduction (str): ``max`` or ``mean``: of a row's priorities over its agents and steps.
        device (torch.device): where the priorities lie; the storage's.

    Example:
        >>> from tensordict import TensorDict
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), sampler=ProportionalSampler(4), batch_size=2)
        >>> _ = buffer.extend(TensorDict({"x": torch.arange(4)}, [4]))
        >>> buffer.update_priority(torch.arange(4), torch.tensor([0.0, 0.0, 1e6, 0.0]))
        >>> buffer.sample()["x"]
        tensor([2, 2])
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        eps: float = 1e-6,
        reduction: str = "max",
        device: torch.device | str = "cpu",
    ) -> None:
        if not alpha >= 0 or not beta >= 0 or not eps > 0:
            raise ValueError(
                f"alpha={alpha} and beta={beta} must not be negative, and eps={eps} must be positive."
            )
        if reduction not in ("max", "mean"):
            raise ValueError(f"reduction={reduction!r} must be 'max' or 'mean'.")
        self._max_capacity, self._alpha, self._beta, self._eps = capacity, alpha, beta, eps
        self.reduction = reduction
        self.priorities = torch.zeros(
            capacity, dtype=torch.float64, device=device
        )  # already to the power of alpha
        self.largest = torch.ones((), dtype=torch.float64, device=device)  # before the power

    def __repr__(self) -> str:
        return f"ProportionalSampler(capacity={self._max_capacity}, alpha={self._alpha}, beta={self._beta})"

    @property
    def alpha(self) -> float:
        """How much priorities matter."""
        return self._alpha

    @property
    def beta(self) -> float:
        """How much of the bias the weights take back; a schedule may set it."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = value

    @property
    def default_priority(self) -> Tensor:
        """Of rows that were never drawn."""
        return self.largest

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Indices ``[batch_size]``, and their ``priority_weight``."""
        rows = len(storage)
        if rows == 0:
            raise RuntimeError("The replay buffer is empty: extend it before sampling.")
        total = self.priorities[:rows].cumsum(0)
        device = total.device
        at = torch.rand(batch_size, dtype=total.dtype, device=device, generator=self._rng) * total[-1]
        index = torch.searchsorted(total, at, right=True).clamp_max(rows - 1)
        weight = (self.priorities[index] * (rows / total[-1])) ** -self._beta
        return index, {"priority_weight": (weight / weight.max()).float()}

    def add(self, index: Any) -> None:
        """New rows get the largest priority so far."""
        self.extend(torch.as_tensor(index).reshape(-1))

    def extend(self, index: Any) -> None:
        """New rows get the largest priority so far."""
        where = torch.as_tensor(index, device=self.priorities.device)
        self.priorities[where] = (self.largest**self._alpha).expand(where.shape)

    @torch.no_grad()
    def update_priority(self, index: Any, priority: Any, *, storage: Storage | None = None) -> None:
        """Rows ``index`` ``[M]`` have been looked at again; ``priority`` is ``[M]``, or ``[M, ...]`` to be reduced."""
        device = self.priorities.device
        where = torch.as_tensor(index, device=device).reshape(-1)
        found = torch.as_tensor(priority, dtype=torch.float64, device=device)
        found = (
            found.reshape(len(where), -1) if found.numel() != 1 else found.reshape(1, 1).expand(len(where), 1)
        )
        found = found.amax(1) if self.reduction == "max" else found.sum(1) / found.shape[1]
        found = found.abs() + self._eps
        self.priorities[where] = found**self._alpha
        self.largest.copy_(torch.maximum(self.largest, found.max()))

    def mark_update(self, index: Any, *, storage: Storage | None = None) -> None:
        """Rows were overwritten."""
        self.extend(index)

    def _empty(self) -> None:
        self.priorities.zero_()
        self.largest.fill_(1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rng": None}

    def state_dict(self) -> dict[str, Any]:
        """Priorities and the largest of them; ``alpha`` and ``beta``."""
        state = {"priorities": self.priorities.clone(), "largest": self.largest.clone()}
        return {**state, "alpha": self._alpha, "beta": self._beta, "eps": self._eps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        kept = state_dict["priorities"]
        if kept.shape != self.priorities.shape:
            raise ValueError(
                f"The state holds priorities of {len(kept)} rows; this sampler has capacity {self._max_capacity}."
            )
        self.priorities.copy_(kept)
        self.largest.copy_(state_dict["largest"])
        self._alpha, self._beta, self._eps = (float(state_dict[name]) for name in ("alpha", "beta", "eps"))

    def dumps(self, path: Any) -> None:
        """Writes :meth:`state_dict` into the folder ``path``."""
        os.makedirs(path, exist_ok=True)
        torch.save(self.state_dict(), os.path.join(path, "sampler.pt"))

    def loads(self, path: Any) -> None:
        """Restores what :meth:`dumps` wrote."""
        self.load_state_dict(torch.load(os.path.join(path, "sampler.pt"), weights_only=True))


class _Told:
    """A storage that is told where its last row went: TorchRL's reads it from the indices, once a batch."""

    def _set_last_cursor(self, cursor: Any) -> None:
        if not isinstance(cursor, Tensor):
            super()._set_last_cursor(cursor)  # type: ignore[misc]


class _OnDevice(_Told, LazyTensorStorage):
    def take(self, index: Tensor) -> TensorDictBase:
        """Rows that are there, tensor by tensor; ``get`` looks whether they are, and indexes the tensordict twice."""
        return take_rows(self._storage, index)


class _InFile(_Told, LazyMemmapStorage):
    def take(self, index: Tensor) -> TensorDictBase:
        """Rows that are there."""
        return self.get(index)


class Replay(TensorDictReplayBuffer):
    """The buffer of off-policy learning: TorchRL's, with rows cut, drawn and moved as a learner needs them.

    Args:
        capacity (int): rows kept; older ones are overwritten.
        batch_size (int): rows of a sample (of each agent, with ``apart``).
        sequence_length (int): consecutive steps in a row, ``L``; 1 leaves no time dimension.
        prioritized (bool): draw with a :class:`ProportionalSampler`.
        alpha, beta (float): that sampler's.
        apart (sequence of (str, int)): groups with their number of agents that draw *their own* rows each: a sample
            then holds one block of rows per agent, in which ``(group, "mask")`` is True for that agent alone. Empty:
            all agents share the rows.
        least (int): rows to be held before learning begins.
        storage (str): ``device``, ``cpu``, or ``memmap``: a memory-mapped file.
        folder (str, optional): where that file lies; None is a temporary folder.
        device (torch.device): where samples are needed.
        seed (int): of the samples.
        announce (callable, optional): told the size before it is allocated.
    """

    cuts_rows = True

    def __init__(
        self,
        capacity: int,
        batch_size: int,
        *,
        sequence_length: int = 1,
        prioritized: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        apart: Sequence[tuple[str, int]] = (),
        least: int = 0,
        storage: str = "device",
        folder: str | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        announce: Callable[[str], Any] | None = print,
    ) -> None:
        numbers = {"capacity": capacity, "batch_size": batch_size, "sequence_length": sequence_length}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r} must be one of {STORAGES}.")
        if prioritized and apart:
            raise ValueError("Priorities are of rows that all agents share: use share_buffer=True with them.")
        if least > capacity:
            raise ValueError(
                f"least={least} rows before learning begins will never fit a capacity of {capacity}."
            )
        self.device, self.place = torch.device(device), torch.device(device if storage == "device" else "cpu")
        self.capacity, self.sequence_length, self.least = capacity, sequence_length, least
        self.apart, self.memmap, self.announce = list(apart), storage == "memmap", announce
        kept: Storage = (
            _InFile(capacity, scratch_dir=folder) if self.memmap else _OnDevice(capacity, device=self.place)
        )
        sampler: Sampler = RandomSampler()
        if prioritized:
            sampler = ProportionalSampler(capacity, alpha=alpha, beta=beta, device=self.place)
        self.prioritized = prioritized
        super().__init__(
            storage=kept, sampler=sampler, writer=RoundRobinWriter(), batch_size=batch_size,
            generator=seeds.started(seed, self.place),
        )  # fmt: skip

    @property
    def ready(self) -> bool:
        """Whether enough rows are held to learn from."""
        return len(self) >= max(1, self.least)

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Stores a batch ``[*B, T]`` as rows.

        Args:
            tensordicts (TensorDictBase): ``T`` is a multiple of ``sequence_length``.
            update_priority (bool, optional): see TorchRL's method.
        """
        rows = cut_rows(tensordicts, self.sequence_length).to(self.place)
        if len(rows) > self.capacity:
            raise ValueError(
                f"A batch of {len(rows)} rows does not fit a replay buffer of {self.capacity}: give it a larger "
                "capacity (buffer_size), or collect fewer frames at a time."
            )
        self._before_allocation(rows)
        last = (self._writer._cursor + len(rows) - 1) % self.capacity
        with _without_a_log_line():
            index = super().extend(rows, update_priority=update_priority)
        self._storage._set_last_cursor(last)
        return index

    def _before_allocation(self, rows: TensorDictBase) -> None:
        """Says what the storage will take, and refuses where there is not so much."""
        if self.storage.initialized:
            return
        size = sum(x[0].numel() * x.element_size() for x in rows.values(True, True))
        total, where = size * self.capacity, "a memory-mapped file" if self.memmap else str(self.place)
        if self.announce is not None:
            self.announce(
                f"replay: {self.capacity:,} rows of {size:,} bytes, {total / 1e6:,.1f} MB on {where}"
            )
        free = _free_bytes(self.place, self.memmap)
        if total > free:
            raise MemoryError(
                f"A replay buffer of {self.capacity:,} rows of {size:,} bytes needs {total / 1e9:.2f} GB on {where}, "
                f"which has {free / 1e9:.2f} GB: lower its capacity, or use another storage of {STORAGES}."
            )

    def sample(self, batch_size: int | None = None, return_info: bool = False, **kwargs: Any) -> Any:
        """Rows ``[M]`` or ``[M, L]`` with their ``index``, where the learner is; also what the sampler says of them."""
        if batch_size is not None or return_info or kwargs:
            return super().sample(batch_size, return_info, **kwargs)
        size = self._batch_size * max(1, sum(n for _, n in self.apart))
        index, info = self._sampler.sample(self._storage, size)
        rows = self._storage.take(index)
        for key, value in {"index": index, **info}.items():
            rows.set(key, value.reshape(-1, *[1] * (rows.ndim - 1)).expand(rows.shape))
        rows = rows.to(self.device)
        return block_masks(rows, self.apart) if self.apart else rows

    def state_dict(self) -> dict[str, Any]:
        """The rows held (not the empty part), where the next one goes, priorities, and the generator."""
        held = self.storage.get(slice(0, len(self))) if len(self) else None
        rows = {} if held is None else {"/".join(as_tuple(k)): x.clone() for k, x in held.items(True, True)}
        return {
            "rows": dict(sorted(rows.items())),  # in one order, whoever allocated the storage
            "shape": [] if held is None else list(held.shape),
            "writer": self._writer.state_dict(),
            "sampler": self._sampler.state_dict(),
            "generator": self._rng.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.empty()
        if state_dict["shape"]:
            shape = [int(n) for n in state_dict["shape"]]
            rows = TensorDict(dict(state_dict["rows"]), batch_size=shape).unflatten_keys("/").to(self.place)
            self._before_allocation(rows)
            with _without_a_log_line():
                self.storage.set(torch.arange(len(rows)), rows)
        self._writer.load_state_dict(state_dict["writer"])
        self._sampler.load_state_dict(state_dict["sampler"])
        self._rng.set_state(state_dict["generator"].cpu())


@contextlib.contextmanager
def _without_a_log_line() -> Iterator[None]:
    """TorchRL logs to the terminal what it allocates, after it has; ``announce`` is told before."""
    level = torchrl_logger.level
    torchrl_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        torchrl_logger.setLevel(level)


def _free_bytes(device: torch.device, on_disk: bool) -> float:
    """What is left to allocate; infinity where nobody can say."""
    if on_disk:
        return shutil.disk_usage(tempfile.gettempdir()).free
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (
        device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names
    ):  # caches count as used: take all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")
