"""Checks that an environment is what tdmarl's collectors and algorithms expect."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot
from torchrl.envs import EnvBase

from tdmarl.keys import unbatched

_ENDS = "done", "terminated", "truncated"
_ACTIONS = Bounded, Categorical, MultiCategorical, OneHot, MultiOneHot


class EnvError(ValueError):
    """An environment that breaks a convention; says which entry, what was found and what was expected."""


def check_env(env: EnvBase, steps: int = 3, seed: int = 0) -> None:
    """Raises if an environment breaks a convention that tdmarl's algorithms rely on.

    Checked are the groups, the specs, what a reset and `steps` random steps really give (keys, shapes, types,
    masks, `done == terminated | truncated`), that resetting half of the environments leaves the others'
    entries alone, and that the same seed and actions give the same rollout. The environment is left freshly
    reset, with seed `seed`; the global random generators are left as they were.

    Args:
        env (EnvBase): the environment.
        steps (int): length of the rollouts.
        seed (int): for environment and actions.

    Raises:
        EnvError: names the key, what was found, what was expected and what would satisfy it.
    """
    with torch.random.fork_rng():
        _check_specs(env)
        first = _rollout(env, steps, seed)
        second = _rollout(env, steps, seed)
        for key in _keys(env):
            for name in (key, ("next", *key)):
                if name in first.keys(True) and not _equal(first.get(name), second.get(name)):
                    raise EnvError(
                        f"{name} differs between two rollouts after set_seed({seed}) with the same actions;"
                        " expected equal values: draw only from generators that set_seed sets."
                    )
        _check_partial_reset(env)
        env.reset()


def _check_specs(env: EnvBase) -> None:
    groups = getattr(env, "group_map", None)
    if not isinstance(groups, dict) or not groups or not all(groups.values()):
        raise EnvError(
            f"env.group_map is {groups!r}; expected a dictionary from group names to lists of agent names."
        )
    done = unbatched(env.full_done_spec, len(env.batch_size))
    for key in _ENDS:
        _shape_of_spec(done, (key,), (1,), "add a boolean entry to the done spec")
    for group, agents in groups.items():
        n = len(agents)
        observations = unbatched(env.full_observation_spec, len(env.batch_size))
        observation = _spec(observations, (group, "observation"), "add it to the observation spec")
        if observation.shape[:1] != (n,):
            _fail((group, "observation"), observation.shape, (n, "..."), f"group '{group}' has {n} agents")
        action = _spec(env.full_action_spec_unbatched, (group, "action"), "add it to the action spec")
        if not isinstance(action, _ACTIONS) or action.shape[:1] != (n,):
            raise EnvError(
                f"the spec of {(group, 'action')} is {type(action).__name__}{tuple(action.shape)}; expected"
                f" one of {', '.join(kind.__name__ for kind in _ACTIONS)} with shape ({n}, ...)."
            )
        _shape_of_spec(env.full_reward_spec_unbatched, (group, "reward"), (n, 1), "give each agent a reward")
        if group in done.keys():  # without entries of its own, a group's agents end with the root
            for key in _ENDS:
                _shape_of_spec(done, (group, key), (n, 1), "repeat the root entry for each agent")


def _rollout(env: EnvBase, steps: int, seed: int) -> TensorDictBase:
    env.set_seed(seed)
    torch.manual_seed(seed)
    tensordict = env.reset()
    _check_entries(env, tensordict, "after reset", with_reward=False)
    found = []
    for step in range(steps):
        for group in env.group_map:
            tensordict.set((group, "action"), _random_action(env, tensordict, group))
        found.append(env.step(tensordict).clone())
        _check_entries(env, found[-1]["next"], f"in 'next' of step {step}", with_reward=True)
        tensordict = env.step_mdp(found[-1])
        if bool(tensordict["done"].any()):
            tensordict = env.maybe_reset(tensordict)
    return torch.stack(found, len(env.batch_size))


def _check_entries(env: EnvBase, tensordict: TensorDictBase, where: str, with_reward: bool) -> None:
    batch = env.batch_size
    _check_ends(tensordict, (), batch, where)
    for group, agents in env.group_map.items():
        n = len(agents)
        if group in env.full_done_spec.keys():
            _check_ends(tensordict, (group,), (*batch, n), where)
        for key, spec in unbatched(env.full_observation_spec, len(batch))[group].items(True, True):
            name = (group, *(key if isinstance(key, tuple) else (key,)))
            value = _get(tensordict, name, where)
            _check_tensor(value, name, (*batch, *spec.shape), spec.dtype, where)
        if with_reward:
            reward = _get(tensordict, (group, "reward"), where)
            _check_tensor(reward, (group, "reward"), (*batch, n, 1), torch.float32, where)
        mask = tensordict.get((group, "action_mask"), None)
        if mask is not None and not bool(mask.any(-1).all()):
            alive = tensordict.get((group, "mask"), torch.ones_like(mask[..., 0]))
            if not bool((mask.any(-1) | ~alive).all()):
                raise EnvError(
                    f"{(group, 'action_mask')} {where} leaves an agent that is alive without any choice; expected at"
                    " least one True."
                )
        alive = tensordict.get((group, "mask"), None)
        if alive is not None:
            _check_tensor(alive, (group, "mask"), (*batch, n), torch.bool, where)


def _check_ends(tensordict: TensorDictBase, prefix: tuple[str, ...], batch: Any, where: str) -> None:
    done, terminated, truncated = (_get(tensordict, (*prefix, key), where) for key in _ENDS)
    for key, value in zip(_ENDS, (done, terminated, truncated)):
        _check_tensor(value, (*prefix, key), (*batch, 1), torch.bool, where)
    if not torch.equal(done, terminated | truncated):
        raise EnvError(f"{(*prefix, 'done')} {where} is not terminated | truncated; expected their union.")


def _check_partial_reset(env: EnvBase) -> None:
    """Half of the environments are reset in the middle of their episodes."""
    if not env.batch_size:
        return
    tensordict = env.reset()
    for group in env.group_map:
        tensordict.set((group, "action"), _random_action(env, tensordict, group))
    before = env.step_mdp(env.step(tensordict)).clone()
    mask = torch.arange(env.batch_size.numel(), device=before.device).reshape(env.batch_size) % 2 == 0
    after = env.reset(before.clone().set("_reset", mask.unsqueeze(-1)))
    kept = ~mask
    for key in _keys(env):
        if key[-1] in ("reward", "action") or key not in before.keys(True):
            continue
        if not _equal(before.get(key)[kept], after.get(key)[kept]):
            raise EnvError(
                f"{key} of environments outside the '_reset' mask changed with the reset of the others;"
                " expected them to be left alone."
            )


def _random_action(env: EnvBase, tensordict: TensorDictBase, group: str) -> Tensor:
    spec = env.full_action_spec[group, "action"]
    mask = tensordict.get((group, "action_mask"), None)
    if mask is None:
        return spec.rand()
    if mask.dtype != torch.bool:
        raise EnvError(
            f"{(group, 'action_mask')} is {mask.dtype}; expected torch.bool, True for choices there are."
        )
    sizes = (
        spec.nvec.reshape(-1, spec.nvec.shape[-1])[0].tolist() if isinstance(spec, MultiCategorical) else None
    )
    parts = mask.split(sizes, -1) if sizes else [mask]
    picks = [torch.multinomial(part.flatten(0, -2).float(), 1).view(part.shape[:-1]) for part in parts]
    if isinstance(spec, OneHot):
        return torch.nn.functional.one_hot(picks[0], mask.shape[-1]).to(spec.dtype)
    return torch.stack(picks, -1) if sizes else picks[0]


def _keys(env: EnvBase) -> list[tuple[str, ...]]:
    specs = env.full_observation_spec, env.full_action_spec, env.full_reward_spec, env.full_done_spec
    keys = [key for spec in specs for key in spec.keys(True, True)]
    return [key if isinstance(key, tuple) else (key,) for key in keys]


def _equal(a: Tensor, b: Tensor) -> bool:
    return (
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
    )


def _get(tensordict: TensorDictBase, key: tuple[str, ...], where: str) -> Tensor:
    value = tensordict.get(key, None)
    if not isinstance(value, (Tensor, TensorDict)):
        raise EnvError(
            f"no {key} {where}; expected a tensor. Found are {sorted(map(str, tensordict.keys(True, True)))}."
        )
    return value


def _check_tensor(
    value: Tensor, key: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> None:
    if tuple(value.shape) != tuple(shape):
        _fail(key, value.shape, shape, f"found {where}")
    if value.dtype != dtype:
        raise EnvError(f"{key} {where} is {value.dtype}; expected {dtype}.")


def _spec(composite: Any, key: tuple[str, ...], hint: str) -> Any:
    if key not in composite.keys(True):
        raise EnvError(
            f"no {key} in the specs, found {sorted(map(str, composite.keys(True, True)))}; {hint}."
        )
    return composite[key]


def _shape_of_spec(composite: Any, key: tuple[str, ...], shape: tuple[int, ...], hint: str) -> None:
    found = _spec(composite, key, hint).shape
    if tuple(found) != shape:
        _fail(key, found, shape, hint)


def _fail(key: tuple[str, ...], found: Any, expected: tuple[Any, ...], hint: str) -> None:
    raise EnvError(f"{key} has shape {tuple(found)}, expected {tuple(expected)}: {hint}.")
