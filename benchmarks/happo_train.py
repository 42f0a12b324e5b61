"""Measures what the sequential update costs: iterations of HAPPO and its kin beside unshared MAPPO, taking turns.

    python benchmarks/happo_train.py
    python benchmarks/happo_train.py --agents 8 --num-envs 128 --rounds 5

Each agent takes the same number of steps on the same number of rows in all of them, but for HATRPO, which takes one.
Unshared MAPPO updates all agents at once, as one stacked network, and has either a critic for each of them or, with
``--critic shared``, one for all; HAPPO has one critic of the team. An iteration is a batch of navigation and the
learner's call on it. Times are the clock's and this process's processor's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import about, seconds, write  # noqa: E402

CONTENDERS = ("mappo unshared", "happo", "happo without factor", "haa2c", "hatrpo")


def make(name: str, args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """A contender's collector and learner, on an environment of its own."""
    env = tdmarl.VmasEnv(
        "navigation", num_envs=args.num_envs, max_steps=100, device=device, seed=0, n_agents=args.agents
    )
    options: dict[str, Any] = {
        "num_epochs": args.epochs, "minibatch_size": args.minibatch_size, "hidden": (args.width, args.width),
        "mode": args.mode,
    }  # fmt: skip
    if name == "mappo unshared":
        algo = tdmarl.mappo(
            env, share_params=False, share_critic_params=args.critic == "shared", entropy_coeff=0.0, **options
        )
    elif name == "hatrpo":
        algo = tdmarl.hatrpo(env, **options | {"mode": "auto"})
    elif name == "haa2c":
        algo = tdmarl.haa2c(env, entropy_coeff=0.0, **options)
    else:
        algo = tdmarl.happo(env, entropy_coeff=0.0, factor=name == "happo", **options)
    frames = args.num_envs * args.steps
    return iter(tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)), algo.learner


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds after the first, and how many times those of unshared MAPPO they are, round by round."""
    device = torch.device(args.device)
    made = {name: make(name, args, device) for name in args.contenders}
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(args.rounds + 1):
        rounds.append({})
        for name, (batches, learner) in made.items():
            *collecting, batch = seconds(lambda b=batches: next(b), args.device)
            learning = seconds(lambda le=learner, b=batch: le(b), args.device)
            rounds[-1][name] = {
                "collect_wall": collecting[0], "collect_cpu": collecting[1], "learn_wall": learning[0],
                "learn_cpu": learning[1], "wall": collecting[0] + learning[0], "cpu": collecting[1] + learning[1],
            }  # fmt: skip
    counted, base = rounds[1:], args.contenders[0]
    return {
        name: {
            "seconds": {k: statistics.median(r[name][k] for r in counted) for k in counted[0][name]},
            "times_the_first": {
                k: statistics.median(r[name][k] / r[base][k] for r in counted)
                for k in ("wall", "cpu", "learn_wall", "learn_cpu")
            },
        }
        for name in made
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--critic", choices=["unshared", "shared"], default="unshared", help="of unshared MAPPO"
    )
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--num-envs", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of each environment in a batch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatch-size", type=int, default=3200)
    parser.add_argument("--width", type=int, default=128, help="of both hidden layers")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that warms up")
    parser.add_argument(
        "--mode", choices=["eager", "compile", "cudagraph"], default="eager", help="of the steps"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "happo_train.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    found = measure(args)
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    write({**about(vars(args), gpu), "results": found}, args.out)
    print(f"{'':22s} collect   learn   total   times {args.contenders[0]}: total (learn), processor")
    for name, figures in found.items():
        s, r = figures["seconds"], figures["times_the_first"]
        print(
            f"{name:22s} {s['collect_cpu']:7.3f} {s['learn_cpu']:7.3f} {s['cpu']:7.3f}   "
            f"{r['cpu']:.2f} ({r['learn_cpu']:.2f})"
        )


if __name__ == "__main__":
    main()
