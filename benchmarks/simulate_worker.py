"""Measures one case of `simulate.py` in a process of its own: all contenders on one scenario at one size.

    python benchmarks/simulate_worker.py SETTINGS.json RESULT.json

The result is written after every repetition, so that a process that is stopped leaves what it has measured;
what it is doing is said on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from simulate_contenders import Batch, Contender, Policy, alone, collecting, raw

import tdmarl
from tdmarl.envs.tasks import TASKS


def scenario_arguments(scenario: str, n_agents: int | None) -> dict[str, Any]:
    """The scenario's arguments, the same for all contenders; more agents get more room to begin in."""
    arguments = dict(TASKS.get(scenario, {}))
    if n_agents is not None:
        arguments["n_agents"] = n_agents
        if scenario == "navigation":
            side = max(1.0, (n_agents / 4) ** 0.5)  # VMAS's own for four agents
            arguments.update(world_spawning_x=side, world_spawning_y=side)
    return arguments


class Case:
    """All contenders of one case, and what became of each.

    Args:
        settings (dict): see `simulate.py`.
        out (Path): where the result goes.
    """

    def __init__(self, settings: dict[str, Any], out: Path) -> None:
        self.settings, self._out = settings, out
        self.device = torch.device(settings["device"])
        self._arguments = scenario_arguments(settings["scenario"], settings["n_agents"])
        self._contenders: dict[str, Contender] = {}
        self._envs: dict[str, tdmarl.VmasEnv] = {}
        self._about: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        self._compiler_start: float | None = None
        example = self._example()
        self._group_map = example.group_map
        self._policy = Policy(example).to(self.device)

    def run(self) -> None:
        """Makes every contender, warms each up, and measures them in turn, repetition by repetition."""
        s = self.settings
        stock = {"torchrl": self._torchrl, "vmas": self._vmas}
        names = [f"tdmarl {mode}" for mode in s["modes"]] if "tdmarl" in s["contenders"] else []
        names += [name for name in stock if name in s["contenders"]]

        def make(name: str) -> None:
            batch_of = stock[name]() if name in stock else self._ours(name)
            self._contenders[name] = Contender(batch_of, s["num_envs"], self.device)

        def settle(name: str) -> None:
            self._contenders[name].settle(s["steps"], s["warmup"], s["seconds"])

        def measure(name: str) -> None:
            self._contenders[name].measure(s["seconds"])

        def by_parts(name: str) -> None:
            self._about[name]["alone_seconds"] = alone(self._envs[name], self._policy, s["seconds"])

        if {"compile", "cudagraph"} & set(s["modes"]) and "tdmarl" in s["contenders"]:
            self._each("starting the compiler for", self._start_compiler, ["tdmarl"])
        alive = self._each("warming up", settle, self._each("making", make, names))
        for repetition in range(s["repetitions"]):
            alive = self._each(f"repetition {repetition + 1} of", measure, alive)
            self.write()
        self._each("parts of", by_parts, [name for name in alive if name in self._envs])
        self.write()

    def write(self) -> None:
        """The result so far."""
        measured = {name: c.result() for name, c in self._contenders.items() if c.repetitions}
        on_gpu = self.device.type == "cuda"
        result = {
            "gpu": torch.cuda.get_device_name(self.device) if on_gpu else None,
            "compiler_start_seconds": self._compiler_start,
            "load": round(os.getloadavg()[0], 2),
            "arguments": self._arguments,
            "groups": {group: len(names) for group, names in self._group_map.items()},
            "measured": {name: {**self._about.get(name, {}), **found} for name, found in measured.items()},
            "failed": self._failed,
        }
        part = self._out.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(self._out)

    def _each(self, doing: str, function: Callable[[str], None], names: list[str]) -> list[str]:
        """The names for which it worked; one contender's failure does not stop the others."""
        worked = []
        for name in names:
            print(f"{doing} {name}", file=sys.stderr, flush=True)
            try:
                function(name)
                worked.append(name)
            except Exception as error:  # whatever a contender comes upon is its result
                self._failed[name] = f"{doing}: {type(error).__name__}: {error}"[:1000]
        return worked

    def _example(self) -> Any:
        """A small environment whose specs the policy is made from, so that it is the same for all."""
        from torchrl.envs import VmasEnv

        arguments = dict(num_envs=2, device=self.device, seed=0, **self._arguments)
        try:
            return tdmarl.VmasEnv(self.settings["scenario"], **arguments)
        except NotImplementedError:  # tdmarl has no such scenario; the others are measured all the same
            return VmasEnv(self.settings["scenario"], **arguments)

    def _start_compiler(self, _: str) -> None:
        """Compiles something small, so that what PyTorch does once per cache is not counted."""
        start, x = time.perf_counter(), torch.ones(64, 64, device=self.device)
        torch.compile(lambda x: x.sin() + 1)(x)
        self._compiler_start = time.perf_counter() - start

    def _common(self) -> dict[str, Any]:
        s = self.settings
        return dict(num_envs=s["num_envs"], max_steps=s["max_steps"], device=self.device, seed=0)

    def _ours(self, name: str) -> Callable[[int], Batch]:
        env = tdmarl.VmasEnv(
            self.settings["scenario"],
            **self._common(),
            group_map=self._group_map,
            mode=name.removeprefix("tdmarl "),
            **self._arguments,
        )
        start = time.perf_counter()
        env.compile()
        elapsed = time.perf_counter() - start
        report = {name: part._asdict() for name, part in env.report.items()}
        self._envs[name] = env
        self._about[name] = {"mode": env.mode, "fallback_reason": env.fallback_reason}
        if report:
            operations = sum(part["operations"] for part in report.values())
            self._about[name].update(compile_seconds=elapsed, operations=operations, parts=report)
        return collecting(
            lambda frames: tdmarl.Collector(env, self._policy, frames_per_batch=frames),
            self.settings["num_envs"],
        )

    def _torchrl(self) -> Callable[[int], Batch]:
        from torchrl.collectors import Collector
        from torchrl.envs import VmasEnv

        def make(frames: int) -> Any:  # a collector closes its environment when it goes
            env = VmasEnv(
                self.settings["scenario"], **self._common(), group_map=self._group_map, **self._arguments
            )
            return Collector(env, self._policy, frames_per_batch=frames, total_frames=-1)

        return collecting(make, self.settings["num_envs"])

    def _vmas(self) -> Callable[[int], Batch]:
        import vmas

        return raw(vmas.make_env(self.settings["scenario"], **self._common(), **self._arguments))


def main() -> None:
    """Reads the settings, measures, and leaves the result."""
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(settings["threads"])
    Case(settings, out).run()


if __name__ == "__main__":
    main()
