from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import (
    Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, TensorSpec, Unbounded,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from toys import ToyEnv

from tdmarl import log
from tdmarl.algorithms import ippo, maddpg, mappo, per_group
from tdmarl.nets import AgentLinear
from tdmarl.run import Options, Run
from tdmarl.saving import SpecsOnly, load_policy


def specs(discrete: bool = False) -> dict[str, Any]:
    """Three agents that see four numbers and choose one of five actions, or two numbers."""
    action: TensorSpec = Categorical(5, shape=(3,)) if discrete else Bounded(-1, 1, (3, 2))
    done = Composite({name: Categorical(2, (1,), dtype=torch.bool) for name in ("done", "terminated")})
    return {
        "group_map": {"agents": ["agent_0", "agent_1", "agent_2"]},
        "observation_spec": log.describe_spec(
            Composite(agents=Composite(observation=Unbounded((3, 4)), shape=(3,)))
        ),
        "full_action_spec": log.describe_spec(Composite(agents=Composite(action=action, shape=(3,)))),
        "full_reward_spec": log.describe_spec(
            Composite(agents=Composite(reward=Unbounded((3, 1)), shape=(3,)))
        ),
        "full_done_spec": log.describe_spec(done),
    }


class Idle:
    """A collector that collects nothing."""

    frames = 0

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frames = state["frames"]


def saved(folder: Path, algorithm: str = "mappo", discrete: bool = False, **arguments: Any) -> Any:
    """The algorithm whose policy lies in the folder, with weights unlike those it was initialized with."""
    env = SpecsOnly(specs(discrete))
    build = {"mappo": mappo, "ippo": ippo, "maddpg": maddpg}[algorithm]
    arguments = {"seed": 0, "minibatch_size": 8, **arguments}
    algo = build(env, **arguments)
    torch.manual_seed(1)
    for parameter in algo.policy.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    options = Options(out=str(folder), progress=False, device="cpu")
    with Run(
        options, algorithm=algorithm, arguments=arguments, env=env, policy=algo.policy,
        learner=algo.learner, collector=Idle(),
    ) as run:
        run.save()
        run.checkpoints.write("best", ["policy", "run"])
    return algo


def observation() -> TensorDict:
    seen = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(2))
    return TensorDict({"agents": TensorDict({"observation": seen}, batch_size=[8, 3])}, batch_size=[8])


@pytest.mark.parametrize("spec", [
    MultiCategorical([3, 4]), MultiCategorical([3, 4], shape=(5, 2)), MultiOneHot([3, 4]), OneHot(3, (2, 3)),
    Categorical(3, shape=(4,)), Categorical(2, shape=(4, 1), dtype=torch.bool), Binary(shape=(2, 3)),
    Bounded(0, 3, shape=(2,), dtype=torch.int64), Bounded(-float("inf"), 3, shape=(2,)), Unbounded((2, 3)),
    Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([0.1, 0.0]), (2,)), Unbounded((2,), dtype=torch.int64),
])  # fmt: skip
def test_specs_survive_json(spec: TensorSpec) -> None:
    plain = {**specs(), "full_action_spec": log.describe_spec(Composite(agents=Composite(action=spec)))}
    rebuilt = SpecsOnly(json.loads(json.dumps(plain, allow_nan=False))).full_action_spec_unbatched
    assert rebuilt["agents", "action"] == spec.to("cpu")


@pytest.mark.parametrize("checkpoint", ["last", "best"])
@pytest.mark.parametrize("algorithm, discrete, share", [
    ("mappo", False, True), ("mappo", True, False), ("ippo", False, [[0, 1], [2]]), ("maddpg", True, False),
])  # fmt: skip
def test_the_loaded_policy_acts_as_the_trained_one(
    tmp_path: Path, algorithm: str, discrete: bool, share: Any, checkpoint: Any
) -> None:
    algo = saved(tmp_path / "run", algorithm, discrete, share_params=share)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = algo.policy(observation())["agents", "action"]
    policy = load_policy(tmp_path / "run", checkpoint=checkpoint)
    action = policy(observation())["agents", "action"]
    assert torch.equal(action, expected)
    assert torch.equal(policy(observation())["agents", "action"], action)  # it does not explore
    assert not any(parameter.requires_grad for parameter in policy.parameters()) and not policy.training
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(policy(observation())["agents", "action"], action)


def test_the_loaded_policy_rounds_as_the_trained_one(tmp_path: Path) -> None:
    algo = saved(tmp_path / "run", precision="bfloat16")
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = algo.policy(observation())["agents", "action"]
    policy = load_policy(tmp_path / "run")
    assert torch.equal(policy(observation())["agents", "action"], expected)
    for layer in [part for part in policy.modules() if isinstance(part, AgentLinear)]:
        layer.products = None
    assert not torch.equal(policy(observation())["agents", "action"], expected)


