"""HAPPO against numbers of its authors' code, against the theorem it rests on, and against PPO where they coincide."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from toys import ToyEnv
from torch import nn
from torchrl.modules import ProbabilisticActor

import tdmarl
from tdmarl.actors import agent_actor
from tdmarl.distributions import MaskedCategorical
from tdmarl.algorithms import haa2c, happo, hatrpo
from tdmarl.learners import AgentUpdate, BatchBuffer, SequentialLearner
from tdmarl.losses import PolicyLoss
from tdmarl.prepare import HAPPOFactor
from tdmarl.step import Part, Step

T, N, AGENTS, STATES, CHOICES = 4, 2, 3, 2, 3
ALL = (1.10886, 0.943286, 1.14044, 0.935593, 0.97268, 1.14044, 0.954288, 1.10886)


class Table(nn.Module):
    """Logits of a tabular policy, ``theta[s, a]``, and no bias."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, observation):
        return observation @ self.theta


def tabular(theta):
    net = TensorDictModule(Table(theta), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        net, in_keys=["logits"], out_keys=["action"], distribution_class=MaskedCategorical, return_log_prob=True,
        log_prob_key="action_log_prob",
    )  # fmt: skip


class Nothing:
    """A critic's learner that learns nothing."""

    def __call__(self, batch):
        return TensorDict()


