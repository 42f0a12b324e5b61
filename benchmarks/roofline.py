"""Measures how far updates and the simulator are from what the machine allows.

    python benchmarks/roofline.py                                   # one update on 1024 x 100 frames, 256 x 256
    python benchmarks/roofline.py --mode compile --device cuda --parts update

*update*: one optimization step (drawing its rows, losses, backward, clipping, Adam, targets) beside nothing but its
matrix products, of the same shapes and strides, on tensors that lie ready. Which products those are is read off an
eager step. *simulator*: collecting a batch with a policy of next to no cost beside one copy in memory of as many bytes
as a step cannot do without: the state read and written, and the entries of the batch.

The sides take turns, and ratios are taken turn by turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import (  # noqa: E402
    RESULTS, add_ways_to_run, begin, command_line, picture, ratios, seconds, spread, where, write,
)
from simulate_contenders import Policy  # noqa: E402

aten = torch.ops.aten
FIRST_FACTOR = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0, aten.baddbmm: 1}  # its place among the arguments
ALGORITHMS = ("mappo", "qmix", "maddpg")
LIMITS = (1.5, 1.2)  # what an update is to stay below, and what it is meant to


class Product(NamedTuple):
    """One product of matrices, or of stacks of them."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    strides: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def operations(self) -> int:
        """Multiplications and additions.

        Example:
            >>> Product(((2, 3), (3, 5)), ((3, 1), (5, 1))).operations
            60
        """
        rows = 1
        for size in self.shapes[0]:
            rows *= size
        return 2 * rows * self.shapes[1][-1]


class Products(TorchDispatchMode):
    """Notes every product of matrices that is made inside, backward ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = FIRST_FACTOR.get(func.overloadpacket)
        if place is not None:
            a, b = args[place : place + 2]
            self.found.append(Product((tuple(a.shape), tuple(b.shape)), (a.stride(), b.stride())))
        return func(*args, **(kwargs or {}))


class Bare:
    """Products alone, on tensors that lie ready: equal ones share them, or they would not fit in memory.

    Args:
        products (sequence of Product): to be made, in this order.
        device (str): where.
    """

    def __init__(self, products: Sequence[Product], device: str) -> None:
        ready: dict[Any, Tensor] = {}

        def factor(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
            size = 1 + sum((n - 1) * step for n, step in zip(shape, stride))
            if (shape, stride) not in ready:
                ready[shape, stride] = torch.randn(size, device=device).as_strided(shape, stride)
            return ready[shape, stride]

        self._calls: list[tuple[Callable[..., Any], Tensor, Tensor, Tensor]] = []
        results: dict[torch.Size, Tensor] = {}
        for shapes, strides in products:
            a, b = (factor(shape, stride) for shape, stride in zip(shapes, strides))
            shape = torch.Size([*a.shape[:-1], b.shape[-1]])
            out = results.setdefault(shape, torch.empty(shape, device=device))
            self._calls.append((torch.mm if a.ndim == 2 else torch.bmm, a, b, out))

    def __call__(self) -> None:
        for multiply, a, b, out in self._calls:
            multiply(a, b, out=out)


class Update:
    """One optimization step of an algorithm, on rows of one collected batch.

    Args:
        algorithm (str): which.
        args (Namespace): sizes, device and mode.
        mode (str): of the step.
    """

    def __init__(self, algorithm: str, args: argparse.Namespace, mode: str) -> None:
        frames = args.num_envs * args.steps
        env = tdmarl.VmasEnv(
            args.scenario, num_envs=args.num_envs, max_steps=100, device=args.device, seed=0,
            continuous_actions=algorithm != "qmix",
        )  # fmt: skip
        common: dict[str, Any] = {
            "hidden": (args.width, args.width), "activation": nn.Tanh, "layer_norm": False, "mode": mode
        }  # fmt: skip
        if algorithm == "mappo":
            common |= {"num_epochs": 1}
        else:
            common |= {"minibatch_size": frames, "buffer_size": frames, "num_updates": 1}
        algo = getattr(tdmarl, algorithm)(env, **common)
        learner, self.frames = algo.learner, frames
        self._buffer, self._step = learner.buffer, learner.step.accelerate(mode)
        rows = learner.prepare(tdmarl.Collector(env, algo.explore, frames_per_batch=frames).rollout())
        self._buffer.extend(rows.select(*learner.step.in_keys, *learner.step.optional_keys, strict=False))

    def __call__(self) -> None:
        self._step(self._buffer.sample())


def products_of(algorithm: str, args: argparse.Namespace) -> list[Product]:
    """The products of matrices in one eager step."""
    update = Update(algorithm, args, "eager")
    with Products() as noted:
        update()
    return noted.found


def turns(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Seconds and processor seconds of each side in each round, after one that warms up."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            wall, cpu, _ = seconds(side, device)
            if turn:
                found[name]["wall"].append(wall)
                found[name]["cpu"].append(cpu)
    return found


def update_beside_products(algorithm: str, args: argparse.Namespace) -> dict[str, Any]:
    """How many times its bare products' time an update takes."""
    products = products_of(algorithm, args)
    update = Update(algorithm, args, args.mode)
    spent = turns({"update": update, "products": Bare(products, args.device)}, args.rounds, args.device)
    operations = sum(product.operations for product in products)
    return {
        "algorithm": algorithm,
        "frames": update.frames,
        "products": len(products),
        "operations": operations,
        "operations_per_second": operations / min(spent["products"]["wall"]),
        "seconds": {name: spread(one["wall"]) for name, one in spent.items()},
        "over_products": ratios(spent["update"]["wall"], spent["products"]["wall"]),
        "over_products_cpu": ratios(spent["update"]["cpu"], spent["products"]["cpu"]),
    }


