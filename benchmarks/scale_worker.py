"""One size of `scale.py`, in a process of its own: makes an iteration whenever it is asked.

Not meant to be run by hand.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import Answers, Memory, seconds  # noqa: E402
from simulate_worker import scenario_arguments  # noqa: E402
from tdmarl.memory import _Piece  # noqa: E402

BATCHES = 2  # that a replay buffer holds


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece of it once.

    Example:
        >>> x = torch.zeros(3, 4)
        >>> nbytes([x, x[1], x.view(12), torch.zeros(2, dtype=torch.bool)])
        50
    """
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def alive() -> int:
    """Bytes of all tensors that there are, and of the memory that waits for batches to come.

    Compiled loops keep what they work on from one iteration to the next, so what an iteration adds is not all it needs.
    """
    found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta]
    found += [torch.empty(0, dtype=torch.uint8).set_(x.storage) for x in gc.get_objects() if type(x) is _Piece]
    return nbytes(found)


def held(learner: Any) -> dict[str, list[Tensor]]:
    """The tensors that a learner keeps from one iteration to the next: buffer, parameters (targets among them), and
    the optimizers' state with the gradients."""
    buffer = learner.buffer
    rows = buffer.storage[:] if hasattr(buffer, "storage") else getattr(buffer, "_rows", None)
    parts = learner.step.parts
    parameters = [x for part in parts for x in (*part.loss.parameters(), *part.loss.buffers())]
    states = [state for part in parts for state in part.optim.state.values()]
    moments = [x for state in states for x in state.values() if isinstance(x, Tensor)]
    return {
        "buffer": [] if rows is None else list(rows.values(True, True)),
        "parameters": parameters,
        "optimizer": [*moments, *(x.grad for x in parameters if x.grad is not None)],
    }


class Size:
    """The environment, the algorithm and their iterations at one size.

    Args:
        settings (dict): see `scale.py`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        s = self.settings = settings
        self.env = tdmarl.VmasEnv(
            s["scenario"],
            num_envs=s["num_envs"],
            max_steps=100,
            device=s["device"],
            seed=0,
            continuous_actions=s["algorithm"] != "qmix",
            mode=s["mode"],
            **scenario_arguments(s["scenario"], s["n_agents"]),
        )
        self.env.compile()
        self.frames = s["num_envs"] * s["steps"]
        self.learner, explore = self._learner()
        self._collector = tdmarl.Collector(self.env, explore, frames_per_batch=self.frames, seed=0)
        self.batches: Iterator[Any] = iter(self._collector)

    def _learner(self) -> tuple[Any, Any]:
        s, minibatch = self.settings, min(self.settings["minibatch_size"], self.frames)
        common = {"hidden": (s["width"],) * 2, "minibatch_size": minibatch, "mode": s["mode"], "seed": 0}
        if s["algorithm"] == "mappo":
            algo = tdmarl.mappo(self.env, num_epochs=s["epochs"], **common)
        else:
            make = {"qmix": tdmarl.qmix, "maddpg": tdmarl.maddpg}[s["algorithm"]]
            updates = s["epochs"] * -(-self.frames // minibatch)
            algo = make(self.env, num_updates=updates, buffer_size=BATCHES * self.frames, **common)
        return algo.learner, algo.explore

    def iterate(self) -> dict[str, float]:
        """One iteration's seconds: collecting and learning, by the clock and in processor time."""
        device = self.settings["device"]
        *collect, batch = seconds(lambda: next(self.batches), device)
        learn = seconds(lambda: self.learner(batch), device)
        return {
            "collect_seconds": collect[0],
            "learn_seconds": learn[0],
            "seconds": collect[0] + learn[0],
            "collect_cpu_seconds": collect[1],
            "learn_cpu_seconds": learn[1],
            "cpu_seconds": collect[1] + learn[1],
        }

    def memory(self) -> dict[str, Any]:
        """Bytes of what an iteration cannot do without, and the most that one needs beside the libraries' own.

        As in the recipes of on-policy learning a batch is let go of before the next one is collected.
        """
        gc.collect()
        before = alive()
        memory = Memory(self.settings["device"])
        memory.begin()
        for last in (False, True):
            batch = next(self.batches)
            self.learner(batch)
            if not last:
                del batch
        peak, kept = memory.peak(before), held(self.learner)
        rows = nbytes(batch.values(True, True))
        sizes = {name: nbytes(tensors) for name, tensors in kept.items()}
        # rows of the latest batch are no buffer of their own
        both = nbytes([*kept["buffer"], *batch.values(True, True)])
        needed = both + sizes["parameters"] + sizes["optimizer"]
        return {"batch": rows, **sizes, "needed": needed, "peak": peak}


def main() -> None:
    answers, settings = Answers(), json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(settings["threads"])
    size = Size(settings)
    for _ in range(BATCHES):
        size.iterate()  # compiles, and fills a replay buffer
    cuda = settings["device"].startswith("cuda")
    report = {"mode": size.env.mode, "fallback_reason": size.env.fallback_reason, "frames": size.frames}
    report["gpu"] = torch.cuda.get_device_name() if cuda else None
    answers.answer(**report, memory=size.memory() if settings["memory"] else None)
    for _ in answers.requests():
        answers.answer(**size.iterate())


if __name__ == "__main__":
    main()
