"""Networks with memory, and their hidden states under their keys: one module for acting and for learning.

The state of an actor is ``(group, "actor_hidden")``, that of a critic ``(group, "critic_hidden")``,
``[*B, n, layers, h]``, and the one after the step is under ``next``. Root ``is_init`` ``[*B, 1]`` says where an
episode begins. Collectors and ``evaluate`` start states at zero and carry them from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode

from tdmarl.keys import present
from tdmarl.nets import GAINS, AgentGRU, AgentLinear, AgentMLP, AgentNorm, Sharing

STARTS = ("stored", "zero")


def after(key: NestedKey) -> NestedKey:
    """The key of an entry after the step.

    Example:
        >>> after(("agents", "actor_hidden")), after("critic_hidden")
        (('next', 'agents', 'actor_hidden'), ('next', 'critic_hidden'))
    """
    return ("next", key) if isinstance(key, str) else ("next", *key)


def hidden_keys(module: Any) -> list[NestedKey]:
    """The states that a module carries: what it reads at the root and writes under ``next``; any TorchRL module."""
    return [key for key in module.in_keys if after(key) in module.out_keys]


class AgentRNN(nn.Module):
    """A perceptron, a gated recurrent unit and a linear layer for each agent: every recurrent actor's and critic's.

    The order of layers is that of recurrent MAPPO and of QMIX's agents.

    Args:
        n_agents (int): ``n``.
        in_features (int): ``in``.
        out_features (int): ``out``.
        hidden (sequence of int): widths of the perceptron's layers, all of them before the unit; at least one.
        hidden_size (int): ``h``, the unit's width.
        layers, share, device: see :class:`AgentGRU`.
        agent_id, activation, layer_norm, output_gain: see :class:`AgentMLP`; the unit's output is normalized, too.

    Shape:
        a step: ``[*B, n, in]`` (or ``[*B, 1, in]``), state ``[*B, n, layers, h]`` and ``is_init`` ``[*B, 1]`` to the
        output ``[*B, n, out]`` and the next state. A sequence: ``[*B, L, n, in]``, the state before it and
        ``is_init`` ``[*B, L, 1]`` to ``[*B, L, n, out]`` and the states after each step.
    """

    def __init__(
        self,
        n_agents: int,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (64,),
        hidden_size: int = 64,
        layers: int = 1,
        share: Sharing = True,
        agent_id: bool = False,
        activation: type[nn.Module] = nn.Tanh,
        layer_norm: bool = False,
        output_gain: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("A recurrent network needs at least one layer before its unit: hidden=(64,).")
        *inner, width = hidden
        perceptron = AgentMLP(
            n_agents, in_features, width, hidden=inner, share=share, agent_id=agent_id, activation=activation,
            layer_norm=layer_norm, output_gain=GAINS.get(activation, 1.0), device=device,
        )  # fmt: skip
        after: list[nn.Module] = [activation()]
        if layer_norm:
            after.append(AgentNorm(n_agents, width, share=share, device=device))
        self.encoder = nn.Sequential(perceptron, *after)
        self.memory = AgentGRU(n_agents, width, hidden_size, layers=layers, share=share, device=device)
        self.norm = AgentNorm(n_agents, hidden_size, share=share, device=device) if layer_norm else None
        self.head = AgentLinear(
            n_agents, hidden_size, out_features, share=share, gain=output_gain, device=device
        )
        self.rows: list[dict[str, int]] = [{} for _ in range(n_agents)]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """``(n, layers, h)``."""
        return self.memory.state_shape

    def forward(self, x: Tensor, state: Tensor, is_init: Tensor) -> tuple[Tensor, Tensor]:
        states = self.memory(self.encoder(x), state, is_init)
        out = states.select(-2, -1)  # of the last layer
        return self.head(out if self.norm is None else self.norm(out)), states


def agent_net(
    n_agents: int, in_features: int, out_features: int, *, recurrent: str | int | None = None, **options: Any
) -> AgentMLP | AgentRNN:
    """The network of an actor or a critic: an :class:`AgentMLP`, or an :class:`AgentRNN` if it shall remember.

    Args:
        n_agents, in_features, out_features: see :class:`AgentMLP`.
        recurrent ("gru", int or None): None is feed-forward; a number is the width of a gated recurrent unit after
            the hidden layers; ``"gru"`` makes it as wide as the last of them.
        **options: those of :class:`AgentMLP`.
    """
    if recurrent is None:
        return AgentMLP(n_agents, in_features, out_features, **options)
    hidden = options.get("hidden", (64,))
    if isinstance(recurrent, bool) or (recurrent != "gru" and not isinstance(recurrent, int)):
        raise ValueError(f"recurrent={recurrent!r} must be None, 'gru' or the width of the recurrent unit.")
    width = recurrent if isinstance(recurrent, int) else hidden[-1] if hidden else 0
    return AgentRNN(n_agents, in_features, out_features, hidden_size=width, **options)


class Recurrent(TensorDictModule):
    """A network with memory that acts step by step and learns from whole sequences.

    Acting, every entry of the batch is one step with its own state. Inside TorchRL's ``set_recurrent_mode(True)``,
    which every ``LossModule`` sets for itself, the last batch dimension is time: a row is a sequence, of whose
    states only the first is read. (A batch ``[M]`` has no time: its rows are steps, each from its stored state.)

    Args:
        module (nn.Module): called with the entries of ``in_keys``, the state and ``is_init``; returns those of
            ``out_keys``, and last the state (a sequence: the states) after the step. The ranks of input and state
            tell it which of the two it is; see :class:`tdmarl.nets.AgentGRU`.
        in_keys (sequence of NestedKey): what it reads besides.
        out_keys (sequence of NestedKey): what it writes besides.
        hidden (NestedKey): the state's key, such as ``("agents", "actor_hidden")``.
        state_shape (sequence of int): of the state, without batch dimensions: ``(n, layers, h)``.
        start ("stored" or "zero"): where sequences start.
        burn_in (int): so many steps of each sequence only bring the state up to date: no gradient goes through
            them. What they put out is written like the others; a loss leaves it out.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> net, key = AgentRNN(3, 4, 2), ("agents", "actor_hidden")
        >>> actor = Recurrent(net, [("agents", "observation")], [("agents", "action")], key, net.state_shape)
        >>> agents = TensorDict(observation=torch.zeros(5, 10, 3, 4), actor_hidden=torch.zeros(5, 10, 3, 1, 64))
        >>> rows = TensorDict(agents=agents, is_init=torch.zeros(5, 10, 1, dtype=torch.bool), batch_size=[5, 10])
        >>> with set_recurrent_mode(True):
        ...     actor(rows)["agents", "action"].shape
        torch.Size([5, 10, 3, 2])
        >>> actor(rows[:, 0])["agents", "action"].shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        hidden: NestedKey,
        state_shape: Sequence[int],
        *,
        start: str = "stored",
        burn_in: int = 0,
    ) -> None:
        super().__init__(module, in_keys=[*in_keys, hidden, "is_init"], out_keys=[*out_keys, after(hidden)])
        if start not in STARTS or burn_in < 0:
            raise ValueError(f"start={start!r} must be one of {STARTS}, and burn_in={burn_in} not negative.")
        self.hidden, self.state_shape, self.start, self.burn_in = hidden, tuple(state_shape), start, burn_in

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """What tells collectors of the state: tdmarl's, ``evaluate``, and TorchRL's."""
        spec: Any = Unbounded(self.state_shape)
        path = (self.hidden,) if isinstance(self.hidden, str) else self.hidden
        for name in reversed(path[1:]):
            spec = Composite({name: spec}, shape=self.state_shape[:1])
        return TensorDictPrimer(Composite({path[0]: spec}), expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:  # type: ignore[override]
        sequence = bool(recurrent_mode()) and tensordict.ndim > 1
        *inputs, state, is_init = self._read(tensordict, sequence)
        if sequence:
            outs = self._rows(tensordict.ndim - 1, inputs, state, is_init)
        else:
            outs = self.module(*inputs, state, is_init)
        for key, out in zip(self.out_keys, outs):
            tensordict.set(key, out)
        return tensordict

    def _read(self, tensordict: TensorDictBase, sequence: bool) -> list[Tensor]:
        found = {key: tensordict.get(key, None) for key in self.in_keys}
        if sequence:
            state = found[self.hidden]
            if self.start == "zero":
                rows = tensordict.shape[:-1]
                state = found[self.in_keys[0]].new_zeros(*rows, *self.state_shape)
            elif state is not None:
                state = state.select(tensordict.ndim - 1, 0)
            found[self.hidden] = state
        for key, value in found.items():
            if value is None:
                raise KeyError(
                    f"A recurrent module reads {key!r}, which is not in the batch. 'is_init' and hidden states are "
                    "written by tdmarl.Collector and tdmarl.evaluate, and in TorchRL's collectors by the transforms "
                    "InitTracker and make_tensordict_primer(); a critic's states by tdmarl.CarryHidden."
                )
        return [found[key] for key in self.in_keys]  # which may name is_init twice

    def _rows(self, time: int, inputs: list[Tensor], state: Tensor, is_init: Tensor) -> Sequence[Tensor]:
        length = is_init.shape[time]
        if not self.burn_in:
            return self.module(*inputs, state, is_init)
        if self.burn_in >= length:
            raise ValueError(
                f"burn_in={self.burn_in} leaves nothing of sequences of length {length} to learn from."
            )
        parts = [x.split([self.burn_in, length - self.burn_in], time) for x in (*inputs, is_init)]
        heads, tails = zip(*parts)
        with torch.no_grad():
            first = self.module(*heads[:-1], state, heads[-1])
        then = self.module(*tails[:-1], first[-1].select(time, -1), tails[-1])
        return [torch.cat(pair, time) for pair in zip(first, then)]


class Direct(TensorDictModule):
    """A TensorDictModule of tensors in and tensors out, without the search for other kinds of outputs.

    ``TensorDictModule`` asks of every output whether it could be made a tensordict, and on the way the file system for
    a package that reads files: more time than a small network's forward pass takes.
    """

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:  # type: ignore[override]
        out = self.module(*present(tensordict, self.in_keys))
        for key, value in zip(self.out_keys, out if isinstance(out, tuple) else (out,)):
            tensordict.set(key, value)
        return tensordict


def as_module(
    net: nn.Module,
    in_keys: Sequence[NestedKey],
    out_keys: Sequence[NestedKey],
    hidden: NestedKey,
    state_shape: Sequence[int] | None,
) -> TensorDictModule:
    """A network as a TensorDict module: a :class:`Recurrent` one if it has a state.

    Args:
        net, in_keys, out_keys, hidden: see :class:`Recurrent`.
        state_shape (sequence of int, optional): ``net.state_shape``; None for a network without memory.
    """
    if state_shape is None:
        return Direct(net, in_keys=list(in_keys), out_keys=list(out_keys))
    return Recurrent(net, in_keys, out_keys, hidden, state_shape)


class CarryHidden(TensorDictModuleBase):
    """Lets a recurrent critic watch the episodes that are collected, so that its state is known where batches begin.

    Goes behind the policy in what the collector runs; writes nothing but the critic's states under ``next``.

    Args:
        critic (TensorDictModuleBase): any module that reads states and writes them under ``next``.
    """

    def __init__(self, critic: TensorDictModuleBase) -> None:
        super().__init__()
        self.critic = critic
        self.in_keys, self.out_keys = list(critic.in_keys), [after(key) for key in hidden_keys(critic)]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        watched = self.critic(tensordict.select(*self.in_keys))
        for key in self.out_keys:
            tensordict.set(key, watched.get(key))
        return tensordict
