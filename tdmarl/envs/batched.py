"""Games written in torch as TorchRL environments: a function of an explicit state does the work, this the rest."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from tdmarl import host, seeds

ENDS = "done", "terminated", "truncated"
Entries = dict[str, Any]


class Outcome(NamedTuple):
    """What a step of a game gives beside the next state.

    Args:
        reward (dict): group to ``[E, n, 1]``.
        terminated (Tensor): ``[E, 1]``, bool: the game is over by its own rules.
    """

    reward: dict[str, Tensor]
    terminated: Tensor


class Game(Protocol):
    """The rules of a game for ``E`` environments at once, without anything that changes in place.

    The state is a flat tensordict ``[E]`` that holds all that the future depends on, random numbers of resets apart.
    ``actions`` are the specs of one environment by group, ``[n]`` or ``[n, a]``. ``start`` draws initial states,
    ``step`` is the transition, and ``show`` what is seen of a state: by group a dictionary with ``observation``
    ``[E, n, o]`` and perhaps ``action_mask``, ``mask`` and ``info``, and perhaps ``state`` ``[E, s]``.
    """

    group_map: dict[str, list[str]]

    def actions(self) -> dict[str, TensorSpec]: ...

    def start(self, num_envs: int, device: torch.device, random: torch.Generator) -> TensorDict: ...

    def step(self, state: TensorDict, actions: dict[str, Tensor]) -> tuple[TensorDict, Outcome]: ...

    def show(self, state: TensorDict) -> Entries: ...


class BatchedEnv(EnvBase):
    """Runs a :class:`Game` in ``E`` environments, with the keys and the ends of :class:`tdmarl.VmasEnv`.

    ``done``, ``terminated`` and ``truncated`` stand at the root ``[E, 1]`` and, the same, in each group
    ``[E, n, 1]``. Any subset of the environments is reset by a mask, without reading from the device. An action
    that is out of range or unavailable raises (on CUDA asynchronously).

    Args:
        game (Game): the rules.
        num_envs (int): number of environments, ``E``.
        max_steps (int, optional): time limit of an episode: ``truncated``, never ``terminated``.
        seed (int): of the initial states.
        device (torch.device, optional): where everything lives; None is torch's default device.
    """

    def __init__(
        self,
        game: Game,
        num_envs: int,
        max_steps: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("max_steps", 1 if max_steps is None else max_steps)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        device = torch.get_default_device() if device is None else torch.device(device)
        super().__init__(device=device, batch_size=[num_envs])
        self.game, self.num_envs, self.max_steps = game, num_envs, max_steps
        self.group_map = {group: list(agents) for group, agents in game.group_map.items()}
        self._random = seeds.started(seed, device)
        self._state = self._start()
        specs = make_specs(self.group_map, game.actions(), self._show())
        self.full_action_spec_unbatched, self.full_observation_spec_unbatched = specs[:2]
        self.full_reward_spec_unbatched, self.full_done_spec_unbatched = specs[2:]

    def _start(self) -> TensorDict:
        """Initial states of all environments, always drawn for all, so that no reset depends on who is reset."""
        state = self.game.start(self.num_envs, self.device, self._random)
        state.set("steps", torch.zeros(self.num_envs, 1, dtype=torch.int64, device=self.device))
        return state.set("terminated", torch.zeros(self.num_envs, 1, dtype=torch.bool, device=self.device))

    def _show(self) -> TensorDict:
        """What is seen of the state; keeps what is available, which the next action is checked by."""
        terminated = self._state.get("terminated").clone()
        truncated = torch.zeros_like(terminated)
        if self.max_steps is not None:
            truncated = self._state.get("steps") >= self.max_steps
        entries = self.game.show(self._state)
        self._masks = {group: entries[group].get("action_mask", None) for group in self.group_map}
        ends = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        for group, agents in self.group_map.items():
            own = {key: end.unsqueeze(1).repeat(1, len(agents), 1) for key, end in ends.items()}  # [E, n, 1]
            shape = [self.num_envs, len(agents)]
            entries[group] = TensorDict({**entries[group], **own}, batch_size=shape, device=self.device)
        return TensorDict({**entries, **ends}, batch_size=self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = {group: self._action(tensordict, group) for group in self.group_map}
        steps = self._state.get("steps") + 1
        state, outcome = self.game.step(self._state, actions)
        self._state = state.set("steps", steps).set("terminated", outcome.terminated)
        shown = self._show()
        for group, reward in outcome.reward.items():
            shown.set((group, "reward"), reward)
        return shown

    def _action(self, tensordict: TensorDictBase, group: str) -> Tensor:
        key, spec = (group, "action"), self.full_action_spec[group, "action"]
        action = tensordict.get(key, None)
        if action is None:
            raise KeyError(f"no {key} in the tensordict; expected an action of shape {tuple(spec.shape)}.")
        if action.shape != spec.shape:
            raise ValueError(f"{key} has shape {tuple(action.shape)}, expected {tuple(spec.shape)}.")
        if isinstance(spec, Bounded):  # a policy may sample outside of its box, as for VMAS
            torch._assert_async(~action.isnan().any(), f"{key} holds NaN.")
            return action.clamp(spec.space.low, spec.space.high)
        valid = (action >= 0) & (action < spec.n)
        mask = self._masks[group]
        if mask is not None:
            valid = valid & mask.gather(-1, action.clamp(0, spec.n - 1).unsqueeze(-1)).squeeze(-1)
        text = f"{key} holds a choice that is not there; expected one of {spec.n}"
        text += "." if mask is None else f" where {(group, 'action_mask')} is True."
        torch._assert_async(valid.all(), text)
        return action

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Resets all environments, or those of the root ``_reset`` ``[E, 1]``; others show what they did."""
        mask = None if tensordict is None else tensordict.get("_reset", None)
        fresh = self._start()
        if mask is not None:
            mask = mask.reshape(self.num_envs)
            fresh = fresh.apply(lambda new, old: torch.where(_like(mask, new), new, old), self._state)
        self._state = fresh
        return self._show()

    def reset_done(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        """What the policy sees after a step: its ``next`` entries, with finished environments reset.

        Args:
            next_tensordict (TensorDict): ``tensordict["next"]`` of the step made last.
        """
        done = next_tensordict.get("done")
        if host.is_surely_false(done):
            return self._show()
        return self._reset(TensorDict({"_reset": done}, batch_size=self.batch_size, device=self.device))

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Adds random actions, only available ones."""
        if tensordict is None:
            tensordict = TensorDict(batch_size=self.batch_size, device=self.device)
        for group, mask in self._masks.items():
            action = self.full_action_spec[group, "action"].rand()
            if mask is not None:
                action = torch.multinomial(mask.flatten(0, -2).float(), 1).view(action.shape)
            tensordict.set((group, "action"), action)
        return tensordict

    def get_state(self) -> TensorDict:
        """A copy of the games' state and the step counters; the random stream is in ``state_dict`` alone."""
        return self._state.clone()

    def set_state(self, state: TensorDict) -> None:
        """Goes on from a copy of ``state``."""
        self._state = state.to(self.device).clone()
        self._show()

    def _set_seed(self, seed: int | None) -> None:
        self._random.manual_seed(0 if seed is None else seed)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All that the future depends on, as tensors: the games' state, step counters, the random stream."""
        leaves = {f"state:{key}": value.clone() for key, value in self._state.items()}
        return {**leaves, "random": self._random.get_state()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Continues to the last bit where ``state_dict`` was taken, also in another process."""
        for key in list(self._state.keys()):
            self._state.set(key, state_dict[f"state:{key}"].to(self.device, copy=True))
        self._random.set_state(state_dict["random"].cpu())
        self._show()

    def to(self, device: Any) -> BatchedEnv:
        """This environment if it is there already.

        Raises:
            NotImplementedError: it is elsewhere; its random stream cannot move.
        """
        if torch.device(device) != self.device:
            raise NotImplementedError(
                f"the environment lives on {self.device} and its random stream cannot move to {device}: build it "
                f"with device={str(device)!r}."
            )
        return self


def make_specs(
    group_map: dict[str, list[str]], actions: dict[str, TensorSpec], shown: TensorDict
) -> tuple[Composite, Composite, Composite, Composite]:
    """Specs of action, observation, reward and done of one environment, from what all show.

    Args:
        group_map (dict): group to the names of its agents.
        actions (dict): group to the spec of its action, ``[n]`` or ``[n, a]``.
        shown (TensorDict): observations and ends, ``[E]``.
    """
    where: Any = {"device": shown.device}
    action, observation, reward, done = (Composite(**where) for _ in range(4))
    for key in ENDS:
        done[key] = Categorical(2, shape=(1,), dtype=torch.bool, **where)
    for group, agents in group_map.items():
        n = (len(agents),)
        action[group] = Composite(action=actions[group].to(shown.device), shape=n, **where)
        reward[group] = Composite(reward=Unbounded((*n, 1), **where), shape=n, **where)
        flags = {key: Categorical(2, shape=(*n, 1), dtype=torch.bool, **where) for key in ENDS}
        done[group] = Composite(flags, shape=n, **where)
        observation[group] = _spec(shown.get(group).exclude(*ENDS), n)
    if "state" in shown.keys():
        observation["state"] = _spec(shown.get("state"), ())
    return action, observation, reward, done


def _spec(value: Any, batch: tuple[int, ...]) -> Any:
    """The spec of what one environment shows, from what all show."""
    if not isinstance(value, Tensor):
        return Composite({key: _spec(v, batch) for key, v in value.items()}, shape=batch, device=value.device)
    shape = value.shape[1:]
    if value.dtype == torch.bool:
        return Categorical(2, shape=shape, device=value.device, dtype=torch.bool)
    return Unbounded(shape, device=value.device, dtype=value.dtype)


def one_hot(index: Tensor, choices: int) -> Tensor:
    """Float ``[*B, choices]`` from ``[*B]``; unlike torch's function without reading the indices on the host."""
    return (index.unsqueeze(-1) == torch.arange(choices, device=index.device)).float()


def _like(mask: Tensor, value: Tensor) -> Tensor:
    """``mask`` ``[E]`` with as many dimensions as ``value``."""
    return mask.reshape(-1, *(1,) * (value.ndim - 1))
