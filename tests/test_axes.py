"""Every axis at once, with toy networks of a few lines: what keeps later features from bending the code.

Rows of length > 1 with a hidden state, teams of unlike groups, a leading axis of seeds, ranks, dead agents and
padding, and two teams with an algorithm each, all go through the same Step, Learner, buffers, Collector and evaluate.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from toys import SeededLinear, ToyEnv

import tdmarl
from tdmarl import reduce
from tdmarl.learners import BatchBuffer, Learner
from tdmarl.prepare import Advantage
from tdmarl.step import Part, Step

OBS, ACT, HIDDEN = ("agents", "observation"), ("agents", "action"), ("agents", "actor_hidden")


class Imitate(TensorDictModuleBase):
    """Squared distance of what a net says of the observation to a target, over what the mask leaves."""

    def __init__(self, net, target=("agents", "advantage"), group="agents"):
        super().__init__()
        self.net, self.target, self.group = net, target, group
        self.in_keys, self.out_keys = [(group, "observation"), target], ["loss_imitate"]
        self.optional_keys = [(group, "mask")]

    def forward(self, td):
        error = self.net(td[self.group, "observation"]) - td[self.target]
        return TensorDict(loss_imitate=reduce.mean(error.square(), td.get((self.group, "mask"), None)))


class Recurrent(TensorDictModuleBase):
    """``h' = tanh(W o + U h)``, reset by ``is_init``; one step ``[E]``, or a row ``[M, L]`` from its stored state."""

    def __init__(self, n=3, o=4, h=2, sequence=False):
        super().__init__()
        self.input, self.hidden, self.sequence, self.shape = (
            nn.Linear(o, h),
            nn.Linear(h, h, bias=False),
            sequence,
            (n, 1, h),
        )
        self.in_keys, self.out_keys = [OBS, HIDDEN, "is_init"], [ACT, ("next", *HIDDEN)]

    def make_tensordict_primer(self):
        return TensorDictPrimer(
            Composite(agents=Composite(actor_hidden=Unbounded(self.shape), shape=self.shape[:1])),
            expand_specs=False,
        )

    def cell(self, o, h, init):
        h = torch.where(init.unsqueeze(-1), 0, h)
        return torch.tanh(self.input(o) + self.hidden(h))

    def forward(self, td):
        o, h, init = td[OBS], td[HIDDEN].squeeze(-2), td["is_init"]
        if not self.sequence:
            h = self.cell(o, h, init)
            td.set(ACT, h)
            return td.set(("next", *HIDDEN), h.unsqueeze(-2))
        outs, now = [], h[:, 0]
        for t in range(o.shape[1]):
            now = self.cell(o[:, t], now, init[:, t])
            outs.append(now)
        return td.set(ACT, torch.stack(outs, 1))


def test_rows_of_a_recurrent_policy_reproduce_the_rollout_across_ends():
    env, policy = ToyEnv(horizon=5), Recurrent()
    collector = tdmarl.Collector(env, policy, frames_per_batch=48, seed=0)
    collector.rollout()
    batch = collector.rollout()  # [4, 12], with ends inside the rows
    assert batch["is_init"][:, 1:].any() and batch[HIDDEN][:, 0].any()
    row = Recurrent(sequence=True)
    row.load_state_dict(policy.state_dict())
    buffer = BatchBuffer(3, sequence_length=6)
    buffer.extend(batch)
    assert buffer.n_minibatches == 3
    for _ in range(3):
        sample = buffer.sample()
        assert sample.shape == (2, 6)
        with torch.no_grad():
            torch.testing.assert_close(row(sample.copy())[ACT], sample[ACT])
    assert tdmarl.evaluate(env, policy, episodes=4)["length"].tolist() == [5] * 4


def test_a_recurrent_policy_learns_through_the_learner():
    env, policy = ToyEnv(horizon=5), Recurrent()
    row = Recurrent(sequence=True)
    row.load_state_dict(policy.state_dict())

    class Aim(TensorDictModuleBase):
        in_keys, out_keys = row.in_keys, ["loss_aim"]

        def forward(self, td):
            return TensorDict(loss_aim=reduce.mean((row(td.copy())[ACT] - 0.5).square()))

    learner = Learner(
        Step([Part(Aim(), torch.optim.Adam(row.parameters(), 0.05))]), BatchBuffer(4, 2, sequence_length=6)
    )
    collector = tdmarl.Collector(env, policy, frames_per_batch=48, seed=0)
    before = tdmarl.evaluate(env, policy, episodes=4)["return_mean_agents"].mean()
    for _ in range(30):
        learner(collector.rollout())
        policy.load_state_dict(row.state_dict())
    assert tdmarl.evaluate(env, policy, episodes=4)["return_mean_agents"].mean() > before / 2