def published(epochs, lr, entropy_coeff):
    """The sequential update on the published data: T x N rows, three tabular agents, order 0, 1, 2, plain SGD."""
    t, e, i = torch.meshgrid(torch.arange(T), torch.arange(N), torch.arange(AGENTS), indexing="ij")
    state = (t + e) % STATES  # [T, N, n]
    action = (3 * t + 5 * e + 7 * i + t // 2) % CHOICES
    advantage = torch.sin((1 + t + 4 * e).double()).float()[..., :1]  # [T, N, 1]
    s, a = torch.meshgrid(torch.arange(STATES), torch.arange(CHOICES), indexing="ij")
    actors = [tabular((0.1 * (agent + 1) * (s + 1) * (a - 1)).float()) for agent in range(AGENTS)]
    group = TensorDict(
        {"observation": nn.functional.one_hot(state, STATES).float(), "action": action}, [T, N, AGENTS]
    )
    old = [
        actors[j].get_dist(group[..., j].select("observation")).log_prob(action[..., j]).detach()
        for j in range(AGENTS)
    ]
    group["action_log_prob"] = torch.stack(old, -1)
    group["advantage"] = tdmarl.reduce.standardize(
        advantage.unsqueeze(-2).expand(T, N, AGENTS, 1), per_agent=True
    )
    group["factor"] = torch.ones(T, N, AGENTS, 1)
    factors, updates = [], []
    for j, actor in enumerate(actors):
        loss = PolicyLoss(actor, None, clip_epsilon=0.2, entropy_coeff=entropy_coeff)
        updates.append(
            AgentUpdate("g", j, actor, Step([Part(loss, torch.optim.SGD(actor.parameters(), lr), 10.0)]))
        )

    def recording(name):
        transform = HAPPOFactor(name)

        def record(td):
            td = transform(td)
            factors.append(td["g", "factor"][..., 0, 0].flatten())
            return td

        return record

    learner = SequentialLearner(
        updates,
        BatchBuffer(None, epochs),
        Nothing(),
        prepare=lambda td: td,
        factor=recording,
        order=range(AGENTS),
    )
    learner(TensorDict({"g": group}, [T, N]))
    return [actor.module[0].module.theta.detach().flatten() for actor in actors], factors


def test_one_step_gives_the_parameters_and_factors_of_the_authors_code():
    thetas, factors = published(1, 0.5, 0.0)
    expected = [
        [0.000313, -0.030719, 0.030406, -0.077332, -0.055536, 0.132868],
        [-0.263616, 0.106238, 0.157378, -0.481529, 0.133161, 0.348367],
        [-0.331184, -0.072001, 0.403185, -0.669051, -0.077373, 0.746424],
    ]
    for theta, numbers in zip(thetas, expected):
        torch.testing.assert_close(theta, torch.tensor(numbers), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors[0], torch.tensor(ALL), atol=1e-5, rtol=0)
    last = [1.338798, 0.761133, 1.426666, 0.799975, 0.884716, 1.426666, 0.800009, 1.338798]
    torch.testing.assert_close(factors[2], torch.tensor(last), atol=1e-5, rtol=0)


def test_five_epochs_with_entropy_give_the_parameters_and_factors_of_the_authors_code():
    thetas, factors = published(5, 2.0, 0.01)
    expected = [
        [0.323835, -0.164147, -0.159688, 0.287067, -0.219253, -0.067814],
        [-0.479078, 0.53425, -0.055172, -0.7131, 0.616283, 0.096817],
        [-0.561553, -0.427772, 0.989325, -0.887995, -0.411176, 1.299171],
    ]
    for theta, numbers in zip(thetas, expected):
        torch.testing.assert_close(theta, torch.tensor(numbers), atol=1e-5, rtol=0)
    last = [3.722034, 0.239742, 3.921283, 0.27262, 0.362761, 3.921283, 0.2875, 3.722034]
    torch.testing.assert_close(factors[2], torch.tensor(last), atol=1e-5, rtol=0)


def joint_game():
    """One state, three agents of two actions, r = 4a + 2b + c - 3ab - 2bc + 1.5ac; all eight joint actions."""
    u = torch.cartesian_prod(*[torch.arange(2)] * 3)
    a, b, c = u.unbind(-1)
    return u, 4 * a + 2 * b + c - 3 * a * b - 2 * b * c + 1.5 * a * c


def test_factors_telescope_to_the_teams_improvement():
    """Old probabilities 1/2, new P(1) = 0.7, 0.4, 0.8, order 2, 0, 1: J goes from 2.625 to 3.76 by the sum of
    E[(r_m - 1) M_m] = 0.225, 0.74, 0.17."""
    u, reward = joint_game()
    new = torch.tensor([0.7, 0.4, 0.8])
    after = torch.where(u == 1, new, 1 - new).log()  # [8, 3]
    before = torch.full_like(after, 0.5).log()
    td = TensorDict({"g": {"factor": torch.ones(8, 3, 1)}}, [8])
    gains = []
    for agent in (2, 0, 1):
        factor = td["g", "factor"][:, agent, 0]
        ratio = (after - before)[:, agent].exp()
        gains.append(((ratio - 1) * factor * reward / 8).sum().item())  # old joint probability 1/8
        td["g", "log_prob_before"], td["g", "log_prob_after"] = (
            before[:, agent : agent + 1],
            after[:, agent : agent + 1],
        )
        td = HAPPOFactor("g")(td)
    assert gains == pytest.approx([0.225, 0.74, 0.17], abs=1e-6) and sum(gains) == pytest.approx(
        3.76 - 2.625, abs=1e-6
    )
    assert (td["g", "factor"][:, 0, 0] * reward / 8).sum().item() == pytest.approx(3.76, abs=1e-5)


def test_factors_decompose_the_advantage_of_a_joint_action():
    """``A(u)`` is the sum of what each agent adds to the choices before it: for u = (1, 0, 1) and the order 2, 0, 1
    0.375 + 2.0 + 1.5 = 3.875. Each agent's new policy is sure of its choice; marginals would add up to 2.25."""
    u, reward = joint_game()
    advantage, chosen = reward - reward.mean(), torch.tensor([1, 0, 1])
    after = torch.where(u == chosen, 0.0, -torch.inf)  # [8, 3]
    before = torch.full_like(after, 0.5).log()
    td = TensorDict({"g": {"factor": torch.ones(8, 3, 1)}}, [8])
    added = []
    for agent in (2, 0, 1):
        ratio = (after - before)[:, agent].exp()
        added.append(((ratio - 1) * td["g", "factor"][:, agent, 0] * advantage / 8).sum().item())
        td["g", "log_prob_before"], td["g", "log_prob_after"] = (x[:, agent : agent + 1] for x in (before, after))
        td = HAPPOFactor("g")(td)
    assert added == pytest.approx([0.375, 2.0, 1.5], abs=1e-6)
    assert advantage[(u == chosen).all(-1)].item() == pytest.approx(3.875)
    marginals = sum(((u[:, i] == chosen[i]) * 2 - 1) * advantage for i in range(3)).sum() / 8
    assert marginals.item() == pytest.approx(2.25)


def factor_of(before, after, **options):
    entries = {"factor": torch.full((4, 2, 1), 2.0), "log_prob_before": before, "log_prob_after": after}
    return HAPPOFactor("g", **{k: v for k, v in options.items() if k != "mask"})(
        TensorDict({"g": entries | ({"updated_mask": options["mask"]} if "mask" in options else {})}, [4])
    )["g", "factor"]


def test_factor_is_detached_stable_and_skips_the_dead():
    before = torch.full((4, 1), -200.0)
    after = (before + math.log(1.5)).requires_grad_()
    out = factor_of(before, after)
    assert not out.requires_grad
    torch.testing.assert_close(out, torch.full((4, 2, 1), 3.0), atol=1e-4, rtol=0)
    mask = torch.tensor([[True], [False], [True], [False]])
    spoiled = torch.where(mask, after.detach(), float("nan"))
    assert factor_of(before, spoiled, mask=mask)[:, 0, 0].tolist() == pytest.approx(
        [3.0, 2.0, 3.0, 2.0], abs=1e-4
    )


def test_factor_of_dimensions_is_a_product_or_a_mean():
    before, after = torch.zeros(4, 1, 2), torch.tensor([2.0, 0.5]).log().expand(4, 1, 2)
    assert factor_of(before, after).flatten().tolist() == pytest.approx([2.0] * 8)  # 2 * (2 * 0.5)
    assert factor_of(before, after, aggregate="mean").flatten().tolist() == pytest.approx([2.5] * 8)
    with pytest.raises(ValueError, match="per action dimension"):
        factor_of(before.sum(-1), after.sum(-1), aggregate="mean")


def parameters(algo):
    return torch.cat([p.detach().flatten() for p in algo.policy.parameters()])


def batch_of(env, algo, frames=40):
    return tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0).rollout()


