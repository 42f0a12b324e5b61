"""HAPPO, HATRPO and HAA2C: agents update one after the other, each weighted by what the earlier ones changed.

With the joint advantage ``A(s, u)`` of the team and a new random order ``i_1, ..., i_n`` in each iteration, agent
``i_m`` maximizes

    ``E[ min(r M, clip(r, 1 - eps, 1 + eps) M) ] + c H``,  ``M = (prod_{j < m} pi_new_j / pi_old_j) A(s, u)``

with ``r = pi(u | o) / pi_old(u | o)`` of its own action. The product over the agents before it, the *factor*, is
taken over the whole batch after each agent's update, unclipped and detached, and is an entry of the batch. As
``M min(r A, clip(r) A) = min(r (M A), clip(r) (M A))`` for a positive factor, an agent's step is PPO's with the
advantage ``factor * A``, which is not standardized again. The critic learns last, so all agents see one ``A``.

HATRPO takes one step in a trust region for each agent in place of PPO's many, HAA2C leaves the clip away; without the
factor HAPPO is MAPPO with unshared parameters, on the same schedule.

Source: Kuba et al. 2022, "Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning"; defaults and
order of statements as in its authors' HARL. Where descriptions print ``i_{1:m-1}-1`` the agents before ``i_m`` are
meant.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import EnvBase

from tdmarl import seeds
from tdmarl.actors import agent_actor, stochastic_actor
from tdmarl.algorithms.contract import Algorithm
from tdmarl.algorithms.ppo import remembering
from tdmarl.critics import NormalizedCritic, ValueNorm, state_critic
from tdmarl.keys import Group, check_chain, collected, team
from tdmarl.learners import AgentUpdate, BatchBuffer, Learner, SequentialLearner
from tdmarl.losses import PolicyLoss, ValueLoss
from tdmarl.nets import Sharing, Views
from tdmarl.precision import set_precision
from tdmarl.prepare import HAPPOFactor, JointAdvantage
from tdmarl.recurrent import hidden_keys
from tdmarl.step import Annealing, Part, Step, adam
from tdmarl.trust import TrustRegionStep

Actors = Mapping[str, Sequence[TensorDictModuleBase]]


def happo(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    team_reward: str = "mean",
    gamma: float = 0.99,
    lmbda: float = 0.95,
    clip_epsilon: float | None = 0.2,
    entropy_coeff: float = 0.01,
    num_epochs: int = 5,
    minibatch_size: int | None = None,
    lr: float = 5e-4,
    critic_lr: float | None = None,
    max_grad_norm: float | None = 10.0,
    value_clip: bool = True,
    value_norm: bool = True,
    huber_delta: float = 10.0,
    normalize_advantage: bool = True,
    anneal_frames: int | None = None,
    critic_scope: str = "team",
    share_params: Sharing = False,
    order: Sequence[int] | None = None,
    factor: bool = True,
    trust: Mapping[str, Any] | None = None,
    hidden: Sequence[int] = (128, 128),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = True,
    gaussian: Mapping[str, Any] | None = None,
    recurrent: str | int | None = None,
    chunk_length: int = 10,
    actor: Actors | None = None,
    critic: TensorDictModuleBase | None = None,
    optim: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    seed: int = 0,
    mode: str = "auto",
    precision: str = "float32",
) -> Algorithm:
    """Builds HAPPO for a cooperative team; agents may differ in sizes, kinds of action and networks.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team's groups; None means the only one. Agents are numbered by
            group, then by index.
        team_reward ("mean" or "sum"): how the agents' rewards become the team's.
        gamma, lmbda, clip_epsilon, entropy_coeff, num_epochs, minibatch_size, lr, critic_lr, max_grad_norm,
            value_clip, value_norm, huber_delta, anneal_frames, hidden, activation, layer_norm, gaussian,
            recurrent, chunk_length, seed, mode, precision: see :func:`tdmarl.mappo`; here each agent has its own epochs
            and optimizer, and ``clip_epsilon=None`` clips no ratio, and values by 0.2. The factor of recurrent policies
            is taken over whole batches, from the states where these begin.
        normalize_advantage (bool): standardize the joint advantage once, over each agent's live entries.
        critic_scope ("team" or "state"): what the team's one V sees.
        share_params (bool or map): agents may share networks, but the theory of the sequential update then no
            longer holds, and a warning says so.
        order (sequence of int, optional): always this order of agents; None draws a new one for each batch.
        factor (bool): False leaves every factor at one: the agents then update as independent PPO learners of the
            joint advantage, which is MAPPO with unshared parameters.
        trust (mapping, optional): each agent takes one step of :class:`tdmarl.trust.TrustRegionStep` with these
            options instead; what is said of epochs, minibatches, optimizer and gradient is then the critic's.
        actor (mapping of str to sequence of modules, optional): each group's actors, one for each agent, with flat
            keys such as ``"observation"`` and ``"action"``.
        critic (module, optional): replaces the critic; writes ``"state_value"`` ``[*B, 1]``.
        optim (callable, optional): parameters to optimizer, in place of Adam.

    Returns:
        Algorithm: policy, explore (the same) and learner.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.matrix_game([[8.0, -12.0], [-12.0, 6.0]], num_envs=16)
        >>> algo = tdmarl.happo(env, num_epochs=2)
        >>> metrics = algo.learner(tdmarl.Collector(env, algo.explore, frames_per_batch=64).rollout())
        >>> sorted(algo.learner.last_order)
        [0, 1]
    """
    members = team(env, group)
    nets: dict[str, Any] = {
        "hidden": hidden, "activation": activation, "layer_norm": layer_norm, "recurrent": recurrent
    }  # fmt: skip
    if share_params is not False:
        warnings.warn(
            "HAPPO with shared parameters: an agent's step changes the others' policies too, so the factor is "
            "no longer the ratio of the agents before it and the improvement is not guaranteed.",
            stacklevel=2,
        )
    with seeds.routed(seeds.generator(seed, "init")):
        agents, policy = _agents(env, list(members), actor, share_params, nets | {"gaussian": gaussian})
        if critic is None:
            critic = state_critic(env, group, scope=critic_scope, joint=True, **nets)
    if trust is not None and precision != "float32":
        raise ValueError(
            f"precision={precision!r} has too few digits for conjugate gradients: a trust region needs 'float32'."
        )
    set_precision(precision, policy, critic, *(alone for _, _, alone in agents))
    norm = ValueNorm(device=members.groups[0].device) if value_norm else None
    if norm is not None:
        critic = NormalizedCritic(critic, {None: norm})
    explore, length = remembering(policy, critic, chunk_length)
    made: dict[tuple[int, ...], torch.optim.Optimizer] = {}

    def make(params: list[Tensor], rate: float) -> torch.optim.Optimizer:
        key = tuple(map(id, params))  # agents that share a network share its optimizer
        if key not in made:
            made[key] = adam(params, rate, mode) if optim is None else optim(params)
        return made[key]

    updates, losses = [], []
    for name, index, alone in agents:
        if trust is not None:
            updates.append(AgentUpdate(name, index, alone, TrustRegionStep(alone, **trust)))
            continue
        loss = PolicyLoss(alone, None, clip_epsilon=clip_epsilon, entropy_coeff=entropy_coeff)
        losses.append(loss)
        part = Part(loss, make(list(alone.parameters()), lr), max_grad_norm, name="actor")
        updates.append(AgentUpdate(name, index, alone, Step([part])))
    value_loss = ValueLoss(
        critic,
        None,
        clip_epsilon=(0.2 if clip_epsilon is None else clip_epsilon) if value_clip else None,
        huber_delta=huber_delta,
        value_norm=norm,
    )
    critic_optim = make(list(critic.parameters()), lr if critic_lr is None else critic_lr)
    value_step = Step([Part(value_loss, critic_optim, max_grad_norm, name="critic")])
    sizes = [g.n_agents for g in members]
    prepare = JointAdvantage(
        critic,
        members.names,
        sizes,
        team_reward=team_reward,
        gamma=gamma,
        lmbda=lmbda,
        standardize=normalize_advantage,
        mode=mode,
    )
    check_chain(collected(env, explore), [("JointAdvantage", prepare), ("the critic's loss", value_step)])
    annealing = None
    if anneal_frames is not None:
        buffers = [(loss, "entropy_coeff") for loss in losses]
        annealing = Annealing(anneal_frames, optims=list(made.values()), buffers=buffers)
    device = members.groups[0].device
    passes = {"agents": (None, 1) if trust is not None else (minibatch_size, num_epochs)}
    rows = [
        BatchBuffer(
            *passes.get(who, (minibatch_size, num_epochs)), sequence_length=length,
            seed=seeds.derive(seed, f"learning/{who}"), device=device,
        )  # fmt: skip
        for who in ("agents", "critic")
    ]
    learner = SequentialLearner(
        updates, rows[0], Learner(value_step, rows[1], mode=mode), prepare=prepare,
        factor=(lambda name: HAPPOFactor(name, members.names)) if factor else None, order=order, annealing=annealing,
        seed=seeds.derive(seed, "order"), mode=mode,
    )  # fmt: skip
    return Algorithm(policy=policy, explore=explore, learner=learner)


def haa2c(env: EnvBase, group: str | Sequence[str] | None = None, **options: Any) -> Algorithm:
    """Builds HAA2C: :func:`happo` whose agents follow ``E[r M A]`` unclipped, as advantage actor-critics do.

    In the first epoch that is the gradient ``E[M A grad log pi]``; defaults are HAPPO's, as in HARL (Zhong et al. 2024,
    "Heterogeneous-Agent Reinforcement Learning").

    Args:
        env, group: as for :func:`happo`.
        **options: those of :func:`happo`, but ``clip_epsilon`` and ``trust``.

    Example:
        >>> import tdmarl
        >>> algo = tdmarl.haa2c(tdmarl.matrix_game([[1.0, 0.0], [0.0, 1.0]], 16), num_epochs=1)
    """
    forbidden = sorted({"clip_epsilon", "trust"} & set(options))
    if forbidden:
        raise TypeError(f"haa2c clips no ratio and has no trust region: {forbidden} is happo's.")
    return happo(env, group, clip_epsilon=None, **options)


def hatrpo(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    max_kl: float = 0.01,
    cg_steps: int = 10,
    damping: float = 0.1,
    line_search_steps: int = 10,
    backtrack: float = 0.8,
    accept_ratio: float = 0.5,
    **options: Any,
) -> Algorithm:
    """Builds HATRPO: :func:`happo` whose agents take one step each in a trust region.

        maximize ``E[r M A]`` subject to ``E[KL(pi_old || pi)] <= max_kl``

    by the natural gradient and a line search; see :mod:`tdmarl.trust`. The metrics ``accepted``, ``kl`` and
    ``surrogate_gain`` are means over the agents. Source: Kuba et al. 2022; defaults as in HARL.

    Args:
        env, group: as for :func:`happo`.
        max_kl, cg_steps, damping, line_search_steps, backtrack, accept_ratio: see
            :class:`tdmarl.trust.TrustRegionStep`.
        **options: those of :func:`happo`, but ``trust`` and ``entropy_coeff``; ``lr``, ``num_epochs``,
            ``minibatch_size``, ``max_grad_norm``, ``optim`` and ``clip_epsilon`` are the critic's.

    Example:
        >>> import tdmarl
        >>> algo = tdmarl.hatrpo(tdmarl.matrix_game([[1.0, 0.0], [0.0, 1.0]], 16), max_kl=0.005)
    """
    forbidden = sorted({"entropy_coeff", "trust"} & set(options))
    if forbidden:
        raise TypeError(f"hatrpo has no entropy bonus and makes its own trust region: {forbidden} is happo's.")
    if options.get("recurrent") is not None and team(env, group).groups[0].device.type == "cuda":
        raise NotImplementedError(
            "hatrpo(recurrent=...) needs second derivatives, which cuDNN's recurrent unit has not: use it on the CPU, "
            "or happo."
        )
    trust = {
        "max_kl": max_kl, "cg_steps": cg_steps, "damping": damping, "line_search_steps": line_search_steps,
        "backtrack": backtrack, "accept_ratio": accept_ratio,
    }  # fmt: skip
    return happo(env, group, trust=trust, **options)


def _agents(
    env: EnvBase, members: list[Group], actor: Actors | None, share_params: Sharing, nets: dict[str, Any]
) -> tuple[list[tuple[str, int, TensorDictModuleBase]], TensorDictModuleBase]:
    """Every agent's own actor, and the policy of them all."""
    policies, agents = [], []
    for g in members:
        if actor is None:
            views: Views = {}
            whole = stochastic_actor(env, g.name, share_params, **nets)
            own = [agent_actor(whole, i, views) for i in range(g.n_agents)]
        else:
            if g.name not in actor or len(actor[g.name]) != g.n_agents:
                found = {name: len(mine) for name, mine in actor.items()}
                raise ValueError(
                    f"actor= has {found} actors; group {g.name!r} needs {g.n_agents}, one for each agent."
                )
            own = list(actor[g.name])
            if any(hidden_keys(alone) for alone in own):
                raise ValueError(
                    f"actor= gives group {g.name!r} recurrent actors, agent by agent; only those that happo builds "
                    "itself may be recurrent: happo(env, recurrent='gru')."
                )
            whole = SideBySide(own, g.name)
        policies.append(whole)
        agents += [(g.name, i, alone) for i, alone in enumerate(own)]
    return agents, policies[0] if len(policies) == 1 else TensorDictSequential(*policies)


class SideBySide(TensorDictModuleBase):
    """Single agents' modules as one module of their group: module ``i`` sees agent ``i``'s entries under flat keys.

    Args:
        modules (sequence of TensorDictModuleBase): one for each agent, all with the same keys.
        group (str): the group.
    """

    def __init__(self, modules: Sequence[TensorDictModuleBase], group: str) -> None:
        super().__init__()
        self.agents, self.group = nn.ModuleList(modules), group
        self.in_keys = [(group, key) for key in modules[0].in_keys]
        self.out_keys = [(group, key) for key in modules[0].out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        seen = {key: tensordict.get((group, key)) for group, key in self.in_keys}  # each [*B, n, ...]
        written = []
        for i, module in enumerate(self.agents):
            mine = {key: x.select(tensordict.ndim, i) for key, x in seen.items()}
            written.append(module(TensorDict(mine, batch_size=tensordict.batch_size)))
        for group, key in self.out_keys:
            stacked = torch.stack([td.get(key) for td in written], tensordict.ndim)
            tensordict.set((group, key), stacked)
        return tensordict
