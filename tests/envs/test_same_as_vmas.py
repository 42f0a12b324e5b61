"""The simulator equals VMAS's own when each step starts from VMAS's state: eager to the last bit, graphs closely.

Runs 10 steps of most scenarios eagerly, fewer of the slow ones, and of a few scenarios also the recorded graphs.
All scenarios, 200 steps, with the graphs compiled (an hour; "trace" runs them uncompiled, a few minutes), a table
of the largest differences at the end, and beside them how far a free run comes from VMAS's in as many steps, and
how far VMAS comes from itself after a perturbation of 1e-7:

    VMAS_MODE=compile VMAS_STEPS=200 python -m pytest tests/envs/test_same_as_vmas.py

Eagerly, to the last bit, 200 steps:

    VMAS_MODE=eager VMAS_STEPS=200 python -m pytest tests/envs/test_same_as_vmas.py

With `VMAS_FEW=1` equal operations of every graph are made one, which otherwise is only done to large ones.

A graph's result may differ from VMAS's by 1e-5 of the entry's largest value, or by ten times what one step of VMAS
itself makes of a change of its state by 1e-7, where that is more.

VMAS asks whether any environment of the batch has two entities near each other before it computes their
collision, so that an environment depends on its neighbours; and it proposes spawn places for ever. The
reference is VMAS with these two replaced by ours. `VMAS_UNPATCHED=1` compares with VMAS as it is, to see by
how much that differs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections import defaultdict
from typing import Any, Iterator

import pytest
import torch
import vmas
from torch import Tensor
from vmas.simulator import core
from vmas.simulator.environment import Environment
from vmas.simulator.utils import ScenarioUtils

from tdmarl.envs import recording, scenarios
from tdmarl.envs.batching import batched
from tdmarl.envs.simulation import collides, find_position
from tdmarl.envs.slots import _resolve, walk
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
MODE = os.environ.get("VMAS_MODE", "")
LARGE = recording._LARGE
FEW = bool(os.environ.get("VMAS_FEW"))
RECORDED = [  # scenario, and the number of operations above which substeps are a function of their own
    ("simple_spread", LARGE),
    ("simple_speaker_listener", LARGE),  # talks
    ("navigation", LARGE),  # lidar
    ("transport", LARGE),  # boxes
    ("asym_joint", LARGE),  # joints
    ("goal", 0),
]
CASES = (
    [(name, MODE, LARGE, FEW) for name in NAMES]
    if MODE
    else [(name, "eager", LARGE, False) for name in NAMES]
    + [(name, "trace", large, few) for name, large in RECORDED for few in (False, True)]
)
TOLERANCE, PERTURBATION, AMPLIFIED = 1e-5, 1e-7, 10
TABLE: dict[str, str] = {}

Shown = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints what was found, where a mode was asked for."""
    yield
    if MODE:
        title = "scenario: mode [operations] largest differences over the entry's scale | free run (VMAS perturbed)"
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{title}", *TABLE.values(), sep="\n")


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
    mine = {name: value for name, _, value in walk(env.core.simulation.scenario)}
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


def perturbed(stock: Environment, name: str, slots: list[str], generator: torch.Generator) -> Environment:
    """A copy of VMAS's environment, its state moved by the last digits of single precision."""
    twin = copy.deepcopy(stock)
    if name == "football" and not os.environ.get("VMAS_UNPATCHED"):
        for controller in (twin.scenario.blue_controller, twin.scenario.red_controller):
            if controller is not None:  # its replacement belongs to the original
                vars(controller).pop("check_better_positions")
        scenarios._football(twin.scenario)
    moved: dict[int, Tensor] = {}
    found = [(path, value) for slot, path, value in walk(twin.scenario) if slot in slots]
    for path, value in found:
        if value.is_floating_point():
            if id(value) not in moved:
                sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                moved[id(value)] = value + PERTURBATION * sign * value.abs().clamp_min(1)
            owner = _resolve(path[:-1], {(): twin.scenario})
            (owner if isinstance(owner, (dict, list)) else vars(owner))[path[-1]] = moved[id(value)]
    return twin