def test_one_agent_is_ppo():
    one = {"agents": (1, 4, 2)}
    nets = {"hidden": (16,), "num_epochs": 3, "minibatch_size": None, "seed": 0}
    env = ToyEnv(groups=one)
    mine, ppo = happo(env, **nets), tdmarl.mappo(env, **nets, share_params=False)
    ppo.policy.load_state_dict(mine.policy.state_dict())
    critic = mine.learner.critic.step.parts[0].loss.critic
    for theirs, own in zip(ppo.learner.prepare.critic.parameters(), critic.parameters()):
        theirs.data.copy_(own)
    batch = batch_of(env, mine)
    mine.learner(batch), ppo.learner(batch)
    torch.testing.assert_close(parameters(mine), parameters(ppo), atol=1e-6, rtol=1e-5)


def test_a_factor_of_one_is_unshared_ppo_on_the_joint_advantage():
    env = ToyEnv()
    mine = happo(env, factor=False, order=(2, 0, 1), hidden=(16,), num_epochs=3, entropy_coeff=0.0)
    group = tdmarl.stochastic_actor(
        env, share_params=False, hidden=(16,), layer_norm=True, activation=nn.ReLU
    )
    group.load_state_dict(mine.policy.state_dict())
    batch = batch_of(env, mine)
    prepared = mine.learner.prepare(batch.copy())
    mine.learner(batch)
    loss = PolicyLoss(group, "agents", entropy_coeff=0.0)
    params = list(group.parameters())
    optim = torch.optim.Adam(params, 5e-4, eps=1e-5)
    for _ in range(3):  # the whole batch each time; the mean over 3 agents has a third of each one's gradient
        for p, grad in zip(
            params, torch.autograd.grad(3 * loss(prepared.reshape(-1))["loss_objective"], params)
        ):
            p.grad = grad
        optim.step()
    torch.testing.assert_close(
        parameters(mine), torch.cat([p.detach().flatten() for p in params]), atol=1e-6, rtol=1e-4
    )


