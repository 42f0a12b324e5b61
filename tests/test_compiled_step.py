"""The recorded step against the plain one, what makes it be recorded anew, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from toys import ToyEnv, record

import tdmarl
from tdmarl import compiled_step, cuda_graph
from tdmarl.compiled_step import CompiledStep
from tdmarl.step import Part, Step, adam

BATCH, FRAMES = 4, 20
OFF_POLICY = {"num_updates": 4, "minibatch_size": 8, "buffer_size": 200}
ALGORITHMS = {
    "mappo": (0, lambda env: tdmarl.mappo(env, num_epochs=2, minibatch_size=8, entropy_coeff=0.1, max_kl=0.01)),
    "ippo, discrete": (3, lambda env: tdmarl.ippo(env, num_epochs=2, minibatch_size=8)),
    "happo": (0, lambda env: tdmarl.happo(env, num_epochs=2, minibatch_size=8)),
    "gru": (0, lambda env: tdmarl.mappo(env, num_epochs=1, minibatch_size=4, recurrent="gru", chunk_length=5)),
    "maddpg": (0, lambda env: tdmarl.maddpg(env, **OFF_POLICY)),
    "matd3": (
        0, lambda env: tdmarl.maddpg(env, twin=True, actor_every=2, target_noise=0.2, prioritized=True, **OFF_POLICY)
    ),
    "maddpg, discrete": (3, lambda env: tdmarl.maddpg(env, **OFF_POLICY)),
    "qmix": (3, lambda env: tdmarl.qmix(env, tau=None, target_every=3, **OFF_POLICY)),
    "iql": (3, lambda env: tdmarl.iql(env, **OFF_POLICY)),
}  # fmt: skip


def accelerate(learner, mode="trace"):
    """Records a learner's steps."""
    if hasattr(learner, "agents"):
        if all(isinstance(agent.step, Step) for agent in learner.agents):  # those in a trust region are called as are
            learner.accelerated = [CompiledStep(agent.step, mode) for agent in learner.agents]
        return [x for x in learner.accelerated if isinstance(x, CompiledStep)] + accelerate(learner.critic, mode)
    learner.accelerated = CompiledStep(learner.step, mode)
    return [learner.accelerated]


def trained(choices, make, mode, iterations=3):
    env = ToyEnv(batch=(BATCH,), choices=choices)
    torch.manual_seed(0)
    algo = make(env)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=FRAMES, seed=0)
    steps = accelerate(algo.learner, mode) if mode else []
    for _ in range(iterations):
        metrics = algo.learner(collector.rollout())
    return algo, metrics, steps


def same(one, two, tolerance):
    for key, x in one.items():
        if isinstance(x, dict):
            same(x, two[key], tolerance)
        elif isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, two[key], atol=tolerance, rtol=tolerance, msg=f"{key}")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_recorded_and_learns_the_same(name):
    """To rounding, random draws included; all that is saved is the same, moments and counts too."""
    plain, expected, _ = trained(*ALGORITHMS[name], None)
    recorded, found, steps = trained(*ALGORITHMS[name], "trace")
    assert all(step.reason is None and step.made.operations > 50 for step in steps)
    assert found.keys() == expected.keys()
    for key in expected.keys():
        torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=2e-5, msg=key)
    same(plain.learner.state_dict(), recorded.learner.state_dict(), 2e-5)
    assert torch.equal(
        plain.learner.generator.get_state() if hasattr(plain.learner, "generator") else torch.ones(1),
        recorded.learner.generator.get_state() if hasattr(plain.learner, "generator") else torch.ones(1),
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_cut_into_blocks_and_learns_the_same(name, monkeypatch):
    """But those that draw for each row: smoothed targets, and discrete actions by Gumbel's noise."""
    plain, expected, _ = trained(*ALGORITHMS[name], None)
    monkeypatch.setattr(compiled_step, "block_size", lambda graph, rows: 2 if rows % 2 == 0 else rows)
    cut, found, steps = trained(*ALGORITHMS[name], "trace")
    functions = [function for step in steps for function in step._functions.values()]
    draws = name in ("matd3", "maddpg, discrete")
    for function in functions:
        assert (function.blocks == 1) == draws, function.whole_because
        assert ("draws" in function.whole_because) == draws
        assert ("not in blocks of rows: " if draws else " blocks of rows") in function.describe()
    for key in expected.keys():
        torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=2e-5, msg=key)
    same(plain.learner.state_dict(), cut.learner.state_dict(), 2e-5)


