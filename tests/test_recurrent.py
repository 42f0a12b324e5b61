"""Networks with memory: one module that acts and learns, its states, and what it does without them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch.func import functional_call, stack_module_state, vmap
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from toys import ToyEnv

import tdmarl
from tdmarl.actors import agent_actor, categorical_actor, gaussian_actor
from tdmarl.critics import state_critic
from tdmarl.recurrent import AgentRNN, CarryHidden, Recurrent, agent_net, hidden_keys

OBS, OUT, HIDDEN = ("g", "observation"), ("g", "out"), ("g", "actor_hidden")


def module(seed=0, **options):
    torch.manual_seed(seed)
    net = AgentRNN(3, 4, 2, hidden=(8,), hidden_size=6, layer_norm=True, agent_id=True)
    return Recurrent(net, [OBS], [OUT], HIDDEN, net.state_shape, **options)


def rows(length=12, share_of_beginnings=0.25):
    """``[5, L]`` with the states of every step as a rollout would have stored them."""
    torch.manual_seed(1)
    agents = {
        "observation": torch.randn(5, length, 3, 4),
        "actor_hidden": torch.randn(5, length, 3, 1, 6).tanh(),
    }
    return TensorDict({"g": agents, "is_init": torch.rand(5, length, 1) < share_of_beginnings}, [5, length])


def test_acting_step_by_step_is_the_sequence():
    net, data = module(), rows()
    assert data["is_init"][:, 1:].any()
    state, outs = data[HIDDEN][:, 0], []
    for t in range(12):
        step = data[:, t].clone().set(HIDDEN, state)
        outs.append(net(step)[OUT])
        state = step["next", *HIDDEN]
    with set_recurrent_mode(True):
        found = net(data.copy())
    torch.testing.assert_close(found[OUT], torch.stack(outs, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["next", *HIDDEN][:, -1], state, atol=1e-5, rtol=1e-5)


def test_only_the_first_state_of_a_row_is_read_and_none_from_zero():
    data = rows(share_of_beginnings=0.0)
    other = data.clone()
    other[HIDDEN][:, 1:] = 7.0
    with set_recurrent_mode(True):
        assert torch.equal(module()(data.copy())[OUT], module()(other.copy())[OUT])
        other[HIDDEN][:, 0] = 0.0
        from_zero = module()(other.copy())[OUT]
        assert not torch.allclose(from_zero, module()(data.copy())[OUT])
        torch.testing.assert_close(module(start="zero")(data.exclude(HIDDEN))[OUT], from_zero)


def test_burn_in_changes_no_value_and_trains_nothing():
    data = rows()
    gradients = []
    with set_recurrent_mode(True):
        plain = module()(data.copy())
        for net, part in ((module(burn_in=5), slice(None)), (module(), slice(5, None))):
            seen = data.copy()
            if part.start:  # by hand: the rest of the row from where the first five steps lead
                with torch.no_grad():
                    first = net(data[:, :5].copy())["next", *HIDDEN][:, -1:]
                seen = data[:, 5:].clone()
                seen[HIDDEN][:, :1] = first
            out = net(seen)
            torch.testing.assert_close(out[OUT], plain[OUT][:, part])
            gradients.append(torch.autograd.grad(out[OUT].square().sum(), list(net.parameters())))
    for mine, by_hand in zip(*gradients):
        torch.testing.assert_close(mine, by_hand, atol=1e-5, rtol=1e-5)


def test_rows_of_one_step_start_from_their_stored_states():
    net, data = module(), rows()
    with set_recurrent_mode(True):
        flat = net(data.reshape(-1))
    assert torch.equal(flat[OUT], net(data.copy())[OUT].reshape(-1, 3, 2))


def test_a_network_traces_whole_and_runs_on_meta():
    net = AgentRNN(3, 4, 2, share=[[0, 1], [2]])
    args = torch.randn(5, 4, 3, 4), torch.zeros(5, 3, 1, 64), torch.rand(5, 4, 1) < 0.3
    traced = torch.compile(net, backend="aot_eager", fullgraph=True)
    for found, expected in zip(traced(*args), net(*args)):
        torch.testing.assert_close(found, expected)
    out, states = net.to("meta")(*(x.to("meta") for x in args))
    assert out.shape == (5, 4, 3, 2) and states.shape == (5, 4, 3, 1, 64)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_networks_of_several_seeds_stack_under_vmap(share):
    nets = [AgentRNN(3, 4, 2, share=share) for _ in range(2)]
    parameters, _ = stack_module_state(nets)
    args = torch.randn(2, 5, 7, 3, 4), torch.randn(2, 5, 3, 1, 64), torch.rand(2, 5, 7, 1) < 0.3
    found = vmap(lambda own, *inputs: functional_call(nets[0], own, inputs))(parameters, *args)
    for seed, net in enumerate(nets):
        for both, alone in zip(found, net(*(x[seed] for x in args))):
            torch.testing.assert_close(both[seed], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choices", [0, 3])
@pytest.mark.parametrize("share", [True, False])
def test_what_an_actor_did_is_as_likely_in_its_rows(choices, share):
    """Log-probabilities recomputed over whole batches are those of collection, across ends; so are one agent's."""
    torch.manual_seed(0)
    env = ToyEnv(batch=(6,), choices=choices, horizon=5)
    make = categorical_actor if choices else gaussian_actor
    actor = make(env, share_params=share, recurrent=16)
    assert hidden_keys(actor) == [("agents", "actor_hidden")]
    collector = tdmarl.Collector(env, actor, frames_per_batch=6 * 12, seed=0)
    collector.rollout()
    batch = collector.rollout()  # [6, 12], begun in the middle of an episode
    assert batch["agents", "actor_hidden"][:, 0].any() and batch["is_init"][:, 1:].any()
    old = batch["agents", "action_log_prob"]
    with set_recurrent_mode(True), torch.no_grad():
        new = actor.get_dist(batch.select(*actor.in_keys)).log_prob(batch["agents", "action"])
        torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)
        own = agent_actor(actor, 1, {})
        mine = batch["agents"][..., 1]
        mine["is_init"] = batch["is_init"]
        alone = own.get_dist(mine.select(*own.in_keys)).log_prob(mine["action"])
        torch.testing.assert_close(alone, old[..., 1], atol=1e-5, rtol=1e-5)


