"""A small combat game with deaths and unavailable actions, as fast as the device: a masked, mortal benchmark."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Categorical, TensorSpec

from tdmarl.envs.batched import BatchedEnv, Entries, Outcome

NOTHING, STAY, FIRST_MOVE, FIRST_ATTACK = 0, 1, 2, 6
MOVES = ((0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0))
WIDTH, HEIGHT, RANGE, SIGHT, HEALTH = 16.0, 10.0, 3.0, 7.0, 12.0


class Combat:
    """The rules of :func:`combat` as functions of a state, which they leave alone.

    The state is a tensordict ``[E]`` of ``ally_position`` ``[E, n, 2]``, ``ally_health`` ``[E, n]``,
    ``enemy_position`` ``[E, m, 2]`` and ``enemy_health`` ``[E, m]``; who has no health is dead.

    Args:
        n_agents, n_enemies (int): ``n`` and ``m``.
        device (torch.device): where the states are.
    """

    def __init__(self, n_agents: int, n_enemies: int, device: torch.device) -> None:
        self.n_agents, self.n_enemies = n_agents, n_enemies
        self.group_map = {"agents": [f"agent_{i}" for i in range(n_agents)]}
        self.moves = torch.tensor(MOVES, device=device)  # [4, 2]
        self.corner = torch.tensor([WIDTH, HEIGHT], device=device)
        self.share = torch.tensor([0.3, 0.8], device=device)  # of the field, where a team starts
        self.others = torch.tensor(
            [[j for j in range(n_agents) if j != i] for i in range(n_agents)],
            dtype=torch.int64,
            device=device,
        )  # [n, n - 1]

    def actions(self) -> dict[str, TensorSpec]:
        return {"agents": Categorical(FIRST_ATTACK + self.n_enemies, shape=(self.n_agents,))}

    def start(self, num_envs: int, device: torch.device, random: torch.Generator) -> TensorDict:
        """Both teams at full health, each anywhere in its own strip at the left or right end."""

        def place(units: int) -> Tensor:
            return (
                1 + torch.rand(num_envs, units, 2, generator=random, device=device) * strip
            )  # [E, units, 2]

        strip = self.corner * self.share
        ally, enemy = place(self.n_agents), place(self.n_enemies)
        enemy[..., 0] = WIDTH - enemy[..., 0]
        return TensorDict(
            ally_position=ally,
            ally_health=torch.full(ally.shape[:-1], HEALTH, device=device),
            enemy_position=enemy,
            enemy_health=torch.full(enemy.shape[:-1], HEALTH, device=device),
            batch_size=[num_envs],
        )

    def step(self, state: TensorDict, actions: dict[str, Tensor]) -> tuple[TensorDict, Outcome]:
        """Everybody acts at once, on what was there before."""
        action, m = actions["agents"], self.n_enemies
        ally, enemy = state["ally_position"], state["enemy_position"]
        ally_alive, enemy_alive = state["ally_health"] > 0, state["enemy_health"] > 0
        enemy_action = nearest(enemy, enemy_alive, ally, ally_alive)
        hits = attacks(action, m) & ally_alive.unsqueeze(-1)  # [E, n, m]
        blows = attacks(enemy_action, self.n_agents) & enemy_alive.unsqueeze(-1)  # [E, m, n]
        ally_health = (state["ally_health"] - blows.sum(-2)).clamp_min(0)
        enemy_health = (state["enemy_health"] - hits.sum(-2)).clamp_min(0)
        lost = state["enemy_health"] - enemy_health  # [E, m]
        killed = (enemy_alive & (enemy_health <= 0)).float()
        over = torch.stack([(ally_health <= 0).all(-1), (enemy_health <= 0).all(-1)], -1)  # [E, 2]
        won = (over[:, 1] & ~over[:, 0]).float()
        reward = 10 * lost.sum(-1) / (m * HEALTH) + 2 * killed.sum(-1) / m + 8 * won  # [E]
        after = TensorDict(
            ally_position=self._moved(ally, action, ally_alive),
            ally_health=ally_health,
            enemy_position=self._moved(enemy, enemy_action, enemy_alive),
            enemy_health=enemy_health,
            batch_size=state.batch_size,
        )
        shared = reward.reshape(-1, 1, 1).repeat(1, self.n_agents, 1)  # [E, n, 1]
        return after, Outcome({"agents": shared}, over.any(-1, keepdim=True))

    def _moved(self, position: Tensor, action: Tensor, alive: Tensor) -> Tensor:
        moves = action.unsqueeze(-1) == torch.arange(FIRST_MOVE, FIRST_ATTACK, device=action.device)
        shift = (moves & alive.unsqueeze(-1)).float() @ self.moves  # [E, units, 2]
        return torch.minimum((position + shift).clamp_min(0), self.corner)

    def available(self, state: TensorDict) -> Tensor:
        """``[E, n, K]``: to the dead nothing, to the living all but nothing."""
        ally = state["ally_position"]
        alive = (state["ally_health"] > 0).unsqueeze(-1)  # [E, n, 1]
        to = ally.unsqueeze(-2) + self.moves  # [E, n, 4, 2]
        inside = ((to >= 0) & (to <= self.corner)).all(-1)
        target = state["enemy_health"].unsqueeze(-2) > 0  # [E, 1, m]
        reach = _distance(ally, state["enemy_position"]) <= RANGE  # [E, n, m]
        return torch.cat([~alive, alive, inside & alive, reach & target & alive], -1)

    def show(self, state: TensorDict) -> Entries:
        mask = self.available(state)
        alive, enemy_alive = state["ally_health"] > 0, state["enemy_health"] > 0
        ally, enemy = state["ally_position"], state["enemy_position"]
        foes = _seen(ally, enemy, state["enemy_health"], enemy_alive)  # [E, n, m, 5]
        friends = _seen(ally, ally, state["ally_health"], alive)  # [E, n, n, 5]
        index = self.others.unsqueeze(-1).expand(*friends.shape[:1], -1, -1, friends.shape[-1])
        friends = friends.gather(-2, index)  # [E, n, n - 1, 5]
        own = self._known(ally, state["ally_health"])  # [E, n, 3]
        parts = [mask[..., FIRST_MOVE:].float(), own, foes.flatten(-2), friends.flatten(-2)]
        observation = torch.cat(parts, -1).masked_fill(~alive.unsqueeze(-1), 0.0)  # [E, n, o]
        world = [own, self._known(enemy, state["enemy_health"])]
        won = alive.any(-1) & ~enemy_alive.any(-1)
        info = {"battle_won": won.reshape(-1, 1, 1).repeat(1, self.n_agents, 1)}
        shown = {"observation": observation, "action_mask": mask, "mask": alive, "info": info}
        return {"agents": shown, "state": torch.cat(world, -2).flatten(-2)}

    def _known(self, position: Tensor, health: Tensor) -> Tensor:
        """Health and place in the field, both from 0 to 1; zeros for the dead. ``[E, units, 3]``"""
        entries = torch.cat([health.unsqueeze(-1) / HEALTH, position / self.corner], -1)
        return entries.masked_fill((health <= 0).unsqueeze(-1), 0.0)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Between all pairs, ``[*B, n, units]``; exact, where ``torch.cdist`` may multiply matrices."""
    return (one.unsqueeze(-2) - other.unsqueeze(-3)).square().sum(-1).sqrt()


