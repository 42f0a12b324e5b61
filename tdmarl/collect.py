"""Rollouts: an environment and a policy in, batches ``[E, T]`` of TorchRL's layout out."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdmarl import seeds
from tdmarl.distributions import RandomAction
from tdmarl.keys import as_tuple
from tdmarl.rollout import CHUNK, Rollout


def hidden_entries(policy: Any) -> dict[NestedKey, torch.Size]:
    """The recurrent states that a policy's modules declare by ``make_tensordict_primer``, with their shapes."""
    entries: dict[NestedKey, torch.Size] = {}
    for module in policy.modules() if isinstance(policy, torch.nn.Module) else ():
        if hasattr(module, "make_tensordict_primer"):
            specs = module.make_tensordict_primer().primers  # type: ignore[operator]
            entries.update({key: specs[key].shape for key in specs.keys(True, True)})
    return entries


class Stepper:
    """Acts and steps, resets what ended, carries hidden states, and adds up each episode's reward.

    The step that the collector repeats ``T`` times and :func:`tdmarl.evaluate` until all episodes ended.

    Args:
        env (EnvBase): any TorchRL environment, batched or not.
        policy (TensorDictModuleBase): reads what the environment shows; hidden states are taken from its primers.
    """

    def __init__(self, env: EnvBase, policy: Callable[[TensorDictBase], TensorDictBase]) -> None:
        self.env, self.policy = env, policy
        self.hidden = hidden_entries(policy)
        shown = [*env.full_observation_spec.keys(True, True), *env.full_done_spec.keys(True, True)]
        self._shown = list(dict.fromkeys(shown))
        self.sums: dict[NestedKey, NestedKey] = {
            key: _sibling(key, "episode_reward") for key in env.reward_keys
        }

    def start(self) -> TensorDictBase:
        """Resets all environments; returns what the policy sees first."""
        root = self.env.reset().select(*self._shown, strict=False)
        root.set("is_init", torch.ones_like(root.get("done")))
        for key, shape in self.hidden.items():
            root.set(key, torch.zeros(self.env.batch_size + shape, device=self.env.device))
        for key, spec in ((k, self.env.full_reward_spec[k]) for k in self.sums):
            root.set(self.sums[key], spec.zero())
        return root

    def __call__(
        self, root: TensorDictBase, act: Callable[[TensorDictBase], TensorDictBase] | None = None
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """One step of all environments.

        Args:
            root (TensorDictBase): what :meth:`start` or the last call returned.
            act (callable, optional): in place of the policy.

        Returns:
            tuple: the transition (with ``next``), and the next root.
        """
        sums = {key: root.get(entry) for key, entry in self.sums.items()}
        step = (act or self.policy)(root.exclude(*self.sums.values()))
        carried = {key: step.pop(("next", *as_tuple(key)), None) for key in self.hidden}
        step = self.env.step(step)
        after = step.get("next")
        done = after.get("done")
        if hasattr(type(self.env), "reset_done"):  # a TransformedEnv would pass its base's on, past the transforms
            following = self.env.reset_done(after)
        else:
            following = self.env.maybe_reset(after.select(*self._shown, strict=False))
        following = following.select(*self._shown, strict=False)
        for key, entry in self.sums.items():
            total = sums[key] + after.get(key)
            after.set(entry, total)
            following.set(entry, total.masked_fill(_like(done, total), 0))
        for key, value in carried.items():
            if value is None:
                raise KeyError(
                    f"The policy declares the hidden state {key} but did not write {('next', *as_tuple(key))}."
                )
            after.set(key, value)
            following.set(key, value.masked_fill(_like(done, value), 0))
        following.set("is_init", done)
        return step, following


class RandomActions:
    """Acts at random where an action is available, and lets the policy write its other entries.

    The policy runs without exploring, so that schedules of exploration stand still, and modules that have to know
    the action really taken (``follows_action``) run again.

    Args:
        env (EnvBase): whose action specs are drawn from; ``(group, "action_mask")`` is obeyed where it is shown.
        policy (TensorDictModuleBase): runs first, so that every batch has the same entries.
    """

    def __init__(self, env: EnvBase, policy: Callable[[TensorDictBase], TensorDictBase]) -> None:
        self.policy = policy
        modules = policy.modules() if isinstance(policy, torch.nn.Module) else ()
        self.followers: list[Any] = [m for m in modules if getattr(m, "follows_action", False)]
        self.draws = {key: RandomAction(env.full_action_spec_unbatched[key], key) for key in env.action_keys}
        shown = set(env.full_observation_spec.keys(True, True))
        masks = {key: _sibling(key, "action_mask") for key in self.draws}
        self.masks = {key: mask for key, mask in masks.items() if mask in shown}

    def __call__(self, root: TensorDictBase) -> TensorDictBase:
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            root = self.policy(root)
        for key, draw in self.draws.items():
            mask = root.get(self.masks[key]) if key in self.masks else None
            root.set(key, draw(root.batch_size, mask))
        for follow in self.followers:
            root = follow(root)
        return root


def _sibling(key: NestedKey, name: str) -> NestedKey:
    return (*key[:-1], name) if isinstance(key, tuple) else name


def _like(done: Tensor, value: Tensor) -> Tensor:
    """``done`` ``[*E, 1]`` with as many dimensions as ``value``."""
    return done.reshape(done.shape[:-1] + (1,) * (value.ndim - done.ndim + 1))


_live: weakref.WeakSet[Collector] = weakref.WeakSet()


def is_held(env: EnvBase) -> bool:
    """Whether a live collector has more to collect from episodes of this environment that are under way."""
    return any(_base(c.env) is _base(env) and c._root is not None and not c.closed and not c.finished for c in _live)


def _base(env: EnvBase) -> EnvBase:
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def env_state(env: EnvBase) -> dict[str, Any] | None:
    """All that an environment's future depends on, or None where it cannot say; transforms included."""
    if isinstance(env, TransformedEnv):
        base = env_state(env.base_env)
        return None if base is None else {"base": base, "transform": copy.deepcopy(env.transform.state_dict())}
    if type(env).state_dict is EnvBase.state_dict:  # that of any module: parameters and buffers, not the world
        return None
    return dict(copy.deepcopy(env.state_dict())) or None


def load_env_state(env: EnvBase, state: dict[str, Any]) -> None:
    """Restores :func:`env_state`."""
    if isinstance(env, TransformedEnv):
        load_env_state(env.base_env, state["base"])
        env.transform.load_state_dict(state["transform"])
    else:
        env.load_state_dict(state)


class Collector(BaseCollector):
    """Collects batches of a fixed number of steps from an environment, in TorchRL's layout.

    A batch is ``[*E, T]`` with ``T = frames_per_batch / E``; episodes go on from one batch to the next. Beside the
    environment's and the policy's entries it holds ``is_init`` and ``("next", group, "episode_reward")``.
    Everything stays on the environment's device. The policy is the learner's own, so there are no weights to send.

    Args:
        env (EnvBase or callable): the environment, or what makes it.
        policy (TensorDictModuleBase): what acts; called under ``no_grad`` and ``ExplorationType.RANDOM``.
        frames_per_batch (int): environment steps of a batch, a multiple of the number of environments.
        total_frames (int): after so many the iteration ends; -1 never. Resuming goes on counting.
        init_random_frames (int): so many frames are collected with random actions first.
        seed (int, optional): of the acting stream, which is then the collector's own; None draws from torch's
            global stream.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("balance", num_envs=2, max_steps=5, seed=0)
        >>> collector = tdmarl.Collector(env, tdmarl.mappo(env).explore, frames_per_batch=20)
    """

    def __init__(
        self,
        env: EnvBase | Callable[[], EnvBase],
        policy: TensorDictModuleBase,
        *,
        frames_per_batch: int,
        total_frames: int = -1,
        init_random_frames: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.env = env if isinstance(env, EnvBase) else env()
        n_envs = self.env.batch_size.numel()
        if frames_per_batch < 1 or frames_per_batch % n_envs:
            below = max(n_envs, frames_per_batch - frames_per_batch % n_envs)
            raise ValueError(
                f"frames_per_batch={frames_per_batch} is no multiple of the {n_envs} environments, which all step "
                f"together: use {below} or {below + n_envs}."
            )
        probable = [key for key in getattr(policy, "out_keys", ()) if as_tuple(key)[-1] == "action_log_prob"]
        if init_random_frames > 0 and probable:
            warnings.warn(
                f"init_random_frames={init_random_frames}: random actions are stored with the probabilities {probable} "
                "of other ones, from which on-policy learning goes wrong. It is for off-policy learning.",
                stacklevel=2,
            )
        if "done" not in self.env.full_done_spec.keys():
            raise ValueError(
                f"{type(self.env).__name__} has no root 'done' in its done spec "
                f"({sorted(map(str, self.env.full_done_spec.keys(True, True)))}): the root's says when to reset."
            )
        self.policy = policy
        self.frames_per_batch = self.requested_frames_per_batch = frames_per_batch
        self.total_frames, self.init_random_frames = total_frames, init_random_frames
        self.steps = frames_per_batch // n_envs
        self.generator = None if seed is None else seeds.generator(seed, "acting", self.env.device or "cpu")
        self.closed = False
        self._stepper = Stepper(self.env, policy)
        self._random = RandomActions(self.env, policy)
        self._fused = Rollout(self.env, policy, self._stepper.sums, list(self._stepper.hidden))
        self._root: TensorDictBase | None = None
        self._frames, self._iter = 0, -1
        _live.add(self)

    @property
    def frames(self) -> int:
        """Environment steps collected so far, resumed runs included."""
        return self._frames

    @property
    def finished(self) -> bool:
        """Whether ``total_frames`` are collected."""
        return 0 <= self.total_frames <= self._frames

    def describe(self) -> str:
        """How batches are made: by compiled functions of tensors, or by the ordinary loop."""
        if getattr(self.env, "mode", "eager") == "eager":
            return "the ordinary loop"
        fused = self._fused
        policy = "compiled, too" if fused.reason is None else f"called as it is ({fused.reason})"
        how = f"compiled functions of tensors, the policy {policy}"
        if fused.whole_because:
            return f"{how}, step by step ({fused.whole_because})"
        return f"{how}, in recorded chunks" if fused.in_chunks else how

    def iterator(self) -> Iterator[TensorDictBase]:
        """Batches until ``total_frames``; `for batch in collector` is the same."""
        while not self.finished:
            yield self.rollout()

    @torch.no_grad()
    def rollout(self) -> TensorDictBase:
        """The next batch, ``[*E, T]``."""
        if self.closed:
            raise RuntimeError("The collector was shut down: make a new one.")
        root = self._stepper.start() if self._root is None else self._root
        n_envs = self.env.batch_size.numel()
        acts = [self._frames + t * n_envs >= self.init_random_frames for t in range(self.steps)]
        self._root = None  # should a step fail, the next batch begins with new episodes
        with seeds.routed(self.generator), set_exploration_type(ExplorationType.RANDOM):
            fused = self._fused if self._fused.is_possible() else None
            batch, self._root = self._one_by_one(root, acts) if fused is None else fused(root, self._random, acts)
        self._frames += self.frames_per_batch
        self._iter += 1
        return batch.refine_names(..., "time")

    def _one_by_one(self, root: TensorDictBase, acts: list[bool]) -> tuple[Any, TensorDictBase]:
        """A batch of any environment, and what the policy sees next."""
        batch: Any = None
        kept: list[TensorDictBase] = []  # not all steps, or the batch would be in memory twice
        for end, own in enumerate(acts, 1):
            step, root = self._stepper(root, None if own else self._random)
            kept.append(step)
            if end == len(acts) or len(kept) == CHUNK:
                part = torch.stack(kept, self.env.batch_dims)
                if len(kept) == len(acts):
                    return part, root
                if batch is None:
                    whole = (*self.env.batch_size, len(acts))
                    batch = torch.empty_like(step.unsqueeze(-1).expand(whole))
                batch[..., end - len(kept) : end] = part
                kept = []
        return batch, root

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the policy is the learner's own object. TorchRL's loops call it after each update."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the acting stream and the environment, whose episodes start anew; returns the next seed."""
        self.generator = seeds.generator(seed, "acting", self.env.device or "cpu")
        self._root = None
        return self.env.set_seed(seed, static_seed=static_seed)

    def shutdown(
        self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True
    ) -> None:
        """Closes the environment; calling it again does nothing."""
        if not self.closed:
            self.closed = True
            if close_env and not self.env.is_closed:
                self.env.close(raise_if_closed=False)

    def state_dict(self) -> OrderedDict:
        """Counters, the acting stream, the running episodes, and the environment's own state if it has one."""
        state: OrderedDict = OrderedDict(frames=self._frames, iterations=self._iter + 1)
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        explicit = env_state(self.env)
        if explicit is not None and self._root is not None:
            state["env"] = explicit
            state["root"] = OrderedDict(self._root.flatten_keys("/").to_dict())
        return state

    def load_state_dict(self, state_dict: OrderedDict) -> None:
        """Restores :meth:`state_dict` without resetting the environment or drawing a number.

        An environment without explicit state starts new episodes, and a warning says so.
        """
        self._frames, self._iter = int(state_dict["frames"]), int(state_dict["iterations"]) - 1
        if "generator" in state_dict:
            if self.generator is None:
                self.generator = seeds.started(0, self.env.device)
            self.generator.set_state(state_dict["generator"].cpu())
        if "env" in state_dict:
            load_env_state(self.env, state_dict["env"])
            saved = TensorDict(
                dict(state_dict["root"]), batch_size=self.env.batch_size, device=self.env.device
            )
            shaped = self.env.full_observation_spec.zero().update(
                self.env.full_done_spec.zero()
            )  # groups are [*E, n]
            self._root = shaped.update(saved.unflatten_keys("/"))
        else:
            self._root = None
            if self._frames:
                warnings.warn(
                    f"{type(self.env).__name__} has no explicit state: the resumed run starts new episodes.",
                    stacklevel=2,
                )

    def __repr__(self) -> str:
        return f"Collector(env={self.env}, steps={self.steps}, frames={self._frames}/{self.total_frames})"
