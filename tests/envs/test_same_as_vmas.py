"""The simulator equals VMAS's own, bit for bit, when each step starts from VMAS's state.

Runs 10 steps of most scenarios, fewer of the slow ones. All 100 steps of all scenarios:

    VMAS_STEPS=100 python -m pytest tests/envs/test_same_as_vmas.py

VMAS asks whether any environment of the batch has two entities near each other before it computes their
collision, so that an environment depends on its neighbours; and it proposes spawn places for ever. The
reference is VMAS with these two replaced by ours. `VMAS_UNPATCHED=1` compares with VMAS as it is, to see by
how much that differs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any, Iterator

import pytest
import torch
import vmas
from torch import Tensor
from vmas.simulator import core
from vmas.simulator.environment import Environment
from vmas.simulator.utils import ScenarioUtils

from tdmarl.envs import scenarios
from tdmarl.envs.functional import collides, find_position
from tdmarl.envs.slots import walk
from tdmarl.envs.vmas import VmasEnv

ENVS = 17
SLOW = {
    "pollock": 2,
    "joint_passage": 4,
    "waterfall": 5,
    "passage": 5,
    "ball_passage": 5,
    "multi_give_way": 5,
}
NAMES = [
    n for n in vmas.scenarios + vmas.mpe_scenarios + vmas.debug_scenarios if n not in scenarios.UNSUPPORTED
]


def steps_of(name: str) -> int:
    return int(os.environ.get("VMAS_STEPS", SLOW.get(name, 10)))


@contextlib.contextmanager
def same_physics(name: str) -> Iterator[None]:
    if os.environ.get("VMAS_UNPATCHED"):
        yield
        return
    patches: list[tuple[Any, str, Any]] = [
        (core.World, "collides", collides),
        (ScenarioUtils, "find_random_pos_for_entity", staticmethod(find_position)),
    ]
    if name == "football":  # its scripted players draw for the environments that a mask selects, ours for all
        patches.append(
            (
                torch,
                "randn",
                lambda *size, **_: torch.full(size if isinstance(size[0], int) else size[0], 0.3),
            )
        )
    with scenarios.replaced(*patches):
        yield


def load(env: VmasEnv, stock: Environment) -> list[str]:
    """Puts VMAS's state into ours; returns the slots that both have."""
    vars(stock.scenario).pop(
        "passages_to_place", None
    )  # a second name for the passages, which ours does not keep
    theirs = {name: value for name, _, value in walk(stock.scenario)}
    mine = {name: value for name, _, value in walk(env.scenario)}
    state, both = env.get_state(), []
    for slot in list(state.keys()):
        if slot == "steps":
            state[slot] = stock.steps.to(torch.int64)
            continue
        owner, _, attribute = slot.rpartition(".")
        if attribute == "_index":  # stock chose one entity for the batch: `owner` is that entity there
            candidates = mine[owner]._candidates
            chosen = [i for i, candidate in enumerate(candidates) if candidate.name == theirs[owner].name]
            state[slot] = torch.full_like(state[slot], chosen[0])
            continue
        value = theirs.get(slot)
        if isinstance(value, Tensor) and value.shape == state[slot].shape:
            state[slot] = value.clone()
            both.append(slot)
        elif isinstance(value, Tensor) and attribute == "_color":
            state[slot] = value.expand_as(state[slot]).clone()
        else:
            raise AssertionError(f"{slot}: stock has {type(value).__name__}, ours {tuple(state[slot].shape)}")
    env.set_state(state)
    return both


def share_masses(env: VmasEnv, stock: Environment) -> None:
    """`het_mass` draws Python numbers from NumPy in stock VMAS; here it takes our masses per environment."""
    for agent, twin in zip(stock.agents, env.agents):
        agent.mass = twin.mass.clone()


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().nan_to_num(float("inf")).max().item()


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_vmas_own(name: str) -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    stock = vmas.make_env(name, num_envs=ENVS, seed=3)
    env = VmasEnv(name, num_envs=ENVS, seed=0)
    worst: dict[str, float] = {}
    if name == "football" and not os.environ.get("VMAS_UNPATCHED"):
        scenarios._football(stock.scenario)
    if name == "het_mass":
        share_masses(env, stock)
    generator = torch.Generator().manual_seed(1)
    with same_physics(name):
        stock.step(stock.get_random_actions())  # VMAS makes some of its tensors in the first step
        env.reset()
        stock.reset()
        if name == "het_mass":
            share_masses(env, stock)
        for _ in range(steps_of(name)):
            both = load(env, stock)
            actions = []
            for agent in stock.agents:
                limit = agent.action.u_range_tensor
                unit = torch.rand(ENVS, stock.get_agent_action_size(agent), generator=generator)
                physical = (unit[:, :agent.action_size] * 2 - 1) * limit
                actions.append(torch.cat([physical, unit[:, agent.action_size :]], -1))
            env.core.streams._states[0] = Environment.vmas_random_state[0].clone()
            tensordict = env.reset_done(env._last.clone().set("done", torch.zeros(ENVS, 1, dtype=torch.bool)))
            for group in env.groups:
                tensordict.set((group.name, "action"), torch.stack([actions[i] for i in group.indices], 1))
            mine = env.step(tensordict)["next"]
            observations, rewards, dones, infos = stock.step([action.clone() for action in actions])
            pairs = [("terminated", mine["terminated"].squeeze(-1), dones)]
            for group in env.groups:
                for place, i in enumerate(group.indices):
                    shown = mine[group.name][:, place]
                    pairs.append((f"observation {i}", shown["observation"], observations[i]))
                    pairs.append((f"reward {i}", shown["reward"].squeeze(-1), rewards[i].reshape(ENVS)))
                    for key in infos[i]:
                        info = infos[i][key].float()
                        pairs.append(
                            (f"info {key}", shown["info", key], info if info.ndim > 1 else info.unsqueeze(-1))
                        )
            after, theirs = env.get_state(), {k: value for k, _, value in walk(stock.scenario)}
            pairs += [(slot, after[slot], theirs[slot]) for slot in both]
            for key, a, b in pairs:
                if not equal(a, b):
                    worst[key] = max(worst.get(key, 0.0), difference(a, b))
    assert not worst, f"differences {worst}"
    assert len(both) >= 5