def test_minibatches_do_not_change_what_the_factor_is_taken_over():
    env = ToyEnv()
    for size in (None, 8):
        algo = happo(env, order=(0, 1, 2), minibatch_size=size, hidden=(16,), lr=0.01)
        batch, seen = batch_of(env, algo), []
        learner = algo.learner
        transform = learner.factors["agents"]

        def record(td, transform=transform, seen=seen):
            out = transform(td)
            seen.append((td["agents", "log_prob_after"].shape, out["agents", "factor"].clone()))
            return out

        learner.factors = {"agents": record}
        learner(batch)
        assert [shape for shape, _ in seen] == [(4, 10, 1)] * 3
        new = torch.stack([a.log_prob(a.view(learner.prepare(batch.copy()))) for a in learner.agents], -1)
        ratio = (new - batch["agents", "action_log_prob"]).sum(-1).exp()  # [4, 10], of all three
        torch.testing.assert_close(seen[-1][1][..., 0, 0], ratio, atol=1e-5, rtol=1e-4)


def test_the_order_is_new_in_each_iteration_fixed_on_request_and_resumed():
    env = ToyEnv()
    algo, other = (happo(env, seed=s, hidden=(8,), num_epochs=1) for s in (0, 3))
    batch, orders = batch_of(env, algo), []
    for _ in range(8):
        algo.learner(batch)
        orders.append(tuple(algo.learner.last_order))
    assert len(set(orders)) > 2
    other.learner.load_state_dict(algo.learner.state_dict())
    for _ in range(3):
        algo.learner(batch), other.learner(batch)
        assert algo.learner.last_order == other.learner.last_order
    assert torch.equal(parameters(algo), parameters(other))
    with pytest.raises(ValueError, match="exactly once"):
        happo(env, order=(0, 1))
    fixed = happo(env, order=(1, 2, 0), hidden=(8,), num_epochs=1)
    for _ in range(3):
        fixed.learner(batch)
        assert fixed.learner.last_order == [1, 2, 0]


def test_agents_that_differ_in_sizes_and_kinds_learn():
    env = ToyEnv(batch=(16,), groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    algo = happo(env, ("a", "b"), lr=3e-3, hidden=(32,))
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=160, seed=0)
    before = tdmarl.evaluate(env, algo.policy, episodes=16)["return_mean_agents"].mean()
    for _ in range(25):
        metrics = algo.learner(collector.rollout())
    assert tdmarl.evaluate(env, algo.policy, episodes=16)["return_mean_agents"].mean() > before / 3
    assert {"loss_objective", "loss_critic", "grad_norm_actor", "grad_norm_critic"} <= set(metrics.keys())


def test_sharing_trains_and_warns_what_is_lost():
    env = ToyEnv()
    with pytest.warns(UserWarning, match="no longer"):
        algo = happo(env, share_params=True, hidden=(8,))
    before = parameters(algo)
    algo.learner(batch_of(env, algo))
    assert not torch.equal(before, parameters(algo))


class FlatGroups(ToyEnv):
    """As `ToyEnv`, but a group's tensordict has the environments' dimensions only."""

    def _show(self, out):
        shown = super()._show(out)
        for g in self.groups:
            shown[g] = TensorDict(dict(shown[g].items()), self.batch_size)
        return shown


def test_agents_are_found_by_their_dimension_whatever_the_groups_batch_size():
    """T equals n, so that a slice by position would be one of time."""
    results = []
    for kind in (ToyEnv, FlatGroups):
        env = kind(batch=(3,))
        algo = happo(env, hidden=(8,), num_epochs=1)
        batch = batch_of(env, algo, 9)
        batch["agents"].batch_size = batch.batch_size
        algo.learner(batch)
        results.append(parameters(algo))
    torch.testing.assert_close(*results)


def test_own_actors_act_side_by_side():
    env = ToyEnv(choices=2, groups={"agents": (3, 4, 1)})
    own = [tabular(torch.randn(4, 2)) for _ in range(3)]
    algo = happo(env, actor={"agents": own})
    seen = TensorDict({"agents": {"observation": torch.randn(3, 3, 4)}}, [3])  # E equals n
    log_prob = algo.policy(seen.copy())["agents", "action_log_prob"]
    assert log_prob.shape == (3, 3)
    dist = own[1].get_dist(TensorDict({"observation": seen["agents", "observation"][:, 1]}, [3]))
    acted = algo.policy(seen.copy())["agents"]
    torch.testing.assert_close(dist.log_prob(acted["action"][:, 1]), acted["action_log_prob"][:, 1])
    with pytest.raises(ValueError, match="needs 3"):
        happo(env, actor={"agents": own[:2]})