def _seen(viewer: Tensor, position: Tensor, health: Tensor, alive: Tensor) -> Tensor:
    """Whether seen, how far, in which direction, and health; zeros beyond sight. ``[E, n, units, 5]``"""
    difference = position.unsqueeze(-3) - viewer.unsqueeze(-2)  # [E, n, units, 2]
    distance = _distance(viewer, position).unsqueeze(-1)
    near = (distance <= SIGHT) & alive[:, None, :, None]
    health = (health / HEALTH)[:, None, :, None].expand_as(distance)
    entries = torch.cat([torch.ones_like(distance), distance / SIGHT, difference / SIGHT, health], -1)
    return entries.masked_fill(~near, 0.0)


def attacks(action: Tensor, targets: int) -> Tensor:
    """Who attacks whom: bool ``[*B, targets]`` from actions ``[*B]``."""
    return action.unsqueeze(-1) == torch.arange(FIRST_ATTACK, FIRST_ATTACK + targets, device=action.device)


def nearest(position: Tensor, alive: Tensor, target: Tensor, target_alive: Tensor) -> Tensor:
    """What the scripted team does: attack the nearest living target, or go towards it along the longer axis.

    Args:
        position (Tensor): ``[E, units, 2]``.
        alive (Tensor): ``[E, units]``, bool.
        target (Tensor): ``[E, targets, 2]``.
        target_alive (Tensor): ``[E, targets]``, bool.

    Returns:
        Tensor: actions ``[E, units]``.
    """
    distance = _distance(position, target).masked_fill(~target_alive.unsqueeze(-2), torch.inf)
    least, chosen = distance.min(-1)  # [E, units]
    way = target.gather(-2, chosen.unsqueeze(-1).expand_as(position)) - position  # [E, units, 2]
    flat = way[..., 0].abs() > way[..., 1].abs()
    move = FIRST_MOVE + torch.where(flat, 2 + (way[..., 0] < 0).long(), (way[..., 1] < 0).long())
    action = torch.where(least <= RANGE, FIRST_ATTACK + chosen, move)
    return action.masked_fill(least.isinf(), STAY).masked_fill(~alive, NOTHING)


