"""An algorithm of your own from parts: TorchRL's loss for the actor, tdmarl's for the critic, and one written here.

The actor learns by TorchRL's ``ClipPPOLoss``, the critic by ``tdmarl.ValueLoss`` with value normalization, and a
third loss of six lines asks for calm actions. Each is a ``Part`` of one ``Step``; a ``Learner`` prepares the batch and
repeats the step; the loop is below.

    python recipes/custom_loss.py --scenario navigation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.objectives import ClipPPOLoss

import tdmarl
from tdmarl.options import Options
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class CustomOptions(Options):
    """PPO from parts, with a loss of one's own."""

    num_epochs: int = 4
    """How often each batch is gone through."""
    minibatch_size: int = 3_200
    """Frames per minibatch."""
    lr: float = 1e-3
    """Learning rate of actor and critic."""
    calm: float = 0.001
    """Weight of the loss on large actions."""


class Calm(TensorDictModuleBase):
    """Costs the squared mean action of every agent that is alive."""

    def __init__(self, actor: TensorDictModuleBase, group: str, weight: float) -> None:
        super().__init__()
        self.actor, self.group, self.weight = actor, group, weight
        self.in_keys, self.out_keys = list(actor.in_keys), ["loss_calm"]
        self.optional_keys = [(group, "mask")]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """``[M]`` to ``weight * mean(a^2)``."""
        action = self.actor.get_dist(tensordict.copy()).mode  # [M, n, a]
        mask = tensordict.get((self.group, "mask"), None)
        return TensorDict(loss_calm=self.weight * tdmarl.reduce.mean(action.square(), mask))


def build(env: Any, group: str, options: CustomOptions) -> tuple[TensorDictModuleBase, tdmarl.Learner]:
    """The policy and its learner."""
    actor = tdmarl.gaussian_actor(env, group)
    norm = tdmarl.ValueNorm(device=env.device)
    critic = tdmarl.NormalizedCritic(tdmarl.state_critic(env, group, scope="team"), {group: norm})
    tdmarl.set_precision(options.network_precision(), actor, critic)

    policy_loss = ClipPPOLoss(actor, None, clip_epsilon=0.2, entropy_coeff=0.0, critic_coeff=0.0)
    policy_loss.set_keys(advantage=(group, "advantage"))
    policy_loss.in_keys = [*actor.in_keys, *((group, k) for k in ("action", "action_log_prob", "advantage"))]

    def adam(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), options.lr, fused=True)

    step = tdmarl.Step([
        tdmarl.Part(policy_loss, adam(actor), max_grad_norm=10.0, name="actor"),
        tdmarl.Part(Calm(actor, group, options.calm), adam(actor), max_grad_norm=1.0, name="calm"),
        tdmarl.Part(tdmarl.ValueLoss(critic, group, value_norm=norm), adam(critic), max_grad_norm=10.0, name="critic"),
    ])
    learner = tdmarl.Learner(
        step,
        tdmarl.BatchBuffer(options.minibatch_size, options.num_epochs, seed=options.seed, device=env.device),
        prepare=tdmarl.Advantage(critic, [group], gamma=0.99, lmbda=0.95),
        mode=options.mode,
    )
    return actor, learner


def main(options: CustomOptions) -> None:
    """Trains the composed algorithm; the run's folder is as that of any recipe."""
    env = tdmarl.VmasEnv(
        options.scenario, num_envs=options.num_envs, max_steps=options.max_steps, device=options.pick_device(),
        seed=options.seed, **options.simulation(), **options.task(),
    )  # fmt: skip
    group = next(iter(env.group_map))
    policy, learner = build(env, group, options)
    collector = tdmarl.Collector(
        env, policy, frames_per_batch=options.frames_per_batch, total_frames=options.total_frames, seed=options.seed
    )
    with Run(
        options, algorithm="custom", arguments={}, env=env, policy=policy, learner=learner, collector=collector
    ) as run:
        for batch in collector:
            metrics = learner(batch)
            evaluated = run.evaluates()
            returns = tdmarl.evaluate(env, policy, episodes=options.eval_episodes) if evaluated else None
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, CustomOptions)
