"""Measures QMIX training: tdmarl beside a plain TorchRL program, at large and at small updates, in one process.

    python benchmarks/q_train.py                         # both settings, three rounds
    python benchmarks/q_train.py --setting small --rounds 5

Both sides see the same environment, networks, buffer, minibatches and optimizer, and take turns. Of the large setting's
hundreds of updates a batch only ``--timed`` are made, and the iteration is added up from them; the small setting's are
all made. What is done once a batch (the team's reward, storing it) counts among the updates, so with few of them it
counts too often. ``bare`` is what no implementation can leave out of an update: forward, target forward, backward and
Adam of the same networks on tensors that lie ready.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.envs import RewardSum, TransformedEnv, VmasEnv
from torchrl.modules import EGreedyModule, MultiAgentMLP, QMixer, QValueModule, SafeSequential
from torchrl.objectives import QMixerLoss, SoftUpdate, ValueEstimators

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import machine  # noqa: E402

CPU = torch.device("cpu")
EMBED = 32  # width of the mixer, whose hypernetworks have one layer, as TorchRL's


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides have in common; ``large`` is that of TorchRL's own QMIX program."""

    width: int
    updates: int  # per batch
    minibatch: int
    scenario: str = "balance"
    n_agents: int = 3
    num_envs: int = 600
    steps: int = 100
    lr: float = 5e-5
    gamma: float = 0.9
    tau: float = 0.005
    max_grad_norm: float = 40.0
    epsilon: float = 0.3

    @property
    def frames(self) -> int:
        """Of a batch, and in the replay buffer."""
        return self.num_envs * self.steps

    def env(self) -> dict[str, Any]:
        """Arguments of both environments."""
        return {
            "scenario": self.scenario, "num_envs": self.num_envs, "max_steps": self.steps, "device": "cpu", "seed": 0,
            "continuous_actions": False, "n_agents": self.n_agents,
        }  # fmt: skip