def test_torchrls_rollouts_carry_the_same_states():
    """With ``InitTracker`` and the primer, as TorchRL's own recurrent modules."""
    torch.manual_seed(0)
    actor = gaussian_actor(ToyEnv(), recurrent="gru")
    ours = tdmarl.Collector(ToyEnv(horizon=5), actor, frames_per_batch=4 * 5)
    env = TransformedEnv(ToyEnv(horizon=5), InitTracker())
    env = env.append_transform(actor[0].make_tensordict_primer())
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        theirs = env.rollout(5, actor)
    torch.manual_seed(1)
    batch = ours.rollout()
    assert theirs["agents", "actor_hidden"].shape == batch["agents", "actor_hidden"].shape == (4, 5, 3, 1, 64)
    torch.testing.assert_close(theirs["agents", "observation"], batch["agents", "observation"])
    torch.testing.assert_close(theirs["agents", "actor_hidden"], batch["agents", "actor_hidden"])


def test_a_critic_watches_what_is_collected_and_writes_nothing_else():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    policy = tdmarl.stochastic_actor(env, ("a", "b"))
    critic = state_critic(env, ("a", "b"), recurrent=8)
    carry = CarryHidden(critic)
    assert carry.out_keys == [("next", "a", "critic_hidden"), ("next", "b", "critic_hidden")]
    batch = tdmarl.Collector(
        env, TensorDictSequential(policy, carry), frames_per_batch=4 * 7, seed=0
    ).rollout()
    assert batch["a", "critic_hidden"].shape == (4, 7, 2, 1, 8) and ("a", "state_value") not in batch.keys(
        True
    )
    begins = batch["is_init"]
    assert begins.any() and not batch["b", "critic_hidden"][begins.squeeze(-1)].any()


def test_a_network_may_look_at_is_init_itself():
    class Looking(AgentRNN):
        def forward(self, x, looked, state, is_init):
            assert looked is is_init
            return super().forward(x, state, is_init)

    net = Looking(3, 4, 2, hidden=(8,), hidden_size=6)
    looking, data = Recurrent(net, [OBS, "is_init"], [OUT], HIDDEN, net.state_shape), rows()
    with set_recurrent_mode(True):
        assert looking(data)[OUT].shape == (5, 12, 3, 2)


def test_wrong_arguments_and_missing_entries_are_named():
    with pytest.raises(ValueError, match="start='first' must be one of"):
        module(start="first")
    with (
        pytest.raises(ValueError, match="burn_in=12 leaves nothing of sequences of length 12"),
        set_recurrent_mode(),
    ):
        module(burn_in=12)(rows())
    with pytest.raises(KeyError, match="'is_init'.*InitTracker"):
        module()(rows().exclude("is_init"))
    with pytest.raises(KeyError, match="actor_hidden"), set_recurrent_mode():
        module()(rows().exclude(HIDDEN))
    for wrong in ("lstm", True, 1.5):
        with pytest.raises(ValueError, match="must be None, 'gru' or the width"):
            agent_net(3, 4, 2, recurrent=wrong)
    with pytest.raises(ValueError, match="at least one layer before its unit"):
        agent_net(3, 4, 2, recurrent="gru", hidden=())
    assert hidden_keys(TensorDictModule(torch.nn.Identity(), in_keys=[OBS], out_keys=[OUT])) == []
