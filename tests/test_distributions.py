"""Distributions of actions against torch's own, quadrature and counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.data import Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot
from toys import NoHostRead

from tdmarl.distributions import ClippedNormal, MaskedCategorical, RandomAction, TanhNormal, choices

LOW, HIGH = torch.tensor([[-2.0, 0.0]]), torch.tensor([[2.0, 0.5]])


def test_clipped_normal_is_torchs_normal_summed_over_dimensions():
    loc, scale = torch.randn(5, 1, 2), torch.rand(5, 1, 2) + 0.1
    ours, plain = ClippedNormal(loc, scale, LOW, HIGH), torch.distributions.Normal(loc, scale)
    x = torch.randn(5, 1, 2)
    torch.testing.assert_close(ours.log_prob(x), plain.log_prob(x).sum(-1))
    torch.testing.assert_close(ours.entropy(), plain.entropy().sum(-1))
    assert ((ours.mode >= LOW) & (ours.mode <= HIGH)).all()


def test_tanh_normal_is_torchs_transformed_normal():
    from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

    loc, scale = torch.randn(7, 1, 2, dtype=torch.float64), torch.rand(7, 1, 2, dtype=torch.float64) + 0.1
    low, high = LOW.double(), HIGH.double()
    parts = [TanhTransform(), AffineTransform((low + high) / 2, (high - low) / 2)]
    plain, ours = TransformedDistribution(Normal(loc, scale), parts), TanhNormal(loc, scale, low, high)
    x = plain.sample()
    torch.testing.assert_close(ours.log_prob(x), plain.log_prob(x).sum(-1), atol=1e-6, rtol=1e-6)
    sampled = ours.rsample((1000,))
    assert ((sampled > low) & (sampled < high)).all()


def test_tanh_entropy_is_what_sampling_gives():
    torch.manual_seed(0)
    loc, scale = torch.tensor([[[0.3, -1.0]]]), torch.tensor([[[0.7, 1.2]]])
    ours = TanhNormal(loc, scale, LOW, HIGH)
    sampled = -ours.log_prob(ours.rsample((400_000,))).double().sum(0) / 400_000
    torch.testing.assert_close(ours.entropy().double(), sampled, atol=5e-3, rtol=0)


@pytest.mark.parametrize("std, tolerance", [(0.5, 1e-6), (1.0, 3e-4), (2.0, 2e-2)])
def test_tanh_entropy_is_as_exact_as_it_says(std, tolerance):
    """Against 180 nodes: H = H(normal) + E[log(1 - tanh(x)^2)], with cosh for the slope."""
    nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(180))
    for mean in (0.0, 0.5, 1.0, 2.0, 4.0):
        exact = (-2 * (mean + std * nodes).cosh().log() * weights).sum() / weights.sum()
        loc, scale = torch.tensor([[mean]]).double(), torch.tensor([[std]]).double()
        ours = TanhNormal(loc, scale, -torch.ones(1, 1).double(), torch.ones(1, 1).double()).entropy()
        normal = torch.distributions.Normal(mean, std).entropy()
        assert abs((ours - normal - exact).item()) < tolerance


@pytest.mark.parametrize("kind", [ClippedNormal, TanhNormal])
def test_padded_dimensions_are_not_there(kind):
    loc, scale = torch.randn(5, 1, 3, requires_grad=True), torch.rand(5, 1, 3) + 0.1
    low, high = torch.tensor([[-1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    real = [0, 2]
    padded = kind(loc, scale, low, high)
    bare = kind(loc[..., real], scale[..., real], low[:, real], high[:, real])
    x = padded.rsample().detach()
    assert not x[..., 1].any() and not padded.mode[..., 1].any()
    torch.testing.assert_close(padded.log_prob(x), bare.log_prob(x[..., real]))
    torch.testing.assert_close(padded.entropy(), bare.entropy())
    (padded.log_prob(x) + padded.entropy()).sum().backward()
    assert not loc.grad[..., 1].any() and torch.isfinite(loc.grad).all()


def test_masked_categorical_is_the_categorical_over_what_is_available():
    logits = torch.tensor([[0.1, 9.0, -0.3]], requires_grad=True)
    ours = MaskedCategorical(logits, torch.tensor([[True, False, True]]))
    plain = torch.distributions.Categorical(logits=logits.detach()[:, [0, 2]])
    torch.testing.assert_close(ours.log_prob(torch.tensor([2])), plain.log_prob(torch.tensor([1])))
    torch.testing.assert_close(ours.entropy(), plain.entropy())
    ours.entropy().sum().backward()
    assert logits.grad[0, 1] == 0 and torch.isfinite(logits.grad).all()
    assert set(ours.sample((500,)).flatten().tolist()) == {0, 2}
    assert ours.mode.item() == 0


def test_categorical_samples_by_probability():
    torch.manual_seed(0)
    p = torch.tensor([[0.2, 0.5, 0.3]])
    drawn = MaskedCategorical(p.log()).sample((100_000,)).flatten().bincount() / 100_000
    torch.testing.assert_close(drawn, p[0], atol=5e-3, rtol=0)


def test_nothing_available_is_uniform_not_nan():
    logits = torch.zeros(1, 3, requires_grad=True)
    dist = MaskedCategorical(logits, torch.zeros(1, 3, dtype=torch.bool))
    (dist.entropy() + dist.log_prob(dist.sample())).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_several_choices_multiply():
    logits = torch.randn(4, 5)
    dist = MaskedCategorical(logits, nvec=(2, 3))
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split((2, 3), -1)]
    action = dist.sample()
    assert action.shape == (4, 2)
    torch.testing.assert_close(
        dist.log_prob(action), sum(p.log_prob(a) for p, a in zip(parts, action.unbind(-1)))
    )
    torch.testing.assert_close(dist.entropy(), sum(p.entropy() for p in parts))


def test_one_hot_is_the_index_in_another_dress():
    dist, plain = MaskedCategorical(torch.randn(4, 3), one_hot=True), None
    action = dist.sample()
    assert action.shape == (4, 3) and action.sum(-1).eq(1).all()
    plain = MaskedCategorical(dist.parts[0])
    torch.testing.assert_close(dist.log_prob(action), plain.log_prob(action.argmax(-1)))


def test_choices_reads_every_discrete_spec():
    assert choices(OneHot(4, shape=(3, 4))) == ((4,), True)
    assert choices(MultiCategorical([[2, 3], [2, 3]], shape=(2, 2))) == ((2, 3), False)
    with pytest.raises(ValueError, match="different numbers of choices"):
        choices(MultiCategorical([[2, 3], [3, 2]], shape=(2, 2)))
    with pytest.raises(ValueError, match="categorical_actions=True"):
        choices(MultiOneHot([2, 3], shape=(2, 5)))
    with pytest.raises(ValueError, match="gaussian_actor"):
        choices(Bounded(-1, 1, (2, 2)))


@pytest.mark.parametrize("spec", [
    Bounded(torch.tensor([[-1.0, 2.0], [0.0, 2.0]]), torch.tensor([[3.0, 2.0], [1.0, 2.0]]), (2, 2)),
    Categorical(3, shape=(2,)), OneHot(3, shape=(2, 3)), OneHot(3, shape=(2, 3), dtype=torch.int64),
    MultiCategorical(torch.tensor([2, 3]).expand(2, 2), shape=(2, 2)),
    MultiCategorical(torch.tensor([3]).expand(2, 1), shape=(2, 1)),
])  # fmt: skip
def test_random_actions_are_the_specs_and_uniform(spec):
    torch.manual_seed(0)
    draw = RandomAction(spec)
    with NoHostRead():
        drawn = draw((6000,))
    assert (
        drawn.shape == (6000, *spec.shape)
        and drawn.dtype == spec.dtype
        and spec.expand(6000, *spec.shape).is_in(drawn)
    )
    expected = (spec.space.low + spec.space.high) / 2 if isinstance(spec, Bounded) else {
        "OneHot": torch.tensor(1 / 3), "Categorical": torch.tensor(1.0),
        "MultiCategorical": torch.tensor([0.5, 1.0]) if spec.shape[-1] == 2 else torch.tensor(1.0),
    }[type(spec).__name__]  # fmt: skip
    torch.testing.assert_close(
        drawn.double().mean(0), expected.double().expand(spec.shape), atol=0.05, rtol=0
    )


def test_random_actions_obey_a_mask_and_other_specs_draw_themselves():
    mask = torch.tensor([[True, False, True], [False, True, False]]).expand(500, 2, 3)
    drawn = RandomAction(Categorical(3, shape=(2,)))((500,), mask)
    assert set(drawn[:, 0].tolist()) == {0, 2} and set(drawn[:, 1].tolist()) == {1}
    whole = Bounded(0, 3, shape=(2,), dtype=torch.int64)
    assert set(RandomAction(whole)((200,)).flatten().tolist()) == {0, 1, 2, 3}
