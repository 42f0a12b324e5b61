from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdmarl.buffers import take_rows
from tdmarl.learners import BatchBuffer, Learner
from tdmarl.replay import Replay
from tdmarl.step import Part, Step


def numbered(*shape):
    return TensorDict(x=torch.arange(torch.Size(shape).numel()).reshape(shape)).auto_batch_size_(len(shape))


def epoch(buffer):
    return [buffer.sample() for _ in range(buffer.n_minibatches)]


@pytest.mark.parametrize("size, parts, length", [(None, 1, 12), (12, 1, 12), (5, 3, 4), (8, 2, 6)])
def test_an_epoch_has_every_row_once_in_equal_parts(size, parts, length):
    buffer = BatchBuffer(size, num_epochs=2)
    buffer.extend(numbered(3, 4))
    assert buffer.n_updates == 2 * parts
    first, second = epoch(buffer), epoch(buffer)
    assert [len(m) for m in first] == [length] * parts
    for order in (first, second):
        assert torch.cat(order)["x"].sort().values.tolist() == list(range(12))
    if parts > 1:
        assert torch.cat(first)["x"].tolist() != torch.cat(second)["x"].tolist()


def test_rows_left_over_sit_one_epoch_out():
    buffer = BatchBuffer(4)
    buffer.extend(numbered(10))
    assert [len(m) for m in epoch(buffer)] == [3, 3, 3]


def test_sequences_are_cut_in_order():
    buffer = BatchBuffer(2, sequence_length=3)
    buffer.extend(numbered(2, 6))
    rows = torch.cat(epoch(buffer))["x"]
    assert rows.shape == (4, 3) and (rows[:, 1:] - rows[:, :-1] == 1).all() and (rows[:, 0] % 3 == 0).all()


def test_each_seed_draws_its_own_rows():
    buffer = BatchBuffer(4, seed_axis=True)
    buffer.extend(numbered(2, 3, 4))
    first = epoch(buffer)
    assert first[0].shape == (2, 4)
    whole = torch.cat(first, 1)["x"]
    assert whole[0].sort().values.tolist() == list(range(12)) and whole[1].sort().values.tolist() == list(
        range(12, 24)
    )
    assert (whole[0] + 12).tolist() != whole[1].tolist()


def test_agents_apart_each_see_their_own_rows_and_all_joint_inputs_of_those():
    buffer = BatchBuffer(3, apart=[("g", 2)])
    data = numbered(6)
    data["g", "observation"] = data["x"].reshape(6, 1, 1).expand(6, 2, 1).clone()
    buffer.extend(data)
    seen = {0: [], 1: []}
    for minibatch in epoch(buffer):
        assert minibatch.shape == (6,)
        mask = minibatch["g", "mask"]
        assert mask[:3, 0].all() and not mask[:3, 1].any() and mask[3:, 1].all() and not mask[3:, 0].any()
        assert torch.equal(minibatch["g", "observation"].squeeze(-1)[:, 0], minibatch["x"])
        for agent in (0, 1):
            seen[agent] += minibatch["x"][mask[:, agent]].tolist()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(6)) and seen[0] != seen[1]


def test_the_dead_stay_dead_when_agents_are_apart():
    buffer = BatchBuffer(apart=[("g", 2)])
    data = numbered(4)
    data["g", "mask"] = torch.tensor([[True, False]] * 4)
    buffer.extend(data)
    assert buffer.sample()["g", "mask"].sum(0).tolist() == [4, 0]


def test_buffer_resumes_its_draws():
    one, two = BatchBuffer(2, seed=3), BatchBuffer(2, seed=4)
    one.extend(numbered(8))
    epoch(one)
    two.load_state_dict(one.state_dict())
    one.extend(numbered(8)), two.extend(numbered(8))
    assert [m["x"].tolist() for m in epoch(one)] == [m["x"].tolist() for m in epoch(two)]


def test_buffer_errors_say_what_to_do():
    with pytest.raises(ValueError, match="at most 12"):
        BatchBuffer(13).extend(numbered(3, 4))
    with pytest.raises(ValueError, match="collect 3 or 6"):
        BatchBuffer(sequence_length=3).extend(numbered(3, 4))
    with pytest.raises(RuntimeError, match="empty"):
        BatchBuffer().sample()
    with pytest.raises(ValueError, match="num_epochs=0"):
        BatchBuffer(num_epochs=0)


class Line(TensorDictModule):
    def __init__(self):
        super().__init__(nn.Linear(1, 1), in_keys=["x", "y"], out_keys=["loss_line"])

    def forward(self, td):
        return TensorDict(loss_line=(self.module(td["x"]) - td["y"]).square().mean())


def line():
    torch.manual_seed(0)
    loss = Line()
    return Step([Part(loss, torch.optim.Adam(loss.parameters(), 0.05))]), loss.module


def points():
    x = torch.linspace(-1, 1, 64).reshape(8, 8, 1)
    return TensorDict({"x": x, "y": 2 * x + 1}, [8, 8])


def test_learner_fits_a_line_from_either_buffer():
    for buffer, updates in ((BatchBuffer(16, 10), None), (Replay(1000, 16, announce=None), 40)):
        step, net = line()
        learner = Learner(step, buffer, updates=updates)
        for _ in range(20):
            metrics = learner(points())
        assert metrics["loss_line"] < 1e-3 and net.weight.item() == pytest.approx(2, abs=0.05)


def test_learner_leaves_the_batch_alone_and_names_what_is_missing():
    step, _ = line()
    batch = points()
    Learner(step, BatchBuffer(), prepare=lambda td: td.set("z", td["x"]))(batch)
    assert set(batch.keys()) == {"x", "y"}
    with pytest.raises(KeyError, match="'y'"):
        Learner(step, BatchBuffer())(batch.exclude("y"))
    with pytest.raises(ValueError, match="updates=None"):
        Learner(step, Replay(10, 2))


def test_a_batch_is_let_go_of_once_it_is_learnt_from():
    """Two would be in memory while the next one is collected."""
    step, _ = line()
    buffer = BatchBuffer(16)
    Learner(step, buffer)(points())
    assert len(buffer) == 0
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample()


def test_rows_are_taken_as_by_an_index():
    group = TensorDict({"x": torch.randn(6, 2, 3), "flag": torch.rand(6, 2) > 0.5}, [6, 2])
    rows = TensorDict({"g": group, "done": torch.zeros(6, 1, dtype=torch.bool)}, [6])
    for data in (rows, rows.unsqueeze(1).expand(6, 4)):  # rows, and sequences that are views
        index = torch.tensor([5, 0, 5, 3])
        found, expected = take_rows(data, index), data[index]
        assert found.batch_size == expected.batch_size and found["g"].batch_size == expected["g"].batch_size
        for key in expected.keys(True, True):
            assert torch.equal(found[key], expected[key])