class Line(TensorDictModule):
    """``loss_x = mean((w x + b - y)^2)``."""

    def __init__(self):
        super().__init__(nn.Identity(), in_keys=["x", "y"], out_keys=["loss_x"])
        self.w, self.b = nn.Parameter(torch.tensor([2.0, -1.0])), nn.Parameter(torch.zeros(1))
        self.scale = 1.0

    def forward(self, td):
        error = td["x"] @ self.w + self.b - td["y"]
        return TensorDict(loss_x=self.scale * error.square().mean(), seen=error.abs().mean())


def rows(seed=0, m=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 2, generator=generator)
    return TensorDict(x=x, y=x.sum(-1), batch_size=[m])


def pair(optim, mode="trace", **options):
    """Two equal steps, the second of which is recorded."""
    steps = []
    for _ in range(2):
        loss = Line()
        steps.append(Step([Part(loss, optim(loss), **options)]))
    return steps[0], steps[1], CompiledStep(steps[1], mode)


def weights(step):
    return torch.cat([p.detach().clone() for p in step.parts[0].loss.parameters()])


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"betas": (0.5, 0.8), "eps": 0.1}]
)
def test_adam_is_torchs_fused_one(options):
    plain, step, take = pair(
        lambda loss: torch.optim.Adam(loss.parameters(), torch.tensor(0.1), fused=True, **options),
        max_grad_norm=1.0,
    )
    for i in range(20):
        plain(rows(i)), take(rows(i))
    assert take.reason is None
    torch.testing.assert_close(weights(step), weights(plain), atol=1e-6, rtol=1e-6)


def test_a_part_that_stops_early_stands_still():
    plain, step, take = pair(lambda loss: adam([*loss.parameters()], 0.1), stop_above=("seen", 0.5))
    for i in range(6):
        if i % 3 == 0:
            plain.begin(), step.begin()
        plain(rows(i)), take(rows(i))
        torch.testing.assert_close(weights(step), weights(plain), atol=1e-6, rtol=1e-6)
    counts = [s.parts[0].optim.state[s.parts[0].loss.w]["step"] for s in (plain, step)]
    assert counts[0] == counts[1] < 6


def test_recording_is_no_step_and_no_draw():
    class Noisy(Line):
        def forward(self, td):
            return super().forward(td).update({"noise": torch.rand(()) + torch.rand(()) * 10})

    loss = Noisy()
    step = Step([Part(loss, adam([*loss.parameters()], 0.1))])
    before, state = weights(step), torch.get_rng_state()
    take = CompiledStep(step, "trace")
    take._function(rows())
    assert torch.equal(weights(step), before) and torch.equal(torch.get_rng_state(), state)
    assert not any(x.abs().sum() for x in step.parts[0].optim.state[loss.w].values())
    torch.manual_seed(3)
    found = [take(rows())["noise"] for _ in range(2)]
    torch.manual_seed(3)
    expected = [torch.rand(()) + torch.rand(()) * 10 for _ in range(2)]
    assert found == expected


