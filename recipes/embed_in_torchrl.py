"""tdmarl's parts inside TorchRL's machinery, both ways around.

1. ``tdmarl.Collector``, ``tdmarl.VmasEnv``, our actor, critic and ``Advantage`` in a ``torchrl.trainers.Trainer``
   with TorchRL's loss and replay buffer; saved, rebuilt, reloaded, and trained on.
2. TorchRL's own ``Collector`` and replay buffer feeding the learner of ``tdmarl.mappo``.

    python recipes/embed_in_torchrl.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector as TorchRLCollector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.objectives import ClipPPOLoss
from torchrl.trainers import DefaultOptimizationStepper, Trainer

import tdmarl
from tdmarl.run import Options, launch


@dataclasses.dataclass(kw_only=True)
class EmbedOptions(Options):
    """tdmarl's parts inside TorchRL's trainer, and TorchRL's collector feeding tdmarl's learner."""

    total_frames: int = 128_000
    """Frames of each of the two runs."""
    num_epochs: int = 5
    """How often each batch is gone through."""
    minibatch_size: int = 3_200
    """Frames per minibatch."""


def make_env(options: EmbedOptions) -> tdmarl.VmasEnv:
    """The simulator, as for any TorchRL loop."""
    return tdmarl.VmasEnv(
        options.scenario, num_envs=options.num_envs, max_steps=options.max_steps, device=options.pick_device(),
        seed=options.seed, **options.task(),
    )  # fmt: skip


def batch_buffer(options: EmbedOptions) -> TensorDictReplayBuffer:
    """TorchRL's buffer over one batch, without replacement."""
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(options.frames_per_batch, device=options.pick_device()),
        sampler=SamplerWithoutReplacement(drop_last=True),
        batch_size=options.minibatch_size,
    )


def make_trainer(options: EmbedOptions, total_frames: int, folder: Path) -> Trainer:
    """TorchRL's trainer around our collector, actor, critic and advantage."""
    env = make_env(options)
    group = next(iter(env.group_map))
    actor, critic = tdmarl.gaussian_actor(env, group), tdmarl.state_critic(env, group, scope="team")
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0)
    names = {"advantage": "advantage", "value_target": "value_target", "value": "state_value"}
    loss.set_keys(**{key: (group, name) for key, name in names.items()})
    collector = tdmarl.Collector(env, actor, frames_per_batch=options.frames_per_batch, total_frames=total_frames)
    trainer = Trainer(
        collector=collector, total_frames=total_frames, frame_skip=1, loss_module=loss, num_epochs=options.num_epochs,
        optim_steps_per_batch=options.frames_per_batch // options.minibatch_size, progress_bar=False,
        optimizer=torch.optim.Adam(loss.parameters(), 1e-3), optimization_stepper=DefaultOptimizationStepper(),
        clip_norm=10.0, checkpoint=Checkpoint(), save_trainer_file=folder, save_trainer_interval=2**62,
    )  # fmt: skip
    buffer, prepare = batch_buffer(options), tdmarl.Advantage(critic, [group])

    def store(batch: TensorDictBase) -> TensorDictBase:
        buffer.extend(prepare(batch).reshape(-1))
        return batch

    trainer.register_op("batch_process", store)
    trainer.register_op("process_optim_batch", lambda _: buffer.sample())
    return trainer


def inside_a_trainer(options: EmbedOptions, folder: Path) -> None:
    """Half the frames, a checkpoint, a new trainer from it, the other half."""
    trainer = make_trainer(options, options.total_frames // 2, folder / "trainer")
    trainer.train()
    trainer.save_trainer(force_save=True)
    again = make_trainer(options, options.total_frames, folder / "trainer")
    again.load_from_file(folder / "trainer")
    assert again.collected_frames == again.collector.frames == trainer.collected_frames
    again.train()
    returns = tdmarl.evaluate(again.collector.env, again.collector.policy, episodes=options.eval_episodes)
    print(f"trainer: {again.collected_frames} frames, return {returns['return_mean_agents'].mean():.3f}")


def fed_by_torchrl(options: EmbedOptions) -> None:
    """TorchRL collects and samples, our step learns."""
    env = make_env(options)
    algo = tdmarl.mappo(env, tuple(env.group_map), lr=1e-3, seed=options.seed)
    updates = options.num_epochs * (options.frames_per_batch // options.minibatch_size)
    learner = tdmarl.Learner(algo.learner.step, batch_buffer(options), updates=updates, prepare=algo.learner.prepare)
    frames = {"frames_per_batch": options.frames_per_batch, "total_frames": options.total_frames}
    collector = TorchRLCollector(env, algo.explore, auto_register_policy_transforms=False, **frames)
    for batch in collector:
        learner(batch)
        collector.update_policy_weights_()
    returns = tdmarl.evaluate(make_env(options), algo.policy, episodes=options.eval_episodes)
    print(f"learner: {options.total_frames} frames, return {returns['return_mean_agents'].mean():.3f}")
    collector.shutdown()


def main(options: EmbedOptions) -> None:
    """Both ways around."""
    folder = Path(options.out or f"runs/embed-{options.scenario}-{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    inside_a_trainer(options, folder)
    fed_by_torchrl(options)


if __name__ == "__main__":
    launch(main, EmbedOptions)