def test_a_team_of_two_groups_of_unlike_sizes():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    algo = tdmarl.mappo(env, ("a", "b"), num_epochs=3, minibatch_size=8, lr=3e-3)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=160, seed=0)
    before = tdmarl.evaluate(env, algo.policy, episodes=8)["return_mean_agents"].mean()
    for _ in range(15):
        algo.learner(collector.rollout())
    after = tdmarl.evaluate(env, algo.policy, episodes=8)
    assert (
        after["return_mean_agents"].mean() > before / 2
        and after["a"].shape == (8, 2)
        and after["b"].shape == (8, 1)
    )


def seeded(seeds, start=None):
    torch.manual_seed(4)
    nets = SeededLinear(2, 4, 2), SeededLinear(2, 4, 1)
    if start is not None:  # the second seed's parameters, alone
        for net in nets:
            for name, p in net.named_parameters():
                setattr(net, name, nn.Parameter(p.detach()[start : start + 1].clone()))
    actor, value = nets
    policy = TensorDictModule(actor, in_keys=[OBS], out_keys=[ACT])
    critic = TensorDictModule(value, in_keys=[OBS], out_keys=[("agents", "state_value")])
    parts = [
        Part(
            Imitate(actor, ACT), torch.optim.Adam(actor.parameters(), 0.01), max_grad_norm=0.1, name="actor"
        ),
        Part(Imitate(value), torch.optim.Adam(value.parameters(), 0.01), max_grad_norm=0.1, name="critic"),
    ]
    step = Step(parts, seed_axis=True)
    learner = Learner(step, BatchBuffer(None, 3, seed_axis=True), prepare=Advantage(critic, ["agents"]))
    return policy, learner


def test_a_seed_axis_is_several_runs_side_by_side():
    env = ToyEnv(batch=(2, 4))
    policy, learner = seeded(2)
    collector = tdmarl.Collector(env, policy, frames_per_batch=80, seed=0)
    batch = collector.rollout()
    assert batch.shape == (2, 4, 10)
    shifted = batch.clone()
    shifted["agents", "action"] += torch.tensor([0.3, -2.0]).reshape(2, 1, 1, 1, 1)
    metrics = learner(shifted)
    assert metrics["loss_imitate"].shape == (2,) and metrics["grad_norm_actor"].shape == (2,)
    for seed in range(2):
        alone, other = seeded(1, seed)
        other(shifted[seed : seed + 1])
        for a, b in zip(policy.parameters(), alone.parameters()):
            torch.testing.assert_close(a[seed : seed + 1], b, atol=1e-6, rtol=1e-5)
    returns = tdmarl.evaluate(env, policy, episodes=8)
    assert returns.shape == (8,)


def rank_program(rank, world, port, results):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    data = TensorDict(
        {"x": torch.randn(12, 3, 4), "y": torch.randn(12, 3, 1), "mask": torch.rand(12, 3) < 0.7}, [12]
    )
    batch = TensorDict(
        {"agents": {"observation": data["x"], "target": data["y"], "mask": data["mask"]}}, [12]
    )
    mine = batch if world == 1 else batch[:9] if rank == 0 else batch[9:]  # unequal shares
    net = nn.Linear(4, 1)
    loss = Imitate(net, ("agents", "target"))
    step = Step([Part(loss, torch.optim.Adam(net.parameters(), 0.1), max_grad_norm=0.05)])
    norm = tdmarl.ValueNorm()
    norm.update(mine["agents", "target"], mine["agents", "mask"])
    standard = reduce.standardize(mine["agents", "target"], mine["agents", "mask"])
    for _ in range(3):
        metrics = step(mine)
    results[rank if world > 1 else "alone"] = {
        "net": torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(),
        "loss": metrics["loss_imitate"].item(),
        "norm": norm.mean.item(),
        "standard": standard.flatten()[:9].tolist(),
    }
    if world > 1:
        dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_of_unequal_shares_do_what_one_does():
    with mp.Manager() as manager:
        results = manager.dict()
        rank_program(0, 1, 0, results)
        mp.spawn(rank_program, (2, free_port(), results), nprocs=2)
        alone, first, second = results["alone"], results[0], results[1]
    assert first["net"] == second["net"]
    for key in alone:
        torch.testing.assert_close(torch.tensor(first[key]), torch.tensor(alone[key]), atol=1e-5, rtol=1e-4)


