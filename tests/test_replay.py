"""Replay: priorities against hand-computed probabilities, rows, storages, what is said before, and state."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tdmarl.replay import ProportionalSampler, Replay


def rows(n=4, start=0):
    return TensorDict({"x": torch.arange(start, start + n).float()}, [n])


def buffer(sampler, size=60_000):
    made = TensorDictReplayBuffer(
        storage=LazyTensorStorage(8),
        sampler=sampler,
        batch_size=size,
        generator=torch.Generator().manual_seed(0),
    )
    made.extend(rows())
    return made


def test_rows_are_drawn_in_proportion_in_torchrls_buffer():
    """Priorities 1, 2, 3, 4 with alpha 1: probabilities 0.1 to 0.4; weights (4 P)^-beta over their largest."""
    replay = buffer(ProportionalSampler(8, alpha=1.0, beta=0.5, eps=1e-12))
    seen = replay.sample()
    seen["td_error"] = (seen["x"] + 1).unsqueeze(-1)
    replay.update_tensordict_priority(seen)
    sample = replay.sample()
    share = torch.bincount(sample["x"].long(), minlength=4) / len(sample)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)
    expected = (4 * torch.tensor([0.1, 0.2, 0.3, 0.4])) ** -0.5
    torch.testing.assert_close(sample["priority_weight"], (expected / expected[0])[sample["x"].long()])


@pytest.mark.parametrize(
    "alpha, expected", [(0.0, [0.25] * 4), (0.5, [1 / 6, 1 / 6, 1 / 3, 1 / 3]), (1.0, [0.1, 0.1, 0.4, 0.4])]
)
def test_alpha_weakens_priorities(alpha, expected):
    """Priorities 1, 1, 4, 4: their square roots are 1, 1, 2, 2."""
    replay = buffer(ProportionalSampler(8, alpha=alpha, eps=1e-12))
    replay.update_priority(torch.arange(4), torch.tensor([1.0, 1, 4, 4]))
    share = torch.bincount(replay.sample()["x"].long(), minlength=4) / 60_000
    torch.testing.assert_close(share, torch.tensor(expected), atol=0.01, rtol=0)


def test_new_rows_have_the_largest_priority_so_far():
    replay = buffer(ProportionalSampler(8, alpha=1.0, eps=1e-12))
    replay.update_priority(torch.arange(4), torch.tensor([1.0, 1, 1, 5]))
    replay.extend(rows(2, 4))  # 5 each: 10 of 18
    share = torch.bincount(replay.sample()["x"].long(), minlength=6) / 60_000
    torch.testing.assert_close(share, torch.tensor([1.0, 1, 1, 5, 5, 5]) / 18, atol=0.01, rtol=0)


def test_a_rows_priorities_are_reduced_over_agents_and_steps():
    for how, expected in (("max", 3.0), ("mean", 2.0)):
        sampler = ProportionalSampler(4, alpha=1.0, reduction=how, eps=1e-12)
        sampler.update_priority(
            torch.tensor([1]), torch.tensor([[[1.0], [2.0], [-3.0 if how == "max" else 3.0]]]).abs()
        )
        assert sampler.priorities[1].item() == pytest.approx(expected)


def test_the_samplers_state_is_complete(tmp_path):
    one = buffer(ProportionalSampler(8), 5)
    one.update_priority(torch.arange(4), torch.tensor([1.0, 2, 3, 4]))
    two = buffer(ProportionalSampler(8), 5)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.sample()["x"], two.sample()["x"])
    one.sampler.dumps(tmp_path)
    three = ProportionalSampler(8)
    three.loads(tmp_path)
    assert torch.equal(three.priorities, one.sampler.priorities) and three.beta == one.sampler.beta
    with pytest.raises(ValueError, match="capacity 3"):
        ProportionalSampler(3).load_state_dict(one.sampler.state_dict())


@pytest.mark.parametrize("storage", ["device", "cpu", "memmap"])
@pytest.mark.parametrize("prioritized", [True, False])
def test_replay_keeps_the_latest_and_resumes_exactly(storage, prioritized, tmp_path):
    def make():
        folder = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        return Replay(6, 4, prioritized=prioritized, storage=storage, folder=folder, seed=3, announce=None)

    one = make()
    for start in (0, 4, 8):  # the third batch overwrites the oldest rows
        one.extend(rows(4, start))
    assert sorted(one.storage.get(slice(0, 6))["x"].tolist()) == [6, 7, 8, 9, 10, 11]
    one.sample()
    if prioritized:
        one.update_priority(torch.arange(6), torch.arange(6.0))
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in one.state_dict().items()}
    two = make()
    two.load_state_dict(saved)
    for _ in range(3):
        assert torch.equal(one.sample()["x"], two.sample()["x"])
    one.extend(rows(1, 20)), two.extend(rows(1, 20))
    assert torch.equal(one.storage.get(slice(0, 6))["x"], two.storage.get(slice(0, 6))["x"])
    empty = make()
    empty.load_state_dict(make().state_dict())
    assert len(empty) == 0 and not empty.ready


def test_sequences_are_rows():
    replay, said = Replay(10, 3, sequence_length=4, announce=None), []
    batch = TensorDict({"x": torch.arange(24).reshape(2, 12)}, [2, 12])
    replay.extend(batch)
    assert len(replay) == 6 and replay.sample().shape == (3, 4)
    steps = replay.sample()["x"]
    assert (steps.diff(dim=-1) == 1).all() and (steps[:, 0] % 4 == 0).all() and not said
    with pytest.raises(ValueError, match="no multiple of sequence_length=4"):
        replay.extend(batch[:, :10])


def test_the_size_is_said_before_it_is_allocated(monkeypatch):
    said = []
    replay = Replay(1000, 4, announce=lambda text: said.append((text, replay.storage.initialized)))
    replay.extend(TensorDict({"x": torch.zeros(8, 5), "y": torch.zeros(8, dtype=torch.bool)}, [8]))
    replay.extend(TensorDict({"x": torch.zeros(8, 5), "y": torch.zeros(8, dtype=torch.bool)}, [8]))
    assert said == [("replay: 1,000 rows of 21 bytes, 0.0 MB on cpu", False)]
    monkeypatch.setattr("tdmarl.replay._free_bytes", lambda *_: 1000)
    with pytest.raises(MemoryError, match="lower its capacity"):
        Replay(1000, 4, announce=None).extend(rows())


@pytest.mark.parametrize("options, words", [
    ({"capacity": 0}, "capacity=0"), ({"storage": "tape"}, "storage='tape'"), ({"least": 9}, "capacity of 8"),
    ({"prioritized": True, "apart": [("agents", 2)]}, "share_buffer"), ({"prioritized": True, "alpha": -1.0}, "alpha"),
])  # fmt: skip
def test_bad_input_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        Replay(**({"capacity": 8, "batch_size": 2} | options))


def test_a_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="larger capacity"):
        Replay(3, 2, announce=None).extend(rows())
    with pytest.raises(RuntimeError, match="empty"):
        ProportionalSampler(4).sample(LazyTensorStorage(4), 2)
    with pytest.raises(ValueError, match="reduction='sum'"):
        ProportionalSampler(4, reduction="sum")
