"""Measures how fast VMAS is collected: our environment against TorchRL's `VmasEnv` and `Collector`, side by
side.

    python benchmarks/simulate.py                       # balance, 1024 environments, natural ends
    python benchmarks/simulate.py --num-envs 128 --steps 50 --repetitions 3 --out /tmp/simulate.json

Both sides run the same policy and hand out the same `[num_envs, steps]` tensordict. Repetitions alternate,
medians are compared. The time of resetting 1 and half of the environments is measured as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdmarl.envs.vmas import VmasEnv

HERE = Path(__file__).resolve().parent


class NoisyLinear(nn.Module):
    """Acts at a fixed cost: tanh of a linear map and unit noise."""

    def __init__(self, observation: int, action: int) -> None:
        super().__init__()
        self.linear = nn.Linear(observation, action)

    def forward(self, observation: Tensor) -> Tensor:
        """An action in (-1, 1)."""
        mean = self.linear(observation)
        return torch.tanh(mean + torch.randn_like(mean))


def make_policy(env: Any) -> TensorDictModule:
    """The policy for all agents of the environment's only group."""
    (group,) = env.group_map
    observation = env.observation_spec_unbatched[group, "observation"].shape[-1]
    action = env.full_action_spec_unbatched[group, "action"].shape[-1]
    torch.manual_seed(0)
    module = NoisyLinear(observation, action).to(env.device)
    return TensorDictModule(module, in_keys=[(group, "observation")], out_keys=[(group, "action")])


def stepping(env: VmasEnv, policy: TensorDictModule, steps: int) -> Callable[[], TensorDictBase]:
    """Our side: `EnvBase.step` and the masked reset in a loop."""
    tensordict = env.reset()

    def collect() -> TensorDictBase:
        nonlocal tensordict
        found = []
        with torch.no_grad():
            for _ in range(steps):
                found.append(env.step(policy(tensordict)))
                tensordict = env.reset_done(found[-1]["next"])
        return torch.stack(found, 1)

    return collect


def collecting(
    collector_class: Any, env: Any, policy: TensorDictModule, steps: int
) -> Callable[[], TensorDictBase]:
    """A collector's side."""
    frames = env.batch_size[0] * steps
    collector = collector_class(env, policy, frames_per_batch=frames, total_frames=frames * 10**6)
    iterator = iter(collector)
    return lambda: next(iterator)


def seconds(function: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Wall time and this process's CPU time of one call, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    found = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu, found


def reset_times(env: VmasEnv, repetitions: int) -> dict[str, float]:
    """Median seconds of resetting one and half of the environments; on a CPU its time, not the wall's."""
    found: dict[str, list[float]] = {"reset_one": [], "reset_half": []}
    masks = {"reset_one": 1, "reset_half": env.num_envs // 2}
    for _ in range(repetitions):
        for name, count in random.sample(sorted(masks.items()), 2):
            mask = (torch.arange(env.num_envs, device=env.device) < count).unsqueeze(-1)  # [E, 1]
            tensordict = TensorDict({"_reset": mask}, batch_size=env.batch_size, device=env.device)
            found[name].append(seconds(lambda: env.reset(tensordict), env.device)[env.device.type == "cpu"])
    return {name: statistics.median(times) for name, times in found.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    cpu = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    packages = "torch", "torchrl", "tensordict", "vmas"
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(cpu),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "commit": git.stdout.strip() if git.returncode == 0 else None,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", default="balance")
    parser.add_argument("--num-envs", type=int, default=1024)
    parser.add_argument("--max-steps", type=int, default=None, help="time limit; default: natural ends only")
    parser.add_argument("--steps", type=int, default=32, help="environment steps per repetition")
    parser.add_argument("--warmup", type=int, default=3, help="repetitions before measuring")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "simulate.json")
    return parser.parse_args()


def main() -> None:
    """Measures and writes the result."""
    from torchrl.collectors import Collector
    from torchrl.envs import VmasEnv as TorchRLVmasEnv

    warnings.filterwarnings("ignore")
    args = parse()
    torch.set_num_threads(args.threads)
    arguments: dict[str, Any] = dict(
        scenario=args.scenario, num_envs=args.num_envs, max_steps=args.max_steps, device=args.device, seed=0
    )
    ours = VmasEnv(**arguments)
    stock = TorchRLVmasEnv(**arguments)
    sides = {
        "tdmarl_step": stepping(ours, make_policy(ours), args.steps),
        "torchrl": collecting(Collector, stock, make_policy(stock), args.steps),
    }
    try:
        from tdmarl.collect import Collector as OurCollector
    except ImportError:
        pass
    else:
        env = VmasEnv(**arguments)
        sides["tdmarl_collector"] = collecting(OurCollector, env, make_policy(env), args.steps)
    times: dict[str, list[float]] = {name: [] for name in sides}
    cpu_times: dict[str, list[float]] = {name: [] for name in sides}
    ends: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(args.warmup + args.repetitions):
        for name, collect in sides.items():
            elapsed, cpu, batch = seconds(collect, ours.device)
            if repetition >= args.warmup:
                times[name].append(elapsed)
                cpu_times[name].append(cpu)
                ends[name].append(batch["next", "done"].float().mean().item())
    resets = reset_times(ours, repetitions=100)
    frames = args.num_envs * args.steps
    result: dict[str, Any] = {
        "arguments": {**vars(args), "out": args.out.name},
        "frames_per_second": {name: frames / statistics.median(found) for name, found in times.items()},
        "seconds": times,
        "ends_per_frame": {name: statistics.mean(found) for name, found in ends.items()},
        "ratio": {
            name: statistics.median(times["torchrl"]) / statistics.median(found)
            for name, found in times.items()
        },
        "ratio_of_cpu_time": {
            name: statistics.median(cpu_times["torchrl"]) / statistics.median(found)
            for name, found in cpu_times.items()
        },
        **resets,
        "reset_ratio": max(resets.values()) / min(resets.values()),
        "machine": machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=2))


if __name__ == "__main__":
    main()
