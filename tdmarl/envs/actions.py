"""The actions of a group of agents: their spec, their check, and what they mean to the simulator."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrl.data import Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec

from tdmarl.envs.simulation import Action


class ActionOptions(NamedTuple):
    """How actions are given: continuous, or choices per dimension or of their product, index or one-hot."""

    continuous: bool
    multi: bool
    one_hot: bool


def action_size(agent: Any, world: Any, continuous: bool) -> tuple[int, ...]:
    """What agents of one action entry must agree in: sizes if continuous, else numbers of choices."""
    talks = world.dim_c if world.dim_c > 0 and not agent.silent else 0
    if continuous:
        return agent.action_size, talks
    return (*agent.discrete_action_nvec, *([talks] if talks else []))


class ContinuousActions:
    """Turns `[E, n, a]` continuous actions into forces and messages, clamped to each agent's range.

    Dimensions that only other agents of the group have are padding, with `low == high == 0` in the spec. A
    message follows the physical part directly.
    """

    def __init__(self, agents: list[Any], world: Any) -> None:
        sizes = [action_size(agent, world, continuous=True) for agent in agents]
        width = max(map(sum, sizes))
        limits = torch.zeros(2, len(agents), width, device=world.device)  # [2, n, a]
        self._factor = torch.ones(len(agents), width, device=world.device)  # [n, a]
        for i, (agent, (force, message)) in enumerate(zip(agents, sizes)):
            limits[0, i, :force] = -agent.action.u_range_tensor
            limits[1, i, :force] = agent.action.u_range_tensor
            limits[1, i, force : force + message] = 1
            self._factor[i, :force] = agent.action.u_multiplier_tensor
        self._low, self._high, self._sizes = limits[0], limits[1], sizes
        self.spec: TensorSpec = Bounded(limits[0], limits[1], device=world.device, dtype=torch.float32)
        self.mask: Tensor | None = None

    def random(self, envs: int) -> Tensor:
        """Uniform within the bounds."""
        return self.spec.expand(envs, *self.spec.shape).rand()

    def invalid(self, action: Tensor) -> Tensor:
        """Where the action is not a number."""
        return action.isnan()

    def decode(self, action: Tensor) -> list[Action]:
        """Force and message of each agent."""
        scaled = torch.clamp(action, self._low, self._high) * self._factor  # [E, n, a]
        found: list[Action] = []
        for own, (force, message) in zip(scaled.unbind(1), self._sizes):
            found.append((own[:, :force], own[:, force : force + message] if message else None))
        return found


class DiscreteActions:
    """Turns choices into forces and messages.

    Each dimension of an agent has a number of choices, spread over its range (with an odd number, choice 0 is
    zero and the others follow from low to high); a message is one dimension with a choice per symbol. The
    choices are `[E, n, k]`, one per dimension, when `multi`, else `[E, n]`, an index into their product in
    row-major order; or the same as one-hot vectors.

    Attributes:
        spec (TensorSpec): of `[n, ...]` actions.
        mask (Tensor or None): `[n, choices]`, False for choices that only other agents of the group have.
    """

    def __init__(self, agents: list[Any], world: Any, multi: bool, one_hot: bool) -> None:
        device = world.device
        choices = [action_size(agent, world, continuous=False) for agent in agents]
        dimensions = max(map(len, choices))
        counts = torch.ones(len(agents), dimensions, dtype=torch.int64)  # [n, k]
        for i, own in enumerate(choices):
            counts[i, : len(own)] = torch.tensor(own)
        self._agents, self._multi, self._one_hot = len(agents), multi, one_hot
        self._forces = [agent.action_size for agent in agents]
        self._messages = [own[-1] if len(own) > force else 0 for own, force in zip(choices, self._forces)]
        self._counts = counts.to(device)
        strides = counts.flip(1).cumprod(1).flip(1) // counts  # [n, k] product of the later counts
        self._strides = strides.to(device)
        self._values = torch.zeros(
            len(agents), dimensions, int(counts.max()), device=device
        )  # [n, k, choices]
        for i, agent in enumerate(agents):
            for k, n in enumerate(agent.discrete_action_nvec):
                factor = agent.action.u_multiplier_tensor[k]
                self._values[i, k, :n] = _spread(n, agent.action.u_range_tensor[k]) * factor
        if multi:
            width = counts.amax(0).tolist()
            self.spec: TensorSpec = (MultiOneHot if one_hot else MultiCategorical)(
                width,
                shape=(len(agents), sum(width) if one_hot else dimensions),
                device=device,
                dtype=torch.int64,
            )
            valid = torch.cat(
                [torch.arange(w) < counts[:, k, None] for k, w in enumerate(width)], 1
            )  # [n, sum]
        else:
            products = [math.prod(own) for own in choices]
            shape = (len(agents), max(products)) if one_hot else (len(agents),)
            self.spec = (OneHot if one_hot else Categorical)(
                max(products), shape=shape, device=device, dtype=torch.int64
            )
            valid = torch.arange(max(products)) < torch.tensor(products)[:, None]  # [n, choices]
        self._bounds = self._counts if multi else self._counts.prod(1)
        self.mask = None if bool(valid.all()) else valid.to(device)
        if self.mask is not None and one_hot:  # specs of indices lose their mask when they are expanded
            self.spec.update_mask(self.mask)

    def _indices(self, action: Tensor) -> Tensor:
        return self.spec.to_categorical(action) if self._one_hot else action  # type: ignore[attr-defined]

    def random(self, envs: int) -> Tensor:
        """Uniform valid choices, where the spec itself does not know which are."""
        if self.mask is None or self._one_hot:
            return self.spec.expand(envs, *self.spec.shape).rand()
        return (torch.rand(envs, *self.spec.shape, device=self._bounds.device) * self._bounds).to(torch.int64)

    def invalid(self, action: Tensor) -> Tensor:
        """Where the agent does not have the choice."""
        index = self._indices(action)
        return (index < 0) | (index >= self._bounds)

    def decode(self, action: Tensor) -> list[Action]:
        """Force and message of each agent."""
        index = self._indices(action)
        if not self._multi:
            index = index[..., None] // self._strides % self._counts  # [E, n, k]
        values = self._values.expand(len(index), *self._values.shape)
        forces = values.gather(-1, index.unsqueeze(-1)).squeeze(-1)  # [E, n, k]
        found: list[Action] = []
        for i, (force, message) in enumerate(zip(self._forces, self._messages)):
            symbol = (
                index[:, i, force, None] == torch.arange(message, device=index.device) if message else None
            )
            found.append((forces[:, i, :force], None if symbol is None else symbol.to(torch.float32)))
        return found


def _spread(choices: int, limit: Tensor) -> Tensor:
    """The value of each choice, from -limit to limit, with zero first when the number is odd."""
    places = torch.arange(choices, device=limit.device)
    if choices % 2:
        half = choices // 2
        places = torch.cat([places[half : half + 1], places[:half], places[half + 1 :]])
    return (places / (choices - 1)) * (2 * limit) - limit


def make_actions(
    agents: list[Any], world: Any, options: ActionOptions
) -> ContinuousActions | DiscreteActions:
    """The actions of a group of agents."""
    if options.continuous:
        return ContinuousActions(agents, world)
    return DiscreteActions(agents, world, options.multi, options.one_hot)
