"""Between collecting and learning: how a batch becomes rows, and the on-policy buffer, which keeps only the latest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdmarl import seeds


class Buffer(Protocol):
    """What a learner asks of a buffer; TorchRL's replay buffers have it."""

    def extend(self, data: TensorDictBase) -> Any: ...  # noqa: D102, E704

    def sample(self) -> TensorDictBase: ...  # noqa: D102, E704


def cut_rows(data: TensorDictBase, length: int, first: int = 0) -> TensorDictBase:
    """A batch ``[*B, T]`` as rows: ``[M]``, or ``[M, length]`` of consecutive steps for sequences.

    Args:
        data (TensorDictBase): ``[*B, T]``.
        length (int): steps in a row; 1 leaves no time dimension.
        first (int): so many leading dimensions are kept as they are.

    Raises:
        ValueError: if ``T`` is no multiple of ``length``.
    """
    if length == 1:
        return data.flatten(first, -1) if data.ndim > first + 1 else data
    steps = data.shape[-1]
    if steps % length:
        below, above = steps - steps % length or length, steps + length - steps % length
        raise ValueError(
            f"The batch has {steps} steps in time, which is no multiple of sequence_length={length}: "
            f"collect {below} or {above} steps of each environment."
        )
    data = data.reshape(*data.shape[:-1], steps // length, length)
    return data.flatten(first, -2) if data.ndim > first + 2 else data


def take_rows(data: TensorDictBase, index: Tensor) -> TensorDict:
    """``data[index]`` of an index ``[M]``, in a fraction of the time for small minibatches.

    Args:
        data (TensorDictBase): ``[N, ...]``, nested as it may be.
        index (Tensor): integers from 0 to N - 1.
    """
    found: dict[str, Any] = {}
    for key, x in data.items():
        if isinstance(x, TensorDictBase):
            found[key] = take_rows(x, index)
        else:
            found[key] = torch.index_select(x, 0, index) if type(x) is Tensor else x[index]
    size = torch.Size([len(index), *data.batch_size[1:]])
    return TensorDict._new_unsafe(found, batch_size=size, device=data.device)


def block_masks(data: TensorDictBase, apart: Sequence[tuple[str, int]]) -> TensorDictBase:
    """Says in ``(group, "mask")`` which of the rows are whose, where each agent drew its own.

    Args:
        data (TensorDictBase): ``[N * M, ...]``, one block of ``M`` rows after the other for each of ``N`` agents.
        apart (sequence of (str, int)): groups with their number of agents, in the blocks' order.
    """
    blocks = sum(n for _, n in apart)
    size, block = len(data) // blocks, 0
    for group, n_agents in apart:
        mine = torch.zeros(blocks, n_agents, dtype=torch.bool, device=data.device)  # [N, n]
        mine[block : block + n_agents] = torch.eye(n_agents, dtype=torch.bool, device=data.device)
        mine = mine.repeat_interleave(size, 0)  # [N * M, n]
        alive = data.get((group, "mask"), None)
        if alive is not None:
            mine = mine.reshape(-1, *[1] * (alive.ndim - 2), n_agents) & alive
        else:
            mine = mine.reshape(-1, *[1] * (data.ndim - 1), n_agents).expand(*data.shape, n_agents)
        data.set((group, "mask"), mine)
        block += n_agents
    return data


class BatchBuffer:
    """Holds the latest batch and goes through it in minibatches without replacement: the buffer of on-policy learning.

    A batch ``[E, T]`` is cut into rows: ``[E * T]``, or ``[E * T / L, L]`` for sequences. Each epoch draws a new
    permutation on the data's device. All minibatches have one size, so that shapes never change: the rows are
    divided into ``ceil(rows / minibatch_size)`` equal parts, and the at most that many rows left over sit this epoch
    out (unlike TorchRL's ``SamplerWithoutReplacement``, whose last minibatch is short).

    Args:
        minibatch_size (int, optional): the most rows in a minibatch; None takes all rows at once.
        num_epochs (int): how often the batch is gone through.
        sequence_length (int): ``L``; 1 is feed-forward and leaves no time dimension.
        apart (sequence of (str, int)): groups with their number of agents whose agents draw *their own* rows each: a
            minibatch then holds one block of rows per agent, in which ``(group, "mask")`` is True for that agent
            alone, so that every joint input is taken at that agent's rows. Empty: all agents share the rows.
        seed_axis (bool): the batch is ``[seeds, E, T]``; each seed draws its own rows.
        seed (int): of the permutations.
        device (torch.device): where they are drawn; the data's, so that nothing is copied.
    """

    cuts_rows = True

    def __init__(
        self,
        minibatch_size: int | None = None,
        num_epochs: int = 1,
        *,
        sequence_length: int = 1,
        apart: Sequence[tuple[str, int]] = (),
        seed_axis: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, number in (
            ("minibatch_size", 1 if minibatch_size is None else minibatch_size),
            ("num_epochs", num_epochs),
            ("sequence_length", sequence_length),
        ):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        self.minibatch_size, self.num_epochs, self.sequence_length = (
            minibatch_size,
            num_epochs,
            sequence_length,
        )
        if apart and seed_axis:
            raise ValueError("Agents apart and a seed axis do not go together: train the seeds one by one.")
        self.apart, self.seed_axis, self.device = list(apart), seed_axis, torch.device(device)
        self.generator = seeds.started(seed, device)
        self._rows: TensorDictBase | None = None
        self._parts: list[Tensor] = []

    @property
    def n_minibatches(self) -> int:
        """Minibatches in an epoch of the batch held."""
        return -(-len(self) // (self.minibatch_size or max(1, len(self))))

    @property
    def n_updates(self) -> int:
        """Minibatches in all epochs of the batch held."""
        return self.num_epochs * self.n_minibatches

    def __len__(self) -> int:
        """Rows held (of each seed)."""
        return 0 if self._rows is None else self._rows.shape[int(self.seed_axis)]

    def extend(self, data: TensorDictBase) -> None:
        """Replaces the batch held.

        Args:
            data (TensorDictBase): ``[E, T]``, any number of leading dimensions; ``[seeds, E, T]`` with a seed axis.

        Raises:
            ValueError: if ``T`` is no multiple of ``sequence_length`` or a minibatch would be larger than the batch.
        """
        length, first = self.sequence_length, int(self.seed_axis)
        data = cut_rows(data, length, first)
        rows = data.shape[first]
        if self.minibatch_size is not None and self.minibatch_size > rows:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} is larger than the batch of {rows} rows of length {length}: "
                f"lower it to at most {rows}, or collect more frames."
            )
        self._rows, self._parts = data, []

    def sample(self) -> TensorDictBase:
        """The next minibatch, ``[M]`` or ``[M, L]``; ``[seeds, M, ...]`` with a seed axis."""
        if self._rows is None:
            raise RuntimeError("The buffer is empty: extend it with a batch before sampling.")
        if not self._parts:
            self._parts = self._epoch()
        index = self._parts.pop(0)
        if self.apart:
            return block_masks(self._rows[index.flatten()], self.apart)
        if self.seed_axis:
            seeds = torch.arange(len(index), device=index.device).unsqueeze(-1)
            return self._rows[seeds, index]
        return take_rows(self._rows, index)

    def _epoch(self) -> list[Tensor]:
        """Row indices of an epoch's minibatches: ``[M]``, or one such row of indices per seed or agent."""
        assert self._rows is not None
        rows, blocks = (
            len(self),
            self._rows.shape[0] if self.seed_axis else sum(n for _, n in self.apart) or None,
        )
        size = rows // self.n_minibatches

        def permutation() -> Tensor:
            order = torch.randperm(rows, generator=self.generator, device=self.device)
            return order[: size * self.n_minibatches]

        order = permutation() if blocks is None else torch.stack([permutation() for _ in range(blocks)])
        return list(order.split(size, -1))

    def empty(self) -> None:
        """Lets go of the batch, whose memory the next one needs."""
        self._rows, self._parts = None, []

    def state_dict(self) -> dict[str, Any]:
        """The generator's state; the batch itself is used up within one iteration."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        self.empty()
