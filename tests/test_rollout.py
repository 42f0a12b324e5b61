"""Fused rollouts: the ordinary loop's batches to the last bit, and policies that no graph could hold."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from toys import NoHostRead, record
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario

import tdmarl
from tdmarl.actors import stochastic_actor
from tdmarl import cuda_graph
from tdmarl.q_actors import EpsilonGreedy, exploring, q_actor
from tdmarl.frozen import frozen
from tdmarl.memory import Memory
from tdmarl.rollout import CHUNK, Columns

ENVS, STEPS = 6, CHUNK + 5


class Noisy(BaseScenario):
    """Agents whose forces are disturbed in every step."""

    def make_world(self, batch_dim: int, device: Any, **kwargs: Any) -> World:
        world = World(batch_dim, device)
        for i in range(2):
            world.add_agent(Agent(f"agent_{i}", collide=False, u_noise=0.1))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        size = (self.world.batch_dim if env_index is None else 1, 2)
        for agent in self.world.agents:
            agent.set_pos(torch.rand(size, device=self.world.device), env_index)

    def reward(self, agent: Agent) -> Tensor:
        return -agent.state.pos.abs().sum(-1)

    def observation(self, agent: Agent) -> Tensor:
        return torch.cat([agent.state.pos, agent.state.vel], -1)


def make_env(name: Any = "simple_spread", **kwargs: Any) -> Any:
    return tdmarl.VmasEnv(name, **{"num_envs": ENVS, "seed": 0, "max_steps": 7, "mode": "trace", **kwargs})


def make(env: Any, policy: Any, fused: bool = True, **kwargs: Any) -> tdmarl.Collector:
    collector = tdmarl.Collector(env, policy, **{"frames_per_batch": ENVS * STEPS, "seed": 3, **kwargs})
    if not fused:
        collector._fused.is_possible = lambda: False  # type: ignore[method-assign]
    return collector


def assert_same(found: TensorDictBase, expected: TensorDictBase, tolerance: float = 0) -> None:
    """Keys, sizes, names, types, and values, to the last bit if there is no tolerance."""
    assert set(found.keys(True)) == set(expected.keys(True))
    assert found.batch_size == expected.batch_size and found.names == expected.names
    for key in expected.keys(True):
        a, b = found.get(key), expected.get(key)
        if isinstance(b, Tensor):
            assert a.is_contiguous(), key
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert a.batch_size == b.batch_size and a.names == b.names, key


def pair(name: Any, kwargs: dict[str, Any], policy: Any, **options: Any) -> list[tdmarl.Collector]:
    """A fused and an ordinary collector of twins."""
    found = []
    for fused in (True, False):
        env = make_env(name, **kwargs)
        torch.manual_seed(0)
        found.append(make(env, policy(env), fused, **options))
    return found


def stochastic(recurrent: Any = None) -> Any:
    return lambda env: stochastic_actor(env, tuple(env.group_map), recurrent=recurrent)


def greedy(env: Any) -> TensorDictModuleBase:
    return exploring(q_actor(env, last_action=True, recurrent=16), EpsilonGreedy(env, anneal_frames=200))


def wandering(env: Any) -> TensorDictModuleBase:
    return tdmarl.maddpg(env, tuple(env.group_map), noise="ou", noise_start=0.5).explore


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "continuous": ("simple_spread", {}, stochastic()),
    "remembers": ("simple_spread", {}, stochastic("gru")),
    "two teams": ("simple_tag", {"time_limit": "terminate"}, stochastic()),
    "choices that remember": ("balance", {"continuous_actions": False}, stochastic("gru")),
    "masked, padded, with info": (
        "simple_world_comm",
        {"continuous_actions": False, "pad": True},
        stochastic(),
    ),
    "draws in its steps": (Noisy, {}, stochastic()),
    "no spare states": ("simple_spread", {"spare_resets": False}, stochastic()),
    "noise that wanders": ("simple_tag", {}, wandering),
    "explores and counts": ("balance", {"continuous_actions": False}, greedy),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fused_batch_is_the_ordinary_one(case: str) -> None:
    name, kwargs, policy = CASES[case]
    fused, plain = pair(name, kwargs, policy)
    # of matrix products, whose inputs lie otherwise in memory
    tolerance = 1e-6 if policy in (greedy, wandering) else 0
    for _ in range(3):
        assert_same(fused.rollout(), plain.rollout(), tolerance)
    assert fused._fused.reason is None and fused._fused._act is not None
    assert torch.equal(fused.generator.get_state(), plain.generator.get_state())  # type: ignore[union-attr]
    for a, b in zip(fused.policy.buffers(), plain.policy.buffers()):
        assert torch.equal(a, b)
    one, two = fused.state_dict(), plain.state_dict()
    assert one["root"].keys() == two["root"].keys() and one["env"].keys() == two["env"].keys()
    for part in ("root", "env"):
        for key, value in two[part].items():
            torch.testing.assert_close(
                one[part][key], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=key
            )


@pytest.mark.filterwarnings("ignore:init_random_frames")
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("draws in its steps", "no spare states")])
def test_one_captured_graph_is_the_ordinary_loop(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy, step, reset and sums as one replay a step; the capture is a stand-in that overwrites its results."""
    name, kwargs, policy = CASES[case]
    count = [0]
    monkeypatch.setattr(cuda_graph, "_capture", lambda run: record(run, count))
    monkeypatch.setattr("tdmarl.cpu_graph.Compiled", lambda graph, inputs, options: graph)
    monkeypatch.setattr("tdmarl.host.is_surely_false", lambda flags: False)  # a GPU's flags are not looked at
    fused, plain = pair(name, kwargs, policy, init_random_frames=ENVS * 2)
    fused.env.mode = "cudagraph"
    batches = []
    for _ in range(3):
        before = count[0]
        batches.append((fused.rollout(), plain.rollout()))
        fused.env.set_state(fused.env.get_state())  # which is then elsewhere
    assert count[0] - before == 2 * STEPS, "in every step one replay of all, and here one that draws ahead"
    tolerance = 1e-6 if policy in (greedy, wandering) else 0
    for a, b in batches:
        if name == "balance":  # what a reset leaves as it is shows after it as it was when its start was drawn
            a, b = (batch.exclude(("agents", "info"), ("next", "agents", "info")) for batch in (a, b))
        assert_same(a, b, tolerance)
    assert fused._fused.reason is None and fused.env.mode == "cudagraph"
    one, two = fused.state_dict(), plain.state_dict()
    for part in ("root", "env"):
        for key, value in two[part].items():
            if "info" not in key and "drawn" not in key:
                near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
                torch.testing.assert_close(one[part][key], value, **near, msg=key)


