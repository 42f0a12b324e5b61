"""Schedules: how a collected batch becomes a number of optimization steps, and the buffers between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer

from tdmarl import reduce, seeds
from tdmarl.step import Annealing, Step


class Buffer(Protocol):
    """What a learner asks of a buffer; TorchRL's replay buffers have it."""

    def extend(self, data: TensorDictBase) -> Any: ...  # noqa: D102, E704

    def sample(self) -> TensorDictBase: ...  # noqa: D102, E704


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
        self.apart, self.seed_axis = list(apart), seed_axis
        self.generator = torch.Generator(device=device).manual_seed(seed)
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
        if length > 1:
            steps = data.shape[-1]
            if steps % length:
                below, above = steps - steps % length or length, steps + length - steps % length
                raise ValueError(
                    f"The batch has {steps} steps in time, which is no multiple of sequence_length={length}: "
                    f"collect {below} or {above} steps of each environment."
                )
            data = data.reshape(*data.shape[:-1], steps // length, length)
            data = data.flatten(first, -2) if data.ndim > first + 2 else data
        else:
            data = data.flatten(first, -1) if data.ndim > first + 1 else data
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
            return self._apart(index)
        if self.seed_axis:
            seeds = torch.arange(len(index), device=index.device).unsqueeze(-1)
            return self._rows[seeds, index]
        return self._rows[index]

    def _epoch(self) -> list[Tensor]:
        """Row indices of an epoch's minibatches: ``[M]``, or one such row of indices per seed or agent."""
        assert self._rows is not None
        rows, blocks = (
            len(self),
            self._rows.shape[0] if self.seed_axis else sum(n for _, n in self.apart) or None,
        )
        size = rows // self.n_minibatches

        def permutation() -> Tensor:
            order = torch.randperm(rows, generator=self.generator, device=self.generator.device)
            return order[: size * self.n_minibatches]

        order = permutation() if blocks is None else torch.stack([permutation() for _ in range(blocks)])
        return list(order.split(size, -1))

    def _apart(self, index: Tensor) -> TensorDictBase:
        assert self._rows is not None
        data = self._rows[index.flatten()]
        size, block = index.shape[1], 0
        for group, n_agents in self.apart:
            mine = torch.zeros(len(index), n_agents, dtype=torch.bool, device=index.device)  # [blocks, n]
            mine[block : block + n_agents] = torch.eye(n_agents, dtype=torch.bool, device=index.device)
            mine = mine.repeat_interleave(size, 0)  # [blocks * M, n]
            alive = data.get((group, "mask"), None)
            if alive is not None:
                mine = mine.reshape(-1, *[1] * (alive.ndim - 2), n_agents) & alive
            else:
                mine = mine.reshape(-1, *[1] * (data.ndim - 1), n_agents).expand(*data.shape, n_agents)
            data.set((group, "mask"), mine)
            block += n_agents
        return data

    def state_dict(self) -> dict[str, Any]:
        """The generator's state; the batch itself is used up within one iteration."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        self._rows, self._parts = None, []


def replay_buffer(
    capacity: int, batch_size: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> TensorDictReplayBuffer:
    """A TorchRL replay buffer on the data's device that samples uniformly: the buffer of off-policy learning.

    Args:
        capacity (int): rows kept; older ones are overwritten.
        batch_size (int): rows of a sample.
        seed (int): of the samples.
        device (torch.device): where the rows lie (TorchRL's own default is the CPU).
    """
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity, device=device),
        sampler=RandomSampler(),
        batch_size=batch_size,
        generator=torch.Generator(device=device).manual_seed(seed),
    )


class Learner:
    """Prepares a batch, stores its rows, and takes steps on samples: the schedule of every algorithm but HAPPO.

    On-policy and off-policy learning differ by the buffer alone.

    Args:
        step (Step): one optimization step.
        buffer (Buffer): a :class:`BatchBuffer`, or any TorchRL replay buffer.
        updates (int, optional): steps per batch; None asks a :class:`BatchBuffer` for its epochs.
        prepare (callable, optional): batch to batch, such as :class:`~tdmarl.prepare.Advantage`.
        annealing (Annealing, optional): advanced by the frames of each batch, after its updates.
        mode (str): see :meth:`Step.accelerate`.
        seed (int): of what ``prepare`` draws, such as the next actions of a critic that reads them.

    Returns:
        calling it with a batch ``[*B, T]`` returns a tensordict of metrics, averaged over the steps, on the device.
    """

    def __init__(
        self,
        step: Step,
        buffer: Buffer,
        *,
        updates: int | None = None,
        prepare: Callable[[TensorDictBase], TensorDictBase] | None = None,
        annealing: Annealing | None = None,
        mode: str = "auto",
        seed: int = 0,
    ) -> None:
        if updates is None and not isinstance(buffer, BatchBuffer):
            raise ValueError(
                f"updates=None needs a BatchBuffer; say how many steps to take on {type(buffer).__name__}."
            )
        self.step, self.buffer, self.updates, self.prepare, self.annealing = (
            step,
            buffer,
            updates,
            prepare,
            annealing,
        )
        self._take = step.accelerate(mode)
        self.generator = torch.Generator(step.parts[0].params[0].device).manual_seed(seed)

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        frames = batch.numel() // (batch.shape[0] if self.step.seed_axis else 1)
        batch = batch.copy()  # entries are added; the caller's batch stays as it is
        if self.prepare is not None:
            with torch.no_grad(), reduce.seed_axis(self.step.seed_axis), seeds.routed(self.generator):
                batch = self.prepare(batch)
        self._check(batch)
        rows = batch.select(*self.step.in_keys, *self.step.optional_keys, strict=False)
        # a BatchBuffer cuts rows itself; TorchRL's buffers store what they are given, one transition a row
        self.buffer.extend(rows if isinstance(self.buffer, BatchBuffer) else rows.reshape(-1))
        self.step.begin()
        taken = self.buffer.n_updates if self.updates is None else self.updates  # type: ignore[attr-defined]
        metrics = [self._take(self.buffer.sample()) for _ in range(taken)]
        if self.annealing is not None:
            self.annealing.advance(frames)
        names = list(dict.fromkeys(key for m in metrics for key in m.keys()))
        found = {name: torch.stack([m.get(name) for m in metrics if name in m.keys()]) for name in names}
        return TensorDict({name: values.sum(0) / len(values) for name, values in found.items()})

    def _check(self, batch: TensorDictBase) -> None:
        missing = [key for key in self.step.in_keys if batch.get(key, None) is None]
        if missing:
            here = sorted(map(str, batch.keys(True, True)))
            raise KeyError(
                f"The losses read {missing}, which neither the collector nor prepare wrote. The batch has {here}."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that learning changes: losses, optimizers, buffer, schedules, generators."""
        state = {"step": self.step.state_dict(), "buffer": self.buffer.state_dict()}  # type: ignore[attr-defined]
        state |= {"generator": self.generator.get_state()}
        return state | ({"annealing": self.annealing.state_dict()} if self.annealing is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.step.load_state_dict(state["step"])
        self.buffer.load_state_dict(state["buffer"])  # type: ignore[attr-defined]
        self.generator.set_state(state["generator"].cpu())
        if self.annealing is not None:
            self.annealing.load_state_dict(state["annealing"])


@dataclass(frozen=True)
class AgentUpdate:
    """What :class:`SequentialLearner` needs to update one agent.

    Args:
        group (str): the agent's group.
        index (int): the agent in it.
        actor (TensorDictModuleBase): the agent's, with flat keys.
        step (Step): a step on the agent's rows, with flat keys.
    """

    group: str
    index: int
    actor: Any
    step: Step

    def view(self, batch: TensorDictBase) -> TensorDictBase:
        """The agent alone: its entries ``[*B]`` under flat keys, its advantage times its factor."""
        keys = dict.fromkeys([*self.step.in_keys, *self.step.optional_keys, *self.actor.in_keys, "factor"])
        group = {key: batch.get((self.group, key), None) for key in keys}  # each [*B, n, ...]
        mine = {key: x.select(batch.ndim, self.index) for key, x in group.items() if x is not None}
        mine["advantage"] = mine["factor"] * mine["advantage"]
        return TensorDict(mine, batch_size=batch.batch_size)

    @torch.no_grad()
    def log_prob(self, view: TensorDictBase) -> Tensor:
        """Of the actions taken, by the agent's present policy, ``[*B]``."""
        return self.actor.get_dist(view.select(*self.actor.in_keys)).log_prob(view.get("action"))


class SequentialLearner:
    """Updates agents one after the other, each weighted by what the earlier ones changed; the critic last.

    For each agent in turn: its advantages are those of the batch times its entry of ``factor``; it takes its steps;
    the ratio of its new to its old probabilities of the whole batch is multiplied into ``factor``, which is written
    back into the batch for the next ones. The schedule of HAPPO.

    Args:
        agents (sequence of AgentUpdate): the team.
        buffer (BatchBuffer): of one agent's rows; it is filled anew for each agent.
        critic (Learner): learns from the whole batch, after all agents.
        prepare (callable): batch to batch; writes ``(group, advantage)`` and ``(group, factor)``.
        factor (callable): from a group's name to the module that multiplies, such as
            :class:`~tdmarl.prepare.HAPPOFactor`; None leaves the factor at one.
        order (sequence of int, optional): always this order; None draws one for each batch.
        annealing (Annealing, optional): advanced by the frames of each batch.
        seed (int): of the orders.
        mode (str): see :meth:`Step.accelerate`.
    """

    def __init__(
        self,
        agents: Sequence[AgentUpdate],
        buffer: BatchBuffer,
        critic: Learner,
        *,
        prepare: Callable[[TensorDictBase], TensorDictBase],
        factor: Callable[[str], Callable[[TensorDictBase], TensorDictBase]] | None,
        order: Sequence[int] | None = None,
        annealing: Annealing | None = None,
        seed: int = 0,
        mode: str = "auto",
    ) -> None:
        if order is not None and sorted(order) != list(range(len(agents))):
            raise ValueError(
                f"order={list(order)} must name each of the agents 0 to {len(agents) - 1} exactly once."
            )
        self.agents, self.buffer, self.critic, self.prepare = list(agents), buffer, critic, prepare
        self.order, self.annealing = order, annealing
        groups = dict.fromkeys(agent.group for agent in agents)
        self.factors = {} if factor is None else {group: factor(group) for group in groups}
        self.generator = torch.Generator().manual_seed(seed)  # on the host: the order is one of Python's calls
        self._take = [agent.step.accelerate(mode) for agent in agents]
        self.last_order: list[int] = []

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        frames = batch.numel()
        batch = batch.copy()
        with torch.no_grad():
            batch = self.prepare(batch)
        drawn = torch.randperm(len(self.agents), generator=self.generator).tolist()
        self.last_order = list(drawn if self.order is None else self.order)
        metrics = [self._update(i, batch) for i in self.last_order]
        found = {key: torch.stack([m.get(key) for m in metrics]) for key in metrics[0].keys()}
        means = TensorDict({key: values.sum(0) / len(values) for key, values in found.items()})
        means.update(self.critic(batch))
        if self.annealing is not None:
            self.annealing.advance(frames)
        return means

    def _update(self, i: int, batch: TensorDictBase) -> TensorDictBase:
        agent, take = self.agents[i], self._take[i]
        view = agent.view(batch)
        before = agent.log_prob(view)
        self.buffer.extend(view)
        agent.step.begin()
        metrics = [take(self.buffer.sample()) for _ in range(self.buffer.n_updates)]
        if agent.group in self.factors:
            group = {
                "log_prob_before": before.unsqueeze(-1),
                "log_prob_after": agent.log_prob(view).unsqueeze(-1),
            }
            mask = view.get("mask", None)
            if mask is not None:
                group["updated_mask"] = mask.unsqueeze(-1)
            entries: dict[str, Any] = {name: {"factor": batch.get((name, "factor"))} for name in self.factors}
            entries[agent.group] |= group
            done = self.factors[agent.group](TensorDict(entries, batch_size=batch.batch_size))
            for name in self.factors:
                batch.set((name, "factor"), done.get((name, "factor")))
        return torch.stack(metrics).sum(0) / len(metrics)

    def state_dict(self) -> dict[str, Any]:
        """All that learning changes: agents, critic, buffer, order, schedules."""
        agents = {str(i): agent.step.state_dict() for i, agent in enumerate(self.agents)}
        state: dict[str, Any] = {"agents": agents, "order": self.generator.get_state()}
        state |= {"buffer": self.buffer.state_dict(), "critic": self.critic.state_dict()}
        return state | ({"annealing": self.annealing.state_dict()} if self.annealing is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        for i, agent in enumerate(self.agents):
            agent.step.load_state_dict(state["agents"][str(i)])
        self.buffer.load_state_dict(state["buffer"])
        self.critic.load_state_dict(state["critic"])
        self.generator.set_state(state["order"].cpu())
        if self.annealing is not None:
            self.annealing.load_state_dict(state["annealing"])