def actions_for(stock: Environment, generator: torch.Generator) -> list[Tensor]:
    found = []
    for agent in stock.agents:
        limit = agent.action.u_range_tensor
        unit = torch.rand(ENVS, stock.get_agent_action_size(agent), generator=generator)
        physical = (unit[:, : agent.action_size] * 2 - 1) * limit
        found.append(torch.cat([physical, unit[:, agent.action_size :]], -1))
    return found


def step_of_stock(stock: Environment, actions: list[Tensor], slots: list[str]) -> Shown:
    """All that VMAS shows after a step, and its state."""
    observations, rewards, dones, infos = stock.step([action.clone() for action in actions])
    shown = {"terminated": dones}
    for i, (observation, reward, info) in enumerate(zip(observations, rewards, infos)):
        shown |= {f"observation {i}": observation, f"reward {i}": reward.reshape(ENVS)}
        for key, value in info.items():
            value = value.float()
            shown[f"info {i} {key}"] = value if value.ndim > 1 else value.unsqueeze(-1)
    after = {key: value for key, _, value in walk(stock.scenario)}
    return {key: value.clone() for key, value in (shown | {slot: after[slot] for slot in slots}).items()}


def step_of_ours(env: VmasEnv, actions: list[Tensor], slots: list[str], stream: Tensor) -> Shown:
    """The same of ours, with the random numbers that VMAS had."""
    env.core.streams._states[0] = stream.clone()
    tensordict = env._last.copy()
    for group in env.groups:
        tensordict.set((group.name, "action"), torch.stack([actions[i] for i in group.indices], 1))
    mine = env.step(tensordict)["next"]
    shown = {"terminated": mine["terminated"].squeeze(-1)}
    for group in env.groups:
        for place, i in enumerate(group.indices):
            own = mine[group.name][:, place]
            shown |= {f"observation {i}": own["observation"], f"reward {i}": own["reward"].squeeze(-1)}
            info = own["info"].items() if "info" in own.keys() else ()
            shown |= {f"info {i} {key}": value for key, value in info}
    state = env.get_state()
    return shown | {slot: state[slot] for slot in slots}


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def difference(a: Tensor, b: Tensor) -> float:
    """The largest; infinite where only one is a number."""
    apart = (a.double() - b.double()).abs()
    return apart.masked_fill((a == b) | (a.isnan() & b.isnan()), 0).nan_to_num(float("inf")).max().item()


def distance(a: Shown, b: Shown) -> Tensor:
    """For each environment the largest difference of an observation."""
    apart = [(a[key] - b[key]).abs().flatten(1).amax(1) for key in b if key.startswith("observation")]
    return torch.stack(apart).amax(0)  # [E]


class Comparison:
    """Adds up over steps what differs between ours and VMAS."""

    def __init__(self) -> None:
        self.scales: dict[str, float] = defaultdict(float)
        self.worst: dict[str, float] = defaultdict(float)
        self.found: list[tuple[str, float, float]] = []  # entry, difference, what VMAS makes of a perturbation

    def add(self, mine: Shown, theirs: Shown) -> dict[str, float]:
        """Returns the entries that differ by more than the tolerance, as far as their scale is known by now."""
        assert set(theirs) <= set(mine), f"not shown: {set(theirs) - set(mine)}"
        large = {}
        for key, value in theirs.items():
            assert value.shape == mine[key].shape, key
            found = difference(mine[key], value)
            finite = value.double().nan_to_num(0, 0, 0).abs().max().item()
            self.scales[key] = max(self.scales[key], finite)
            self.worst[key] = max(self.worst[key], found)
            if found > TOLERANCE * self.scales[key]:
                large[key] = found
        return large

    def faults(self) -> dict[str, tuple[float, float]]:
        return {
            key: (found, allowed)
            for key, found, allowed in self.found
            if found > max(TOLERANCE * self.scales[key], AMPLIFIED * allowed)
        }

    def report(self) -> str:
        """The largest differences over their scales: of what agents see, of rewards, of info, of the state."""
        kinds: dict[str, float] = defaultdict(float)
        for key, value in self.worst.items():
            kind = key.split()[0] if not key.startswith("scenario") else "state"
            kinds[kind] = max(kinds[kind], value / (self.scales[key] or 1))
        return " ".join(f"{kind} {value:.0e}" for kind, value in kinds.items())


