"""Games with known answers: what an algorithm must learn on them follows from the payoffs by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, Categorical, TensorSpec

from tdmarl.envs.batched import BatchedEnv, Entries, Outcome, one_hot

Device = torch.device | str | None


def _agents(n: int) -> dict[str, list[str]]:
    return {"agents": [f"agent_{i}" for i in range(n)]}


class _MatrixGame:
    """``payoff`` ``[n, K_1, ..., K_n]``: what each agent gets for every joint action."""

    def __init__(self, payoff: Tensor, steps: int | None) -> None:
        self.payoff, self.steps, self.n_agents = payoff, steps, payoff.shape[0]
        self.choices = list(payoff.shape[1:])
        self.group_map = _agents(self.n_agents)
        available = [[k < own for k in range(max(self.choices))] for own in self.choices]
        self.mask = torch.tensor(available, device=payoff.device)  # [n, K]
        self.unequal = len(set(self.choices)) > 1

    def actions(self) -> dict[str, TensorSpec]:
        return {"agents": Categorical(max(self.choices), shape=(self.n_agents,))}

    def start(self, num_envs: int, device: torch.device, random: torch.Generator) -> TensorDict:
        played = torch.zeros(num_envs, 1, dtype=torch.int64, device=device)
        return TensorDict(played=played, batch_size=[num_envs])

    def step(self, state: TensorDict, actions: dict[str, Tensor]) -> tuple[TensorDict, Outcome]:
        joint: tuple[Any, ...] = (slice(None), *actions["agents"].unbind(-1))  # n times [E]
        reward = self.payoff[joint].T.unsqueeze(-1)  # [E, n, 1]
        played = state["played"] + 1
        over = torch.zeros_like(played, dtype=torch.bool) if self.steps is None else played >= self.steps
        return TensorDict(played=played, batch_size=state.batch_size), Outcome({"agents": reward}, over)

    def show(self, state: TensorDict) -> Entries:
        E = state.batch_size[0]
        own: Entries = {"observation": torch.ones(E, self.n_agents, 1, device=self.payoff.device)}
        if self.unequal:
            own["action_mask"] = self.mask.expand(E, *self.mask.shape)
        return {"agents": own}


def matrix_game(
    payoff: Any,
    num_envs: int,
    steps: int | None = 1,
    *,
    max_steps: int | None = None,
    seed: int = 0,
    device: Device = None,
) -> BatchedEnv:
    """A one-shot or repeated game, for what an algorithm's estimates and equilibria should be.

    Every agent always observes a constant 1, ``[E, n, 1]``. Agents with fewer choices than others have the missing
    ones False in ``("agents", "action_mask")``.

    Args:
        payoff (array or sequence of arrays): nested lists, an array or a tensor with one axis per agent is a reward
            that all share: ``payoff[a_1, ..., a_n]``. A list or tuple of n arrays or tensors, each with n axes, is
            one payoff per agent.
        num_envs (int): number of environments.
        steps (int, optional): the game is played so often, and is then ``terminated``; None: without end.
        max_steps (int, optional): time limit, ``truncated``.
        seed (int): taken for the sake of uniformity; nothing is drawn.
        device (torch.device, optional): where everything lives.

    Raises:
        ValueError: the payoff has no axis, an empty one, an entry that is no finite number, or payoffs of agents
            have unlike shapes or another number of axes than there are agents.

    Example:
        >>> env = matrix_game([[11.0, -30.0, 0.0], [-30.0, 7.0, 0.0], [0.0, 6.0, 5.0]], num_envs=4, steps=25)
        >>> env.rollout(25)["next", "agents", "reward"].shape
        torch.Size([4, 25, 2, 1])
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps} must be at least 1, or None for a game without end.")
    device = torch.get_default_device() if device is None else torch.device(device)
    return BatchedEnv(_MatrixGame(_payoff(payoff).to(device), steps), num_envs, max_steps, seed, device)


def _payoff(payoff: Any) -> Tensor:
    """``[n, K_1, ..., K_n]``."""
    given = isinstance(payoff, (list, tuple)) and len(payoff) > 0 and all(hasattr(p, "shape") for p in payoff)
    if given and all(len(p.shape) > 0 for p in payoff):
        tables = [_table(p, f"payoff[{i}]") for i, p in enumerate(payoff)]
        shapes = [tuple(table.shape) for table in tables]
        if len(set(shapes)) > 1 or len(shapes[0]) != len(tables):
            raise ValueError(
                f"the payoffs of {len(tables)} agents have shapes {shapes}; expected one shape with {len(tables)} "
                "axes, one for each agent's choice. A reward that all share is one array, not a list of arrays."
            )
        return torch.stack(tables)
    table = _table(payoff, "payoff")
    return table.expand(table.ndim, *table.shape)


