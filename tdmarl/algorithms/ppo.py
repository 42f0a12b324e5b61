"""MAPPO and IPPO: PPO for each agent, with a centralized or with its own critic.

Both collect with the current policies, estimate advantages with GAE, and for some epochs take clipped steps on
minibatches of that one batch. With observation ``o``, joint observation (or state) ``s`` and actions ``u`` they
maximize, for every agent,

    ``min(r A, clip(r, 1 - eps, 1 + eps) A) + c H``,  ``r = pi(u | o) / pi_old(u | o)``

and minimize the clipped Huber loss between ``V`` and the lambda-return. They differ in what ``V`` sees: ``o`` for
IPPO (de Witt et al. 2020), ``s`` for MAPPO (Yu et al. 2022). With ``other_actions`` the critic is ``V(o, s, u')``
and the advantage ``A(o, s, u')``, with ``u'`` the *other* agents' actions: the agent's own is left out, or the
baseline would be biased. Where descriptions of these algorithms print a ``min`` in the value clip or an ``argmax``
for the critic, the implementations' ``max`` and ``argmin`` are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import EnvBase

from tdmarl import seeds
from tdmarl.actors import stochastic_actor
from tdmarl.algorithms.contract import Algorithm
from tdmarl.critics import NormalizedCritic, ValueNorm, state_critic
from tdmarl.keys import Group, check_chain, collected, team
from tdmarl.learners import BatchBuffer, Learner
from tdmarl.losses import PolicyLoss, ValueLoss
from tdmarl.nets import Sharing
from tdmarl.precision import set_precision
from tdmarl.prepare import Advantage
from tdmarl.recurrent import CarryHidden, hidden_keys
from tdmarl.step import Annealing, Part, Step, adam

Optim = Callable[[list[Tensor]], torch.optim.Optimizer]


def mappo(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    gamma: float = 0.99,
    lmbda: float = 0.95,
    clip_epsilon: float = 0.2,
    entropy_coeff: float = 0.01,
    num_epochs: int = 15,
    minibatch_size: int | None = None,
    lr: float = 5e-4,
    critic_lr: float | None = None,
    max_grad_norm: float | None = 10.0,
    value_clip: bool = True,
    value_norm: bool = True,
    huber_delta: float = 10.0,
    normalize_advantage: str | None = "group",
    max_kl: float | None = None,
    anneal_frames: int | None = None,
    critic_scope: str = "team",
    other_actions: bool = False,
    share_params: Sharing = True,
    share_critic_params: Sharing | None = None,
    agent_id: bool = False,
    share_buffer: bool = True,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = True,
    gaussian: Mapping[str, Any] | None = None,
    recurrent: str | int | None = None,
    chunk_length: int = 10,
    actor: TensorDictModuleBase | Mapping[str, TensorDictModuleBase] | None = None,
    critic: TensorDictModuleBase | None = None,
    optim: Optim | None = None,
    seed: int = 0,
    mode: str = "auto",
    precision: str = "float32",
) -> Algorithm:
    """Builds MAPPO for a team; the defaults are those of the paper's code.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team's groups; None means the only one.
        gamma, lmbda (float): discount, and GAE's weight of long returns.
        clip_epsilon (float): of the ratio, and of the value.
        entropy_coeff (float): weight of the entropy bonus.
        num_epochs (int): how often each batch is gone through.
        minibatch_size (int, optional): the most rows in a minibatch: environment steps or, with recurrence, sequences
            of ``chunk_length`` of them; None: the whole batch.
        lr (float): Adam's learning rate (eps 1e-5); ``critic_lr`` if the critic's is another.
        max_grad_norm (float, optional): of the actor's and of the critic's gradient, each apart.
        value_clip (bool): clip the value's change by ``clip_epsilon``.
        value_norm (bool): let the critic regress standardized returns; see :class:`~tdmarl.critics.ValueNorm`.
        huber_delta (float): of the value loss; infinity is half the squared error.
        normalize_advantage ("group", "agent" or None): over all live agents together, each apart, or not.
        max_kl (float, optional): the actor stands still for the rest of a batch once a minibatch's ``kl_approx``
            exceeds this.
        anneal_frames (int, optional): learning rates and entropy coefficient fall linearly to zero over so many
            frames; None keeps them.
        critic_scope (str): what V sees: ``agent``, ``group``, ``team`` or ``state``.
        other_actions (bool): let V also see what the other agents do.
        share_params, share_critic_params (bool or map): which agents share a network; the critic as the actor
            unless it is said.
        agent_id (bool): let a shared actor know whom it serves (the critic always does).
        share_buffer (bool): False: each agent learns from its own draw of rows.
        hidden, activation, layer_norm: the networks'; see :class:`~tdmarl.nets.AgentMLP`.
        gaussian (mapping, optional): options of :func:`tdmarl.gaussian_actor` alone, where actions are continuous,
            such as ``{"distribution": "clipped", "std": "free"}``.
        recurrent ("gru", int or None): let actor and critic remember; see :func:`tdmarl.recurrent.agent_net`.
        chunk_length (int): recurrent networks, one's own ones too, learn from sequences of so many steps, which
            start with their stored states. Batches must be a multiple of it long in time.
        actor (module or mapping, optional): replaces the actor; for several groups a mapping from group to actor.
        critic (module, optional): replaces the critic; writes ``(group, "state_value")`` for every group. A
            :class:`~tdmarl.critics.NormalizedCritic` keeps its own moments.
        optim (callable, optional): parameters to optimizer, in place of Adam; then ``lr`` is its own affair.
        seed (int): of initialization and minibatches.
        mode (str): ``eager``, ``compile``, ``cudagraph`` or ``auto``; see :meth:`tdmarl.step.Step.accelerate`.
        precision (str): ``float32``, or ``bfloat16`` for the products of the networks' hidden layers; see
            :func:`tdmarl.set_precision`.

    Returns:
        Algorithm: policy, explore (the same; a recurrent critic watches, too) and learner.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("navigation", num_envs=8, max_steps=10, seed=0)
        >>> algo = tdmarl.mappo(env)
    """
    members = team(env, group)
    if share_critic_params is None:
        share_critic_params = share_params
    nets: dict[str, Any] = {
        "hidden": hidden, "activation": activation, "layer_norm": layer_norm, "recurrent": recurrent
    }  # fmt: skip
    with seeds.routed(seeds.generator(seed, "init")):
        policies = nets | {"agent_id": agent_id, "gaussian": gaussian}
        actors = _actors(env, list(members), actor, share_params, policies)
        if critic is None:
            critic = state_critic(
                env,
                group,
                scope=critic_scope,
                other_actions=other_actions,
                share_params=share_critic_params,
                **nets,
            )
    set_precision(precision, *actors.values(), critic)
    norms: dict[str, ValueNorm] = {}
    if isinstance(critic, NormalizedCritic):
        norms = critic.moments  # it brings its own
    elif value_norm:
        norms = {g.name: ValueNorm(device=g.device) for g in members}
        critic = NormalizedCritic(critic, norms)
    policy = actors[members.names[0]] if len(actors) == 1 else TensorDictSequential(*actors.values())
    explore, length = remembering(policy, critic, chunk_length)

    def make(params: list[Tensor], rate: float) -> torch.optim.Optimizer:
        return adam(params, rate, mode) if optim is None else optim(params)

    parts, policy_losses = [], []
    for g in members:
        label = g.name if len(members) > 1 else ""
        loss = PolicyLoss(actors[g.name], g.name, clip_epsilon=clip_epsilon, entropy_coeff=entropy_coeff)
        policy_losses.append(loss)
        stop = None if max_kl is None else ("kl_approx", max_kl)
        params = list(actors[g.name].parameters())
        parts.append(Part(loss, make(params, lr), max_grad_norm, stop_above=stop, name="actor", prefix=label))
    parts += _critic_parts(critic, list(members), norms, clip_epsilon if value_clip else None, huber_delta,
                           lambda p: make(p, lr if critic_lr is None else critic_lr), max_grad_norm)  # fmt: skip
    annealing = None
    if anneal_frames is not None:
        annealing = Annealing(
            anneal_frames,
            optims=[part.optim for part in parts],
            buffers=[(loss, "entropy_coeff") for loss in policy_losses],
        )
    prepare = Advantage(
        critic, members.names, gamma=gamma, lmbda=lmbda, standardize=normalize_advantage, actor=policy, mode=mode
    )
    step = Step(parts)
    check_chain(collected(env, explore), [("Advantage", prepare), ("the losses", step)])
    buffer = BatchBuffer(
        minibatch_size, num_epochs, sequence_length=length,
        apart=() if share_buffer else [(g.name, g.n_agents) for g in members],
        seed=seeds.derive(seed, "learning"), device=members.groups[0].device,
    )  # fmt: skip
    prepared_by = seeds.derive(seed, "prepare")
    learner = Learner(step, buffer, prepare=prepare, annealing=annealing, mode=mode, seed=prepared_by)
    return Algorithm(policy=policy, explore=explore, learner=learner)


def ippo(env: EnvBase, group: str | Sequence[str] | None = None, **options: Any) -> Algorithm:
    """Builds IPPO: :func:`mappo` whose critic sees the agent's own observation only.

    Args:
        env, group: as for :func:`mappo`.
        **options: those of :func:`mappo`, but ``critic_scope`` and ``other_actions``.
    """
    forbidden = sorted({"critic_scope", "other_actions"} & set(options))
    if forbidden:
        raise TypeError(f"ippo's critic sees the agent's own observation only: {forbidden} is mappo's.")
    return mappo(env, group, critic_scope="agent", **options)


def remembering(
    policy: TensorDictModuleBase, critic: TensorDictModuleBase, chunk_length: int
) -> tuple[TensorDictModuleBase, int]:
    """What to collect with, and how long the rows to learn from are, whether or not networks are recurrent.

    Args:
        policy, critic (TensorDictModuleBase): a recurrent critic has to watch what is collected.
        chunk_length (int): the length, if one of them is recurrent.
    """
    if chunk_length < 1:
        raise ValueError(f"chunk_length={chunk_length} must be at least 1.")
    watched = bool(hidden_keys(critic))
    explore = TensorDictSequential(policy, CarryHidden(critic)) if watched else policy
    return explore, chunk_length if watched or hidden_keys(policy) else 1


def _actors(
    env: EnvBase,
    members: list[Group],
    actor: TensorDictModuleBase | Mapping[str, TensorDictModuleBase] | None,
    share_params: Sharing,
    nets: dict[str, Any],
) -> dict[str, TensorDictModuleBase]:
    names = [g.name for g in members]
    if actor is None:
        return {name: stochastic_actor(env, name, share_params, **nets) for name in names}
    if isinstance(actor, Mapping):
        if set(actor) != set(names):
            raise ValueError(f"actor= names the groups {sorted(actor)}; the team has {names}.")
        return {name: actor[name] for name in names}
    if len(names) > 1:
        raise ValueError(f"The team has the groups {names}: give actor= as a mapping from group to actor.")
    return {names[0]: actor}


def _critic_parts(
    critic: TensorDictModuleBase,
    members: list[Group],
    norms: Mapping[str, ValueNorm],
    clip_epsilon: float | None,
    huber_delta: float,
    optim: Optim,
    max_grad_norm: float | None,
) -> list[Part]:
    """One part for the critic: groups may share parameters, so their losses share a step."""
    losses = [
        ValueLoss(
            critic, g.name, clip_epsilon=clip_epsilon, huber_delta=huber_delta, value_norm=norms.get(g.name)
        )
        for g in members
    ]
    loss: TensorDictModuleBase = (
        losses[0] if len(losses) == 1 else _Losses({g.name: x for g, x in zip(members, losses)})
    )
    return [Part(loss, optim(list(critic.parameters())), max_grad_norm, name="critic")]


class _Losses(TensorDictModuleBase):
    """Several groups' losses of one critic as one; the entries of group ``g`` are ``<entry>_<g>``."""

    def __init__(self, losses: dict[str, ValueLoss]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.in_keys = list(dict.fromkeys(k for loss in losses.values() for k in loss.in_keys))
        self.optional_keys = [k for loss in losses.values() for k in loss.optional_keys]
        self.out_keys = [f"{k}_{g}" for g, loss in losses.items() for k in loss.out_keys]

    def forward(self, tensordict: Any) -> Any:
        return TensorDict(
            {f"{k}_{g}": v for g, loss in self.losses.items() for k, v in loss(tensordict).items()}
        )