def test_steps_in_pieces_are_fused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdmarl.envs.recording._LARGE", 0)
    fused, plain = pair("goal", {}, stochastic())
    assert_same(fused.rollout(), plain.rollout())
    assert "go_on" in fused.env.report


def test_random_frames_come_first() -> None:
    fused, plain = pair(
        "balance", {"continuous_actions": False}, greedy, init_random_frames=ENVS * (STEPS + 4)
    )
    for _ in range(3):
        assert_same(fused.rollout(), plain.rollout(), 1e-6)
    explore = next(m for m in fused.policy.modules() if isinstance(m, EpsilonGreedy))
    assert int(explore.frames) == ENVS * (2 * STEPS - 4)


def test_a_resumed_fused_collector_goes_on_to_the_last_bit() -> None:
    env = make_env()
    torch.manual_seed(0)
    actor = stochastic_actor(env, recurrent="gru")
    collector = make(env, actor)
    collector.rollout()
    state = collector.state_dict()
    expected = [collector.rollout() for _ in range(2)]
    torch.manual_seed(99)
    other = make(make_env(seed=8), actor, seed=77)
    other.load_state_dict(state)
    before = torch.get_rng_state()
    for batch in expected:
        assert_same(other.rollout(), batch)
    assert torch.equal(before, torch.get_rng_state()), (
        "recording and acting draw from the collector's own stream"
    )


def test_a_trained_policy_acts_as_trained() -> None:
    """Parameters are read where they are, whatever changes them in place."""
    fused, plain = pair("simple_spread", {}, stochastic())
    assert_same(fused.rollout(), plain.rollout())
    act = fused._fused._act
    for collector in (fused, plain):
        optim = torch.optim.Adam(collector.policy.parameters(), lr=0.1)
        for parameter in collector.policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optim.step()
    assert_same(fused.rollout(), plain.rollout())
    for collector in (fused, plain):
        collector.policy.load_state_dict({k: v * 0 for k, v in collector.policy.state_dict().items()})
    assert_same(fused.rollout(), plain.rollout())
    assert fused._fused._act is act
    for collector in (fused, plain):
        for parameter in collector.policy.parameters():
            parameter.data = torch.full_like(parameter, 0.3)
    assert_same(fused.rollout(), plain.rollout())
    assert fused._fused._act is not act, "parameters in another place need another graph"


