"""Target updates: exact copies at every k-th update, soft ones by their formula, on TorchRL's losses, too."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss
from toys import ToyEnv

import tdmarl
from tdmarl.targets import TargetUpdate, target_pairs


def pair():
    loss = nn.Module()
    loss.net, loss.target_net = nn.Linear(2, 1), nn.Linear(2, 1)
    return loss


@pytest.mark.parametrize("every", [1, 3, 5])
def test_a_copy_at_every_kth_update_exactly(every):
    """TorchRL's updater of the same name copies at 6, 12, 18 for an interval of 5."""
    loss, copied = pair(), []
    update = TargetUpdate(loss, every=every)
    for t in range(1, 16):
        loss.net.weight.data.add_(1)
        before = loss.target_net.weight.clone()
        update.step()
        if torch.equal(loss.target_net.weight, loss.net.weight):
            copied.append(t)
        else:
            assert torch.equal(before, loss.target_net.weight)
    assert copied == list(range(every, 16, every))


def test_the_soft_update_is_its_formula():
    loss = pair()
    trained, target = loss.net.weight.detach().clone(), loss.target_net.weight.detach().clone()
    update = TargetUpdate(loss, tau=0.1)
    update()
    torch.testing.assert_close(loss.target_net.weight.detach(), 0.9 * target + 0.1 * trained)
    assert torch.equal(loss.net.weight.detach(), trained)


def test_the_count_is_saved():
    loss = pair()
    update, other = TargetUpdate(loss, every=3), TargetUpdate(loss, every=3)
    update(), update()
    other.load_state_dict(update.state_dict())
    other()
    assert torch.equal(loss.net.weight, loss.target_net.weight)


def test_a_step_counts_and_saves_its_target_updates():
    env = ToyEnv(choices=3)
    algo = tdmarl.iql(env, target_every=4, num_updates=3, minibatch_size=10)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0)
    loss = algo.learner.step.parts[0].loss

    def same():
        pairs = zip(loss.local_value_network.parameters(), loss.target_local_value_network.parameters())
        return all(torch.equal(a, b) for a, b in pairs)

    algo.learner(collector.rollout())
    assert not same() and algo.learner.step.state_dict()["after"]["count"] == 3
    algo.learner.updates = 1
    algo.learner(collector.rollout())
    assert same()


def test_it_serves_torchrls_losses():
    value = QValueActor(TensorDictModule(nn.Linear(3, 2), ["observation"], ["action_value"]), action_space="one-hot",
                        in_keys=["observation"])  # fmt: skip
    loss = DQNLoss(value, action_space="one-hot", delay_value=True)
    with torch.no_grad():
        loss.value_network_params.apply(lambda p: p.data.add_(1))
    update = TargetUpdate(loss, every=1)
    update()
    for target, trained in target_pairs(loss):
        assert torch.equal(target, trained)


def test_softly_at_the_first_of_every_so_many_calls():
    loss = pair()
    update, moved = TargetUpdate(loss, tau=0.5, every=3), []
    for _ in range(7):
        before = [t.clone() for t, _ in target_pairs(loss)]
        update()
        moved.append(not all(torch.equal(a, t) for a, (t, _) in zip(before, target_pairs(loss))))
    assert moved == [True, False, False, True, False, False, True]


def test_a_copy_moves_the_targets_of_the_copied_loss():
    loss = pair()
    whole = nn.ModuleDict({"loss": loss})
    whole["follow"] = TargetUpdate(loss, every=2)
    whole["follow"]()
    twin = copy.deepcopy(whole)
    kept = [t.clone() for t, _ in target_pairs(loss)]
    twin["follow"]()  # its second call
    assert all(torch.equal(t, s) for t, s in target_pairs(twin["loss"]))
    assert all(torch.equal(a, t) for a, (t, _) in zip(kept, target_pairs(loss)))


def test_bad_input_is_named():
    wrong = [
        ({}, "got neither"),
        ({"tau": 2.0}, "tau=2.0"),
        ({"every": 0}, "every=0"),
    ]
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            TargetUpdate(pair(), **options)
    with pytest.raises(ValueError, match="has no target networks"):
        TargetUpdate(nn.Linear(1, 1), every=1)