def moved(state: Any, batch: Any, steps: int) -> int:
    """Bytes that a step of all environments moves at least: the state read and written, the batch's entries written.

    Args:
        state (TensorDict): of the environments.
        batch (TensorDict): ``[E, T]``.
        steps (int): ``T``.
    """
    held = sum(x.numel() * x.element_size() for x in state.values(True, True))
    return 2 * held + sum(x.numel() * x.element_size() for x in batch.values(True, True)) // steps


def simulator_beside_copy(scenario: str, num_envs: int, args: argparse.Namespace) -> dict[str, Any]:
    """How many times as long as a copy of its bytes collecting takes."""
    env = tdmarl.VmasEnv(scenario, num_envs=num_envs, device=args.device, seed=0, mode=args.simulation)
    env.compile()
    steps = max(1, min(args.steps, args.most_frames // num_envs))
    collector = tdmarl.Collector(env, Policy(env).to(args.device), frames_per_batch=num_envs * steps)
    size = moved(env.get_state(), collector.rollout(), steps)
    source = torch.zeros(
        size * steps // 2, dtype=torch.uint8, device=args.device
    )  # read once and written once
    target = torch.empty_like(source)
    sides = {"simulator": collector.rollout, "copy": lambda: target.copy_(source)}
    spent = turns(sides, args.rounds, args.device)
    return {
        "scenario": scenario,
        "num_envs": num_envs,
        "mode": env.mode,
        "fallback_reason": env.fallback_reason,
        "bytes_per_step": size,
        "bytes_per_second": size * steps / min(spent["copy"]["wall"]),
        "seconds_per_step": {name: spread([x / steps for x in one["wall"]]) for name, one in spent.items()},
        "over_copy": ratios(spent["simulator"]["wall"], spent["copy"]["wall"]),
        "over_copy_cpu": ratios(spent["simulator"]["cpu"], spent["copy"]["cpu"]),
    }


def table(result: dict[str, Any]) -> str:
    """The ratios in markdown: median (least-greatest)."""
    form = "{median:.2f} ({least:.2f}-{greatest:.2f})"
    lines = []
    if result["updates"]:
        lines = [
            "| update | frames | products | GFLOP | at GFLOP/s | update, s | over its products | in processor time |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
    for one in result["updates"]:
        lines.append(
            f"| {one['algorithm']} | {one['frames']:,} | {one['products']} | {one['operations'] / 1e9:,.1f} "
            f"| {one['operations_per_second'] / 1e9:,.0f} | {one['seconds']['update']['median']:.4f} "
            f"| {form.format(**one['over_products'])} | {form.format(**one['over_products_cpu'])} |"
        )
    if result["simulators"]:
        lines += [
            "",
            "| simulator | environments | mode | kB a step | copied at GB/s | ms a step | over a copy |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
    for one in result["simulators"]:
        lines.append(
            f"| {one['scenario']} | {one['num_envs']:,} | {one['mode']} | {one['bytes_per_step'] / 1e3:,.0f} "
            f"| {one['bytes_per_second'] / 1e9:.1f} | {1e3 * one['seconds_per_step']['simulator']['median']:.3f} "
            f"| {form.format(**one['over_copy'])} |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], figure: Any) -> None:
    """Updates as bars of ratios; the simulator's time over environments above the time of its bytes."""
    updates, simulators = result["updates"], result["simulators"]
    panels = iter(figure.subplots(1, bool(updates) + bool(simulators), squeeze=False).flat)
    if updates:
        axes = next(panels)
        names = [one["algorithm"] for one in updates]
        values = [one["over_products"]["median"] for one in updates]
        low = [value - one["over_products"]["least"] for value, one in zip(values, updates)]
        high = [one["over_products"]["greatest"] - value for value, one in zip(values, updates)]
        axes.bar(names, values, yerr=[low, high], color="#0072b2", width=0.6, capsize=3)
        axes.axhline(1, color="#111111", linewidth=1)
        for limit in LIMITS:
            axes.axhline(limit, color="#d55e00", linewidth=0.8, linestyle="--")
        axes.set(ylabel="times its bare products", ylim=(0, None))
        axes.set_title(f"an update on {updates[0]['frames']:,} frames", fontsize=10)
    if simulators:
        axes = next(panels)
        for place, scenario in enumerate(dict.fromkeys(one["scenario"] for one in simulators)):
            mine = [one for one in simulators if one["scenario"] == scenario]
            color, xs = ("#0072b2", "#d55e00", "#009e73")[place % 3], [one["num_envs"] for one in mine]
            for side, style in (("simulator", "o-"), ("copy", "--")):
                ys = [1e3 * one["seconds_per_step"][side]["median"] for one in mine]
                label = scenario if side == "simulator" else "its bytes, copied"
                axes.plot(xs, ys, style, color=color, markersize=4, label=label)
        axes.set(xscale="log", yscale="log", xlabel="environments", ylabel="ms a step of all environments")
        sizes = sorted({one["num_envs"] for one in simulators})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        axes.set_title(f"the simulator, mode {result['settings']['simulation']}", fontsize=10)
    figure.suptitle(where(result), fontsize=10)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the committed measurement."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["update", "simulator"], default=["update", "simulator"], help="what")
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="whose updates")
    add("--scenario", default="navigation", help="of the updates")
    add("--num-envs", type=int, default=1024, help="environments, whose steps are one minibatch")
    add("--steps", type=int, default=100, help="of each environment in a batch")
    add("--width", type=int, default=256, help="units in each of two hidden tanh layers")
    add("--scenarios", nargs="+", default=["balance", "simple_spread", "navigation"], help="of the simulator")
    add("--simulated-envs", nargs="+", type=int, default=[1024, 4096, 16384, 65536], help="of the simulator")
    add("--most-frames", type=int, default=2**19, help="of the simulator's batch, which is kept in memory")
    add("--rounds", type=int, default=5, help="that count, after one that warms up")
    add_ways_to_run(parser, RESULTS / "roofline.json")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    result: dict[str, Any] = {**begin(args), "updates": [], "simulators": []}
    for algorithm in args.algorithms if "update" in args.parts else ():
        result["updates"].append(update_beside_products(algorithm, args))
        write(result, args.out)
    for scenario in args.scenarios if "simulator" in args.parts else ():
        for num_envs in args.simulated_envs:
            result["simulators"].append(simulator_beside_copy(scenario, num_envs, args))
            write(result, args.out)
    picture(draw, result, args.out, (11, 4.5))
    print(table(result))


if __name__ == "__main__":
    main()
