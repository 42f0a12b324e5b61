"""From a run's folder back to a policy that acts: no training code, no simulator, no pickle."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torchrl.checkpoint import Checkpoint, StateDictCheckpointAdapter
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase

from tdmarl import algorithms, log


def load_policy(
    run_dir: str | Path,
    actor: TensorDictModuleBase | Mapping[str, TensorDictModuleBase] | None = None,
    checkpoint: Literal["last", "best"] = "last",
    device: torch.device | str = "cpu",
) -> TensorDictModuleBase:
    """Rebuilds the policy that a run trained, ready to act: it writes ``(group, "action")``.

    Called plainly it does not explore; under ``set_exploration_type(ExplorationType.RANDOM)`` it samples.

    Args:
        run_dir (str or Path): the run's folder.
        actor (module or mapping, optional): the network, when the run trained one of your own; the run's
            weights are written into it.
        checkpoint (str): ``"last"``, or ``"best"`` for the one with the highest evaluated return.
        device (torch.device or str): where the policy shall act.

    Raises:
        ValueError: if the folder holds no run or no such checkpoint, or the weights do not fit ``actor``.
    """
    config = log.read_config(run_dir)
    path = Path(run_dir, "checkpoints", f"{checkpoint}.torchrl")
    if not path.is_file():
        found = sorted(file.stem for file in path.parent.glob("*.torchrl"))
        raise ValueError(f"{run_dir} has no checkpoint {checkpoint!r}; it has {found or 'none yet'}.")
    policy = _build(config, actor, torch.device(device))
    weights = _Weights()
    reader = Checkpoint().register("policy", weights, adapter=StateDictCheckpointAdapter())
    reader.load(path, map_location={f"cuda:{index}": "cpu" for index in range(16)})
    _fill(policy, weights.state, str(path))
    for module in policy.modules():
        if isinstance(module, ProbabilisticTensorDictModule):
            module.default_interaction_type = InteractionType.DETERMINISTIC
    return policy.to(device).eval().requires_grad_(False)


def _build(config: Mapping[str, Any], actor: Any, device: torch.device) -> TensorDictModuleBase:
    specs = SpecsOnly(config["specs"], device)
    return _policy(specs, config["algorithm"]["name"], dict(config["algorithm"]["arguments"]), actor)


def _policy(specs: SpecsOnly, name: str, arguments: dict[str, Any], actor: Any) -> TensorDictModuleBase:
    if name == "per_group":
        return actor if isinstance(actor, TensorDictModuleBase) else _teams(specs, arguments, actor or {})
    known = [known for known in algorithms.__all__ if known.islower()]
    if name not in known:
        if isinstance(actor, TensorDictModuleBase):
            return actor
        raise ValueError(
            f"The run trained {name!r}, which is none of tdmarl's algorithms ({', '.join(known)}): build its "
            "policy and pass it as actor=..."
        )
    for key, value in list(arguments.items()):
        if isinstance(value, dict) and set(value) == {"custom"}:  # Run could not write it as JSON
            if key == "actor" and actor is None:
                raise ValueError(
                    f"The run trained an actor of your own, a {value['custom']}: build one of the same shape "
                    "and pass it as actor=..."
                )
            del arguments[key]
    if actor is not None:
        arguments["actor"] = actor
    built = getattr(algorithms, name)(specs, **arguments)
    return built if isinstance(built, TensorDictModuleBase) else built.policy


def _teams(
    specs: SpecsOnly, teams: Mapping[str, Any], actors: Mapping[str, TensorDictModuleBase]
) -> TensorDictModuleBase:
    """The policies of a ``per_group``, one after the other; ``teams`` has each one's algorithm and arguments."""
    policies = []
    for name, entry in teams.items():
        if isinstance(entry, Mapping) and "algorithm" in entry:
            policies.append(_policy(specs, entry["algorithm"], dict(entry["arguments"]), actors.get(name)))
        elif name in actors:
            policies.append(actors[name])
        else:
            raise ValueError(
                f"How the policy of {name!r} is built was not written down ({entry}): build one of the same shape and "
                f"pass it as actor={{{name!r}: ...}}."
            )
    return TensorDictSequential(*policies)


def _fill(policy: torch.nn.Module, state: Mapping[str, Any], source: str) -> None:
    wanted = policy.state_dict()
    problems = [f"{key} is missing" for key in sorted(set(wanted) - set(state))]
    problems += [f"{key} is not part of the policy" for key in sorted(set(state) - set(wanted))]
    for key in sorted(set(wanted) & set(state)):
        here, there = wanted[key], state[key]
        if isinstance(here, torch.Tensor) and here.shape != there.shape:
            problems.append(f"{key} has shape {tuple(there.shape)}, the policy expects {tuple(here.shape)}")
    if problems:
        raise ValueError(
            f"The weights in {source} do not fit the policy: {'; '.join(problems[:3])}. Pass the network "
            "that was trained as actor=..."
        )
    policy.load_state_dict(state)


class _Weights:
    """Receives a component's state from a checkpoint."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class SpecsOnly(EnvBase):
    """Stands in for an environment where only its specs are read, to build an algorithm; never steps.

    Args:
        specs (mapping): what ``tdmarl.log.describe_specs`` gave.
        device (torch.device): where its data would live.
    """

    def __init__(self, specs: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        super().__init__(device=device, batch_size=[])
        self.group_map = dict(specs["group_map"])
        self.observation_spec = _rebuild(specs["observation_spec"], device)
        self.action_spec = _rebuild(specs["full_action_spec"], device)
        self.reward_spec = _rebuild(specs["full_reward_spec"], device)
        self.done_spec = _rebuild(specs["full_done_spec"], device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        raise RuntimeError("SpecsOnly has no simulator, only the specs of the one a policy was trained in.")

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._reset()

    def _set_seed(self, seed: int | None) -> None:
        self._reset()


def _rebuild(plain: Mapping[str, Any], device: torch.device | str) -> TensorSpec:
    kind, shape = plain["kind"], torch.Size(plain["shape"])
    if kind == "Composite":
        entries = {name: _rebuild(entry, device) for name, entry in plain["entries"].items()}
        return Composite(entries, shape=shape, device=device)
    options: dict[str, Any] = {"shape": shape, "dtype": getattr(torch, plain["dtype"]), "device": device}
    if kind == "Bounded":
        bounds = {
            side: torch.tensor(ast.literal_eval(plain[side].replace("inf", "1e999")), dtype=options["dtype"])
            for side in ("low", "high")
        }
        return Bounded(**{side: bound.to(device) for side, bound in bounds.items()}, **options)
    if "nvec" in plain:
        several = MultiCategorical if kind == "MultiCategorical" else MultiOneHot
        sizes = plain["nvec"] if kind == "MultiOneHot" else torch.tensor(plain["nvec"])
        return several(sizes, **options)
    if "n" in plain:
        return (OneHot if kind == "OneHot" else Categorical)(plain["n"], **options)
    return (Binary if kind == "Binary" else Unbounded)(**options)