@pytest.mark.parametrize("choices", [0, 3])
def test_dead_agents_leave_no_trace(choices):
    env = ToyEnv(choices=choices, mortal=True)
    first, second = (happo(env, hidden=(8,), num_epochs=2) for _ in range(2))
    batch = batch_of(env, first)
    spoiled = batch.clone()
    dead = ~batch["agents", "mask"]
    spoiled["agents", "action_log_prob"][dead] = -50.0
    spoiled["next", "agents", "reward"][dead] = 1e6
    first.learner(batch), second.learner(spoiled)
    torch.testing.assert_close(parameters(first), parameters(second))


class Agreement(ToyEnv):
    """One step, one state; reward 1 where the first half of the agents does one thing and the other half the other."""

    def _step(self, tensordict):
        out = super()._step(tensordict)
        action = tensordict["agents", "action"]
        half = action.shape[-1] // 2
        one, two = action[..., :half], action[..., half:]
        right = ((one == 0).all(-1) & (two == 1).all(-1)) | ((one == 1).all(-1) & (two == 0).all(-1))
        out["agents", "reward"] = right.float().reshape(-1, 1, 1).expand(*action.shape, 1).clone()
        return out

    def _show(self, out):
        shown = super()._show(out)
        shown["agents", "observation"] = torch.ones_like(shown["agents", "observation"])
        shown["agents", "action_mask"][:] = True
        return shown


def expected_return(env, algo, n):
    """Of the sampled policy, exactly: the probability of the two right joint actions."""
    td = env.reset()
    p = algo.policy.get_dist(td).parts[0].exp()[0]  # [n, 2]
    half = n // 2
    return (p[:half, 0].prod() * p[half:, 1].prod() + p[:half, 1].prod() * p[half:, 0].prod()).item()


@pytest.mark.parametrize("n", [2, 4])
def test_shared_parameters_without_identity_stop_where_theory_says_and_happo_does_not(n):
    """The best shared policy earns 2 / 2^n; agents of their own earn 1."""
    env = Agreement(batch=(64,), groups={"agents": (n, 2, 1)}, choices=2, horizon=1)
    results = {}
    for name in ("happo", "mappo unshared", "shared", "shared with ids"):
        best = 0.0
        options = {"lr": 0.02, "hidden": (16,), "layer_norm": False, "entropy_coeff": 0.0, "num_epochs": 5}
        for seed in range(2):
            if name == "happo":
                algo = happo(env, **options, seed=seed)
            else:
                shared = name.startswith("shared")
                algo = tdmarl.mappo(
                    env, **options, seed=seed, share_params=shared, agent_id=name.endswith("ids")
                )
            collector = tdmarl.Collector(env, algo.explore, frames_per_batch=256, seed=seed)
            for _ in range(80):
                algo.learner(collector.rollout())
                best = max(best, expected_return(env, algo, n))
                if best > 0.97:
                    break
            if best > 0.97:
                break
        results[name] = best
    assert results["shared"] <= 2 / 2**n + 1e-6
    assert min(results[name] for name in results if name != "shared") > 0.95, results


RECURRENT = {"recurrent": 8, "hidden": (8,), "chunk_length": 5, "num_epochs": 2}


def collected(env, algo, frames=40):
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)
    collector.rollout()
    return collector.rollout()


@pytest.mark.parametrize("choices", [0, 3])
def test_the_factor_of_policies_that_remember_is_taken_over_whole_batches(choices):
    """Agent by agent: the ratio of log-probabilities found by stepping through the batch, before and after."""
    env = ToyEnv(choices=choices, horizon=7)
    algo = happo(env, lr=0.02, minibatch_size=3, order=[2, 0, 1], normalize_advantage=False, **RECURRENT)
    batch = collected(env, algo)
    assert batch["agents", "actor_hidden"][:, 0].any() and batch["is_init"][:, 1:].any()

    def by_steps():
        state, found = batch["agents", "actor_hidden"][:, 0], []
        for t in range(batch.shape[1]):
            now = batch[:, t].select(*algo.policy.in_keys).clone().set(("agents", "actor_hidden"), state)
            found.append(algo.policy.get_dist(now).log_prob(batch["agents", "action"][:, t]))
            now = algo.policy[0](now)
            state = now["next", "agents", "actor_hidden"]
        return torch.stack(found, 1)

    with torch.no_grad():
        before = by_steps()
        torch.testing.assert_close(before, batch["agents", "action_log_prob"], atol=1e-5, rtol=1e-5)
        prepared, factors = algo.learner.prepare(batch.copy()), []
        for agent in algo.learner.order:
            with torch.enable_grad():
                algo.learner._update(agent, prepared)
            factors.append(prepared["agents", "factor"].clone())
        after = by_steps()
    ratio, expected = (after - before).exp(), torch.ones_like(before[..., 0])
    assert (ratio - 1).abs().max() > 0.01
    for factor, agent in zip(factors, [2, 0, 1]):
        expected = expected * ratio[..., agent]
        torch.testing.assert_close(factor, expected[..., None, None].expand_as(factor), atol=1e-4, rtol=1e-4)


