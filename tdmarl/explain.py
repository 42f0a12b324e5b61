"""Says how each part of a training loop runs: compiled, captured or eagerly, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torchrl.envs import EnvBase

from tdmarl.collect import Collector
from tdmarl.compiled_step import CompiledStep


def explain(algo: Any, env: EnvBase, collector: Collector | None = None) -> str:
    """Prints how simulation, rollout and updates run, with shapes, and why something runs eagerly that need not.

    What is compiled at its first use says so until then, and afterwards of how many operations it is.

    Args:
        algo (Algorithm): whose learner is looked at.
        env (EnvBase): what it is trained in.
        collector (Collector, optional): that of the loop.

    Returns:
        str: what was printed.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("navigation", num_envs=4, seed=0)
        >>> text = tdmarl.explain(tdmarl.mappo(env, minibatch_size=8), env)
        simulation  eager: VmasEnv of navigation, 4 environments on cpu
          agents    4 agents, observation (18,), action (2,)
        update      eager: PolicyLoss of 5,928 parameters, ValueLoss of 9,553 parameters, minibatches of 8 rows
    """
    lines = [*_simulation(env), *_rollout(collector), *_precision(algo.policy)]
    lines += [*_values(algo.learner), *_updates("", algo.learner)]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {what}" for name, what in lines)
    print(text)
    return text


def _simulation(env: EnvBase) -> Iterator[tuple[str, str]]:
    base: Any = env
    while not hasattr(base, "mode") and getattr(base, "base_env", None) is not None:
        base = base.base_env  # under transforms
    name = type(base).__name__
    if hasattr(base, "scenario"):
        name = f"{name} of {type(base.scenario).__module__.rpartition('.')[2]}"
    mode, report = getattr(base, "mode", "eager"), getattr(base, "report", {})
    how = mode
    if getattr(base, "fallback_reason", None) is not None:
        how = f"eager ({base.fallback_reason})"
    elif report:
        seconds = sum(part.trace_seconds + part.compile_seconds for part in report.values())
        parts = ", ".join(f"{key} of {part.operations} operations" for key, part in report.items())
        how = f"{mode} ({parts}; {seconds:.0f} s)"
    elif mode != "eager":
        how = f"{mode} (at its first use)"
    yield "simulation", f"{how}: {name}, {env.batch_size.numel()} environments on {env.device or 'cpu'}"
    for group, names in getattr(env, "group_map", {}).items():
        shapes = []
        for kind, spec in (("observation", env.observation_spec), ("action", env.action_spec)):
            found = spec.get((group, kind), None)
            if found is not None:
                shapes.append(f"{kind} {tuple(found.shape[env.batch_dims + 1 :]) or 'of one choice'}")
        yield f"  {group}", ", ".join([f"{len(names)} agents", *shapes])


def _rollout(collector: Collector | None) -> Iterator[tuple[str, str]]:
    if collector is not None:
        yield "rollout", f"{collector.describe()}: {collector.steps} steps a batch"


def _precision(policy: nn.Module) -> Iterator[tuple[str, str]]:
    kinds = {layer.products for layer in policy.modules() if getattr(layer, "products", None) is not None}
    if kinds:
        yield "networks", f"hidden layers multiply in {' and '.join(str(kind).split('.')[1] for kind in kinds)}"


def _values(learner: Any) -> Iterator[tuple[str, str]]:
    """How a batch is valued once before it is learned from, where that may be compiled."""
    prepare = getattr(learner, "prepare", None)
    fast = getattr(getattr(prepare, "advantage", prepare), "accelerated", None)
    if fast is not None:
        how = f"eager ({fast.reason})" if fast.reason else "compile"
        yield "values", f"{how}: {type(fast.module).__name__} of the whole batch"


def _updates(name: str, learner: Any) -> Iterator[tuple[str, str]]:
    if isinstance(getattr(learner, "learners", None), Mapping):  # several teams
        for team, part in learner.learners.items():
            yield from _updates(f" {team}", part)
        return
    for i, agent in enumerate(getattr(learner, "agents", ())):  # one after the other
        yield (
            f"update{name} {agent.group} {agent.index}",
            _update(agent.step, learner.accelerated[i], learner.buffer),
        )
    if hasattr(learner, "critic"):
        yield from _updates(f"{name} critic", learner.critic)
    elif hasattr(learner, "step"):
        yield f"update{name}", _update(learner.step, learner.accelerated, learner.buffer)
    else:
        yield f"update{name}", f"eager: {type(learner).__name__}, which is none of tdmarl's"


def _update(step: Any, take: Any, buffer: Any) -> str:
    how = take.describe() if isinstance(take, CompiledStep) else "eager"
    rows = getattr(buffer, "minibatch_size", None) or getattr(buffer, "batch_size", None) or "all"
    if not hasattr(step, "parts"):
        return (
            f"{how}: {type(step).__name__} of {sum(p.numel() for p in step.params):,} parameters, {rows} rows"
        )
    parts = [
        f"{_loss(part.loss)} of {sum(p.numel() for p in part.params):,} parameters" for part in step.parts
    ]
    after = [] if step.after is None else [type(step.after).__name__]
    return f"{how}: {', '.join([*parts, *after])}, minibatches of {rows} rows"


def _loss(loss: Any) -> str:
    whole, name = loss.__dict__.get("whole") or getattr(loss, "whole", None), type(loss).__name__
    return name if whole is None else f"{type(whole).__name__}'s {name.strip('_')}"