def _table(payoff: Any, name: str) -> Tensor:
    try:
        table = torch.as_tensor(payoff, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} is no table of numbers ({error}); expected equally long nested lists."
        ) from error
    if table.ndim == 0 or table.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(table.shape)}; expected one axis per agent, as long as its number of choices."
        )
    if not table.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; expected finite numbers, for they are learned from.")
    return table


class _TwoStepGame:
    """States 0, 1 (2A) and 2 (2B)."""

    group_map = _agents(2)

    def actions(self) -> dict[str, TensorSpec]:
        return {"agents": Categorical(2, shape=(2,))}

    def start(self, num_envs: int, device: torch.device, random: torch.Generator) -> TensorDict:
        place = torch.zeros(num_envs, 1, dtype=torch.int64, device=device)
        return TensorDict(place=place, batch_size=[num_envs])

    def step(self, state: TensorDict, actions: dict[str, Tensor]) -> tuple[TensorDict, Outcome]:
        place, action = state["place"], actions["agents"]  # [E, 1], [E, 2]
        first, both = place == 0, action.sum(-1, keepdim=True)  # [E, 1]
        risky = (both + (both - 1).clamp_min(0) * 6).float()  # 0, 1, 8 for none, one, both playing B
        reward = risky.masked_fill(place == 1, 7.0).masked_fill(first, 0.0)  # [E, 1]
        place = torch.where(first, action[:, :1] + 1, place)
        shared = reward.unsqueeze(1).expand(-1, 2, 1)  # [E, n, 1]
        return TensorDict(place=place, batch_size=state.batch_size), Outcome(
            {"agents": shared.clone()}, ~first
        )

    def show(self, state: TensorDict) -> Entries:
        place = one_hot(state["place"].squeeze(-1), 3)  # [E, 3]
        return {"agents": {"observation": place.unsqueeze(1).repeat(1, 2, 1)}, "state": place}


def two_step_game(
    num_envs: int, *, max_steps: int | None = None, seed: int = 0, device: Device = None
) -> BatchedEnv:
    """The QMIX paper's game that a sum of values cannot represent (Rashid et al. 2018, section 5).

    In the first state agent 0's choice leads to 2A or to 2B, without reward. In 2A the reward is 7 whatever is
    done; in 2B it is 0 for (A, A), 1 for (A, B) and (B, A), 8 for (B, B). Both agents get it and see the state, one-hot
    ``[E, 2, 3]``, which is also the root ``state`` ``[E, 3]``. The best return is 8; VDN settles for 7.

    Args:
        num_envs (int): number of environments.
        max_steps (int, optional): time limit, ``truncated``.
        seed (int): taken for the sake of uniformity; nothing is drawn.
        device (torch.device, optional): where everything lives.
    """
    return BatchedEnv(_TwoStepGame(), num_envs, max_steps, seed, device)


class _ContinuousGame:
    def __init__(self, reward: Callable[[Tensor], Tensor], n_agents: int, low: float, high: float) -> None:
        self.reward, self.n_agents, self.low, self.high = reward, n_agents, low, high
        self.group_map = _agents(n_agents)

    def actions(self) -> dict[str, TensorSpec]:
        return {"agents": Bounded(self.low, self.high, (self.n_agents, 1))}

    def start(self, num_envs: int, device: torch.device, random: torch.Generator) -> TensorDict:
        played = torch.zeros(num_envs, 1, dtype=torch.bool, device=device)
        return TensorDict(played=played, batch_size=[num_envs])

    def step(self, state: TensorDict, actions: dict[str, Tensor]) -> tuple[TensorDict, Outcome]:
        reward = self.reward(actions["agents"].squeeze(-1)).unsqueeze(-1)  # [E, n, 1]
        over = torch.ones_like(state["played"])
        return TensorDict(played=over, batch_size=state.batch_size), Outcome({"agents": reward}, over.clone())

    def show(self, state: TensorDict) -> Entries:
        observation = torch.ones(state.batch_size[0], self.n_agents, 1, device=state["played"].device)
        return {"agents": {"observation": observation}}