SETTINGS = {
    "large": Setting(width=256, updates=45 * (60_000 // 4096), minibatch=4096),
    "small": Setting(width=64, updates=64, minibatch=512),
}


def seconds(function: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Wall time and this process's CPU time of one call, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    found = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu, found


class Ours:
    """QMIX by tdmarl with TorchRL's choices: no double Q, no agent identity, one layer in the hypernetworks."""

    def __init__(self, setting: Setting, updates: int, mode: str) -> None:
        env = tdmarl.VmasEnv(**setting.env(), time_limit="terminate", mode=mode)
        env.compile()
        self.algo = tdmarl.qmix(
            env, team_reward="mean", embed_dim=EMBED, hypernet_layers=1, gamma=setting.gamma, double_q=False,
            lr=setting.lr, max_grad_norm=setting.max_grad_norm, num_updates=updates,
            minibatch_size=setting.minibatch, buffer_size=setting.frames, tau=setting.tau,
            epsilon_start=setting.epsilon, epsilon_end=0.0, epsilon_frames=250 * setting.frames, agent_id=False,
            hidden=(setting.width, setting.width), activation=nn.Tanh,
        )  # fmt: skip
        self.batches = iter(tdmarl.Collector(env, self.algo.explore, frames_per_batch=setting.frames))

    def collect(self) -> TensorDictBase:
        """One batch."""
        return next(self.batches)

    def update(self, batch: TensorDictBase) -> None:
        """The updates after a batch."""
        self.algo.learner(batch)


class TorchRL:
    """The same of TorchRL's parts: ``MultiAgentMLP``, ``QMixer``, ``QMixerLoss``, ``SoftUpdate`` and its collector."""

    def __init__(self, setting: Setting, updates: int) -> None:
        self.setting, self.updates = setting, updates
        stock = VmasEnv(**setting.env())
        env = TransformedEnv(
            stock, RewardSum(in_keys=[stock.reward_key], out_keys=[("agents", "episode_reward")])
        )
        spec, shape = (
            stock.full_action_spec_unbatched,
            stock.observation_spec_unbatched["agents", "observation"].shape,
        )
        net = MultiAgentMLP(
            shape[-1], spec["agents", "action"].space.n, setting.n_agents, centralized=False, share_params=True,
            depth=2, num_cells=setting.width, activation_class=nn.Tanh,
        )  # fmt: skip
        names = [("agents", name) for name in ("action", "action_value", "chosen_action_value")]
        qnet = SafeSequential(
            TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=[("agents", "action_value")]),
            QValueModule(action_value_key=names[1], out_keys=names, spec=spec, action_space=None),
        )
        greedy = {"eps_init": setting.epsilon, "eps_end": 0, "annealing_num_steps": 250 * setting.frames}
        self.noise = EGreedyModule(spec=spec, action_key=names[0], **greedy)
        mixer = TensorDictModule(
            QMixer(shape, EMBED, setting.n_agents, device=CPU),
            in_keys=[names[2], ("agents", "observation")],
            out_keys=["chosen_action_value"],
        )
        self.loss = QMixerLoss(qnet, mixer, delay_value=True)
        self.loss.set_keys(
            action=names[0], action_value=names[1], local_value=names[2], global_value="chosen_action_value"
        )
        self.loss.make_value_estimator(ValueEstimators.TD0, gamma=setting.gamma)
        self.target = SoftUpdate(self.loss, eps=1 - setting.tau)
        self.optim = torch.optim.Adam(self.loss.parameters(), setting.lr)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(setting.frames), sampler=RandomSampler(), batch_size=setting.minibatch
        )
        explore = TensorDictSequential(qnet, self.noise)
        self.collector = Collector(env, explore, frames_per_batch=setting.frames, total_frames=-1)
        self.batches = iter(self.collector)

    def collect(self) -> TensorDictBase:
        """One batch."""
        return next(self.batches)

    def update(self, batch: TensorDictBase) -> None:
        """The updates after a batch."""
        batch.set(("next", "reward"), batch.get(("next", "agents", "reward")).mean(-2))
        self.buffer.extend(batch.exclude(("next", "agents", "reward")).reshape(-1))
        for _ in range(self.updates):
            loss = self.loss(self.buffer.sample())["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), self.setting.max_grad_norm)
            self.optim.step()
            self.optim.zero_grad()
            self.target.step()
        self.noise.step(batch.numel())
        self.collector.update_policy_weights_()


class BareMixer(nn.Module):
    """QMIX's mixer in as few operations as it has."""

    def __init__(self, n: int, state: int) -> None:
        super().__init__()
        self.weights, self.bias = nn.Linear(state, n * EMBED), nn.Linear(state, EMBED)
        self.last = nn.Linear(state, EMBED)
        self.value = nn.Sequential(nn.Linear(state, EMBED), nn.ReLU(), nn.Linear(EMBED, 1))

    def forward(self, q: Tensor, s: Tensor) -> Tensor:
        """``[M, n]`` and ``[M, s]`` to ``[M, 1]``."""
        first = self.weights(s).abs().view(len(q), q.shape[-1], EMBED)
        hidden = nn.functional.elu(torch.baddbmm(self.bias(s).unsqueeze(1), q.unsqueeze(1), first))
        return torch.bmm(hidden, self.last(s).abs().unsqueeze(2)).squeeze(2) + self.value(s)


class Bare:
    """Forward, target forward, backward and Adam of those networks, on tensors that lie ready."""

    def __init__(self, setting: Setting, updates: int, batch: TensorDictBase) -> None:
        self.setting, self.updates = setting, updates
        rows = batch.reshape(-1)[: setting.minibatch]
        self.seen, self.after = (rows.get((*at, "agents", "observation")) for at in ((), ("next",)))
        self.action = rows.get(("agents", "action")).unsqueeze(-1)  # [M, n, 1]
        self.reward = (
            rows.get(("next", "agents", "reward")).squeeze(-1).sum(-1, keepdim=True) / setting.n_agents
        )
        self.going = (~rows.get(("next", "terminated"))).float()
        size, w = self.seen.shape[-1], setting.width
        choices = int(self.action.max()) + 1
        net = nn.Sequential(nn.Linear(size, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, choices))
        self.nets = nn.ModuleList([net, BareMixer(setting.n_agents, setting.n_agents * size)])
        self.targets = copy.deepcopy(self.nets).requires_grad_(False)
        self.optim = torch.optim.Adam(self.nets.parameters(), setting.lr, fused=True)

    def update(self) -> None:
        """As many updates as the others make."""
        (net, mixer), (target, target_mixer) = self.nets, self.targets
        for _ in range(self.updates):
            value = mixer(net(self.seen).gather(-1, self.action).squeeze(-1), self.seen.flatten(1))
            with torch.no_grad():
                best = target(self.after).amax(-1)  # [M, n]
                following = target_mixer(best, self.after.flatten(1))
                goal = self.reward + self.setting.gamma * self.going * following
            self.optim.zero_grad()
            (goal - value).square().mean().backward()
            self.optim.step()


def measure(setting: Setting, timed: int, rounds: int, mode: str) -> dict[str, Any]:
    """All sides in turn; medians over the rounds after the first, by the clock and in processor time."""
    updates = min(timed, setting.updates)
    sides: dict[str, Any] = {"tdmarl": Ours(setting, updates, mode), "torchrl": TorchRL(setting, updates)}
    found: dict[str, dict[str, list[float]]] = {}

    def note(name: str, phase: str, spent: Sequence[float], share: float = 1.0) -> None:
        for unit, value in zip(("wall", "cpu"), spent):
            found.setdefault(name, {}).setdefault(f"{phase}_{unit}", []).append(value * share)

    for _ in range(rounds + 1):
        for name in ("tdmarl", "torchrl"):
            *spent, batch = seconds(sides[name].collect, CPU)
            note(name, "collection", spent)
            note(name, "update", seconds(lambda: sides[name].update(batch), CPU)[:2], 1 / updates)
        bare = sides.setdefault("bare", Bare(setting, updates, batch))
        note("bare", "update", seconds(bare.update, CPU)[:2], 1 / updates)
    counted = {
        name: {key: x[1:] for key, x in side.items()} for name, side in found.items()
    }  # without warming up
    result = {
        "settings": dataclasses.asdict(setting),
        "mode": mode,
        "timed_updates": updates,
        "seconds": counted,
    }
    return {**result, **figures(setting, counted)}


def figures(setting: Setting, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians of seconds (update: of one) and how many times faster tdmarl is, round by round."""
    for name in ("tdmarl", "torchrl"):
        for unit in ("wall", "cpu"):
            pairs = zip(found[name][f"collection_{unit}"], found[name][f"update_{unit}"])
            found[name][f"total_{unit}"] = [collect + setting.updates * update for collect, update in pairs]
    ours, theirs, bare = found["tdmarl"], found["torchrl"], found["bare"]
    ratios = {key: statistics.median(b / a for a, b in zip(ours[key], theirs[key])) for key in ours}
    over = {key: statistics.median(a / b for a, b in zip(ours[key], bare[key])) for key in bare}
    medians = {name: {key: statistics.median(x) for key, x in side.items()} for name, side in found.items()}
    return {"medians": medians, "tdmarl_is_faster_by": ratios, "update_over_bare": over}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The ratios as a markdown table: processor time, by the clock in brackets."""
    lines = ["| | collection | update | end to end | update over bare |", "|---|---|---|---|---|"]
    for name, result in results.items():
        faster, bare = result["tdmarl_is_faster_by"], result["update_over_bare"]
        cells = [
            f"{faster[f'{p}_cpu']:.2f} ({faster[f'{p}_wall']:.2f})" for p in ("collection", "update", "total")
        ]
        cells.append(f"{bare['update_cpu']:.2f} ({bare['update_wall']:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3, help="that count, after one that warms up")
    parser.add_argument("--timed", type=int, default=64, help="updates made per batch, at most")
    parser.add_argument(
        "--mode", choices=["eager", "compile"], default="compile", help="of tdmarl's simulation"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-envs", type=int, default=600)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "q_train.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    chosen = {name: dataclasses.replace(SETTINGS[name], num_envs=args.num_envs) for name in args.setting}
    results = {name: measure(setting, args.timed, args.rounds, args.mode) for name, setting in chosen.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