@pytest.mark.parametrize("name, mode, large, few", CASES)
def test_each_step_is_vmas_own(
    name: str, mode: str, large: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.filterwarnings("ignore")
    monkeypatch.setattr(recording, "_LARGE", large)
    if few:
        monkeypatch.setattr(recording, "_in_few", batched)
    torch.manual_seed(0)
    stock = vmas.make_env(name, num_envs=ENVS, seed=3)
    env = VmasEnv(name, num_envs=ENVS, seed=0, mode=mode)
    if name == "football" and not os.environ.get("VMAS_UNPATCHED"):
        scenarios._football(stock.scenario)
    if name == "het_mass":
        share_masses(env, stock)
    generator, signs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    found = Comparison()
    with same_physics(name):
        compiled = env.compile()._compiled
        stock.step(stock.get_random_actions())  # VMAS makes some of its tensors in the first step
        env.reset()
        stock.reset()
        if name == "het_mass":
            share_masses(env, stock)
        for _ in range(steps_of(name)):
            slots = load(env, stock)
            assert len(slots) >= 5
            if compiled is not None:  # what nothing depends on is not kept up
                slots = [slot for slot in slots if slot in compiled.recording.names]
            actions, stream = actions_for(stock, generator), Environment.vmas_random_state[0].clone()
            before = copy.deepcopy(stock) if compiled is not None else None
            mine = step_of_ours(env, actions, slots, stream)
            theirs = step_of_stock(stock, actions, slots)
            after = Environment.vmas_random_state[0]
            large_ones = found.add(mine, theirs)
            change: dict[str, float] = defaultdict(float)
            for _ in range(16 if large_ones and before is not None else 0):
                Environment.vmas_random_state[0] = stream.clone()
                other = step_of_stock(perturbed(before, name, slots, signs), actions, slots)
                change |= {key: max(change[key], difference(other[key], theirs[key])) for key in large_ones}
            Environment.vmas_random_state[0] = after
            found.found += [(key, value, change[key]) for key, value in large_ones.items()]
        free = free_run(name, env, stock, slots, generator, signs) if MODE else ""
    report = {} if compiled is None else compiled.recording.report
    operations = "+".join(f"{part} {what.operations}" for part, what in report.items())
    reason = f" EAGER: {env.fallback_reason}" if env.mode != mode else ""
    TABLE[name] = f"{name}: {env.mode} [{operations}] {found.report()} | {free}{reason}"
    if env.mode == "eager":
        assert not any(found.worst.values()), f"differences {dict(found.worst)}"
    assert not found.faults(), f"difference, that of VMAS perturbed: {found.faults()}"
    assert MODE or env.mode == mode, env.fallback_reason
    assert large > 0 or "go_on" in report


def free_run(
    name: str,
    env: VmasEnv,
    stock: Environment,
    slots: list[str],
    generator: torch.Generator,
    signs: torch.Generator,
) -> str:
    """How far ours is from VMAS, and VMAS perturbed from itself, after as many steps (median of environments)."""
    stock.reset()
    if name == "het_mass":
        share_masses(env, stock)
    load(env, stock)
    twin = perturbed(stock, name, slots, signs)
    for _ in range(steps_of(name)):
        actions, stream = actions_for(stock, generator), Environment.vmas_random_state[0].clone()
        other = step_of_stock(twin, actions, slots)
        Environment.vmas_random_state[0] = stream.clone()
        theirs, mine = step_of_stock(stock, actions, slots), step_of_ours(env, actions, slots, stream)
    return f"{distance(mine, theirs).median():.0e} ({distance(other, theirs).median():.0e})"


if MODE in ("trace", "compile", "cudagraph"):

    def test_most_scenarios_run_as_graphs() -> None:
        """And the others say why, in the table."""
        eager = [name for name, row in TABLE.items() if "EAGER" in row]
        assert len(TABLE) < len(NAMES) or len(NAMES) - len(eager) >= 37, eager