def scripted(n_agents: int = 5, n_enemies: int = 5) -> TensorDictModule:
    """A team to compare with: what the enemies do, with their rules, as a policy for :func:`combat`.

    Args:
        n_agents, n_enemies (int): the environment's.
    """

    def act(state: Tensor, mask: Tensor) -> Tensor:
        units = state.unflatten(-1, (n_agents + n_enemies, 3))  # [*B, units, 3]
        alive = units[..., 0] > 0
        position = torch.stack([units[..., 1] * WIDTH, units[..., 2] * HEIGHT], -1)
        split = [n_agents, n_enemies]
        (ally, enemy), (ally_alive, enemy_alive) = position.split(split, -2), alive.split(split, -1)
        action = nearest(ally, ally_alive, enemy, enemy_alive)
        allowed = mask.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return torch.where(
            allowed, action, mask[..., STAY].long()
        )  # in the way of the border: stay; dead: nothing

    return TensorDictModule(
        act, in_keys=["state", ("agents", "action_mask")], out_keys=[("agents", "action")]
    )


def combat(
    num_envs: int,
    n_agents: int = 5,
    n_enemies: int = 5,
    *,
    max_steps: int | None = 60,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> BatchedEnv:
    """A team against a scripted one, where agents die and few actions are available: what masks are for.

    The field is 16 wide and 10 high. Both teams start at full health, 12, at random places in strips 4.8 wide and 8
    high, one at each end. In each step all units act at once, on what was there before the step:

    ======  ========================================  =============================================
    action  what it does                              available
    ======  ========================================  =============================================
    0       nothing                                   to the dead, who can do nothing else
    1       stay                                      to the living
    2 to 5  one up, down, right, left                 to the living, within the field
    6 + j   enemy j loses 1 of its health             to the living, if j lives within a distance of 3
    ======  ========================================  =============================================

    A unit without health is dead for the rest of the episode. Every enemy attacks the nearest living agent, or goes
    towards it along the longer axis. The episode is ``terminated`` when a team is dead, and ``truncated`` at the limit.

    Every agent, dead or alive, gets the team's reward: 10 times the share of the enemies' health taken in the step,
    2 times the share of enemies killed, and 8 for the victory (all enemies dead, an agent alive). So an episode's
    return is 20 if it was won, and less than 12 or just that if not; ``return_mean_agents`` is the team's. An agent's
    death does not end its episode, in which its team may still win: ``(group, "terminated")`` is the root's, and
    ``("agents", "mask")`` says who is alive.

    The living observe, ``[E, n, 7 + 5 m + 5 (n - 1)]`` with ``m`` enemies: which moves and attacks are available; their
    health and place; and of each enemy and each other agent, if within a distance of 7, a one, distance, direction and
    health, else zeros. The dead observe zeros. The root ``state`` ``[E, 3 (n + m)]`` is everybody's health and place.
    ``("agents", "info", "battle_won")`` is there for logs.

    Returns and wins of 5 against 5 in 1,000 episodes: random agents 1.8 and 0 %, the enemies' own tactics
    (:func:`scripted`) 14.8 and 49 %, agents that gather, wait and concentrate their fire 19.7 and 96 %.

    Args:
        num_envs (int): number of environments, ``E``.
        n_agents, n_enemies (int): units of both teams.
        max_steps (int, optional): time limit.
        seed (int): of the places where episodes start.
        device (torch.device, optional): where everything lives.

    Example:
        >>> env = combat(num_envs=4)
        >>> env.rollout(3)["agents", "action_mask"].shape
        torch.Size([4, 3, 5, 11])
    """
    for name, value in (("n_agents", n_agents), ("n_enemies", n_enemies)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    device = torch.get_default_device() if device is None else torch.device(device)
    return BatchedEnv(Combat(n_agents, n_enemies, device), num_envs, max_steps, seed, device)