def test_agents_who_remember_solve_the_memory_game_one_after_the_other():
    env = tdmarl.memory_game(64, n_agents=2, cues=2, delay=4, seed=0)
    algo = happo(env, recurrent="gru", chunk_length=5, lr=2e-3, num_epochs=10, hidden=(32,), seed=0)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=64 * 20, seed=0)
    for _ in range(6):
        algo.learner(collector.rollout())
    found = tdmarl.evaluate(env, algo.policy, episodes=256)["return_mean_agents"].mean()
    assert found.item() == pytest.approx(1.0, abs=0.01)


def test_unlike_agents_who_remember_train_resume_and_keep_the_dead_out():
    groups = {"a": (2, 3, 1), "b": (1, 5, 2)}
    options = RECURRENT | {"minibatch_size": 3}
    algos = [happo(ToyEnv(groups=groups, mortal=True), ("a", "b"), seed=seed, **options) for seed in (0, 1)]
    batch = collected(ToyEnv(groups=groups, mortal=True), algos[0])
    assert batch["critic_hidden"].shape == (4, 10, 1, 1, 8)
    algos[0].learner(batch)
    algos[1].learner.load_state_dict(algos[0].learner.state_dict())
    spoiled = batch.clone()
    for group in groups:
        spoiled[group, "action_log_prob"][~batch[group, "mask"]] = -50.0
    metrics = [algo.learner(data) for algo, data in zip(algos, (batch, spoiled))]
    assert all(torch.isfinite(v).all() for v in metrics[0].values())
    for a, b in zip(*(algo.policy.parameters() for algo in algos)):
        torch.testing.assert_close(a, b)


def test_own_actors_agent_by_agent_may_not_remember():
    env = ToyEnv()
    whole = tdmarl.gaussian_actor(env, share_params=False, recurrent=8)
    own = {"agents": [agent_actor(whole, i, {}) for i in range(3)]}
    with pytest.raises(ValueError, match="recurrent='gru'"):
        happo(env, actor=own)


@pytest.mark.parametrize("epochs", [1, 4])
def test_haa2c_follows_the_unclipped_policy_gradient(epochs):
    """SGD on ``E[r M A]``, whose gradient in the first epoch is ``E[M A grad log pi]``; happo's clip ends earlier."""
    env, ended = ToyEnv(), {}
    options = {"hidden": (16,), "order": (1, 0, 2), "entropy_coeff": 0.0, "max_grad_norm": None, "num_epochs": epochs}
    batch = batch_of(env, haa2c(env, **options))
    for build, more in ((haa2c, {}), (happo, {"clip_epsilon": 0.01})):
        algo = build(env, optim=lambda p: torch.optim.SGD(p, 0.1), **options, **more)
        agent = algo.learner.agents[1]  # the first in the order: its factor is one
        view = agent.view(algo.learner.prepare(batch.copy()))
        mine = copy.deepcopy(agent.actor)
        params = list(mine.parameters())
        for epoch in range(epochs):
            log_prob = mine.get_dist(view.select("observation")).log_prob(view["action"])
            ratio = (log_prob - view["action_log_prob"]).exp() if epoch else log_prob
            gain = (ratio.unsqueeze(-1) * view["advantage"]).mean()
            with torch.no_grad():
                for p, g in zip(params, torch.autograd.grad(gain, params)):
                    p += 0.1 * g
        algo.learner(batch)
        ended[build] = [torch.cat([p.detach().flatten() for p in who.parameters()]) for who in (mine, agent.actor)]
    torch.testing.assert_close(*ended[haa2c], rtol=1e-4, atol=1e-6)
    assert torch.allclose(*ended[happo], rtol=1e-4, atol=1e-6) == (epochs == 1)


