"""Measures whole iterations of IPPO on simple_spread: frames a second, collecting and learning apart.

    python benchmarks/ippo.py
    python benchmarks/ippo.py --sizes 16x128 --modes compile eager --threads 1

Networks of 64 x 64 tanh units, 4 epochs of 4 minibatches, episodes of 25 steps: the settings by which JAX programs
give their speed. Where there are several modes, their iterations take turns. Compiling is in none of the times.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import MODES, RESULTS, begin, command_line, picture, seconds, spread, where, write  # noqa: E402


def make(num_envs: int, steps: int, mode: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """A mode's batches and learner, on an environment of its own."""
    frames = num_envs * steps
    env = tdmarl.VmasEnv(
        "simple_spread", num_envs=num_envs, max_steps=25, device=args.device, seed=0, mode=mode,
        continuous_actions=not args.discrete,
    )  # fmt: skip
    algo = tdmarl.ippo(
        env, num_epochs=4, minibatch_size=frames // 4, hidden=(64, 64), activation=torch.nn.Tanh, layer_norm=False,
        mode=mode,
    )  # fmt: skip
    return iter(tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)), algo.learner


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """For each mode seconds and frames a second of the iterations after those that warm up.

    A product of two matrices takes its turn with them: by its speed figures of one machine can be compared that other
    programs, or other guests of the same host, keep more or less busy.
    """
    num_envs, steps = map(int, size.split("x"))
    made = {mode: make(num_envs, steps, mode, args) for mode in args.modes}
    taken: dict[str, list[tuple[float, float]]] = {mode: [] for mode in made}
    matrix = torch.rand(1024, 1024, device=args.device)
    products: list[float] = []
    for _ in range(args.warmup + args.rounds):
        products.append(2e-9 * 1024**3 / seconds(lambda: matrix @ matrix, args.device)[0])
        for mode, (batches, learner) in made.items():
            collecting, _, batch = seconds(lambda b=batches: next(b), args.device)
            learning, _, _ = seconds(lambda le=learner, x=batch: le(x), args.device)
            taken[mode].append((collecting, learning))
            del batch
    found: dict[str, Any] = {"product_gflops": spread(products[args.warmup :])}
    for mode, all_of_them in taken.items():
        times = all_of_them[args.warmup :]
        found[mode] = {
            "collect_seconds": spread([collecting for collecting, _ in times]),
            "learn_seconds": spread([learning for _, learning in times]),
            "frames_per_second": spread([num_envs * steps / sum(one) for one in times]),
        }
    return found


def draw(result: dict[str, Any], figure: Any) -> None:
    """Bars of frames a second, from the slowest to the fastest iteration where they are thin."""
    axes = figure.subplots()
    modes = result["settings"]["modes"]
    for place, mode in enumerate(modes):
        speeds = [found[mode]["frames_per_second"] for found in result["sizes"].values()]
        at = [row + (place - (len(modes) - 1) / 2) * 0.8 / len(modes) for row in range(len(speeds))]
        medians = [speed["median"] for speed in speeds]
        below = [speed["median"] - speed["least"] for speed in speeds]
        above = [speed["greatest"] - speed["median"] for speed in speeds]
        bars = axes.bar(at, medians, 0.8 / len(modes), yerr=(below, above), ecolor="#777777", label=mode)
        axes.bar_label(bars, [f"{median:,.0f}" for median in medians], label_type="center", color="white")
    axes.set_xticks(range(len(result["sizes"])), list(result["sizes"]))
    axes.set(xlabel="environments x steps", ylabel="frames a second, collected and learned from")
    axes.legend(title="mode")
    axes.set_title(f"IPPO on simple_spread, 64x64 tanh, 4x4 minibatches ({where(result)})", fontsize="medium")


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["16x128", "1024x128"], help="environments x steps of a batch")
    add("--modes", nargs="+", choices=MODES, default=["compile"], help="of simulation, policy and updates")
    add("--discrete", action="store_true", help="discrete actions")
    add("--rounds", type=int, default=20, help="iterations that count")
    add("--warmup", type=int, default=3, help="iterations before")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=2)
    add("--out", type=Path, default=RESULTS / "ippo.json", help="results file, with a picture beside it")
    args = parser.parse_args()
    result = begin(args)
    result["sizes"] = {}
    print("size       mode        collect ms   learn ms   frames/s, median (least-greatest)")
    for size in args.sizes:
        result["sizes"][size] = found = measure(size, args)
        write(result, args.out)
        for mode in args.modes:
            figures = found[mode]
            collecting, learning = (figures[k]["median"] * 1e3 for k in ("collect_seconds", "learn_seconds"))
            speed = "{median:,.0f} ({least:,.0f}-{greatest:,.0f})".format(**figures["frames_per_second"])
            print(f"{size:10s} {mode:10s} {collecting:11.1f} {learning:10.1f}   {speed}")
        machine = "{median:.0f} ({least:.0f}-{greatest:.0f})".format(**found["product_gflops"])
        print(f"{size:10s} beside 1024 x 1024 products at {machine} GFLOP/s")
    picture(draw, result, args.out, (6, 4))


if __name__ == "__main__":
    main()
