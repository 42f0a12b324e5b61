"""Schedules: how a collected batch becomes a number of optimization steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode

from tdmarl import reduce, seeds
from tdmarl.buffers import BatchBuffer, Buffer
from tdmarl.step import Annealing, Step
from tdmarl.trust import TrustRegionStep


class Learner:
    """Prepares a batch, stores its rows, and takes steps on samples: the schedule of every algorithm but HAPPO.

    On-policy and off-policy learning differ by the buffer alone.

    Args:
        step (Step): one optimization step.
        buffer (Buffer): a :class:`BatchBuffer`, or any TorchRL replay buffer.
        updates (int, optional): steps per batch; None asks a :class:`BatchBuffer` for its epochs.
        prepare (callable, optional): batch to batch, such as :class:`~tdmarl.prepare.Advantage`.
        annealing (Annealing, optional): advanced by the frames of each batch, after its updates.
        modules (mapping of str to nn.Module, optional): what else changes and belongs to the state, such as an
            exploration schedule, or moments that ``prepare`` takes in.
        mode (str): see :meth:`Step.accelerate`.
        seed (int): of what ``prepare`` and the losses draw, such as the next actions of a critic that reads them.

    Attributes:
        accelerated (callable): what takes the steps: ``step`` itself, or the compiled function that stands for it.

    Returns:
        calling it with a batch ``[*B, T]`` returns a tensordict of metrics, averaged over the steps, on the device;
        an empty one while a buffer says that it is not ``ready``.
    """

    def __init__(
        self,
        step: Step,
        buffer: Buffer,
        *,
        updates: int | None = None,
        prepare: Callable[[TensorDictBase], TensorDictBase] | None = None,
        annealing: Annealing | None = None,
        modules: Mapping[str, nn.Module] | None = None,
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
        self.modules = dict(modules or {})
        self.accelerated = step.accelerate(mode)
        self.generator = seeds.started(seed, step.parts[0].params[0].device)

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        frames = batch.numel() // (batch.shape[0] if self.step.seed_axis else 1)
        batch = batch.copy()  # entries are added; the caller's batch stays as it is
        if self.prepare is not None:
            with torch.no_grad(), reduce.seed_axis(self.step.seed_axis), seeds.routed(self.generator):
                batch = self.prepare(batch)
        self._check(batch)
        rows = batch.select(*self.step.in_keys, *self.step.optional_keys, strict=False)
        # ours cut rows themselves; TorchRL's buffers store what they are given, one transition a row
        self.buffer.extend(rows if getattr(self.buffer, "cuts_rows", False) else rows.reshape(-1))
        self.step.begin()
        taken = self.buffer.n_updates if self.updates is None else self.updates  # type: ignore[attr-defined]
        if not getattr(self.buffer, "ready", True):
            taken = 0
        with seeds.routed(self.generator):  # what losses draw
            metrics = [self._update() for _ in range(taken)]
        if isinstance(self.buffer, BatchBuffer):
            self.buffer.empty()
        if self.annealing is not None:
            self.annealing.advance(frames)
        names = list(dict.fromkeys(key for m in metrics for key in m.keys()))
        found = {name: torch.stack([m.get(name) for m in metrics if name in m.keys()]) for name in names}
        return TensorDict({name: values.sum(0) / len(values) for name, values in found.items()})

    def _update(self) -> TensorDictBase:
        rows = self.buffer.sample()
        found = self.accelerated(rows)
        if self.step.row_keys:
            for key in self.step.row_keys:
                rows.set(key, found.pop(key))
            self.buffer.update_tensordict_priority(rows)  # type: ignore[attr-defined]
        return found

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
        state |= {name: module.state_dict() for name, module in self.modules.items()}
        return state | ({"annealing": self.annealing.state_dict()} if self.annealing is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.step.load_state_dict(state["step"])
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
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
        step (Step or TrustRegionStep): a step on the agent's rows, with flat keys.
    """

    group: str
    index: int
    actor: Any
    step: Step | TrustRegionStep

    def view(self, batch: TensorDictBase) -> TensorDictBase:
        """The agent alone: its entries ``[*B]`` under flat keys, its advantage times its factor."""
        keys = dict.fromkeys([*self.step.in_keys, *self.step.optional_keys, *self.actor.in_keys, "factor"])
        common = {key: batch.get(key) for key in keys if key == "is_init"}  # no agent's
        group = {key: batch.get((self.group, key), None) for key in keys}  # each [*B, n, ...]
        mine = {key: x.select(batch.ndim, self.index) for key, x in group.items() if x is not None} | common
        mine["advantage"] = mine["factor"] * mine["advantage"]
        return TensorDict(mine, batch_size=batch.batch_size)

    @torch.no_grad()
    def log_prob(self, view: TensorDictBase) -> Tensor:
        """Of the actions taken, by the agent's present policy, ``[*B]``; a recurrent one starts at the stored state."""
        with set_recurrent_mode(True):
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

    Attributes:
        accelerated (list of callable): for each agent what takes its steps; see :class:`Learner`.
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
        self.generator = torch.Generator().manual_seed(
            seed
        )  # on the host: the order is one of Python's calls
        self.accelerated = [agent.step.accelerate(mode) for agent in agents]
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
        agent, take = self.agents[i], self.accelerated[i]
        view = agent.view(batch)
        before = agent.log_prob(view)
        self.buffer.extend(view)
        agent.step.begin()
        metrics = [take(self.buffer.sample()) for _ in range(self.buffer.n_updates)]
        self.buffer.empty()
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
