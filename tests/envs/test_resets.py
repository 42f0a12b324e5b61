"""Initial states drawn ahead have the distribution of VMAS's own, and each of them begins one episode.

Runs a few scenarios with 2,000 initial states. All scenarios with 10,000 (half an hour), and a table at the end:

    VMAS_ROWS=10000 python -m pytest tests/envs/test_resets.py

Each entry of what agents observe after a reset is compared by the two-sample test of Kolmogorov and Smirnov, and so
are random projections of all entries, which would see that two entities are placed together. Where VMAS makes one
choice for its whole batch and ours one for each environment, each of VMAS's states comes from a reset of its own.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, Iterator

import pytest
import torch
import vmas
from torch import Tensor

from tdmarl.envs.scenarios import UNSUPPORTED
from tdmarl.envs.vmas import VmasEnv

ALL = [n for n in vmas.scenarios + vmas.mpe_scenarios + vmas.debug_scenarios if n not in UNSUPPORTED]
FEW = ["simple_spread", "simple_speaker_listener", "dropout", "het_mass"]
BATCH_WIDE = {  # VMAS draws something once for the batch
    "asym_joint",
    "ball_passage",
    "ball_trajectory",
    "give_way",
    "het_mass",
    "joint_passage",
    "joint_passage_size",
    "passage",
    "simple_adversary",
    "simple_crypto",
    "simple_push",
    "simple_reference",
    "simple_speaker_listener",
    "wind_flocking",
}
ROWS = int(os.environ.get("VMAS_ROWS", 0))
DRAWS = 5  # resets of all environments that give the rows
PROJECTIONS = 32
SAME = 1e-5  # values closer than this, relative to the largest, are one
TABLE: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints what was found, where a number of rows was asked for."""
    yield
    if ROWS:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\nscenario: entries, smallest corrected p, different initial states (of VMAS)")
            print(*TABLE.values(), sep="\n")


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of the distribution functions of `a` and `b` [rows, entries], for each entry.

    Values within a tolerance count as one, so that rounding does not tell constants apart.
    """
    found = []
    for x, y in zip(a.T.contiguous().sort().values, b.T.contiguous().sort().values):
        near = SAME * max(x.abs().max().item(), y.abs().max().item())
        at = torch.cat([x, y])
        below = [torch.searchsorted(s, at, right=True) / len(s) for s in (x, y)]
        above = [torch.searchsorted(s, at + near, right=True) / len(s) for s in (x, y)]
        found.append(torch.maximum((below[0] - above[1]).max(), (below[1] - above[0]).max()).clamp_min(0))
    return torch.stack(found)  # [entries]


def p_value(distance: float, rows: int, others: int) -> float:
    """Probability of so large a distance between samples of one distribution, for many rows."""
    x = distance * math.sqrt(rows * others / (rows + others))
    if x < 0.2:  # where the series needs many terms and is 1
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k**2 * x**2) for k in range(1, 101)))


def flat(observation: Any) -> Tensor:
    """`[E, entries]` of what an agent observes."""
    if isinstance(observation, dict):
        return torch.cat([flat(observation[key]) for key in sorted(observation)], 1)
    return observation.to(torch.float64).flatten(1)


def of_stock(name: str, rows: int) -> Tensor:
    """Observations of all agents after VMAS's resets, [rows, entries]."""
    alone = name in BATCH_WIDE
    stock = vmas.make_env(name, num_envs=1 if alone else rows, seed=1)
    found = [torch.cat([flat(x) for x in stock.reset()], 1).clone() for _ in range(rows if alone else 1)]
    return torch.cat(found)


def of_ours(env: VmasEnv, times: int) -> Tensor:
    """The same through the spares: all environments end after every step."""
    names, found = [key for key in env.group_map], []
    tensordict = env.reset()
    for _ in range(times):
        next_tensordict = env.step(env.rand_action(tensordict))["next"]
        assert next_tensordict["done"].all()
        tensordict = env.reset_done(next_tensordict)
        agents: list[Any] = [None] * env.n_agents
        for group in env.groups:
            for place, i in enumerate(group.indices):
                agents[i] = tensordict[group.name, "observation"][:, place]
        found.append(torch.cat([flat(as_dict(x)) for x in agents], 1))
    assert names and not env._compiled.ran_short
    return torch.cat(found)


def as_dict(x: Any) -> Any:
    return x if isinstance(x, Tensor) else x.to_dict()