class Bang(nn.Module):
    """Pushes with a force that is an attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.force, self.calls, self.seen = kind, 0.1, 0, []  # type: ignore[var-annotated]

    def forward(self, observation: Tensor) -> Tensor:
        if self.kind == "counts":
            self.calls += 1
        elif self.kind == "remembers":
            self.seen.append(0)
        elif self.kind == "reads" and observation.sum() > 1e9:
            return observation[..., :2]
        elif self.kind == "writes":
            observation += 1
        return torch.zeros_like(observation[..., :2]) + self.force + self.calls / 100


def bang(kind: str) -> Any:
    return lambda env: TensorDictModule(Bang(kind), [("agents", "observation")], [("agents", "action")])


@pytest.mark.parametrize(
    "kind, reason",
    [("counts", "changes"), ("remembers", "changes"), ("reads", "reads a tensor"), ("writes", "writes")],
)
def test_a_policy_that_no_graph_can_hold_is_called(kind: str, reason: str) -> None:
    fused, plain = pair("simple_spread", {}, bang(kind))
    assert fused._fused.is_possible()
    a, b = fused.rollout(), plain.rollout()
    if kind == "counts":  # recording was a call as well
        assert (a["agents", "action"][:, 1:] > a["agents", "action"][:, :-1]).all()
    elif kind != "writes":  # into what was the last step's entry, too
        assert_same(a, b)
    assert fused._fused._act is None and reason in str(fused._fused.reason)


def test_hooks_and_closures_are_seen() -> None:
    count = [0]

    def act(observation: Tensor) -> Tensor:
        count[0] += 1
        return torch.zeros_like(observation[..., :2])

    env = make_env()
    closed = TensorDictModule(act, [("agents", "observation")], [("agents", "action")])
    collector = make(env, closed)
    collector.rollout()
    assert "changes" in str(collector._fused.reason) and count[0] == STEPS + 1
    hooked = bang("fixed")(env)
    hooked.module.register_forward_hook(lambda *_: None)
    collector = make(env, hooked)
    collector.rollout()
    assert "hooks" in str(collector._fused.reason)


def test_an_attribute_that_is_set_between_batches_holds() -> None:
    env = make_env()
    policy = bang("fixed")(env)
    collector = make(env, policy)
    for force in (0.1, 0.2, 0.5):
        policy.module.force = force
        assert (collector.rollout()["agents", "action"] == force).all() and collector._fused._act is not None
    policy.eval()
    collector.rollout()
    assert "Python changed" in str(collector._fused.reason)  # often enough
    policy.module.force = 0.7
    assert (collector.rollout()["agents", "action"] == torch.tensor(0.7)).all()


def test_what_a_fingerprint_holds() -> None:
    module = Bang("fixed")
    before = frozen(module)
    assert before == frozen(module)
    module.register_buffer("more", torch.zeros(2))
    assert before != frozen(module)
    before = frozen(module)
    module.more += 1  # type: ignore[operator]
    assert before == frozen(module), "a buffer's values are read in every call"


def test_batches_are_their_own() -> None:
    """The next batch is written elsewhere, and starts from what the last one left."""
    collector = make(make_env(max_steps=8), stochastic()(make_env()))
    one = collector.rollout()
    kept = one.clone()
    two = collector.rollout()
    assert_same(one, kept)
    going = ~one["next", "done"][:, -1].squeeze(-1)
    last, first = one["next", "agents", "observation"][:, -1], two["agents", "observation"][:, 0]
    assert torch.equal(last[going], first[going]) and going.any()
    places = [{x.untyped_storage().data_ptr() for x in batch.values(True, True)} for batch in (one, two)]
    assert not places[0] & places[1]


def test_columns_hold_few_steps_twice() -> None:
    columns = Columns(2 * CHUNK + 3, Memory())
    for t in range(2 * CHUNK + 3):
        columns.add({("x",): torch.full((2, 3), float(t))})
        assert len(columns._kept) < CHUNK
    assert torch.equal(columns.entries["x",][0, :, 0], torch.arange(2.0 * CHUNK + 3))


def test_a_missing_or_wrong_action_is_named() -> None:
    env = make_env()
    for out, shape, error in (("force", (ENVS, 3, 2), KeyError), ("action", (ENVS, 3, 4), ValueError)):
        policy = TensorDictModule(
            lambda o, s=shape: o.new_zeros(s), [("agents", "observation")], [("agents", out)]
        )
        with pytest.raises(error, match="agents.*action"):
            make(env, policy).rollout()
    doubles = TensorDictModule(
        lambda o: o[..., :2].double() * 0 + 0.5, [("agents", "observation")], [("agents", "action")]
    )
    assert make(env, doubles).rollout()["agents", "action"].dtype == torch.float64  # as it was written
    nans = TensorDictModule(
        lambda o: o[..., :2] * float("nan"), [("agents", "observation")], [("agents", "action")]
    )
    with pytest.raises(ValueError, match="NaN"):
        make(env, nans).rollout()


@pytest.mark.parametrize("mode", ["eager", "trace"])
def test_after_a_refused_action_episodes_begin_anew(mode: str) -> None:
    class Once(TensorDictModuleBase):
        in_keys, out_keys, calls = [("agents", "observation")], [("agents", "action")], 0

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            self.calls += 1
            return td.set(self.out_keys[0], torch.full((ENVS, 3, 2), float("nan") if self.calls == STEPS + 3 else 0.1))

    collector = make(make_env(mode=mode, max_steps=None), Once())
    collector.rollout()
    with pytest.raises(ValueError, match="NaN"):
        collector.rollout()
    batch = collector.rollout()
    assert batch["is_init"][:, 0].all() and not batch["is_init"][:, 1:].any()
    after, following = batch["next", "agents", "observation"][:, :-1], batch["agents", "observation"][:, 1:]
    assert torch.equal(after, following)


def test_an_environment_that_cannot_go_on_compiled_says_why() -> None:
    env = make_env()

    class Restless(TensorDictModuleBase):
        in_keys, out_keys, calls = [("agents", "observation")], [("agents", "action")], 0

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            self.calls += 1
            env.scenario.a_number = self.calls
            return td.set(self.out_keys[0], torch.zeros(ENVS, 3, 2))

    collector = make(env, Restless())
    with pytest.warns(UserWarning, match="eagerly"), pytest.raises(RuntimeError, match="values changed"):
        collector.rollout()
    assert collector.rollout()["is_init"][:, 0].all()


def test_other_environments_take_the_ordinary_path() -> None:
    class Louder(tdmarl.VmasEnv):
        def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
            out = super()._step(tensordict)
            return out.set(("agents", "reward"), out["agents", "reward"] + 1000)

    env = Louder("simple_spread", num_envs=ENVS, seed=0, mode="trace")
    batch = make(env, stochastic()(env)).rollout()
    assert (batch["next", "agents", "reward"] > 500).all()
    eager = make(make_env(mode="eager"), stochastic()(env))
    eager.rollout()
    assert not eager._fused.is_possible()


@pytest.mark.parametrize("recurrent", [None, "gru"])
def test_a_rollout_asks_nothing(recurrent: Any) -> None:
    env = make_env(max_steps=3)
    collector = make(env, stochastic(recurrent)(env))
    collector.rollout()
    with NoHostRead():
        collector.rollout()


def test_evaluation_and_other_uses_in_between_change_nothing() -> None:
    fused, plain = pair("simple_spread", {}, stochastic())
    for collector in (fused, plain):
        collector.rollout()
        tdmarl.evaluate(collector.env, collector.policy, episodes=8)
    assert_same(fused.rollout(), plain.rollout())


def test_what_the_scenario_changes_holds_in_the_middle() -> None:
    """A policy that moves an agent through the scenario: the next step starts from there."""
    env = make_env(max_steps=None)

    class Moves(TensorDictModuleBase):
        in_keys, out_keys, calls = [("agents", "observation")], [("agents", "action")], 0

        def forward(self, td: TensorDictBase) -> TensorDictBase:
            self.calls += 1
            if self.calls == 6:
                env.scenario.world.agents[1].set_pos(torch.full((ENVS, 2), 5.0), batch_index=None)
            return td.set(self.out_keys[0], torch.zeros(ENVS, 3, 2))

    batch = make(env, Moves()).rollout()
    with contextlib.suppress(StopIteration):
        far = (batch["next", "agents", "observation"][:, :, 1, :2] > 4.5).all(-1).all(0)
        assert not far[:3].any() and far[6:].all()


def test_compiled_batches_are_nearly_the_recorded_ones() -> None:
    """The only test here that compiles."""
    batches = []
    for mode in ("compile", "trace"):
        env = make_env("simple", mode=mode)
        torch.manual_seed(0)
        collector = make(env, TensorDictSequential(stochastic_actor(env)))
        collector.rollout()
        batches.append(collector.rollout())
        assert env.mode == mode and collector._fused.reason is None
    for key in batches[1].keys(True, True):
        torch.testing.assert_close(batches[0][key], batches[1][key], rtol=1e-5, atol=1e-5, msg=str(key))
