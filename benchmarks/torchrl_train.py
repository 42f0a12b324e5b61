"""MAPPO as a plain TorchRL loop: TorchRL's VmasEnv, collector, networks, loss and buffer, nothing of tdmarl.

A contender of ``train.py``, which starts it; not meant to be run by hand.
"""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import RewardSum, TransformedEnv, VmasEnv
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from train_worker import Worker


def main() -> None:
    worker = Worker()
    settings = worker.settings
    torch.manual_seed(settings.seed)

    env = VmasEnv(
        scenario=settings.scenario,
        num_envs=settings.num_envs,
        continuous_actions=True,
        max_steps=settings.max_steps,
        device=settings.device,
        seed=settings.seed,
        clamp_actions=True,
        **settings.scenario_args,
    )
    env = TransformedEnv(env, RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")]))

    observation_size = env.full_observation_spec_unbatched["agents", "observation"].shape[-1]
    action_spec = env.full_action_spec_unbatched["agents", "action"]
    n_agents, action_size = action_spec.shape
    network = {
        "n_agent_inputs": observation_size,
        "n_agents": n_agents,
        "share_params": True,
        "device": settings.device,
        "num_cells": settings.hidden,
        "activation_class": torch.nn.Tanh,
    }
    actor_net = MultiAgentMLP(n_agent_outputs=2 * action_size, centralized=False, **network)
    policy = ProbabilisticActor(
        module=TensorDictModule(
            torch.nn.Sequential(actor_net, NormalParamExtractor()),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
        spec=env.full_action_spec_unbatched,
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high},
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )
    critic = ValueOperator(
        MultiAgentMLP(n_agent_outputs=1, centralized=True, **network),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )

    collector = Collector(
        env,
        policy,
        device=settings.device,
        storing_device=settings.device,
        frames_per_batch=settings.frames,
        total_frames=-1,
    )
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(settings.frames, device=settings.device),
        sampler=SamplerWithoutReplacement(),
        batch_size=settings.minibatch_size,
    )
    loss = ClipPPOLoss(
        actor_network=policy,
        critic_network=critic,
        clip_epsilon=settings.clip_epsilon,
        entropy_coeff=settings.entropy_coeff,
        critic_coeff=1.0,
        loss_critic_type="l2",
        normalize_advantage=False,
    )
    loss.set_keys(
        reward=("agents", "reward"),
        action=("agents", "action"),
        sample_log_prob=("agents", "action_log_prob"),
        value=("agents", "state_value"),
        done=("agents", "done"),
        terminated=("agents", "terminated"),
        advantage=("agents", "advantage"),
        value_target=("agents", "value_target"),
    )
    loss.make_value_estimator(ValueEstimators.GAE, gamma=settings.gamma, lmbda=settings.lmbda)
    actor_params, critic_params = list(policy.parameters()), list(critic.parameters())
    optim = torch.optim.Adam(loss.parameters(), lr=settings.lr, eps=settings.adam_eps)
    minibatches = -(-settings.frames // settings.minibatch_size)

    worker.start(policy, {"actor": actor_params, "critic": critic_params})
    batches = iter(collector)
    while worker.wait():
        started = worker.clock()
        batch = next(batches)
        collected = worker.clock()

        shape = batch["next", "agents", "reward"].shape  # [E, T, n, 1]
        for key in ("done", "terminated"):
            batch["next", "agents", key] = batch["next", key].unsqueeze(-1).expand(shape)
        with torch.no_grad():
            loss.value_estimator(
                batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        buffer.extend(batch.reshape(-1))
        for _ in range(settings.epochs):
            for _ in range(minibatches):
                losses = loss(buffer.sample())
                total = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
                total.backward()
                torch.nn.utils.clip_grad_norm_(actor_params, settings.max_grad_norm)
                torch.nn.utils.clip_grad_norm_(critic_params, settings.max_grad_norm)
                optim.step()
                optim.zero_grad()
        collector.update_policy_weights_()
        worker.report(started, collected, worker.clock(), batch)
    collector.shutdown()


if __name__ == "__main__":
    main()