def recorded(algo):
    """What each agent's step of a hatrpo learner returned, in order, and its KL measured again over the batch."""
    found = []
    for i, agent in enumerate(algo.learner.agents):

        def take(rows, step=agent.step):
            with torch.no_grad():
                before = step._dist(rows)
            metrics = step(rows)
            with torch.no_grad():
                after = step._dist(rows)
            kl = torch.distributions.kl_divergence(before, after)
            mask = rows.get("mask", torch.ones_like(kl, dtype=torch.bool))
            ratio = (after.log_prob(rows["action"]) - before.log_prob(rows["action"])).exp()
            gain = ((ratio - 1) * rows["advantage"].squeeze(-1))[mask].mean()
            found.append({key: metrics[key].item() for key in ("accepted", "kl", "surrogate_gain")})
            found[-1] |= {"measured": kl[mask].mean().item(), "gained": gain.item()}
            return metrics

        algo.learner.accelerated[i] = take
    return found


@pytest.mark.parametrize("choices", [0, 3])
def test_every_accepted_trust_region_step_keeps_its_bound_and_its_surrogate_does_not_fall(choices):
    env = ToyEnv(batch=(16,), choices=choices, mortal=True)
    algo = hatrpo(env, max_kl=0.02, hidden=(16,), num_epochs=2)
    steps, before = recorded(algo), tdmarl.evaluate(env, algo.policy, episodes=16)["return_mean_agents"].mean()
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=320, seed=0)
    for _ in range(10):
        metrics = algo.learner(collector.rollout())
    assert len(steps) == 30 and sum(step["accepted"] for step in steps) >= 24
    for step in steps:
        assert step["kl"] < 0.02 and step["surrogate_gain"] >= 0
        if step["accepted"]:
            assert step["measured"] == pytest.approx(step["kl"], rel=1e-2, abs=1e-6) and step["gained"] > 0
        else:
            assert step["measured"] == 0
    assert {"accepted", "kl", "surrogate_gain", "grad_norm_actor", "grad_norm_critic"} <= set(metrics.keys())
    if not choices:  # the toy rewards what is near its target
        assert tdmarl.evaluate(env, algo.policy, episodes=16)["return_mean_agents"].mean() > before


@pytest.mark.parametrize("recurrent", [None, 8])
def test_trust_regions_of_unlike_agents_resume_to_the_last_bit(recurrent):
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    memory = RECURRENT if recurrent else {"hidden": (8,)}
    one, two = (hatrpo(env, ("a", "b"), seed=seed, **memory) for seed in (0, 1))
    batch = collected(env, one)
    assert torch.isfinite(torch.stack(list(one.learner(batch).values()))).all()
    two.learner.load_state_dict(one.learner.state_dict())
    metrics = [algo.learner(batch) for algo in (one, two)]
    assert metrics[0]["accepted"] > 0 and one.learner.last_order == two.learner.last_order
    assert torch.equal(parameters(one), parameters(two))


def test_a_trust_region_solves_the_agreement_that_sharing_cannot():
    env = Agreement(batch=(64,), groups={"agents": (2, 2, 1)}, choices=2, horizon=1)
    algo = hatrpo(env, max_kl=0.05, hidden=(16,), layer_norm=False, seed=1)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=256, seed=1)
    for _ in range(60):
        algo.learner(collector.rollout())
        if expected_return(env, algo, 2) > 0.97:
            break
    assert expected_return(env, algo, 2) > 0.95


def test_what_an_algorithm_of_the_family_lacks_is_refused_by_name():
    env = ToyEnv()
    with pytest.raises(TypeError, match="clip_epsilon"):
        haa2c(env, clip_epsilon=0.1)
    with pytest.raises(TypeError, match="entropy_coeff"):
        hatrpo(env, entropy_coeff=0.1)
    with pytest.raises(ValueError, match="max_kl"):
        hatrpo(env, max_kl=-1.0)
