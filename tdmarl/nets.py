"""Networks over the agents of a group, as plain modules with plain parameters: ``[*B, n, in] -> [*B, n, out]``.

Nothing here is a TensorDict module and no parameter is swapped at run time: TorchRL's ``MultiAgentMLP`` breaks
``torch.compile`` inside a loss, and with ``use_td_params=False`` it ignores target parameters without a word.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdmarl.gru import gru

Sharing = Union[bool, Sequence[Sequence[int]]]
"""True: one set of parameters; False: one per agent; ``[[0, 1], [2]]``: agents 0 and 1 share, 2 has its own."""

GAINS = {nn.Tanh: 5 / 3, nn.ReLU: math.sqrt(2)}


def parameter_sets(n_agents: int, share: Sharing) -> list[int]:
    """Which set of parameters each agent uses.

    Example:
        >>> parameter_sets(3, True), parameter_sets(3, False), parameter_sets(3, [[0, 2], [1]])
        ([0, 0, 0], [0, 1, 2], [0, 1, 0])
    """
    if isinstance(share, bool):
        return [0] * n_agents if share else list(range(n_agents))
    sets = {agent: index for index, members in enumerate(share) for agent in members}
    if sorted(agent for members in share for agent in members) != list(range(n_agents)):
        raise ValueError(
            f"The sharing map {[list(m) for m in share]} must name each of the agents 0 to {n_agents - 1} exactly "
            "once, such as [[0, 1], [2]]; or give True (all share) or False (none)."
        )
    return [sets[agent] for agent in range(n_agents)]


Views = dict[tuple[int, int], nn.Parameter]


def alone(module: nn.Module, index: int, views: Views) -> nn.Module:
    """One agent's part of a network for several, on the same memory: what trains it trains the whole.

    Args:
        module (nn.Module): made of this file's modules, whose ``rows`` say which rows are whose.
        index (int): the agent.
        views (dict): the parameters made so far; agents that share a set get the same parameter. Start with ``{}``.

    Returns:
        nn.Module: ``[*B, 1, in] -> [*B, 1, out]``. It keeps the memory of the moment: moving ``module`` to another
        device afterwards, or copying it, parts them.

    Example:
        >>> net, x = AgentMLP(3, 4, 2, share=False), torch.randn(5, 3, 4)
        >>> torch.allclose(alone(net, 1, {})(x[:, 1:2]), net(x)[:, 1:2], atol=1e-6)
        True
    """
    part = copy.deepcopy(module)
    for mine, whole in zip(part.modules(), module.modules()):
        rows = getattr(whole, "rows", None)
        if rows is None:
            if any(True for _ in whole.parameters(recurse=False)):
                raise ValueError(
                    f"{type(whole).__name__} has parameters but no rows that say which agent's they are: build each "
                    "agent's network itself, or use one of tdmarl.nets."
                )
            continue
        for name, row in rows[index].items():
            stacked = getattr(whole, name)
            if isinstance(stacked, nn.Parameter):
                key = (id(stacked), row)
                views[key] = views[key] if key in views else nn.Parameter(stacked.data[row : row + 1])
                setattr(mine, name, views[key])
            elif stacked is not None:
                setattr(mine, name, stacked[row : row + 1])
        mine.sets, mine.n_agents = None, 1  # type: ignore[assignment]
    return part


def _of_agents(parameter: Tensor, sets: list[int] | None) -> Tensor:
    """One row for each agent from one for each set; None where rows are agents already, or there is only one."""
    return parameter if sets is None else torch.stack([parameter[s] for s in sets])


class AgentLinear(nn.Module):
    """A linear layer with one set of parameters for all agents, one each, or one for each part of them.

    With ``agent_id`` the layer also reads which agent it serves: the same function as appending a one-hot
    identity to its input, computed as a row added to the output.

    Args:
        n_agents (int): ``n``.
        in_features (int): ``in``.
        out_features (int): ``out``.
        share (bool or sequence of sequences of int): see :data:`Sharing`.
        agent_id (bool): let the layer know the agent's index.
        gain (float): of the orthogonal initialization, done for each set apart (biases start at zero).
        device (torch.device, optional): where the parameters live.

    Attributes:
        products (torch.dtype, optional): what is multiplied is rounded to it; see :func:`tdmarl.set_precision`.

    Shape:
        ``[*B, n, in]``, or ``[*B, 1, in]`` for one input common to all agents, to ``[*B, n, out]``. The output of
        a common input stays ``[*B, 1, out]`` while nothing tells the agents apart.
    """

    products: torch.dtype | None = None

    def __init__(
        self,
        n_agents: int,
        in_features: int,
        out_features: int,
        *,
        share: Sharing = True,
        agent_id: bool = False,
        gain: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sets = parameter_sets(n_agents, share)
        n_sets = max(sets) + 1
        ids = n_agents if agent_id else 0
        weight = torch.empty(n_sets, out_features, in_features + ids)
        for part in weight:  # `nn.init` takes the first dimension of a stack for a fan
            nn.init.orthogonal_(part, gain)
        weight = weight.transpose(1, 2).contiguous()  # [sets, in + ids, out]
        self.weight = nn.Parameter(weight[:, :in_features].clone().to(device))  # [sets, in, out]
        self.bias = nn.Parameter(torch.zeros(n_sets, out_features, device=device))  # [sets, out]
        own = weight[torch.tensor(sets), in_features + torch.arange(n_agents)] if agent_id else None
        self.agent = nn.Parameter(own.to(device)) if own is not None else None  # [n, out]
        self.sets = None if n_sets in (1, n_agents) else sets
        self.rows = [
            {"weight": s, "bias": s} | ({"agent": i} if agent_id else {}) for i, s in enumerate(sets)
        ]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, dtype = _of_agents(self.weight, self.sets), _of_agents(self.bias, self.sets), x.dtype
        if self.products is not None:
            x, weight, bias = (t.to(self.products) for t in (x, weight, bias))
        if len(weight) == 1:
            y = F.linear(x, weight[0].T, bias[0])
        else:
            # agents first in memory from layer to layer: what is elementwise in between then runs without strides
            x = x.movedim(-2, 0)  # [n or 1, *B, in]
            batch = x.shape[1:-1]
            x = x.reshape(len(x), batch.numel(), x.shape[-1]).expand(len(weight), -1, -1)
            y = torch.baddbmm(bias.unsqueeze(1), x, weight)
            y = y.view(len(weight), *batch, weight.shape[-1]).movedim(0, -2)
        y = y.to(dtype)
        return y if self.agent is None else y + self.agent


class AgentNorm(nn.Module):
    """Layer normalization over features with parameters shared as an :class:`AgentLinear`'s are."""

    def __init__(
        self, n_agents: int, features: int, *, share: Sharing = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        sets = parameter_sets(n_agents, share)
        self.weight = nn.Parameter(torch.ones(max(sets) + 1, features, device=device))
        self.bias = nn.Parameter(torch.zeros(max(sets) + 1, features, device=device))
        self.sets = None if max(sets) + 1 in (1, n_agents) else sets
        self.rows = [{"weight": s, "bias": s} for s in sets]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _of_agents(self.weight, self.sets), _of_agents(self.bias, self.sets)
        if len(weight) == 1:
            return F.layer_norm(x, x.shape[-1:], weight[0], bias[0])
        return F.layer_norm(x, x.shape[-1:]) * weight + bias


class AgentMLP(nn.Module):
    """A multi-layer perceptron for each agent of a group: the network of every feed-forward actor and critic.

    Args:
        n_agents (int): ``n``.
        in_features (int): ``in``.
        out_features (int): ``out``.
        hidden (sequence of int): widths of the hidden layers.
        share (bool or sequence of sequences of int): which agents share parameters; see :data:`Sharing`.
        agent_id (bool): let a network that several agents share know whom it serves.
        activation (type): after each hidden layer.
        layer_norm (bool): normalize the input and each hidden layer, as MAPPO's code does.
        output_gain (float): of the last layer's orthogonal initialization; MAPPO: 0.01 for policies, 1 for values.
        device (torch.device, optional): where the parameters live.

    Shape:
        ``[*B, n, in]`` (or ``[*B, 1, in]``, an input common to all agents) to ``[*B, n, out]``.

    Example:
        >>> AgentMLP(3, 4, 2, share=[[0, 1], [2]])(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 3, 2])
    """

    state_shape: tuple[int, ...] | None = None
    """Of a recurrent network's state; this one has none."""

    def __init__(
        self,
        n_agents: int,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (64, 64),
        share: Sharing = True,
        agent_id: bool = False,
        activation: type[nn.Module] = nn.Tanh,
        layer_norm: bool = False,
        output_gain: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.n_agents, self.in_features, self.out_features = n_agents, in_features, out_features
        gain = GAINS.get(activation, 1.0)
        layers: list[nn.Module] = []
        if layer_norm:
            layers.append(AgentNorm(n_agents, in_features, share=share, device=device))
        width = in_features
        for i, size in enumerate(hidden):
            first = agent_id and i == 0
            layers += [
                AgentLinear(n_agents, width, size, share=share, agent_id=first, gain=gain, device=device)
            ]
            layers += [activation()]
            if layer_norm:
                layers.append(AgentNorm(n_agents, size, share=share, device=device))
            width = size
        first = agent_id and not hidden
        layers.append(
            AgentLinear(
                n_agents, width, out_features, share=share, agent_id=first, gain=output_gain, device=device
            )
        )
        self.layers = nn.Sequential(*layers)
        self.rows: list[dict[str, int]] = [{} for _ in range(n_agents)]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features or x.shape[-2] not in (1, self.n_agents):
            raise ValueError(
                f"AgentMLP got an input of shape {tuple(x.shape)}; expected [*B, {self.n_agents}, {self.in_features}]."
            )
        y = self.layers(x)
        return y.expand(*y.shape[:-2], self.n_agents, -1)


class AgentGRU(nn.Module):
    """A gated recurrent unit for each agent of a group, with parameters shared as an :class:`AgentLinear`'s are.

    Whether it is asked for one step, or for a whole sequence from the state before it, is told by the ranks of input
    and state. Inside a sequence the state is emptied wherever an episode begins. Agents that share parameters
    go through one pass together; see :mod:`tdmarl.gru` for how.

    Args:
        n_agents (int): ``n``.
        in_features (int): ``in``.
        hidden_size (int): ``h``.
        layers (int): units on top of each other.
        share (bool or sequence of sequences of int): see :data:`Sharing`.
        device (torch.device, optional): where the parameters live.

    The parameters have the names and the layout of ``torch.nn.GRU``'s, with one row for each set of agents in front.

    Shape:
        a step: ``[*B, n, in]``, state ``[*B, n, layers, h]`` and ``is_init`` ``[*B, 1]`` to the next state, of the
        same shape. A sequence: ``[*B, L, n, in]``, state ``[*B, n, layers, h]`` before the first step and
        ``is_init`` ``[*B, L, 1]`` to the states after each step, ``[*B, L, n, layers, h]``. The output of the unit is
        the state of the last layer.

    Example:
        >>> net, x, state = AgentGRU(3, 4, 8), torch.randn(5, 10, 3, 4), torch.zeros(5, 3, 1, 8)
        >>> begins = torch.zeros(5, 10, 1, dtype=torch.bool)
        >>> states = net(x, state, begins)
        >>> for t in range(10):
        ...     state = net(x[:, t], state, begins[:, t])
        >>> torch.allclose(states[:, -1], state, atol=1e-6)
        True
    """

    def __init__(
        self,
        n_agents: int,
        in_features: int,
        hidden_size: int,
        *,
        layers: int = 1,
        share: Sharing = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or layers < 1:
            raise ValueError(f"hidden_size={hidden_size} and layers={layers} must be at least 1.")
        self.n_agents, self.in_features, self.hidden_size, self.layers = (
            n_agents,
            in_features,
            hidden_size,
            layers,
        )
        sets = parameter_sets(n_agents, share)
        n_sets, rows = max(sets) + 1, 3 * hidden_size
        self.names: list[tuple[str, ...]] = []  # of each layer's parameters, in torch's order
        for k in range(layers):
            shapes = {
                "weight_ih": (rows, hidden_size if k else in_features),
                "weight_hh": (rows, hidden_size),
            }
            for name, shape in (shapes | {"bias_ih": (rows,), "bias_hh": (rows,)}).items():
                stacked = torch.zeros(n_sets, *shape)
                if len(shape) == 2:
                    for part in stacked:
                        nn.init.orthogonal_(part)
                self.register_parameter(f"{name}_l{k}", nn.Parameter(stacked.to(device)))
            self.names.append(
                tuple(f"{name}_l{k}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            )
        self.sets = None if n_sets in (1, n_agents) else sets
        self.rows = [{name: s for names in self.names for name in names} for s in sets]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """``(n, layers, h)``."""
        return (self.n_agents, self.layers, self.hidden_size)

    def forward(self, x: Tensor, state: Tensor, is_init: Tensor) -> Tensor:
        a_step = x.ndim == state.ndim - 1
        if (
            state.shape[-3:] != self.state_shape
            or (not a_step and x.ndim != state.ndim)
            or x.shape[-2:] != (self.n_agents, self.in_features)
        ):
            raise ValueError(
                f"AgentGRU got an input of shape {tuple(x.shape)} and a state of shape {tuple(state.shape)}; expected "
                f"[*B, {self.n_agents}, {self.in_features}], or [*B, L, ...] for a sequence, and a state [*B, "
                f"{', '.join(map(str, self.state_shape))}]."
            )
        if is_init.shape != (*x.shape[:-2], 1):
            raise ValueError(
                f"AgentGRU got is_init of shape {tuple(is_init.shape)}; expected {(*x.shape[:-2], 1)}: one entry for "
                "each step of each environment."
            )
        states = []
        for layer, before in zip(self.names, state.unbind(-2)):
            weights = [getattr(self, name) for name in layer]
            x = (
                self._step(x, before, is_init, weights)
                if a_step
                else self._sequence(x, before, is_init, weights)
            )
            states.append(x)
        return torch.stack(states, -2)

    def _step(self, x: Tensor, state: Tensor, is_init: Tensor, weights: list[Tensor]) -> Tensor:
        state = state.masked_fill(is_init.unsqueeze(-1), 0)  # [*B, n, h]
        weight_ih, weight_hh, bias_ih, bias_hh = (_of_agents(weight, self.sets) for weight in weights)
        if len(weight_ih) == 1:
            return torch.gru_cell(
                x.reshape(-1, x.shape[-1]), state.reshape(-1, state.shape[-1]),
                weight_ih[0], weight_hh[0], bias_ih[0], bias_hh[0],
            ).reshape(state.shape)  # fmt: skip
        seen = (torch.einsum("...ni,noi->...no", x, weight_ih) + bias_ih).chunk(3, -1)
        kept = (torch.einsum("...ni,noi->...no", state, weight_hh) + bias_hh).chunk(3, -1)
        reset, update = torch.sigmoid(seen[0] + kept[0]), torch.sigmoid(seen[1] + kept[1])
        new = torch.tanh(seen[2] + reset * kept[2])
        return new + update * (state - new)

    def _sequence(self, x: Tensor, state: Tensor, is_init: Tensor, weights: list[Tensor]) -> Tensor:
        sets = len(weights[0])
        of_agent = ([0] if sets == 1 else list(range(sets))) if self.sets is None else self.sets
        if sets == 1:
            of_agent = of_agent * self.n_agents
        parts: list[Tensor] = [x] * self.n_agents
        for s in range(sets):
            agents = [agent for agent, own in enumerate(of_agent) if own == s]
            mine = slice(None) if len(agents) == self.n_agents else agents
            own, before = x[..., mine, :].movedim(-3, 0), state[..., mine, :]  # [L, *B, k, in], [*B, k, h]
            begins = is_init.movedim(-2, 0).expand(own.shape[:-1])  # [L, *B, k]
            after = gru(
                own.reshape(len(own), -1, own.shape[-1]), before.reshape(-1, before.shape[-1]),
                begins.reshape(len(own), -1), [weight[s] for weight in weights],
            )  # fmt: skip
            after = after.reshape(len(own), *before.shape).movedim(0, -3)  # [*B, L, k, h]
            if sets == 1:
                return after
            for agent, part in zip(agents, after.unbind(-2)):
                parts[agent] = part
        return torch.stack(parts, -2)