def continuous_game(
    reward: Callable[[Tensor], Tensor],
    n_agents: int = 2,
    num_envs: int = 64,
    *,
    low: float = -1.0,
    high: float = 1.0,
    seed: int = 0,
    device: Device = None,
) -> BatchedEnv:
    """A one-shot game of continuous actions, for equilibria and gradients known by hand.

    Every agent observes a constant 1; actions ``[E, n, 1]`` are clipped to the box, and the only step terminates.

    Args:
        reward (callable): actions ``[E, n]`` to each agent's reward ``[E, n]``.
        n_agents (int): number of agents, ``n``.
        num_envs (int): number of environments, ``E``.
        low, high (float): bounds of an action.
        seed (int): taken for the sake of uniformity; nothing is drawn.
        device (torch.device, optional): where everything lives.

    Raises:
        ValueError: the reward has a wrong shape.

    Example:
        >>> env = continuous_game(lambda a: -(a - 0.5).square() - a.flip(-1))  # plays (0.5, 0.5) in equilibrium
    """
    if n_agents < 1 or not low < high:
        raise ValueError(f"n_agents={n_agents} must be at least 1 and low={low} below high={high}.")
    device = torch.get_default_device() if device is None else torch.device(device)
    found = reward(torch.zeros(3, n_agents, device=device))
    if not isinstance(found, Tensor) or found.shape != (3, n_agents) or found.dtype != torch.float32:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"reward gives {what} for actions of shape (3, {n_agents}); expected torch.float32 (3, {n_agents}): a "
            "reward for each environment and agent. A shared one needs .unsqueeze(-1).expand_as(actions)."
        )
    return BatchedEnv(_ContinuousGame(reward, n_agents, low, high), num_envs, None, seed, device)


class _MemoryGame:
    def __init__(self, n_agents: int, cues: int, delay: int) -> None:
        self.n_agents, self.cues, self.delay = n_agents, cues, delay
        self.group_map = _agents(n_agents)

    def actions(self) -> dict[str, TensorSpec]:
        return {"agents": Categorical(self.cues, shape=(self.n_agents,))}

    def start(self, num_envs: int, device: torch.device, random: torch.Generator) -> TensorDict:
        cue = torch.randint(self.cues, (num_envs, self.n_agents), generator=random, device=device)
        time = torch.zeros(num_envs, 1, dtype=torch.int64, device=device)
        return TensorDict(cue=cue, time=time, batch_size=[num_envs])

    def step(self, state: TensorDict, actions: dict[str, Tensor]) -> tuple[TensorDict, Outcome]:
        asked = state["time"] == self.delay  # [E, 1]
        right = (actions["agents"] == state["cue"]).float().mean(-1, keepdim=True)  # [E, 1]
        reward = right.masked_fill(~asked, 0.0).unsqueeze(1).repeat(1, self.n_agents, 1)  # [E, n, 1]
        state = TensorDict(cue=state["cue"], time=state["time"] + 1, batch_size=state.batch_size)
        return state, Outcome({"agents": reward}, asked)

    def show(self, state: TensorDict) -> Entries:
        time = state["time"].unsqueeze(-1)  # [E, 1, 1]
        cue = one_hot(state["cue"], self.cues).masked_fill(time != 0, 0.0)  # [E, n, cues]
        asked = (time == self.delay).float().expand(-1, self.n_agents, 1)
        return {"agents": {"observation": torch.cat([cue, asked], -1)}}


def memory_game(
    num_envs: int,
    n_agents: int = 2,
    cues: int = 2,
    delay: int = 4,
    *,
    max_steps: int | None = None,
    seed: int = 0,
    device: Device = None,
) -> BatchedEnv:
    """A game that needs memory, to prove recurrent networks: what was shown first must be repeated last.

    In the first step each agent sees a cue of its own, drawn anew, one-hot. ``delay`` steps later it sees only a flag
    that asks for the cue; between them it sees zeros, and what it does does not matter. The reward of that last step,
    which every agent gets, is the share of agents whose action was their cue. Its mean is 1 for agents that
    remember, and at most ``1 / cues`` for agents that act on what they see.

    Args:
        num_envs (int): number of environments.
        n_agents (int): number of agents.
        cues (int): how many cues there are, and actions.
        delay (int): steps between cue and question; an episode has ``delay + 1``.
        max_steps (int, optional): time limit, ``truncated``.
        seed (int): of the cues.
        device (torch.device, optional): where everything lives.

    Observations are ``[E, n, cues + 1]``.
    """
    for name, value, least in (("n_agents", n_agents, 1), ("cues", cues, 2), ("delay", delay, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    return BatchedEnv(_MemoryGame(n_agents, cues, delay), num_envs, max_steps, seed, device)
