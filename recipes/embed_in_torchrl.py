"""tdmarl's parts inside TorchRL's machinery, both ways around.

1. ``tdmarl.Collector``, ``tdmarl.VmasEnv``, our actor, critic and ``Advantage`` in a ``torchrl.trainers.Trainer``
   with TorchRL's loss and replay buffer; saved, rebuilt, reloaded, and trained on.
2. TorchRL's own ``Collector`` and replay buffer feeding the learner of ``tdmarl.mappo``.

    python recipes/embed_in_torchrl.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import tyro
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector as TorchRLCollector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.objectives import ClipPPOLoss
from torchrl.trainers import DefaultOptimizationStepper, Trainer

import tdmarl
from tdmarl.envs.tasks import TASKS


@dataclasses.dataclass(kw_only=True)
class EmbedOptions:
    """tdmarl's parts inside TorchRL's trainer, and TorchRL's collector feeding tdmarl's learner."""

    scenario: str = "navigation"  # name of the VMAS scenario
    num_envs: int = 128  # environments simulated side by side
    max_steps: int = 100  # steps after which an episode is cut
    frames_per_batch: int = 12_800  # frames between two updates; a multiple of --num-envs
    total_frames: int = 128_000  # frames of each of the two runs
    num_epochs: int = 5  # how often each batch is gone through
    minibatch_size: int = 3_200  # frames per minibatch
    eval_episodes: int = 128  # whole episodes that each result is evaluated on
    seed: int = 0  # of the simulator, the networks and the draws
    device: str = "cpu"  # where everything lives
    out: Path = Path("runs/embed")  # folder of the trainer's checkpoint


def make_env(options: EmbedOptions) -> tdmarl.VmasEnv:
    """The simulator."""
    return tdmarl.VmasEnv(
        options.scenario, num_envs=options.num_envs, max_steps=options.max_steps, device=options.device,
        seed=options.seed, **TASKS.get(options.scenario, {}),
    )  # fmt: skip


def batch_buffer(options: EmbedOptions) -> TensorDictReplayBuffer:
    """TorchRL's buffer over one batch, without replacement."""
    storage = LazyTensorStorage(options.frames_per_batch, device=options.device)
    sampler = SamplerWithoutReplacement(drop_last=True)
    return TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=options.minibatch_size)


def make_trainer(options: EmbedOptions, total_frames: int) -> Trainer:
    """TorchRL's trainer around our collector, actor, critic and advantage."""
    env = make_env(options)
    group = next(iter(env.group_map))
    actor, critic = tdmarl.gaussian_actor(env, group), tdmarl.state_critic(env, group, scope="team")
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0)
    loss.set_keys(advantage=(group, "advantage"), value_target=(group, "value_target"), value=(group, "state_value"))
    collector = tdmarl.Collector(env, actor, frames_per_batch=options.frames_per_batch, total_frames=total_frames)
    trainer = Trainer(
        collector=collector, total_frames=total_frames, frame_skip=1, loss_module=loss, num_epochs=options.num_epochs,
        optim_steps_per_batch=options.frames_per_batch // options.minibatch_size, progress_bar=False,
        optimizer=torch.optim.Adam(loss.parameters(), 1e-3), optimization_stepper=DefaultOptimizationStepper(),
        clip_norm=10.0, checkpoint=Checkpoint(), save_trainer_file=options.out, save_trainer_interval=2**62,
    )  # fmt: skip
    buffer, prepare = batch_buffer(options), tdmarl.Advantage(critic, [group])

    def store(batch: TensorDictBase) -> TensorDictBase:
        buffer.extend(prepare(batch).reshape(-1))
        return batch

    trainer.register_op("batch_process", store)
    trainer.register_op("process_optim_batch", lambda _: buffer.sample())
    return trainer


def inside_a_trainer(options: EmbedOptions) -> None:
    """Half the frames, a checkpoint, a new trainer from it, the other half."""
    trainer = make_trainer(options, options.total_frames // 2)
    trainer.train()
    trainer.save_trainer(force_save=True)
    again = make_trainer(options, options.total_frames)
    again.load_from_file(options.out)
    again.train()
    returns = tdmarl.evaluate(again.collector.env, again.collector.policy, episodes=options.eval_episodes)
    print(f"trainer: {again.collected_frames} frames, return {returns['return_mean_agents'].mean():.3f}")


def fed_by_torchrl(options: EmbedOptions) -> None:
    """TorchRL collects and samples, our step learns."""
    env = make_env(options)
    algo = tdmarl.mappo(env, tuple(env.group_map), lr=1e-3, seed=options.seed)
    updates = options.num_epochs * (options.frames_per_batch // options.minibatch_size)
    whole: Any = algo.learner
    learner = tdmarl.Learner(whole.step, batch_buffer(options), updates=updates, prepare=whole.prepare)
    frames = {"frames_per_batch": options.frames_per_batch, "total_frames": options.total_frames}
    collector = TorchRLCollector(env, algo.explore, auto_register_policy_transforms=False, **frames)
    for batch in collector:
        learner(batch)
        collector.update_policy_weights_()
    returns = tdmarl.evaluate(make_env(options), algo.policy, episodes=options.eval_episodes)
    print(f"learner: {options.total_frames} frames, return {returns['return_mean_agents'].mean():.3f}")
    collector.shutdown()


if __name__ == "__main__":
    chosen = tyro.cli(EmbedOptions)
    torch.manual_seed(chosen.seed)
    inside_a_trainer(chosen)
    fed_by_torchrl(chosen)
