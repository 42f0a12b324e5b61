"""MADDPG: decentralized actors that climb on critics which know what everybody sees and does.

Each agent ``i`` has a critic ``Q_i(x, u_1, ..., u_n)`` of its own reward, which learns from replayed transitions with
the next actions of *all* agents by their target actors, and an actor ``mu_i(o_i)``, which follows the gradient of
``Q_i`` with its own action re-computed and the others' as they were:

    ``y_i = r_i + gamma (1 - terminated_i) Q_i'(x', mu_1'(o_1'), ..., mu_n'(o_n'))``

    ``grad J_i = E[ grad mu_i(o_i)  grad_{u_i} Q_i(x, u_1, ..., u_n) at u_i = mu_i(o_i) ]``

In each update the critics come first, then the actors on the updated critics, then the targets. As every agent has a
critic and a reward of its own, agents may want different things: several groups, given as a tuple, are learnt together
by critics that know all their actors (``group=("adversary", "agent")``). ``scope="agent"`` leaves each agent with its
own observation and action alone (IDDPG); ``twin``, ``target_noise`` and ``actor_every`` make it MATD3.

Source: Lowe et al. 2017, "Multi-Agent Actor-Critic for Mixed Cooperative-Competitive Environments", and its code, whose
defaults are ``gamma=.95, lr=1e-2, tau=.01, hidden=(64, 64), minibatch_size=1024, buffer_size=1_000_000,
max_grad_norm=.5, action_reg=1e-3``, one update of each agent per 100 steps. Where descriptions print the reward, the
next observation and the end among a critic's inputs, ``Q(o, s, u)`` is meant; where they give all agents one critic and
their actors a joint gradient, that is ``cooperative=True`` here, right for one shared reward only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from tdmarl import seeds
from tdmarl.action_critics import action_critic
from tdmarl.algorithms.contract import Algorithm
from tdmarl.algorithms.q import Rewards
from tdmarl.deterministic_actors import ActionNoise, OrnsteinUhlenbeckNoise, deterministic_actor
from tdmarl.keys import Team, check_chain, collected, team
from tdmarl.learners import Learner
from tdmarl.maddpg_loss import MADDPGLoss
from tdmarl.nets import Sharing
from tdmarl.precision import set_precision
from tdmarl.prepare import RewardNorm
from tdmarl.q_actors import EpsilonGreedy
from tdmarl.replay import Replay
from tdmarl.step import Annealing, Part, Step, adam
from tdmarl.targets import TargetUpdate

NOISES = ("gaussian", "ou", "none")


def maddpg(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    scope: str = "team",
    others: str = "buffer",
    cooperative: bool = False,
    team_reward: str | None = None,
    gamma: float = 0.99,
    n_steps: int = 1,
    twin: bool = False,
    target_noise: float = 0.0,
    target_noise_clip: float = 0.5,
    actor_every: int = 1,
    relaxation: str = "straight_through",
    temperature: float = 1.0,
    action_reg: float = 0.0,
    huber_delta: float | None = None,
    standardize_reward: bool = False,
    lr: float = 5e-4,
    critic_lr: float | None = None,
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
    tau: float | None = 0.005,
    target_every: int | None = None,
    noise: str = "gaussian",
    noise_start: float = 0.1,
    noise_end: float = 0.1,
    noise_frames: int = 50_000,
    epsilon_start: float = 0.0,
    epsilon_end: float = 0.0,
    epsilon_frames: int = 50_000,
    share_params: Sharing = False,
    share_critic_params: Sharing = False,
    agent_id: bool = True,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
    actor: TensorDictModuleBase | None = None,
    critic: TensorDictModuleBase | None = None,
    optim: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    seed: int = 0,
    mode: str = "auto",
    precision: str = "float32",
) -> Algorithm:
    """Builds MADDPG for continuous and discrete actions, for one group of agents or for several that learn together.

    Sizes are in frames (environment steps), also where a row of the replay buffer holds several.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the groups that learn; None means the only one. Critics see all of
            them, whether they share a reward or not.
        scope (str): what critics see: ``team``, ``state``, ``group`` or ``agent``; see :func:`tdmarl.action_critic`.
        others ("buffer", "policy" or "joint"): the others' actions in an actor's gradient; see
            :class:`~tdmarl.maddpg_loss.MADDPGLoss`.
        cooperative (bool): one critic for all agents of a group, of the team's reward, and one gradient through all
            actors; sets ``others="joint"`` and, if not given, ``team_reward="mean"``.
        team_reward ("sum", "mean" or None): what each agent is rewarded with; None is its own reward.
        gamma (float): discount.
        n_steps (int): rewards added up before a value, along stored sequences of so many steps, of which a batch's
            steps are a multiple; towards a sequence's end fewer.
        twin (bool), target_noise, target_noise_clip (float), actor_every (int): TD3's two critics, smoothed targets
            and delayed actors (MATD3: ``True, .2, .5, 2``); targets move with the actors.
        relaxation, temperature, action_reg, huber_delta: see :class:`~tdmarl.maddpg_loss.MADDPGLoss`.
        standardize_reward (bool): by running moments; see :class:`~tdmarl.prepare.RewardNorm`.
        lr, critic_lr (float): Adam's learning rates (eps 1e-5) of actors and critics; the critics' is ``lr`` if None.
        max_grad_norm (float, optional): of the gradient of all actors together, and of all critics.
        anneal_frames (int, optional): the learning rates fall linearly to zero over so many frames.
        num_updates (int): optimization steps per collected batch.
        minibatch_size (int): frames in a minibatch; of each agent, with ``share_buffer=False``.
        buffer_size (int): frames that the replay buffer keeps.
        learning_starts (int): frames to be in it before the first update.
        share_buffer (bool): False: each agent learns from its own draw of transitions, with all agents' entries of
            these. A forward pass then takes as many rows as there are agents times ``minibatch_size``.
        prioritized (bool), priority_alpha, priority_beta (float): see :class:`~tdmarl.replay.ProportionalSampler`.
        storage (str): of the replay buffer: ``device``, ``cpu`` or ``memmap``.
        tau (float, optional): share by which the targets follow at every update.
        target_every (int, optional): copy exactly at every so many updates instead; then ``tau`` is None.
        noise ("gaussian", "ou" or "none"), noise_start, noise_end (float), noise_frames (int): added to continuous
            actions; see :class:`~tdmarl.deterministic_actors.ActionNoise` and
            :class:`~tdmarl.deterministic_actors.OrnsteinUhlenbeckNoise`.
        epsilon_start, epsilon_end (float), epsilon_frames (int): discrete actions are drawn from the logits; with this
            probability at random instead, see :class:`~tdmarl.q_actors.EpsilonGreedy`. 0 is the paper's way, whose
            exploration dies with the policy's entropy.
        share_params, share_critic_params (bool or map): which agents share an actor, and a critic.
        agent_id (bool): let a shared network know whom it serves.
        hidden, activation, layer_norm: the networks'; see :class:`~tdmarl.nets.AgentMLP`.
        actor, critic (module, optional): replace them; see :class:`~tdmarl.maddpg_loss.MADDPGLoss`.
        optim (callable, optional): parameters to optimizer, in place of Adam; then ``lr`` is its own affair.
        seed (int): of initialization, minibatches, and what updates draw.
        mode (str): ``eager``, ``compile``, ``cudagraph`` or ``auto``; see :meth:`tdmarl.step.Step.accelerate`.
        precision (str): ``float32``, or ``bfloat16`` for the products of the networks' hidden layers; see
            :func:`tdmarl.set_precision`.

    Returns:
        Algorithm: the deterministic policy; explore, which adds noise; learner.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("navigation", num_envs=8, max_steps=10, seed=0)
        >>> algo = tdmarl.maddpg(env, num_updates=1, minibatch_size=16)
        >>> collector = tdmarl.Collector(env, algo.explore, frames_per_batch=80, total_frames=160)
        >>> for batch in collector:
        ...     metrics = algo.learner(batch)
        replay: 100,000 rows of 634 bytes, 63.4 MB on cpu
    """
    members = team(env, group)
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} must be one of {NOISES}.")
    if (tau is None) == (target_every is None):
        raise ValueError(
            f"tau={tau} and target_every={target_every}: give exactly one, and None for the other."
        )
    if cooperative and (others == "policy" or share_critic_params is not False or scope == "agent"):
        raise ValueError(
            f"cooperative=True is one critic of all and others='joint'; others={others!r}, scope={scope!r} and "
            f"share_critic_params={share_critic_params!r} do not go with it."
        )
    if cooperative:
        others, team_reward = "joint", team_reward or "mean"
        share_critic_params, agent_id_of_critic = True, False
        warnings.warn(
            "cooperative=True: one critic of the team's reward and one gradient through all actors. Agents that are "
            "rewarded for different things would no longer pursue their own; MADDPG is cooperative=False.",
            stacklevel=2,
        )
    else:
        agent_id_of_critic = agent_id
        _warn(members, scope, others, share_critic_params, agent_id)
    device = members.groups[0].device
    nets = {"hidden": hidden, "activation": activation, "layer_norm": layer_norm}
    with seeds.routed(seeds.generator(seed, "init")):
        if actor is None:
            actor = deterministic_actor(env, group, share_params, agent_id=agent_id, **nets)  # type: ignore[arg-type]
        if critic is None:
            critic = action_critic(
                env, group, scope=scope, twin=twin, share_params=share_critic_params, agent_id=agent_id_of_critic,
                **nets,  # type: ignore[arg-type]
            )  # fmt: skip
    set_precision(precision, actor, critic)
    norm = RewardNorm(device=device) if standardize_reward else None
    loss = MADDPGLoss(
        actor, critic, gamma=gamma, others=others, relaxation=relaxation, temperature=temperature,
        action_reg=action_reg, target_noise=target_noise, target_noise_clip=target_noise_clip,
        huber_delta=huber_delta, n_steps=n_steps, reward_norm=norm,
    )  # fmt: skip
    make = optim or (lambda params: adam(params, lr, mode))
    make_critic = optim or (lambda params: adam(params, lr if critic_lr is None else critic_lr, mode))
    chosen, valued = make(list(actor.parameters())), make_critic(list(critic.parameters()))
    value_part, actor_part = loss.parts()
    rows = [loss.tensor_keys.priority] if prioritized else []
    step = Step(
        [
            Part(value_part, valued, max_grad_norm, name="critic", row_keys=rows),
            Part(actor_part, chosen, max_grad_norm, every=actor_every, name="actor"),
        ],
        after=TargetUpdate(loss, tau=tau, every=target_every if tau is None else actor_every),
    )
    schedules = _noises(
        env, members, noise, {"start": noise_start, "end": noise_end, "anneal_frames": noise_frames},
        {"start": epsilon_start, "end": epsilon_end, "anneal_frames": epsilon_frames},
    )  # fmt: skip
    explore = TensorDictSequential(actor, *schedules.values()) if schedules else actor
    prepare = Rewards(members, team_reward, norm, joint=False)
    check_chain(collected(env, explore), [("the rewards", prepare), ("the losses", step)])
    buffer = Replay(
        max(1, buffer_size // n_steps), max(1, minibatch_size // n_steps), sequence_length=n_steps,
        prioritized=prioritized, alpha=priority_alpha, beta=priority_beta,
        apart=() if share_buffer else [(g.name, g.n_agents) for g in members], least=learning_starts // n_steps,
        storage=storage, device=device, seed=seeds.derive(seed, "learning"),
    )  # fmt: skip
    annealing = None if anneal_frames is None else Annealing(anneal_frames, optims=[chosen, valued])
    learner = Learner(
        step, buffer, updates=num_updates, prepare=prepare, annealing=annealing, modules=schedules, mode=mode,
        seed=seeds.derive(seed, "prepare"),
    )  # fmt: skip
    return Algorithm(policy=actor, explore=explore, learner=learner)


def _warn(members: Team, scope: str, others: str, share: Sharing, agent_id: bool) -> None:
    """Says what is most likely not meant."""
    if members.n_agents == 1 and scope != "agent":
        warnings.warn(
            f"The critic of scope={scope!r} sees one agent only, that of {members.names}: this is DDPG. With opponents "
            "in other groups, MADDPG is given all of them, group=('this', 'that').",
            stacklevel=3,
        )
    if others == "joint":
        warnings.warn(
            "others='joint': every actor follows the gradient of all agents' values, not of its own. This is right for "
            "one shared reward only.",
            stacklevel=3,
        )
    if share is not False and not agent_id and members.n_agents > 1 and scope != "agent":
        warnings.warn(
            "A shared critic of a common input without the agent's identity gives all agents that share it the same "
            "value: right for one shared reward only.",
            stacklevel=3,
        )


def _noises(
    env: EnvBase, members: Team, noise: str, sigma: dict[str, Any], epsilon: dict[str, Any]
) -> dict[str, Any]:
    """What is added to or put in place of actions to explore, by the name under which its schedule is saved."""
    boxes = tuple(g.name for g in members if isinstance(g.action_spec, Bounded))
    choices = tuple(name for name in members.names if name not in boxes)
    found: dict[str, Any] = {}
    if boxes and noise != "none":
        kind = ActionNoise if noise == "gaussian" else OrnsteinUhlenbeckNoise
        found["explore"] = kind(env, boxes, **sigma)
    if choices and epsilon["start"] + epsilon["end"] > 0:
        found["epsilon"] = EpsilonGreedy(env, choices, **epsilon)
    return found
