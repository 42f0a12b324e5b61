"""Shows that a device computes what the CPU computes: the simulator's steps and one update of each kind of learner.

    python benchmarks/gpu_check.py --device cuda --output benchmarks/results/gpu_check.json

Exit code 1 where they differ by more than single precision explains.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import step_mdp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402

SCENARIOS = ("navigation", "balance", "transport", "sampling", "simple_tag")
Optim = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
KINDS = ("mappo", "mappo, recurrent", "happo", "happo, recurrent", "hatrpo", "qmix", "qmix, recurrent", "maddpg")
TOLERANCE = 2e-3  # contact forces are hundreds of times larger than what they move


def furthest(ours: TensorDictBase, theirs: TensorDictBase) -> float:
    """The greatest difference between two tensordicts of like entries, relative to 1 or to a larger entry."""
    worst = 0.0
    for key, value in ours.items(True, True):
        other = theirs.get(key).to(value.device).double()
        value = value.double()
        worst = max(worst, ((value - other).abs() / value.abs().clamp_min(1.0)).max().item())
    return worst


def simulator(scenario: str, device: str, num_envs: int = 64, steps: int = 30) -> float:
    """The greatest difference of a step on the device from the same step, of the same state, on the CPU."""
    cpu = tdmarl.VmasEnv(scenario, num_envs=num_envs, device="cpu", seed=0)
    other = tdmarl.VmasEnv(scenario, num_envs=num_envs, device=device, seed=1)
    torch.manual_seed(0)
    current, twin = cpu.reset(), other.reset()
    worst = 0.0
    for _ in range(steps):
        # The device goes on from the CPU's state: small differences would grow with every collision.
        other.set_state(cpu.get_state().to(device))
        current = cpu.rand_action(current)
        for group in cpu.group_map:
            twin[group, "action"] = current[group, "action"].to(device)
        current, twin = cpu.step(current), other.step(twin)
        worst = max(worst, furthest(current["next"], twin["next"]))
        current, twin = step_mdp(current), step_mdp(twin)
    return worst


def build(kind: str, env: tdmarl.VmasEnv, frames: int, optim: Optim | None = None) -> tdmarl.Algorithm:
    """One of the algorithms that are checked; one optimization step takes in a whole batch.

    Args:
        kind (str): a key of ``KINDS``.
        env (VmasEnv): on either device.
        frames (int): of a batch.
        optim (callable, optional): in place of Adam.
    """
    if kind.startswith("qmix"):
        more = {"recurrent": "gru", "sequence_length": 5, "last_action": True} if "recurrent" in kind else {}
        return tdmarl.qmix(
            env, num_updates=1, minibatch_size=frames, buffer_size=frames, optim=optim, tau=0.01, **more
        )
    if kind == "maddpg":
        return tdmarl.maddpg(env, num_updates=1, minibatch_size=frames, buffer_size=frames, optim=optim)
    more = {"recurrent": "gru", "chunk_length": 5} if "recurrent" in kind else {}
    rows = frames // 5 if more else frames
    if kind.startswith("ha"):
        learn, more = (tdmarl.hatrpo if kind == "hatrpo" else tdmarl.happo), more | {"order": (2, 0, 3, 1)}
        return learn(env, num_epochs=1, minibatch_size=rows, optim=optim, **more)
    return tdmarl.mappo(env, num_epochs=1, minibatch_size=rows, optim=optim, **more)


def trained(algo: tdmarl.Algorithm) -> list[torch.nn.Module]:
    """What an update changes: the losses, or agent by agent the actors and then the critic's loss."""
    learner = algo.learner
    if isinstance(learner, tdmarl.SequentialLearner):
        return [*(agent.actor for agent in learner.agents), learner.critic.step.parts[0].loss]
    return [part.loss for part in learner.step.parts]


def make(kind: str, device: str, num_envs: int, steps: int) -> tdmarl.VmasEnv:
    """The environment for one of ``KINDS``."""
    continuous = not kind.startswith("qmix")
    return tdmarl.VmasEnv(
        "navigation", num_envs=num_envs, max_steps=steps, device=device, seed=0, continuous_actions=continuous
    )


def learner(kind: str, device: str, num_envs: int = 64, steps: int = 20) -> dict[str, float]:
    """Differences of metrics and parameters after one step of plain gradient descent on the same rows.

    Adam's first step is the gradient's sign, in which the noise of a gradient near zero would be as large as
    the rest. Each device draws from generators of its own, so a replay buffer's sample is made once, on the CPU.
    """
    frames = num_envs * steps
    envs = [make(kind, where, num_envs, steps) for where in ("cpu", device)]
    algos = [build(kind, env, frames, lambda params: torch.optim.SGD(params, 0.1)) for env in envs]
    ours, theirs = (trained(algo) for algo in algos)
    for mine, other in zip(ours, theirs):
        other.load_state_dict(mine.state_dict())
    collector = tdmarl.Collector(envs[0], algos[0].explore, frames_per_batch=frames, total_frames=frames)
    batch = next(iter(collector))
    if kind.startswith("qmix") or kind == "maddpg":
        algos[0].learner.buffer.extend(algos[0].learner.prepare(batch))
        rows = algos[0].learner.buffer.sample()
        metrics, metrics_twin = algos[0].learner.step(rows), algos[1].learner.step(rows.to(device))
    else:
        metrics, metrics_twin = algos[0].learner(batch), algos[1].learner(batch.to(device))
    parameters = max(
        (a.detach() - b.detach().cpu()).abs().max().item()
        for mine, other in zip(ours, theirs)
        for a, b in zip(mine.parameters(), other.parameters())
    )
    return {"metrics": furthest(metrics, metrics_twin), "parameters": parameters}


def host_reads(kind: str, device: str, num_envs: int = 64, steps: int = 20) -> str:
    """Whether a second iteration, of collecting and of learning, reads from a CUDA device: where it does."""
    if not device.startswith("cuda"):
        return "not measured: only CUDA tells"
    frames = num_envs * steps
    env = make(kind, device, num_envs, steps)
    algo = build(kind, env, frames)
    batches = iter(tdmarl.Collector(env, algo.explore, frames_per_batch=frames, total_frames=2 * frames))
    algo.learner(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    what = "collection"
    try:
        batch = next(batches)
        what = "update"
        algo.learner(batch)
    except RuntimeError as error:
        return f"{what}: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="the device to compare with the CPU")
    parser.add_argument("--output", type=Path, required=True, help="file for the figures, JSON")
    args = parser.parse_args()
    found: dict[str, Any] = {"device": args.device, "torch": torch.__version__, "tolerance": TOLERANCE}
    if args.device.startswith("cuda"):
        found["device_name"] = torch.cuda.get_device_name()
    found["simulator"] = {name: simulator(name, args.device) for name in SCENARIOS}
    found["learner"] = {kind: learner(kind, args.device) for kind in KINDS}
    found["host_reads"] = {kind: host_reads(kind, args.device) for kind in KINDS}
    worst = max(
        [*found["simulator"].values(), *(x for kind in found["learner"].values() for x in kind.values())]
    )
    found["agree"] = worst <= TOLERANCE
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["agree"] else 1)


if __name__ == "__main__":
    main()