def projections(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of all entries with random weights, so that entries that depend on each other are seen together."""
    both = torch.cat([a, b])
    spread = both.std(0)
    moves = spread > SAME * both.abs().amax(0)
    weights = torch.randn(int(moves.sum()), PROJECTIONS, generator=torch.Generator().manual_seed(0)).double()
    return tuple((x - both.mean(0))[:, moves] / spread[moves] @ weights for x in (a, b))  # type: ignore


def different(rows: Tensor) -> int:
    return len(rows.unique(dim=0))


def test_probabilities_are_those_of_the_tables() -> None:
    """Critical values 1.358 at 5 % and 1.628 at 1 %; a shift by half of a uniform distribution's width is 1/2."""
    assert p_value(1.3581 / math.sqrt(500), 1000, 1000) == pytest.approx(0.05, abs=1e-4)
    assert p_value(1.6276 / math.sqrt(500), 1000, 1000) == pytest.approx(0.01, abs=1e-4)
    grid = (torch.arange(1000.0) / 1000)[:, None]
    assert distance(grid, grid + 0.5).item() == pytest.approx(0.5, abs=1e-3)
    assert (
        distance(grid, grid).item() == 0 and distance(torch.ones(5, 1), torch.ones(5, 1) + 1e-6).item() == 0
    )


@pytest.mark.parametrize("name", ALL if ROWS else FEW)
def test_initial_states_are_distributed_as_vmas_own(name: str) -> None:
    warnings.filterwarnings("ignore")
    rows = ROWS or 2_000
    env = VmasEnv(name, num_envs=rows // DRAWS, seed=0, max_steps=1, mode="trace")
    env.compile()
    assert env.mode == "trace", env.fallback_reason
    mine, theirs = of_ours(env, DRAWS), of_stock(name, rows)
    assert mine.shape == theirs.shape
    tests = torch.cat([distance(mine, theirs), distance(*projections(mine, theirs))])
    worst = int(tests.argmax())
    p = min(1.0, p_value(tests[worst].item(), rows, rows) * len(tests))
    TABLE[name] = f"{name}: {mine.shape[1]} {p:.2g} {different(mine)} ({different(theirs)})"
    assert p > 0.01, (
        f"entry {worst} of {mine.shape[1]} (+{PROJECTIONS} projections): distance {tests[worst]:.3f}"
    )
    if different(theirs) == rows:
        assert different(mine) == rows, "an initial state began two episodes"


@pytest.mark.parametrize("mode", ["eager", "trace"])
def test_every_episode_has_an_initial_state_of_its_own(mode: str) -> None:
    """Environments end at steps of their own, and each at times twice in a row; others stay as they are."""
    env = VmasEnv("simple_spread", num_envs=64, seed=0, max_steps=8, mode=mode)
    env.compile()
    assert env.mode == mode
    generator, starts = torch.Generator().manual_seed(0), []
    left = torch.randint(0, 8, (64,), generator=generator)  # steps until an environment ends
    twice = torch.zeros(64, dtype=torch.bool)
    for _ in range(40):
        ends = left == 0
        twice ^= ends
        left = torch.where(ends, torch.where(twice, 0, 11), left - 1)
        before, state = env._last.clone(), env.get_state()
        shown = env.reset_done(before.clone().set("done", ends.unsqueeze(-1)))
        starts.append(shown["agents", "observation"][ends].flatten(1))
        after = env.get_state()
        for key in before.keys(True, True):
            assert torch.equal(before[key][~ends], shown[key][~ends]), key
        for key in state.keys():
            if state[key].ndim and state[key].shape[0] == 64:
                assert torch.equal(state[key][~ends], after[key][~ends]), key
    rows = torch.cat(starts)
    assert len(rows) > 200 and different(rows) == len(rows)


def test_a_second_use_is_reported() -> None:
    """On a GPU, where nobody asks, three ends within a draw's period are more than there are initial states."""
    env = VmasEnv("simple", num_envs=4, seed=0, max_steps=40, mode="trace").compile()
    env._compiled._period = 16
    ends = torch.tensor([[True], [False], [False], [False]])
    starts = [env.reset_done(env._last.clone().set("done", ends))["agents", "observation"] for _ in range(3)]
    assert torch.equal(starts[0][1:], starts[2][1:]) and not torch.equal(starts[0][0], starts[1][0])
    with pytest.warns(UserWarning, match="spare_resets=False"):
        env.state_dict()


def test_a_cpu_knows_when_there_is_no_initial_state_left() -> None:
    """And draws only then: one environment ends in every step, twenty times, and never begins from a state twice."""
    env = VmasEnv("simple_spread", num_envs=4, seed=0, mode="trace").compile()
    refill, drawn = env._compiled.recording.refill, []
    env._compiled.recording.refill = lambda inputs: drawn.append(1) or refill(inputs)  # type: ignore[assignment]
    ends, starts = torch.tensor([[True], [False], [False], [False]]), []
    for i in range(20):
        starts.append(
            env.reset_done(env._last.clone().set("done", ends))["agents", "observation"][0].flatten()
        )
        env.reset_done(env._last.clone().set("done", torch.zeros_like(ends)))
    assert different(torch.stack(starts)) == 20 and not env._compiled.ran_short
    assert len(drawn) == 20  # two to begin with, and one for each further end of the one that ends most often
