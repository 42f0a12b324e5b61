"""Measures training by MAPPO, QMIX or MADDPG: tdmarl, BenchMARL and a plain TorchRL loop in one interleaved run.

Each contender is a process of its own that makes one iteration when it is told to, in turn, so that no two
run at once and whatever else keeps the machine busy meets all of them alike. BenchMARL 1.5.2 needs an older
TorchRL and gets a virtual environment, made on first use. A contender that fails is reported; the rest go on.

    python benchmarks/train.py --scenario navigation balance --iterations 10
    python benchmarks/train.py --algorithm qmix --scenario balance
    python benchmarks/train.py --algorithm maddpg

This file imports the standard library only: a child's peak memory starts at its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

from measuring import RESULTS, Process, ProcessFailed, about, command_line, picture, write

HERE = Path(__file__).resolve().parent
CONTENDERS = ("tdmarl", "benchmarl", "torchrl")
# what differs between the algorithms: a batch, and the optimization steps on it
DEFAULTS: dict[str, dict[str, Any]] = {
    "mappo": {"num_envs": 600, "minibatch_size": 4096, "max_grad_norm": 5.0},
    "qmix": {"num_envs": 60, "minibatch_size": 1024, "max_grad_norm": 40.0},
    "maddpg": {"num_envs": 60, "minibatch_size": 1024, "max_grad_norm": 40.0},
}
SENT = (
    "algorithm num_envs max_steps epochs minibatch_size lr gamma lmbda clip_epsilon entropy_coeff max_grad_norm hidden"
    " updates buffer_size tau explore_start explore_end explore_frames seed threads device mode precision"
).split()
BENCHMARL = ("benchmarl==1.5.2", "vmas==1.5.2")
BENCHMARL_VENV = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tdmarl" / "benchmarl-1.5.2"
COLORS = {"tdmarl": "#0072b2", "benchmarl": "#d55e00", "torchrl": "#777777"}
PHASES = ("collection", "update", "total")
CPU_PHASES = tuple(f"{phase}_cpu" for phase in PHASES)  # in processor seconds, all threads added up
# BenchMARL's task files; a scenario that is not here runs with VMAS's own defaults.
SCENARIO_ARGS: dict[str, dict[str, Any]] = {
    "navigation": {
        "n_agents": 3,
        "collisions": True,
        "agents_with_same_goal": 1,
        "split_goals": False,
        "observe_all_goals": False,
        "shared_rew": False,
        "lidar_range": 0.35,
        "agent_radius": 0.1,
    },
    "balance": {"n_agents": 4, "random_package_pos_on_line": True, "package_mass": 5},
}


class Contender(Process):
    """One contender's process, and what it has answered so far."""

    def __init__(self, name: str, python: str, settings: dict[str, Any], timeout: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        environment = dict(os.environ)
        if name == "benchmarl":
            environment.pop("PYTHONPATH", None)
        command = [python, str(HERE / f"{name}_train.py"), json.dumps(settings)]
        super().__init__(name, command, settings["threads"], timeout, environment)

    def iterate(self) -> None:
        """One collection and one update."""
        self.rows.append(self.ask(do="iterate"))

    def evaluate(self, episodes: int, seed: int) -> None:
        """The deterministic policy's return in stock VMAS, after the frames seen so far."""
        frames = sum(row["frames"] for row in self.rows)
        self.evaluations.append({"frames": frames, **self.ask(do="evaluate", episodes=episodes, seed=seed)})


def benchmarl_python(folder: Path, wheels: Path | None) -> str:
    """The interpreter of BenchMARL's virtual environment, which is made when it is not there.

    Args:
        folder (Path): the virtual environment.
        wheels (Path, optional): a folder with the wheels, to work without a network; the new environment then
            sees this interpreter's packages (torch among them), and what BenchMARL needs goes over them.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "benchmarl-installed"
    if done.exists():
        return str(python)
    print(f"making BenchMARL's virtual environment in {folder}", file=sys.stderr)
    try:
        venv.create(folder, with_pip=wheels is None, clear=True)
        torch = "torch==" + metadata.version("torch").split("+")[0]
        command = [str(python), "-m", "pip", "install", "--quiet"]
        if wheels is not None:
            purelib = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
            site = Path(subprocess.run(purelib, check=True, capture_output=True, text=True).stdout.strip())
            inherited = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
            (site / "inherited.pth").write_text("\n".join(inherited))
            command += ["--no-index", "--find-links", str(wheels)]
        subprocess.run([*command, torch, *BENCHMARL], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        words = (error.stderr or str(error))[-2000:].strip()
        raise ProcessFailed(f"no environment for benchmarl: {words}") from error
    except (OSError, metadata.PackageNotFoundError) as error:
        raise ProcessFailed(f"no environment for benchmarl: {error}") from error
    done.touch()
    return str(python)


def start(args: argparse.Namespace, scenario: str, failures: dict[str, str]) -> list[Contender]:
    """Start the contenders one after the other, all with the same settings."""
    settings = {name: getattr(args, name) for name in SENT}
    settings |= {"scenario": scenario, "scenario_args": SCENARIO_ARGS.get(scenario, {}), "adam_eps": 1e-6}
    contenders = []
    for name in args.contenders:
        try:
            python = sys.executable
            if name == "benchmarl":
                python = benchmarl_python(args.benchmarl_venv, args.wheels)
            contenders.append(Contender(name, python, settings, args.timeout))
        except ProcessFailed as failure:
            failures[name] = str(failure)
    return contenders


def measure(args: argparse.Namespace, scenario: str) -> dict[str, Any]:
    """Run one scenario with all contenders in turn.

    Returns:
        What goes into the results file: settings, machine, a record per contender, ratios, failures.
    """
    failures: dict[str, str] = {}
    load = [os.getloadavg()[0]]
    contenders = start(args, scenario, failures)
    alive = list(contenders)

    def everyone(action: str, *arguments: int) -> None:
        for contender in list(alive):
            try:
                getattr(contender, action)(*arguments)
            except ProcessFailed as failure:
                failures[contender.name] = str(failure)
                alive.remove(contender)

    everyone("evaluate", args.episodes, args.seed + 1000)
    for iteration in range(1, args.iterations + 1):
        everyone("iterate")
        load.append(os.getloadavg()[0])
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            everyone("evaluate", args.episodes, args.seed + 1000)
        progress(contenders, iteration)
    for contender in contenders:
        contender.finish()

    places = ("scenario", "output", "wheels", "benchmarl_venv")
    options = {name: value for name, value in vars(args).items() if name not in places}
    options["scenario_args"] = SCENARIO_ARGS.get(scenario, {})
    gpus = [contender.about["device_name"] for contender in contenders]
    return {
        "scenario": scenario,
        **about(options, gpus[0] if gpus else None),
        "load_average": [round(value, 2) for value in load],
        "contenders": {contender.name: record(contender, args.warmup) for contender in contenders},
        "ratios": ratios(contenders, args.warmup),
        "failures": failures,
    }


def record(contender: Contender, warmup: int) -> dict[str, Any]:
    """One contender's figures: medians over the iterations after the warm-up, and every row behind them."""
    figures: dict[str, Any] = {"about": contender.about}
    rows = contender.rows[warmup:]
    if rows:
        figures["frames_per_second"] = {
            phase: round(statistics.median(row["frames"] / seconds(row, phase) for row in rows), 1)
            for phase in PHASES
        }
    if contender.rows:
        figures["peak_memory_mb"] = round(max(row["peak_memory_mb"] for row in contender.rows))
        device = contender.rows[-1]["peak_device_memory_mb"]
        figures["peak_device_memory_mb"] = None if device is None else round(device)
    return {**figures, "evaluations": contender.evaluations, "iterations": contender.rows}


def ratios(contenders: list[Contender], warmup: int) -> dict[str, dict[str, dict[str, float]]]:
    """How many times faster tdmarl is than each other contender, round by round: median, least, greatest.

    The iterations of one round follow each other, so other load moves their ratio less than the times; it
    moves the ratio of processor times least.
    """
    ours = next((contender.rows[warmup:] for contender in contenders if contender.name == "tdmarl"), [])
    result: dict[str, dict[str, dict[str, float]]] = {}
    for contender in contenders:
        pairs = list(zip(ours, contender.rows[warmup:]))
        if contender.name == "tdmarl" or not pairs:
            continue
        result[contender.name] = {}
        for phase in (*PHASES, *CPU_PHASES):
            values = [seconds(theirs, phase) / seconds(mine, phase) for mine, theirs in pairs]
            result[contender.name][phase] = {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
    return result


def seconds(row: dict[str, Any], phase: str) -> float:
    """What one phase of an iteration took, by the clock or in processor time."""
    name, _, cpu = phase.partition("_")
    unit = "cpu_seconds" if cpu else "seconds"
    collect, update = row[f"collect_{unit}"], row[f"update_{unit}"]
    return {"collection": collect, "update": update, "total": collect + update}[name]


def progress(contenders: list[Contender], iteration: int) -> None:
    """One line per round on stderr."""
    parts = []
    for contender in contenders:
        if len(contender.rows) == iteration:
            row = contender.rows[-1]
            value = row["train_return"]
            parts.append(
                f"{contender.name} {row['collect_seconds']:.1f}+{row['update_seconds']:.1f} s"
                + (f" return {value:.3f}" if value is not None else "")
            )
    print(f"{iteration:4d}  " + "   ".join(parts), file=sys.stderr)


def table(result: dict[str, Any]) -> str:
    """The figures of one scenario as a markdown table, the failures below it."""
    settings = result["settings"]
    frames = settings["num_envs"] * settings["max_steps"]
    lines = [
        f"### {settings['algorithm']} on {result['scenario']}, {settings['num_envs']} environments x "
        f"{settings['max_steps']} steps, {settings['device']}, {settings['threads']} threads",
        "",
        "| | collection, frames/s | update, frames/s | total, frames/s "
        "| tdmarl is faster by, total (min-max) | in processor time | peak memory, MB "
        "| training return | evaluation return | frames |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, figures in result["contenders"].items():
        speed = figures.get("frames_per_second")
        if speed is None:
            continue
        against = result["ratios"].get(name, {})
        faster = " | ".join(
            "{median:.2f} ({min:.2f}-{max:.2f})".format(**against[phase]) if against else "-"
            for phase in ("total", "total_cpu")
        )
        memory = f"{figures['peak_memory_mb']:,}"
        if figures["peak_device_memory_mb"] is not None:
            memory += f" + {figures['peak_device_memory_mb']:,} on the GPU"
        trained = figures["iterations"][-1]["train_return"]
        evaluation = figures["evaluations"][-1] if figures["evaluations"] else None
        lines.append(
            f"| {name} | "
            + " | ".join(f"{speed[phase]:,.0f}" for phase in PHASES)
            + f" | {faster} | {memory} | "
            + (f"{trained:.3f}" if trained is not None else "-")
            + (f" | {evaluation['return']:.3f}" if evaluation else " | -")
            + f" | {len(figures['iterations']) * frames:,} |"
        )
    for name, failure in result["failures"].items():
        lines += ["", f"{name} failed:", "```", failure, "```"]
    return "\n".join(lines)


def save(result: dict[str, Any], path: Path) -> None:
    """Put one scenario's result into the file, in place of an earlier one of like scenario, device, size."""

    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        names = ("algorithm", "device", "threads", "num_envs", "max_steps", "mode", "precision")
        settings = {"algorithm": "mappo", "precision": "float32", **run["settings"]}
        return (run["scenario"], *(settings[name] for name in names))

    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in runs if key(run) != key(result)] + [result]
    write({"runs": runs}, path)


def draw(result: dict[str, Any], figure: Any) -> None:
    """For each run the frames per second of every contender, and its evaluated returns over frames."""
    runs = result["runs"]
    for row, run in zip(figure.subplots(len(runs), 2, squeeze=False), runs):
        speeds, returns = row
        for place, (name, one) in enumerate(run["contenders"].items()):
            color = COLORS[name]
            if "frames_per_second" in one:
                values = [one["frames_per_second"][phase] for phase in PHASES]
                speeds.bar(
                    [i + 0.27 * (place - 1) for i in range(len(PHASES))],
                    values,
                    0.25,
                    color=color,
                    label=name,
                )
            found = one["evaluations"]
            returns.plot(
                [e["frames"] for e in found], [e["return"] for e in found], "o-", color=color, markersize=4
            )
        s = run["settings"]
        speeds.set_xticks(range(len(PHASES)), PHASES)
        speeds.set(yscale="log", ylabel="frames/s")
        speeds.legend(fontsize=8)
        about_it = (
            f"{s.get('algorithm', 'mappo')} on {run['scenario']}, {s['num_envs']} x {s['max_steps']} frames"
        )
        rounded = ", bfloat16" if s.get("precision") == "bfloat16" else ""
        speeds.set_title(about_it, fontsize=9)
        ways = f"{s['device']}, {s['threads']} threads, tdmarl's mode {s['mode']}{rounded}"
        returns.set_title(ways, fontsize=9)
        returns.xaxis.set_major_formatter("{x:,.0f}")
        returns.set(xlabel="frames", ylabel="evaluated return")
        returns.locator_params(axis="x", nbins=5)  # the numbers are long
        returns.grid(alpha=0.25)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the committed measurement."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--algorithm", choices=list(DEFAULTS), default="mappo", help="what all contenders learn by")
    add("--scenario", nargs="+", default=["navigation"], help="VMAS scenarios, one after the other")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who, in this order")
    add("--iterations", type=int, default=10, help="rounds; in each, every contender iterates once")
    add("--warmup", type=int, default=1, help="first rounds that do not count for the speed")
    add("--num-envs", type=int, help="environments simulated at once (default: 600, off-policy 60)")
    add("--max-steps", type=int, default=100, help="time limit, and steps per batch")
    add("--epochs", type=int, default=4, help="MAPPO's passes over each batch")
    add("--minibatch-size", type=int, help="frames of a minibatch (default: 4096, off-policy 1024)")
    add("--updates", type=int, default=100, help="of QMIX and MADDPG after each batch")
    add("--buffer-size", type=int, default=60_000, help="frames in the replay buffer of QMIX and MADDPG")
    add("--tau", type=float, default=0.005, help="share by which targets follow at each update")
    add("--explore-start", type=float, default=0.8, help="QMIX's epsilon, MADDPG's noise, at the start")
    add("--explore-end", type=float, default=0.05, help="the same in the end")
    add("--explore-frames", type=int, default=60_000, help="frames until then")
    add("--lr", type=float, default=5e-4, help="Adam's learning rate, actor and critic")
    add("--gamma", type=float, default=0.9, help="discount")
    add("--lmbda", type=float, default=0.9, help="GAE's lambda")
    add("--clip-epsilon", type=float, default=0.2, help="PPO's clip")
    add("--entropy-coeff", type=float, default=1e-4, help="weight of the entropy bonus")
    add("--max-grad-norm", type=float, help="clip, of actor and of critic apart (default: 5, off-policy 40)")
    add("--hidden", type=int, nargs="+", default=[256, 256], help="hidden tanh layers of each network")
    add("--seed", type=int, default=0, help="the seed of every contender")
    add("--threads", type=int, default=2, help="threads of each contender")
    add("--device", default="cpu", help="cpu or cuda, for simulation and training")
    add("--mode", default="auto", help="tdmarl's mode: auto, eager, compile or cudagraph")
    add("--precision", default="float32", help="tdmarl's products: float32 or bfloat16; the others' are float32")
    add("--episodes", type=int, default=256, help="whole episodes of each evaluation")
    add("--eval-every", type=int, default=5, help="rounds between evaluations; first and last always are")
    add("--timeout", type=float, default=900.0, help="seconds a contender may take to answer")
    add(
        "--benchmarl-venv",
        type=Path,
        default=BENCHMARL_VENV,
        help="its virtual environment, made when not there",
    )
    add("--wheels", type=Path, help="folder of wheels to make that environment from, without a network")
    add("--output", type=Path, default=RESULTS / "train.json", help="results file")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.algorithm].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.iterations <= args.warmup:
        parser.error(f"--iterations ({args.iterations}) must be greater than --warmup ({args.warmup})")
    return args


def main() -> None:
    args = parse()
    for scenario in args.scenario:
        result = measure(args, scenario)
        save(result, args.output)
        print(table(result) + "\n", flush=True)
    everything = json.loads(args.output.read_text())
    picture(draw, everything, args.output, (9, 3.2 * len(everything["runs"])))


if __name__ == "__main__":
    main()
