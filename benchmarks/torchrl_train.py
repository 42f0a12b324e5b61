"""MAPPO, QMIX or MADDPG as a plain TorchRL loop: TorchRL's VmasEnv, collector, networks, loss and buffer.

A contender of ``train.py``, which starts it; not meant to be run by hand. Nothing of tdmarl is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.nn.distributions import NormalParamExtractor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, RandomSampler, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import RewardSum, TransformedEnv, VmasEnv
from torchrl.modules import (
    AdditiveGaussianModule,
    EGreedyModule,
    MultiAgentMLP,
    ProbabilisticActor,
    QMixer,
    QValueModule,
    SafeSequential,
    TanhDelta,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, DDPGLoss, QMixerLoss, SoftUpdate, ValueEstimators
from train_worker import EMBED, Settings, Worker

OBSERVATION, ACTION = ("agents", "observation"), ("agents", "action")


class Parts(NamedTuple):
    """What the loop needs of an algorithm."""

    policy: Any
    explore: Any
    networks: dict[str, list[torch.Tensor]]
    learn: Callable[[TensorDictBase], None]  # from a batch, all its updates


def network(
    settings: Settings, env: Any, outputs: int, centralized: bool, share: bool, more: int = 0
) -> MultiAgentMLP:
    """The networks of all algorithms; ``more`` are inputs beside the observation."""
    return MultiAgentMLP(
        n_agent_inputs=env.full_observation_spec_unbatched[OBSERVATION].shape[-1] + more,
        n_agent_outputs=outputs,
        n_agents=env.full_action_spec_unbatched[ACTION].shape[0],
        centralized=centralized,
        share_params=share,
        device=settings.device,
        num_cells=settings.hidden,
        activation_class=torch.nn.Tanh,
    )


def bounds(env: Any) -> dict[str, Any]:
    """Of continuous actions."""
    space = env.full_action_spec_unbatched[ACTION].space
    return {"low": space.low, "high": space.high}


def per_agent_ends(batch: TensorDictBase) -> None:
    """The losses read each agent's ends; the environment has the root's."""
    shape = batch["next", "agents", "reward"].shape  # [E, T, n, 1]
    for key in ("done", "terminated"):
        batch["next", "agents", key] = batch["next", key].unsqueeze(-1).expand(shape)


def mappo(settings: Settings, env: Any) -> Parts:
    """MAPPO: one actor for all agents, one value for the team."""
    size = env.full_action_spec_unbatched[ACTION].shape[-1]
    policy = ProbabilisticActor(
        module=TensorDictModule(
            torch.nn.Sequential(network(settings, env, 2 * size, False, True), NormalParamExtractor()),
            in_keys=[OBSERVATION],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
        spec=env.full_action_spec_unbatched,
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[ACTION],
        distribution_class=TanhNormal,
        distribution_kwargs=bounds(env),
        return_log_prob=True,
        log_prob_key=("agents", "action_log_prob"),
    )
    critic = ValueOperator(
        network(settings, env, 1, True, True), in_keys=[OBSERVATION], out_keys=[("agents", "state_value")]
    )
    buffer = TensorDictReplayBuffer(
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
    names = "reward action done terminated advantage value_target".split()
    loss.set_keys(
        **{name: ("agents", name) for name in names},
        sample_log_prob=("agents", "action_log_prob"),
        value=("agents", "state_value"),
    )
    loss.make_value_estimator(ValueEstimators.GAE, gamma=settings.gamma, lmbda=settings.lmbda)
    actor_params, critic_params = list(policy.parameters()), list(critic.parameters())
    optim = torch.optim.Adam(loss.parameters(), lr=settings.lr, eps=settings.adam_eps)
    minibatches = -(-settings.frames // settings.minibatch_size)

    def learn(batch: TensorDictBase) -> None:
        per_agent_ends(batch)
        with torch.no_grad():
            loss.value_estimator(
                batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        buffer.extend(batch.reshape(-1))
        for _ in range(settings.epochs * minibatches):
            losses = loss(buffer.sample())
            (losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]).backward()
            torch.nn.utils.clip_grad_norm_(actor_params, settings.max_grad_norm)
            torch.nn.utils.clip_grad_norm_(critic_params, settings.max_grad_norm)
            optim.step()
            optim.zero_grad()

    return Parts(policy, policy, {"actor": actor_params, "critic": critic_params}, learn)


def replay(settings: Settings) -> TensorDictReplayBuffer:
    """The buffer of QMIX and MADDPG."""
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(settings.buffer_size, device=settings.device),
        sampler=RandomSampler(),
        batch_size=settings.minibatch_size,
    )


def qmix(settings: Settings, env: Any) -> Parts:
    """QMIX: one network for all agents, and the mixer."""
    spec = env.full_action_spec_unbatched
    names = [("agents", name) for name in ("action", "action_value", "chosen_action_value")]
    net = network(settings, env, spec[ACTION].space.n, False, True)
    policy = SafeSequential(
        TensorDictModule(net, in_keys=[OBSERVATION], out_keys=[names[1]]),
        QValueModule(action_value_key=names[1], out_keys=names, spec=spec, action_space=None),
    )
    noise = EGreedyModule(
        spec=spec,
        action_key=ACTION,
        eps_init=settings.explore_start,
        eps_end=settings.explore_end,
        annealing_num_steps=settings.explore_frames,
    ).to(settings.device)
    shape = env.full_observation_spec_unbatched[OBSERVATION].shape
    mixer = TensorDictModule(
        QMixer(shape, EMBED, shape[0], device=settings.device),
        in_keys=[names[2], OBSERVATION],
        out_keys=["chosen_action_value"],
    )
    loss = QMixerLoss(policy, mixer, delay_value=True)
    loss.set_keys(
        action=names[0], action_value=names[1], local_value=names[2], global_value="chosen_action_value"
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma)
    target, buffer = SoftUpdate(loss, eps=1 - settings.tau), replay(settings)
    params = list(loss.parameters())
    optim = torch.optim.Adam(params, lr=settings.lr, eps=settings.adam_eps)

    def learn(batch: TensorDictBase) -> None:
        batch.set(("next", "reward"), batch.get(("next", "agents", "reward")).mean(-2))
        buffer.extend(batch.exclude(("next", "agents", "reward")).reshape(-1))
        for _ in range(settings.updates):
            loss(buffer.sample())["loss"].backward()
            torch.nn.utils.clip_grad_norm_(params, settings.max_grad_norm)
            optim.step()
            optim.zero_grad()
            target.step()
        noise.step(batch.numel())

    networks = {"local_value": list(net.parameters()), "mixer": list(mixer.parameters())}
    return Parts(policy, TensorDictSequential(policy, noise), networks, learn)


def maddpg(settings: Settings, env: Any) -> Parts:
    """MADDPG as TorchRL has it: an actor and a critic for each agent, all actors on the gradient of all values."""
    spec = env.full_action_spec_unbatched
    size = spec[ACTION].shape[-1]
    policy = ProbabilisticActor(
        module=TensorDictModule(
            network(settings, env, size, False, False), in_keys=[OBSERVATION], out_keys=[("agents", "param")]
        ),
        spec=spec,
        in_keys=[("agents", "param")],
        out_keys=[ACTION],
        distribution_class=TanhDelta,
        distribution_kwargs=bounds(env),
        return_log_prob=False,
    )
    noise = AdditiveGaussianModule(
        spec=spec,
        action_key=ACTION,
        sigma_init=settings.explore_start,
        sigma_end=settings.explore_end,
        annealing_num_steps=settings.explore_frames,
        device=settings.device,
    )
    critic = ValueOperator(
        network(settings, env, 1, True, False, more=size),
        in_keys=[OBSERVATION, ACTION],
        out_keys=[("agents", "state_action_value")],
    )
    loss = DDPGLoss(policy, critic, delay_value=True, loss_function="l2")
    loss.set_keys(
        state_action_value=("agents", "state_action_value"),
        **{name: ("agents", name) for name in ("reward", "done", "terminated")},
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma)
    target, buffer = SoftUpdate(loss, eps=1 - settings.tau), replay(settings)
    actor_params, critic_params = list(policy.parameters()), list(critic.parameters())
    optim = torch.optim.Adam(loss.parameters(), lr=settings.lr, eps=settings.adam_eps)

    def learn(batch: TensorDictBase) -> None:
        per_agent_ends(batch)
        buffer.extend(batch.reshape(-1))
        for _ in range(settings.updates):
            losses = loss(buffer.sample())
            (losses["loss_actor"] + losses["loss_value"]).backward()
            torch.nn.utils.clip_grad_norm_(actor_params, settings.max_grad_norm)
            torch.nn.utils.clip_grad_norm_(critic_params, settings.max_grad_norm)
            optim.step()
            optim.zero_grad()
            target.step()
        noise.step(batch.numel())

    return Parts(
        policy, TensorDictSequential(policy, noise), {"actor": actor_params, "value": critic_params}, learn
    )


def main() -> None:
    worker = Worker()
    settings = worker.settings
    torch.manual_seed(settings.seed)
    env = VmasEnv(
        scenario=settings.scenario,
        num_envs=settings.num_envs,
        continuous_actions=settings.continuous,
        max_steps=settings.max_steps,
        device=settings.device,
        seed=settings.seed,
        clamp_actions=True,
        **settings.scenario_args,
    )
    env = TransformedEnv(env, RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")]))
    parts = {"mappo": mappo, "qmix": qmix, "maddpg": maddpg}[settings.algorithm](settings, env)
    collector = Collector(
        env,
        parts.explore,
        device=settings.device,
        storing_device=settings.device,
        frames_per_batch=settings.frames,
        total_frames=-1,
    )
    worker.start(parts.policy, parts.networks)
    batches = iter(collector)
    while worker.wait():
        started = worker.clock()
        batch = next(batches)
        collected = worker.clock()
        parts.learn(batch)
        collector.update_policy_weights_()
        worker.report(started, collected, worker.clock(), batch)
    collector.shutdown()


if __name__ == "__main__":
    main()
