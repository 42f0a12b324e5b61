from __future__ import annotations

import torch

from tdmarl import reduce


def test_mean_counts_only_what_the_mask_says_whatever_the_rest_holds():
    x = torch.tensor([[1.0, float("nan")], [3.0, float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    value = reduce.mean(x, mask)
    value.backward()
    assert value.item() == 2.0
    assert x.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]]


def test_mean_of_nothing_is_zero():
    assert reduce.mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_moments_and_standardize_by_hand():
    x, mask = torch.tensor([[[1.0], [9.0]], [[3.0], [9.0]]]), torch.tensor([[True, False], [True, False]])
    centre, variance = reduce.moments(x, mask)
    assert (centre.item(), variance.item()) == (2.0, 1.0)
    out = reduce.standardize(x, mask)
    torch.testing.assert_close(out, torch.tensor([[[-1.0], [0.0]], [[1.0], [0.0]]]) / (1 + 1e-5))


def test_per_agent_keeps_the_agents_apart():
    x = torch.tensor([[[1.0], [10.0]], [[3.0], [30.0]]])  # [M, n, 1]
    assert reduce.mean(x, per_agent=True).tolist() == [2.0, 20.0]
    assert (
        reduce.standardize(x, per_agent=True)[:, 1].flatten().tolist()
        == reduce.standardize(x[:, 1]).flatten().tolist()
    )


def test_seed_axis_keeps_the_seeds_apart():
    x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    with reduce.seed_axis():
        assert reduce.mean(x).tolist() == [2.0, 20.0]
        assert reduce.mean(x.unsqueeze(-1).unsqueeze(-1), torch.tensor([[[True], [False]]] * 2)).tolist() == [
            1.0,
            10.0,
        ]
    assert reduce.mean(x).item() == 11.0


def test_clip_gradients_scales_to_the_norm_and_each_seed_by_its_own():
    p, q = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    p.grad, q.grad = torch.tensor([[3.0], [0.3]]), torch.tensor([[4.0], [0.4]])
    with reduce.seed_axis():
        norm = reduce.clip_gradients([p, q], 1.0)
    torch.testing.assert_close(norm, torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(p.grad, torch.tensor([[0.6], [0.3]]))  # 3-4-5 scaled to 1; the other below it
    p.grad, q.grad = torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [0.0]])
    assert reduce.clip_gradients([p, q], 1.0).item() == 5.0
    torch.testing.assert_close(q.grad, torch.tensor([[0.8], [0.0]]))