def test_a_dead_agent_and_padding_leave_parameters_as_if_they_were_not_there():
    def learned(batch):
        torch.manual_seed(0)
        net = nn.Linear(4, 1)
        critic = TensorDictModule(nn.Linear(4, 1), in_keys=[OBS], out_keys=[("agents", "state_value")])
        loss = Imitate(net)
        learner = Learner(
            Step([Part(loss, torch.optim.Adam(net.parameters(), 0.05), max_grad_norm=1.0)]),
            BatchBuffer(None, 4),
            prepare=Advantage(critic, ["agents"]),
        )
        learner(batch)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    env = ToyEnv(mortal=True)
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=[OBS], out_keys=[ACT])
    batch = tdmarl.Collector(env, policy, frames_per_batch=40, seed=0).rollout()
    clean = learned(batch)
    spoiled = batch.clone()
    dead = ~spoiled["agents", "mask"]
    spoiled["agents", "observation"][dead] = 1e3
    spoiled["next", "agents", "reward"][dead] = -1e3
    torch.testing.assert_close(learned(spoiled), clean)
    padding = batch.clone()
    padding["agents", "mask"][:] = False
    torch.testing.assert_close(learned(torch.cat([batch, padding])), clean, atol=1e-6, rtol=1e-5)


def test_two_teams_with_an_algorithm_each():
    env = ToyEnv(groups={"chasers": (2, 3, 1), "runners": (1, 5, 2)})
    chasers, runners = (
        tdmarl.mappo(env, "chasers", num_epochs=2, seed=0),
        tdmarl.ippo(env, "runners", num_epochs=2, seed=1),
    )
    both = TensorDictSequential(chasers.explore, runners.explore)
    collector = tdmarl.Collector(env, both, frames_per_batch=40, seed=0)
    before = {
        name: [p.clone() for p in a.policy.parameters()] for name, a in (("c", chasers), ("r", runners))
    }
    batch = collector.rollout()
    metrics = chasers.learner(batch)
    assert all(torch.equal(a, b) for a, b in zip(before["r"], runners.policy.parameters()))
    runners.learner(batch)
    assert not all(torch.equal(a, b) for a, b in zip(before["c"], chasers.policy.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(before["r"], runners.policy.parameters()))
    assert torch.isfinite(metrics["loss_objective"]) and dataclasses.is_dataclass(chasers)
    returns = tdmarl.evaluate(env, TensorDictSequential(chasers.policy, runners.policy), episodes=4)
    assert {"chasers", "runners"} <= set(returns.keys())


def test_teams_with_memory_of_unlike_groups_beside_a_team_without():
    """States of actors and critics under each group, carried by one collector; only some learn from sequences."""
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2), "c": (2, 4, 1)}, horizon=7, mortal=True)
    options = {"hidden": (16,), "num_epochs": 3, "lr": 3e-3}
    pair = tdmarl.mappo(env, ("a", "b"), recurrent=8, chunk_length=5, share_buffer=False, **options)
    other = tdmarl.happo(env, "c", recurrent=8, chunk_length=10, **options)
    plain = tdmarl.ippo(env, "c", **options)
    collector = tdmarl.Collector(
        env, TensorDictSequential(pair.explore, other.explore), frames_per_batch=80, seed=0
    )
    both = TensorDictSequential(pair.policy, plain.policy)
    before = tdmarl.evaluate(env, TensorDictSequential(pair.policy, other.policy), episodes=8)
    for _ in range(12):
        batch = collector.rollout()
        assert (
            pair.learner(batch)["loss_critic_a"].isfinite() and other.learner(batch)["loss_critic"].isfinite()
        )
    assert batch["a", "actor_hidden"].shape == batch["a", "critic_hidden"].shape == (4, 20, 2, 1, 8)
    assert batch["critic_hidden"].shape == (4, 20, 1, 1, 8)  # of team c's one critic
    begins = batch["is_init"].squeeze(-1)
    for key in (("b", "actor_hidden"), ("b", "critic_hidden"), ("critic_hidden",)):
        assert begins[:, 1:].any() and not batch[key][begins].any() and batch[key][~begins].any()
        torch.testing.assert_close(
            batch["next", *key][:, :-1][~begins[:, 1:]], batch[key][:, 1:][~begins[:, 1:]]
        )
    after = tdmarl.evaluate(env, TensorDictSequential(pair.policy, other.policy), episodes=8)
    assert after["return_mean_agents"].mean() > before["return_mean_agents"].mean() * 0.7  # both are negative
    assert tdmarl.evaluate(env, both, episodes=4)["c"].shape == (4, 2)


