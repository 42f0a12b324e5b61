"""IQL, VDN and QMIX: Q-learning for each agent, or for the team through a mixer of the agents' values.

All three act epsilon-greedily on ``Q_i(o_i, u_i)``, keep what they saw in a replay buffer, and minimize squared
temporal-difference errors on samples of it, with target networks (primes) and double Q-learning. They differ by
the mixer alone:

    IQL:   ``y_i = r_i + gamma (1 - d_i) max_u Q_i'(o'_i, u)``, one error per agent (Tampuu et al. 2017)
    VDN:   ``Q_tot = sum_i Q_i``, one error of the team (Sunehag et al. 2018)
    QMIX:  ``Q_tot = f(Q_1, ..., Q_n; s)`` with ``df / dQ_i >= 0``, one error of the team (Rashid et al. 2018)

``d`` is termination: a time limit bootstraps. Where descriptions of these algorithms leave out the discount or
``1 - d`` in IQL's target, put VDN's square inside the sum, or say that VDN sums rewards, the papers' code is
followed: VDN sums values, and its reward is the team's, added up as ``team_reward`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from tdmarl import seeds
from tdmarl.algorithms.contract import Algorithm
from tdmarl.keys import Team, check_chain, collected, team
from tdmarl.learners import Learner
from tdmarl.mixers import qmix_mixer, vdn_mixer
from tdmarl.mixing import MixingLoss
from tdmarl.nets import Sharing
from tdmarl.precision import set_precision
from tdmarl.prepare import RewardNorm, TeamReward
from tdmarl.q_actors import EpsilonGreedy, exploring, q_actor
from tdmarl.replay import Replay
from tdmarl.step import Annealing, Part, Step, adam
from tdmarl.targets import TargetUpdate

Optim = Callable[[list[Tensor]], torch.optim.Optimizer]


def q_learning(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    mixer: TensorDictModuleBase | None = None,
    team_reward: str | None = None,
    gamma: float = 0.99,
    double_q: bool = True,
    n_steps: int = 1,
    lmbda: float = 0.0,
    sequence_length: int = 1,
    standardize_reward: bool = False,
    huber_delta: float | None = None,
    lr: float = 5e-4,
    max_grad_norm: float | None = 10.0,
    anneal_frames: int | None = None,
    num_updates: int = 32,
    minibatch_size: int = 1024,
    buffer_size: int = 100_000,
    learning_starts: int = 0,
    share_buffer: bool = True,
    prioritized: bool = False,
    priority_alpha: float = 0.6,
    priority_beta: float = 0.4,
    storage: str = "device",
    target_every: int = 200,
    tau: float | None = None,
    epsilon_start: float = 1.0,
    epsilon_end: float = 0.05,
    epsilon_frames: int = 50_000,
    share_params: Sharing = True,
    agent_id: bool = True,
    last_action: bool = False,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
    recurrent: str | int | None = None,
    hidden_start: str = "stored",
    burn_in: int = 0,
    actor: TensorDictModuleBase | None = None,
    optim: Optim | None = None,
    seed: int = 0,
    mode: str = "auto",
    precision: str = "float32",
) -> Algorithm:
    """Builds what :func:`iql`, :func:`vdn` and :func:`qmix` have in common, which is all but the mixer.

    Sizes are in frames (environment steps), also where a row of the replay buffer holds several.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team's groups; None means the only one.
        mixer (TensorDictModuleBase, optional): mixes the agents' values; None: independent agents.
        team_reward ("sum", "mean" or None): of all live agents' rewards. None leaves each agent its own, which a
            mixer cannot use.
        gamma (float): discount.
        double_q (bool): let the online network choose the next action that the target values.
        n_steps (int), lmbda (float): n-step or lambda-returns, within rows of ``sequence_length`` steps; see
            :func:`~tdmarl.mixing.td_returns`.
        sequence_length (int): consecutive steps in a row; the collected batch's steps are a multiple of it.
        standardize_reward (bool): by running moments; see :class:`~tdmarl.prepare.RewardNorm`.
        huber_delta (float, optional): where the Huber loss turns linear; None is the squared error.
        lr (float): Adam's learning rate (eps 1e-5).
        max_grad_norm (float, optional): of the gradient of all networks together.
        anneal_frames (int, optional): the learning rate falls linearly to zero over so many frames.
        num_updates (int): optimization steps per collected batch.
        minibatch_size (int): frames in a minibatch; of each agent, with ``share_buffer=False``.
        buffer_size (int): frames that the replay buffer keeps.
        learning_starts (int): frames to be in it before the first update.
        share_buffer (bool): False: each agent learns from its own draw of rows; independent agents only. A forward
            pass then takes as many rows as there are agents times ``minibatch_size``.
        prioritized (bool), priority_alpha, priority_beta (float): see :class:`~tdmarl.replay.ProportionalSampler`.
        storage (str): of the replay buffer: ``device``, ``cpu`` or ``memmap``.
        target_every (int): copy the networks to the targets at every so many updates, exactly.
        tau (float, optional): move the targets by this share at every update instead.
        epsilon_start, epsilon_end, epsilon_frames: see :class:`~tdmarl.q_actors.EpsilonGreedy`.
        share_params (bool or map): which agents share a network.
        agent_id (bool): let a shared network know whom it serves.
        last_action (bool): let the network see the agent's last action.
        hidden, activation, layer_norm: the networks'; see :class:`~tdmarl.nets.AgentMLP`.
        recurrent ("gru", int or None): networks with memory, which learn from rows of ``sequence_length`` steps;
            see :func:`tdmarl.recurrent.agent_net`.
        hidden_start ("stored" or "zero"), burn_in (int): how they enter a row; ``burn_in`` steps at its beginning
            only bring the state up to date. See :class:`tdmarl.recurrent.Recurrent`.
        actor (module, optional): replaces the actor; see :class:`~tdmarl.mixing.MixingLoss`.
        optim (callable, optional): parameters to optimizer, in place of Adam; then ``lr`` is its own affair.
        seed (int): of initialization and minibatches.
        mode (str): ``eager``, ``compile``, ``cudagraph`` or ``auto``; see :meth:`tdmarl.step.Step.accelerate`.
        precision (str): ``float32``, or ``bfloat16`` for the products of the actor's hidden layers; see
            :func:`tdmarl.set_precision`.

    Returns:
        Algorithm: the greedy policy; explore, which is epsilon-greedy; learner.
    """
    members = team(env, group)
    if sequence_length < n_steps or (lmbda > 0 and sequence_length < 2):
        raise ValueError(
            f"n_steps={n_steps} and lmbda={lmbda} look ahead within rows of sequence_length={sequence_length} steps: "
            "give a longer sequence_length, of which the steps of a batch are a multiple."
        )
    if mixer is not None and not share_buffer:
        raise ValueError(
            "share_buffer=False is for independent agents: a mixer needs all agents of one moment."
        )
    if burn_in >= sequence_length or (recurrent is not None and sequence_length < 2):
        raise ValueError(
            f"recurrent={recurrent!r} with burn_in={burn_in} needs rows to learn from that are longer than "
            f"sequence_length={sequence_length}."
        )
    device = members.groups[0].device
    if actor is None:
        with seeds.routed(seeds.generator(seed, "init")):
            actor = q_actor(
                env, group, share_params, hidden=hidden, activation=activation, layer_norm=layer_norm,
                agent_id=agent_id, last_action=last_action, recurrent=recurrent, start=hidden_start, burn_in=burn_in,
            )  # fmt: skip
    set_precision(precision, actor)
    epsilon = EpsilonGreedy(env, group, start=epsilon_start, end=epsilon_end, anneal_frames=epsilon_frames)
    explore = exploring(actor, epsilon)
    norm = RewardNorm(device=device) if standardize_reward else None
    loss = MixingLoss(
        actor, mixer, gamma=gamma, double_q=double_q, n_steps=n_steps, lmbda=lmbda, huber_delta=huber_delta,
        reward_norm=norm,
    )  # fmt: skip
    params = list(loss.parameters())
    chosen = adam(params, lr, mode) if optim is None else optim(params)
    rows = [loss.tensor_keys.priority] if prioritized else []
    update = TargetUpdate(loss, tau=tau, every=None if tau is not None else target_every)
    step = Step([Part(loss, chosen, max_grad_norm, row_keys=rows)], after=update)
    prepare = Rewards(members, team_reward, norm, joint=mixer is not None)
    check_chain(collected(env, explore), [("the rewards", prepare), ("the losses", step)])
    buffer = Replay(
        max(1, buffer_size // sequence_length), max(1, minibatch_size // sequence_length),
        sequence_length=sequence_length, prioritized=prioritized, alpha=priority_alpha, beta=priority_beta,
        apart=() if share_buffer else [(g.name, g.n_agents) for g in members],
        least=learning_starts // sequence_length, storage=storage, device=device,
        seed=seeds.derive(seed, "learning"),
    )  # fmt: skip
    annealing = None if anneal_frames is None else Annealing(anneal_frames, optims=[chosen])
    learner = Learner(
        step, buffer, updates=num_updates, prepare=prepare, annealing=annealing, modules={"explore": epsilon},
        mode=mode, seed=seeds.derive(seed, "prepare"),
    )  # fmt: skip
    return Algorithm(policy=actor, explore=explore, learner=learner)


def iql(
    env: EnvBase, group: str | Sequence[str] | None = None, *, team_reward: str | None = None, **options: Any
) -> Algorithm:
    """Builds IQL: each agent learns its own values as if the others were part of the environment.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the groups; None means the only one.
        team_reward ("sum", "mean" or None): what each agent is rewarded with; None is its own reward, the others the
            team's, as the papers on cooperation have it.
        **options: those of :func:`q_learning`, but ``mixer``.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("navigation", num_envs=8, max_steps=10, continuous_actions=False, seed=0)
        >>> algo = tdmarl.iql(env)
    """
    if "mixer" in options:
        raise TypeError("iql mixes nothing: mixer is qmix's.")
    return q_learning(env, group, team_reward=team_reward, **options)


def vdn(
    env: EnvBase, group: str | Sequence[str] | None = None, *, team_reward: str = "mean", **options: Any
) -> Algorithm:
    """Builds VDN: the team's value is the sum of the agents'.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team's groups; None means the only one.
        team_reward ("mean" or "sum"): of all live agents' rewards. The mean (the default) of a reward that all
            agents share is that reward.
        **options: those of :func:`q_learning`, but ``mixer``.
    """
    if "mixer" in options:
        raise TypeError("vdn's mixer is the sum: mixer is qmix's.")
    return q_learning(env, group, mixer=vdn_mixer(env, group), team_reward=team_reward, **options)


def qmix(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    team_reward: str = "mean",
    embed_dim: int = 32,
    hypernet_layers: int = 2,
    hypernet_embed: int = 64,
    state: str = "auto",
    mixer: TensorDictModuleBase | None = None,
    seed: int = 0,
    **options: Any,
) -> Algorithm:
    """Builds QMIX: the team's value is a monotonic function of the agents', with weights made from the state.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team's groups; None means the only one.
        team_reward ("mean" or "sum"): of all live agents' rewards. The mean (the default) of a reward that all
            agents share is that reward.
        embed_dim, hypernet_layers, hypernet_embed, state: see :func:`tdmarl.qmix_mixer`.
        mixer (module, optional): replaces the mixer; see :class:`~tdmarl.mixing.MixingLoss`.
        seed (int): of initialization and minibatches.
        **options: those of :func:`q_learning`.
    """
    if mixer is None:
        with seeds.routed(seeds.generator(seed, "init/mixer")):
            mixer = qmix_mixer(
                env, group, embed_dim=embed_dim, hypernet_layers=hypernet_layers, hypernet_embed=hypernet_embed,
                state=state,
            )  # fmt: skip
    return q_learning(env, group, mixer=mixer, team_reward=team_reward, seed=seed, **options)


class Rewards(TensorDictModuleBase):
    """What the agents are rewarded with: the team's reward as asked, and the moments of the rewards that are learnt.

    Args:
        members (Team): the team.
        team_reward (str, optional): see :func:`q_learning`.
        norm (RewardNorm, optional): takes in each batch.
        joint (bool): the loss reads the root's reward; else each agent's, which becomes the team's if asked.
    """

    def __init__(
        self, members: Team, team_reward: str | None, norm: RewardNorm | None, *, joint: bool
    ) -> None:
        super().__init__()
        if joint and team_reward is None:
            raise ValueError("A mixer needs one reward of the team: team_reward must be 'sum' or 'mean'.")
        self.groups, self.joint = members.names, joint
        self.__dict__["norm"] = norm  # owned, and saved, by the loss
        self.team = None if team_reward is None else TeamReward(members.names, team_reward)
        self.in_keys = [("next", g, "reward") for g in self.groups]
        self.out_keys = [("next", "reward")] if self.team is not None else []

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.team is not None:
            tensordict = self.team(tensordict)
            reward = tensordict.get(("next", "reward"))
            if not self.joint:
                for g in self.groups:
                    own = tensordict.get(("next", g, "reward"))
                    tensordict.set(("next", g, "reward"), reward.unsqueeze(-2).expand(own.shape))
        if self.norm is not None:
            if self.joint:
                self.norm.update(tensordict.get(("next", "reward")))
            else:
                for g in self.groups:
                    self.norm.update(tensordict.get(("next", g, "reward")), tensordict.get((g, "mask"), None))
        return tensordict
