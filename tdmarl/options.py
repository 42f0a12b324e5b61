"""What a recipe can be asked for on its command line; ``tyro`` reads the types, and the strings are the help.

A recipe's own dataclass extends one of these with what its algorithm alone has.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import torch

from tdmarl import log
from tdmarl.envs.tasks import TASKS


WORTH_COMPILING = 8_000  # updates, each of which saves milliseconds


@dataclasses.dataclass(kw_only=True)
class Options:
    """What every recipe can be asked for; a recipe's own dataclass extends it with hyper-parameters."""

    scenario: str = "navigation"
    """Name of the VMAS scenario."""
    scenario_args: str = "{}"
    """The scenario's own arguments as JSON, such as '{"n_agents": 5}', over those of tdmarl.envs.tasks."""
    num_envs: int = 128
    """Environments simulated side by side."""
    max_steps: int = 100
    """Steps after which an episode is cut."""
    frames_per_batch: int = 12_800
    """Frames (environment steps over all environments) between two updates; a multiple of --num-envs."""
    total_frames: int = 768_000
    """Frames of the whole run, those before a resume included."""
    seed: int = 0
    """Seed of everything random: initialization, environment, acting, learning, evaluation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N: simulator, policy and learner run there."""
    mode: Literal["auto", "eager", "compile", "cudagraph"] = "auto"
    """How simulation and updates run on the device; auto compiles what the run is long enough for."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products: tf32 (CUDA) rounds what they multiply, bfloat16 more, in the networks' hidden layers."""
    out: str | None = None
    """Folder of the run. Default: runs/<algorithm>-<scenario>-<seed>-<time>."""
    resume: str | None = None
    """Folder of a run to continue. Its options hold; its length and its record-keeping may be given anew."""
    logger: Literal["csv", "tensorboard", "wandb", "mlflow", "none"] = "csv"
    """Where metrics go besides metrics.csv, which is always written; csv and none add nothing to it."""
    eval_every: int = 5
    """Iterations between two evaluations; 0: only the last one is evaluated."""
    eval_episodes: int = 128
    """Whole episodes per evaluation, played by the deterministic policy."""
    checkpoint_every: int = 1
    """Iterations between two checkpoints; 0: only at the end. A signal always writes one."""
    progress: bool = True
    """Show a progress bar on a terminal."""

    def check(self) -> None:
        """Raises ValueError for options that no environment and no algorithm could accept."""
        for name in ("num_envs", "max_steps", "frames_per_batch", "total_frames", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} must not be negative, got {getattr(self, name)}")
        if self.frames_per_batch % self.num_envs:
            near = max(1, self.frames_per_batch // self.num_envs) * self.num_envs
            raise ValueError(
                f"--frames-per-batch {self.frames_per_batch} is not a multiple of "
                f"--num-envs {self.num_envs}; {near} would be"
            )
        log.check_tracker(self.logger)
        device = self.pick_device()
        if self.precision == "tf32" and device.type != "cuda":
            raise ValueError(f"--precision tf32 is a GPU's way to multiply, and this run's device is {device}")
        self.task()

    def task(self) -> dict[str, Any]:
        """The scenario's arguments: those of the published comparisons, and ``scenario_args`` over them."""
        try:
            given = json.loads(self.scenario_args)
        except json.JSONDecodeError as error:
            raise ValueError(f"--scenario-args {self.scenario_args!r} is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(
                f"--scenario-args {self.scenario_args!r} must be an object such as '{{\"n_agents\": 5}}'"
            )
        return TASKS.get(self.scenario, {}) | given

    def network_precision(self) -> str:
        """The algorithm's ``precision``; TF32 is the whole process's, which :func:`tdmarl.run.launch` sets."""
        return "float32" if self.precision == "tf32" else self.precision

    def simulation(self) -> dict[str, Any]:
        """How the environment runs, for :class:`tdmarl.VmasEnv`; that of a resumed run stays what it was."""
        stored = None if self.resume is None else log.read_config(self.resume).get("simulation")
        return {"mode": stored or self.mode, "expected_steps": self.total_frames // self.num_envs}

    def update_mode(self, updates: int) -> str:
        """How updates run, for the algorithm; that of a resumed run stays what it was.

        ``auto`` compiles them on a CPU if there are so many that they repay the time it takes.

        Args:
            updates (int): in the whole run.
        """
        if self.resume is not None:
            stored = log.read_config(self.resume)["algorithm"]["arguments"]
            for given in (stored, *stored.values()):  # of one algorithm, or of several teams'
                given = given.get("arguments", given) if isinstance(given, dict) else {}
                if "mode" in given:
                    return given["mode"]
        if self.mode == "auto" and self.pick_device().type == "cpu":
            return "compile" if updates >= WORTH_COMPILING else "eager"
        return self.mode

    def pick_device(self) -> torch.device:
        """The device that ``device`` names; ValueError where it is not there."""
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        try:
            device = torch.device(("cuda" if found else "cpu") if self.device == "auto" else self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {self.device} is none of auto, cpu, cuda and cuda:N")
        if device.type == "cuda" and (device.index or 0) >= found:
            raise ValueError(f"--device {self.device} is not there: torch finds {found} CUDA devices")
        return device


@dataclasses.dataclass(kw_only=True)
class OnPolicyOptions(Options):
    """What the recipes of the PPO family have in common, with defaults for VMAS on a laptop."""

    lr: float = 1e-3
    """Learning rate of actor and critic."""
    num_epochs: int = 4
    """How often each batch is gone through."""
    minibatch_size: int = 3_200
    """Frames per minibatch, at most --frames-per-batch."""
    gamma: float = 0.99
    """Discount of rewards."""
    lmbda: float = 0.95
    """GAE's weight of long returns."""
    clip_epsilon: float = 0.2
    """How far a policy's probability ratio may move within a batch."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 10.0
    """Largest norm of the actor's and of the critic's gradient."""
    anneal: bool = False
    """Let the learning rates and the entropy bonus fall to zero over --total-frames."""
    recurrent: bool = False
    """Let actor and critic remember: a gated recurrent unit after the hidden layers."""
    chunk_length: int = 10
    """With --recurrent: steps in the sequences learned from; divides the steps of a batch."""

    def check(self) -> None:
        """Raises ValueError for options that cannot be meant."""
        super().check()
        if not 1 <= self.minibatch_size <= self.frames_per_batch:
            raise ValueError(
                f"--minibatch-size {self.minibatch_size} must be between 1 and the batch's "
                f"{self.frames_per_batch} frames (--frames-per-batch)"
            )
        steps = self.frames_per_batch // self.num_envs
        if self.recurrent and not (1 <= self.chunk_length <= steps and steps % self.chunk_length == 0):
            raise ValueError(
                f"--chunk-length {self.chunk_length} must divide the {steps} steps of a batch "
                "(--frames-per-batch over --num-envs)"
            )
        if self.recurrent and self.minibatch_size < self.chunk_length:
            raise ValueError(
                f"--minibatch-size {self.minibatch_size} holds no sequence of --chunk-length {self.chunk_length}"
            )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of :func:`tdmarl.mappo`, :func:`tdmarl.ippo` and :func:`tdmarl.happo`."""
        names = (
            "lr", "num_epochs", "minibatch_size", "gamma", "lmbda", "clip_epsilon", "entropy_coeff", "max_grad_norm",
            "seed",
        )  # fmt: skip
        horizon = self.total_frames if self.anneal else None
        given = {name: getattr(self, name) for name in names} | {"anneal_frames": horizon}
        batches = self.total_frames // self.frames_per_batch * self.num_epochs
        given["mode"] = self.update_mode(batches * max(1, self.frames_per_batch // self.minibatch_size))
        given["precision"] = self.network_precision()
        if self.recurrent:  # minibatches are counted in rows, which are sequences then
            rows = self.minibatch_size // self.chunk_length
            given |= {"recurrent": "gru", "chunk_length": self.chunk_length, "minibatch_size": rows}
        return given


@dataclasses.dataclass(kw_only=True)
class OffPolicyOptions(Options):
    """What the recipes that learn from a replay buffer have in common, with defaults for VMAS on a laptop."""

    num_envs: int = 256
    """Environments simulated side by side."""
    frames_per_batch: int = 5_120
    """Frames (environment steps over all environments) between two rounds of updates; a multiple of --num-envs."""
    total_frames: int = 512_000
    """Frames of the whole run, those before a resume included."""
    eval_every: int = 10
    """Iterations between two evaluations; 0: only the last one is evaluated."""
    checkpoint_every: int = 20
    """Iterations between two checkpoints, which hold the replay buffer; 0: only at the end. A signal writes one."""
    lr: float = 1e-3
    """Learning rate."""
    num_updates: int = 32
    """Optimization steps after each batch."""
    minibatch_size: int = 2_048
    """Frames per minibatch."""
    gamma: float = 0.9
    """Discount of rewards."""
    n_steps: int = 1
    """Rewards added up before a value."""
    width: int = 128
    """Of each of the networks' two hidden layers."""
    share_params: bool = True
    """One network for all agents of a group, or one each."""
    buffer_size: int = 409_600
    """Frames that the replay buffer keeps."""
    storage: Literal["device", "cpu", "memmap"] = "device"
    """Where the replay buffer lies: with the simulator, in main memory, or in a memory-mapped file."""
    prioritized: bool = False
    """Replay in proportion to errors."""
    init_random_frames: int = 0
    """Frames collected with random actions first."""
    learning_starts: int = 0
    """Frames to be in the replay buffer before the first update."""
    tau: float = 0.01
    """Share by which targets follow the networks at every update; 0: they are copied at every --target-every."""
    target_every: int = 100
    """With --tau 0: updates between two copies of the networks to the targets."""
    max_grad_norm: float = 10.0
    """Largest norm of the gradient."""
    standardize_reward: bool = False
    """Standardize rewards by running moments."""
    anneal: bool = True
    """Let the learning rate fall to zero over --total-frames."""

    def check(self) -> None:
        """Raises ValueError for options that cannot be meant."""
        super().check()
        steps, (name, length) = self.frames_per_batch // self.num_envs, self.row()
        if not (1 <= length <= steps and steps % length == 0):
            raise ValueError(
                f"{name} {length} must divide the {steps} steps of a batch (--frames-per-batch over --num-envs)"
            )
        if self.frames_per_batch > self.buffer_size:
            raise ValueError(
                f"--buffer-size {self.buffer_size} must be at least --frames-per-batch {self.frames_per_batch}"
            )
        if not 1 <= self.minibatch_size <= self.buffer_size:
            raise ValueError(
                f"--minibatch-size {self.minibatch_size} must be between 1 and the replay buffer's "
                f"{self.buffer_size} frames (--buffer-size)"
            )

    def row(self) -> tuple[str, int]:
        """Steps in a row of the replay buffer, and the option that says so."""
        return "--n-steps", self.n_steps

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that all algorithms with a replay buffer take."""
        names = (
            "lr", "num_updates", "minibatch_size", "gamma", "n_steps", "share_params", "buffer_size", "storage",
            "prioritized", "learning_starts", "max_grad_norm", "standardize_reward", "seed",
        )  # fmt: skip
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given["mode"] = self.update_mode(self.total_frames // self.frames_per_batch * self.num_updates)
        given["precision"] = self.network_precision()
        given["hidden"] = (self.width, self.width)
        given["tau"] = self.tau or None
        given["target_every"] = None if self.tau else self.target_every
        given["anneal_frames"] = self.total_frames if self.anneal else None
        return given


@dataclasses.dataclass(kw_only=True)
class ValueOptions(OffPolicyOptions):
    """What the recipes of Q-learning have in common; actions are discrete."""

    double_q: bool = True
    """Let the online network choose the next action that the target network values."""
    n_steps: int = 1
    """Rewards added up before a value, within --chunk-length."""
    lmbda: float = 0.0
    """Weight of long returns, within --chunk-length."""
    recurrent: bool = False
    """Let the networks remember: a gated recurrent unit after a hidden layer."""
    chunk_length: int = 10
    """With --recurrent, --n-steps or --lmbda: steps in the sequences learned from; divides the steps of a batch."""
    burn_in: int = 0
    """With --recurrent: steps at the beginning of a sequence that only bring the state up to date."""
    last_action: bool = False
    """Let the networks see the agent's last action."""
    epsilon_end: float = 0.05
    """Probability of a random action, from --epsilon-frames on; it falls from 1."""
    epsilon_frames: int = 100_000
    """Frames until then."""

    def row(self) -> tuple[str, int]:
        """Steps in a row of the replay buffer: one, unless something looks further."""
        looks = self.recurrent or self.n_steps > 1 or self.lmbda > 0
        return "--chunk-length", self.chunk_length if looks else 1

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of :func:`tdmarl.iql`, :func:`tdmarl.vdn` and :func:`tdmarl.qmix`."""
        names = ("double_q", "lmbda", "burn_in", "last_action", "epsilon_end", "epsilon_frames")
        given = super().arguments() | {name: getattr(self, name) for name in names}
        given["hidden"] = (self.width,) if self.recurrent else (self.width, self.width)
        given["target_every"] = self.target_every
        given["recurrent"] = "gru" if self.recurrent else None
        given["sequence_length"] = self.row()[1]
        return given


@dataclasses.dataclass(kw_only=True)
class DeterministicOptions(OffPolicyOptions):
    """What the recipes of MADDPG have in common."""

    critic_lr: float = 1e-3
    """Learning rate of the critics."""
    others: Literal["buffer", "policy", "joint"] = "buffer"
    """The other agents' actions in an actor's gradient: those in the buffer, their policies', or all at once."""
    twin: bool = False
    """Two critics for each agent, whose smaller value counts (TD3)."""
    target_noise: float = 0.0
    """Smooth the targets of continuous actions by noise of this size (TD3: 0.2)."""
    actor_every: int = 1
    """Updates of the critics to one of the actors and targets (TD3: 2)."""
    action_reg: float = 0.0
    """Weight of the mean square of what actions are made of, before tanh or softmax (official code: 0.001)."""
    noise: Literal["gaussian", "ou", "none"] = "gaussian"
    """Added to continuous actions to explore; discrete ones are drawn from the logits."""
    noise_start: float = 0.5
    """Size of the noise at first, in units of half the action range."""
    noise_end: float = 0.1
    """Size of the noise from --noise-frames on."""
    noise_frames: int = 200_000
    """Frames until then."""
    epsilon_start: float = 0.0
    """Probability of a random discrete action at first."""
    epsilon_end: float = 0.0
    """Probability of a random discrete action from --epsilon-frames on."""
    epsilon_frames: int = 200_000
    """Frames until then."""
    share_params: bool = False
    """One actor for all agents of a group, or one each."""
    share_critic_params: bool = False
    """One critic for all agents of a group, which is told whom it values, or one each."""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of :func:`tdmarl.maddpg`."""
        names = (
            "critic_lr", "others", "twin", "target_noise", "actor_every", "action_reg", "noise", "noise_start",
            "noise_end", "noise_frames", "epsilon_start", "epsilon_end", "epsilon_frames", "share_critic_params",
        )  # fmt: skip
        return super().arguments() | {name: getattr(self, name) for name in names}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")