def learned_values(make, batch, group="agents", **options):
    algo = make(
        ToyEnv(choices=3, mortal=True),
        group,
        minibatch_size=80,
        num_updates=3,
        target_every=2,
        seed=1,
        **options,
    )
    algo.learner.buffer.sample = lambda: batch  # the same rows in the same order
    for _ in range(3):
        algo.learner._update()
    return torch.cat([p.detach().flatten() for p in algo.policy.parameters()])


@pytest.mark.parametrize("make", [tdmarl.iql, tdmarl.vdn, tdmarl.qmix])
def test_dead_agents_and_padding_teach_no_values(make):
    env = ToyEnv(choices=3, mortal=True)
    batch = tdmarl.Collector(env, make(env).explore, frames_per_batch=40, seed=0).rollout()
    batch = tdmarl.TeamReward(["agents"], "mean")(batch).reshape(-1)
    clean, spoiled = learned_values(make, batch), batch.clone()
    dead = ~spoiled["agents", "mask"]
    spoiled["agents", "observation"][dead] = 1e3
    spoiled["next", "agents", "observation"][~spoiled["next", "agents", "mask"]] = 1e3
    spoiled["next", "agents", "reward"][dead] = -1e3
    torch.testing.assert_close(learned_values(make, spoiled), clean, atol=1e-5, rtol=1e-4)
    padding = spoiled.clone()
    padding["next", "reward"][:] = float("nan")
    real = torch.cat([torch.ones(40), torch.zeros(40)]).bool()
    both = torch.cat([batch, padding]).set(("collector", "mask"), real)
    torch.testing.assert_close(learned_values(make, both), clean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [tdmarl.iql, tdmarl.vdn, tdmarl.qmix])
@pytest.mark.parametrize("memory", [False, True])
def test_value_based_teams_of_unlike_groups_learn_from_rows(make, memory):
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)}, choices=3, horizon=5)
    rows = {"recurrent": 8, "last_action": True, "burn_in": 1} if memory else {"lmbda": 0.5}
    algo = make(env, ("a", "b"), minibatch_size=40, num_updates=4, sequence_length=6, buffer_size=480, **rows)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=48, seed=0)
    before = [p.detach().clone() for p in algo.policy.parameters()]
    for _ in range(3):
        metrics = algo.learner(collector.rollout())
    assert all(torch.isfinite(v) for v in metrics.values())
    assert all(not torch.equal(a, b) for a, b in zip(before, algo.policy.parameters()) if a.ndim > 2)
    assert tdmarl.evaluate(env, algo.policy, episodes=4)["length"].tolist() == [5] * 4


@pytest.mark.parametrize("mixer", [None, tdmarl.vdn_mixer, tdmarl.qmix_mixer])
@pytest.mark.parametrize("update", [{"tau": 0.1}, {"every": 2}])
def test_a_value_based_iteration_on_meta_reads_nothing_back(mixer, update):
    env = ToyEnv(choices=3, mortal=True)
    epsilon = tdmarl.EpsilonGreedy(env)
    explore = tdmarl.exploring(tdmarl.q_actor(env), epsilon)
    batch = tdmarl.Collector(env, explore, frames_per_batch=40, seed=0).rollout()
    batch = tdmarl.TeamReward(["agents"], "mean")(batch).to("meta")
    explore.to("meta")
    with set_exploration_type(ExplorationType.RANDOM):
        acted = explore(batch.copy())
    loss = tdmarl.MixingLoss(explore[0], None if mixer is None else mixer(env).to("meta"))
    adam = torch.optim.Adam(loss.parameters(), 1e-3, foreach=True)
    step = Step(
        [Part(loss, adam, 1.0, row_keys=["td_error"])],
        after=tdmarl.TargetUpdate(loss, **update),
    )
    metrics = step(acted.reshape(-1).set("priority_weight", torch.ones(40, device="meta")))
    assert {v.device.type for v in metrics.values()} == {"meta"} and metrics["td_error"].shape == (40, 1)
    sampler = tdmarl.ProportionalSampler(40, device="meta")
    sampler.extend(torch.arange(40, device="meta"))
    sampler.update_priority(torch.arange(40, device="meta"), metrics["td_error"])
