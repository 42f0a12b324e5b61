from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

from tdmarl.step import Annealing, Part, Step, adam


class Quadratic(TensorDictModule):
    """``loss_x = scale * p^2 / 2 + (p - batch)`` parts with known gradients."""

    def __init__(self, start: float) -> None:
        super().__init__(nn.Identity(), in_keys=["x"], out_keys=["loss_x"])
        self.p = nn.Parameter(torch.tensor([start]))

    def forward(self, td):
        return TensorDict(loss_x=(self.p * td["x"]).square().sum() / 2, kl=td["x"].abs().sum())


def part(start=1.0, lr=0.1, fused=False, **options):
    loss = Quadratic(start)
    if fused:
        optim = torch.optim.Adam(loss.parameters(), torch.tensor(lr), fused=True)
    else:
        optim = torch.optim.SGD(loss.parameters(), lr)
    return Part(loss, optim, **options)


def data(x=1.0):
    return TensorDict(x=torch.tensor([x]))


def test_one_step_by_hand():
    p = part(start=2.0)
    metrics = Step([p])(data())
    assert (
        p.loss.p.item() == pytest.approx(1.8)
        and metrics["loss_x"].item() == 2.0
        and metrics["grad_norm"].item() == 2.0
    )


def test_clipping_is_each_parts_own():
    a, b = part(start=30.0, max_grad_norm=1.0, name="a"), part(start=0.5, max_grad_norm=1.0, name="b")
    metrics = Step([a, b])(data())
    assert a.loss.p.item() == pytest.approx(29.9) and b.loss.p.item() == pytest.approx(0.45)
    assert metrics["grad_norm_a"].item() == 30.0 and metrics["grad_norm_b"].item() == 0.5


def test_a_part_may_sit_steps_out_and_targets_come_last():
    seen = []
    slow = part(every=2)
    step = Step([slow], after=lambda: seen.append(slow.loss.p.item()))
    for _ in range(3):
        step(data())
    assert seen == [pytest.approx(0.9), pytest.approx(0.9), pytest.approx(0.81)]


def test_a_part_that_exceeds_its_limit_stands_still_until_the_next_batch():
    p = part(fused=True, stop_above=("kl", 1.5))
    step, values = Step([p]), []
    for x in (1.0, 2.0, 1.0):
        step(data(x))
        values.append(p.loss.p.item())
    assert values[0] == pytest.approx(0.9, abs=1e-5) and values[1] == values[0] and values[2] == values[0]
    count = p.optim.state[p.loss.p]["step"].item()
    assert count == 1
    step.begin()
    step(data())
    assert p.loss.p.item() < values[0] and p.optim.state[p.loss.p]["step"].item() == 2


def test_resumes_to_the_last_bit():
    def trained(step, xs):
        for x in xs:
            step(data(x))
        return step.parts[0].loss.p.item()

    whole = trained(Step([part(fused=True, every=2)]), [1.0, 2.0, 3.0, 4.0, 5.0])
    first, second = Step([part(fused=True, every=2)]), Step([part(start=9.0, fused=True, every=2)])
    trained(first, [1.0, 2.0, 3.0])
    second.load_state_dict(first.state_dict())
    assert trained(second, [4.0, 5.0]) == whole


def test_a_part_never_touches_anothers_parameters():
    shared = nn.Parameter(torch.ones(1))
    a = TensorDictModule(nn.Identity(), in_keys=["x"], out_keys=["loss_a"])
    a.forward = lambda td: TensorDict(loss_a=(shared * a_own).sum())
    a_own = nn.Parameter(torch.ones(1))
    Step([Part(a, torch.optim.SGD([a_own], 0.1))])(data())
    assert shared.grad is None and a_own.item() == pytest.approx(0.9)


def test_annealing_falls_to_zero_and_stays_there():
    module = nn.Module()
    module.register_buffer("coeff", torch.tensor(0.4))
    p = part(fused=True)
    schedule = Annealing(100, optims=[p.optim], buffers=[(module, "coeff")])
    seen = []
    for _ in range(3):
        schedule.advance(50)
        seen.append((round(p.optim.param_groups[0]["lr"].item(), 6), round(module.coeff.item(), 6)))
    assert seen == [(0.05, 0.2), (0.0, 0.0), (0.0, 0.0)]


def test_errors():
    with pytest.raises(ValueError, match="fused=True"):
        part(stop_above=("kl", 1.0))
    with pytest.raises(ValueError, match="at least 1"):
        part(every=0)
    with pytest.raises(ValueError, match="mode='fast'"):
        Step([part()]).accelerate("fast")
    with pytest.raises(ValueError, match="needs CUDA"):
        Step([part()]).accelerate("cudagraph")
    with pytest.raises(ValueError, match="torch.tensor"):
        Annealing(10, optims=[part().optim])
    nameless = Part(TensorDictModule(nn.Linear(1, 1), in_keys=["x"], out_keys=["y"]), part().optim)
    with pytest.raises(KeyError, match="loss_"):
        Step([nameless])(data())


def test_compiled_losses_step_alike():
    eager, compiled = part(start=2.0), part(start=2.0)
    Step([eager])(data(3.0))
    Step([compiled]).accelerate("compile")(data(3.0))
    torch.testing.assert_close(eager.loss.p, compiled.loss.p)


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_gradients_that_come_transposed_move_the_right_entries(mode):
    """Fused Adam takes gradients as they lie in memory; einsum's backward returns some the other way round."""

    class Fit(TensorDictModuleBase):
        in_keys, out_keys = ["x"], ["loss_fit"]

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2, 3))

        def forward(self, td):
            goal = td["x"].sum(-1, keepdim=True) * torch.tensor([1.0, -2.0])
            return TensorDict(loss_fit=(torch.einsum("mf,nf->mn", td["x"], self.w) - goal).square().mean())

    torch.manual_seed(0)
    fit, batch = Fit(), TensorDict(x=torch.randn(64, 3), batch_size=[64])
    take = Step([Part(fit, adam([fit.w], 0.05))]).accelerate(mode)
    for _ in range(300):
        take(batch)
    torch.testing.assert_close(fit.w.detach(), torch.tensor([[1.0] * 3, [-2.0] * 3]), atol=0.02, rtol=0)