def test_what_changed_is_recorded_anew():
    """A loaded state, a number of the loss, a parameter that was replaced, minibatches of another size."""
    plain, step, take = pair(lambda loss: adam([*loss.parameters()], 0.1))

    def go_on(m=8):
        for s in (plain, step):
            s.begin()
        plain(rows(m=m)), take(rows(m=m))
        torch.testing.assert_close(weights(step), weights(plain), atol=1e-6, rtol=1e-6)

    go_on()
    assert take._builds == 1
    go_on()
    assert take._builds == 1
    saved = step.state_dict()
    plain.load_state_dict(saved), step.load_state_dict(saved)
    go_on()
    assert take._builds == 2
    for s in (plain, step):
        s.parts[0].loss.scale = 3.0
    go_on()
    go_on(m=5)
    assert take._builds == 4 and take.reason is None
    for s in (plain, step):
        s.parts[0].optim.param_groups[0]["lr"].fill_(0.01)  # a tensor is read where it is
    go_on(m=5)
    assert take._builds == 4


def test_state_is_kept_to_the_last_bit():
    _, first, take = pair(lambda loss: adam([*loss.parameters()], 0.1))
    _, second, go_on = pair(lambda loss: adam([*loss.parameters()], 0.1))
    for i in range(3):
        take(rows(i))
    second.load_state_dict(first.state_dict())
    for i in range(3):
        take(rows(i)), go_on(rows(i))
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("blocks", [1, 4])
def test_compiled_it_is_nearly_the_plain_step_and_resumes_to_the_last_bit(blocks, monkeypatch):
    """The only test here that compiles."""
    monkeypatch.setattr(compiled_step, "block_size", lambda graph, rows: rows // blocks)
    plain, step, take = pair(lambda loss: adam([*loss.parameters()], 0.1), "compile")
    for i in range(4):
        saved = step.state_dict() if i == 2 else None
        before = weights(step)
        metrics, expected = take(rows(i)), plain(rows(i))
        torch.testing.assert_close(metrics["loss_x"], expected["loss_x"], atol=1e-5, rtol=1e-5)
        assert not torch.equal(weights(step), before)
        torch.testing.assert_close(weights(step), weights(plain), atol=1e-5, rtol=1e-5)
        assert saved is None or "parts" in saved
        assert take.made.blocks == blocks
    assert (" in 4 blocks of rows" in take.describe()) == (blocks == 4)
    assert take.describe().endswith(", its kernels recorded)")
    take.made._call.whole_because = "of a test"
    assert take.describe().endswith(", called through Python: of a test)")
    _, other, go_on = pair(lambda loss: adam([*loss.parameters()], 0.1), "compile")
    other.load_state_dict(step.state_dict())
    take(rows(9)), go_on(rows(9))
    assert torch.equal(weights(step), weights(other))


def test_captured_it_is_the_recorded_step(monkeypatch):
    """The capture is a stand-in: state stays where it is, metrics are copied out before the next replay."""
    count = [0]
    monkeypatch.setattr(cuda_graph, "_capture", lambda run: record(run, count))
    monkeypatch.setattr("tdmarl.cpu_graph.Compiled", lambda graph, inputs, options: graph)
    plain, step, take = pair(lambda loss: adam([*loss.parameters()], 0.1), "cudagraph")
    found = [take(rows(i))["loss_x"] for i in range(4)]
    expected = [plain(rows(i))["loss_x"] for i in range(4)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    torch.testing.assert_close(weights(step), weights(plain), atol=1e-6, rtol=1e-6)
    assert count[0] == 4


class Asking(Line):
    def forward(self, td):
        out = super().forward(td)
        if out["loss_x"] > 0:
            out["positive"] = torch.ones(())
        return out


class Sharing(Line):
    def __init__(self):
        super().__init__()
        self.part = self.w.data[:1]

    def forward(self, td):
        return super().forward(td).update({"part": self.part.sum()})


def with_hook():
    loss = Line()
    loss.register_forward_hook(lambda *args: None)
    return loss


@pytest.mark.parametrize("make, optim, reason", [
    (Asking, lambda ps: adam(ps, 0.1), r"test_compiled_step.py:\d+ reads a tensor's value"),
    (Sharing, lambda ps: adam(ps, 0.1), r"shape \(1,\) shares memory"),
    (with_hook, lambda ps: adam(ps, 0.1), "'Line' has hooks"),
    (Line, lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), "makes its state at its first step"),
    (Line, lambda ps: torch.optim.Adam(ps, torch.tensor(0.1), fused=True, amsgrad=True), "state at|amsgrad"),
])  # fmt: skip
def test_what_cannot_be_recorded_warns_once_and_runs_as_it_is(make, optim, reason):
    losses = [make(), make()]
    plain, step = (Step([Part(loss, optim([*loss.parameters()]))]) for loss in losses)
    take = CompiledStep(step, "compile")
    with pytest.warns(UserWarning, match=f"mode='eager': .*({reason})"):
        take(rows(0))
    plain(rows(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(rows(1)), plain(rows(1))
    assert torch.equal(weights(step), weights(plain)) and take.reason is not None


def test_what_follows_a_step_must_be_tensors_alone():
    """A list that grows and a count in Python are not; a target that follows is recorded."""

    class Delayed(Line):
        def __init__(self):
            super().__init__()
            self.target = nn.Parameter(self.w.detach().clone(), requires_grad=False)

    seen = []
    loss = Line()
    step = Step([Part(loss, adam([*loss.parameters()], 0.1))], after=lambda: seen.append(1))
    take = CompiledStep(step, "trace")
    with pytest.warns(UserWarning, match="changes from step to step"):
        take(rows())
    count = len(seen)
    take(rows())
    assert len(seen) == count + 1

    class Counter:
        n = 0

        def step(self):
            self.n += 1

    counter = Counter()
    take = CompiledStep(Step([Part(loss, adam([*loss.parameters()], 0.1))], after=counter.step), "trace")
    with pytest.warns(UserWarning, match="changes from step to step"):
        take(rows())

    delayed = Delayed()

    def follow():
        with torch.no_grad():
            delayed.target.lerp_(delayed.w, 0.5)

    step = Step([Part(delayed, adam([delayed.w, delayed.b], 0.1))], after=follow)
    take = CompiledStep(step, "trace")
    before = delayed.target.clone()
    for i in range(2):
        expected = before
        take(rows(i))
        before = delayed.target.clone()
        torch.testing.assert_close(before, (expected + delayed.w.detach()) / 2)
    assert take.reason is None


def test_without_a_compiler_it_runs_as_it_is(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nand more")

    plain, step, take = pair(lambda loss: adam([*loss.parameters()], 0.1), "compile")
    monkeypatch.setattr("tdmarl.cpu_graph.Compiled", missing)
    with pytest.warns(UserWarning, match=r"compiling failed: RuntimeError: No working C\+\+ compiler found\."):
        take(rows())
    plain(rows())
    assert torch.equal(weights(step), weights(plain))


def test_a_learning_rate_that_is_a_number_and_falls_is_named():
    _, step, take = pair(lambda loss: torch.optim.SGD(loss.parameters(), 0.1))
    with pytest.warns(UserWarning, match="must be a tensor"):
        for i in range(10):
            step.parts[0].optim.param_groups[0]["lr"] = 0.1 / (i + 1)
            take(rows(i))
    plain, _, _ = pair(lambda loss: torch.optim.SGD(loss.parameters(), 0.1))
    for i in range(10):
        plain.parts[0].optim.param_groups[0]["lr"] = 0.1 / (i + 1)
        plain(rows(i))
    torch.testing.assert_close(weights(step), weights(plain), atol=1e-6, rtol=1e-6)


def test_errors_of_a_loss_come_through_and_leave_the_step_as_it_was():
    _, step, take = pair(lambda loss: adam([*loss.parameters()], 0.1))
    before = weights(step)
    with pytest.raises(KeyError, match="y"):
        take(rows().exclude("y"))
    assert torch.equal(weights(step), before) and take.reason is None
    take(rows())
    assert not torch.equal(weights(step), before)