def test_an_actor_of_ones_own_is_asked_for_and_filled(tmp_path: Path) -> None:
    from tdmarl.actors import gaussian_actor

    mine = gaussian_actor(SpecsOnly(specs()), hidden=(7,))
    trained = saved(tmp_path / "run", actor=mine)
    with pytest.raises(ValueError, match="an actor of your own, a .*: build one of the same shape"):
        load_policy(tmp_path / "run")
    again = gaussian_actor(SpecsOnly(specs()), hidden=(7,))
    policy = load_policy(tmp_path / "run", actor=again)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = trained.policy(observation())["agents", "action"]
    assert torch.equal(policy(observation())["agents", "action"], expected)
    with pytest.raises(ValueError, match=r"do not fit the policy: .* has shape .*, the policy expects"):
        load_policy(tmp_path / "run", actor=gaussian_actor(SpecsOnly(specs()), hidden=(6,)))


def test_an_algorithm_from_elsewhere_needs_its_policy(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["algorithm"]["name"] = "mine"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mine', which is none of tdmarl's algorithms .*mappo"):
        load_policy(tmp_path / "run")
    wrong = TensorDictModule(nn.Linear(4, 2), [("agents", "observation")], [("agents", "action")])
    with pytest.raises(ValueError, match="is missing|is not part of the policy"):
        load_policy(tmp_path / "run", actor=wrong)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the folder of a run"):
        load_policy(tmp_path / "nowhere")
    saved(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "best.torchrl").unlink()
    with pytest.raises(ValueError, match=r"has no checkpoint 'best'; it has \['last'\]"):
        load_policy(tmp_path / "run", checkpoint="best")


def test_a_policy_acts_without_simulator_and_without_pickle(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    code = """
import sys, pickle, torch
def refuse(*args, **kwargs): raise AssertionError("unpickled")
from tdmarl.saving import load_policy
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
from tensordict import TensorDict
policy = load_policy(sys.argv[1])
data = TensorDict({"agents": TensorDict({"observation": torch.zeros(2, 3, 4)}, [2, 3])}, [2])
print(tuple(policy(data)["agents", "action"].shape), "vmas" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "(2, 3, 2) False", done.stderr


def test_the_stand_in_never_steps() -> None:
    with pytest.raises(RuntimeError, match="no simulator"):
        SpecsOnly(specs()).reset()


@pytest.mark.parametrize("discrete", [False, True])
def test_a_policy_that_remembers_comes_back_with_its_memory(tmp_path: Path, discrete: bool) -> None:
    trained = saved(tmp_path / "run", discrete=discrete, recurrent="gru", chunk_length=5).policy
    loaded = load_policy(tmp_path / "run")
    state, found = torch.zeros(8, 3, 1, 64), []
    for policy in (trained, loaded):
        seen, actions = observation(), []
        seen["agents", "actor_hidden"] = state
        for begins in (True, False, False, True):
            seen["is_init"] = torch.full((8, 1), begins)
            with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
                seen = policy(seen)
            actions.append(seen["agents", "logits" if discrete else "loc"])
            seen["agents", "actor_hidden"] = seen["next", "agents", "actor_hidden"]
        found.append(torch.stack(actions))
    assert torch.equal(*found)
    first, second, _, again = found[0]
    assert torch.equal(first, again) and not torch.equal(first, second)  # equal observations, another memory


@pytest.mark.filterwarnings("ignore:The critic of scope")
def test_several_teams_come_back_together(tmp_path: Path) -> None:
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    teams = {
        "a": {"algorithm": "mappo", "arguments": {"group": "a", "minibatch_size": 8}},
        "b": {"algorithm": "maddpg", "arguments": {"group": "b"}},
    }
    algo = per_group(env, a=mappo(env, "a", minibatch_size=8), b=maddpg(env, "b"))
    own = per_group(env, a=algo.policy[0], b=maddpg(env, "b"))
    for name, built, given in (
        ("both", algo, teams), ("own", own, {"a": {"custom": "a network"}, "b": teams["b"]}),
    ):  # fmt: skip
        options = Options(out=str(tmp_path / name), progress=False, device="cpu")
        with Run(
            options, algorithm="per_group", arguments=given, env=env, policy=built.policy, learner=built.learner,
            collector=Idle(),
        ) as run:  # fmt: skip
            run.save()
    seen = {g: TensorDict(observation=torch.randn(4, n, o), batch_size=[4, n]) for g, (n, o, _) in env.groups.items()}
    batch = TensorDict(seen, batch_size=[4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = algo.policy(batch.copy())
    found = load_policy(tmp_path / "both")(batch.copy())
    assert all(torch.equal(found[g, "action"], expected[g, "action"]) for g in ("a", "b"))
    with pytest.raises(ValueError, match=r"How the policy of 'a' is built was not written down"):
        load_policy(tmp_path / "own")
    assert ("a", "action") in load_policy(tmp_path / "own", actor={"a": mappo(env, "a").policy}).out_keys
