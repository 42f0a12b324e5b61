"""bfloat16 in the products of hidden layers, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from test_compiled_step import accelerate
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from toys import ToyEnv

import tdmarl
from tdmarl.nets import AgentLinear, AgentMLP
from tdmarl.precision import set_precision

OFF_POLICY = {"num_updates": 1, "minibatch_size": 20, "buffer_size": 200, "hidden": (16, 16)}
ON_POLICY = {"num_epochs": 1, "minibatch_size": 20, "hidden": (16, 16)}
ALGORITHMS = {
    "mappo": (0, tdmarl.mappo, ON_POLICY),
    "ippo, own networks": (3, tdmarl.ippo, ON_POLICY | {"share_params": False}),
    "happo": (0, tdmarl.happo, ON_POLICY),
    "qmix": (3, tdmarl.qmix, OFF_POLICY),
    "maddpg": (0, tdmarl.maddpg, OFF_POLICY),
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
KEEPING = PRODUCTS | {
    "t",
    "transpose",
    "view",
    "_unsafe_view",
    "expand",
    "unsqueeze",
    "select",
    "permute",
    "squeeze",
}


class Types(TorchDispatchMode):
    """Which types of numbers are multiplied as matrices, and which of the operations are in bfloat16."""

    def __init__(self):
        super().__init__()
        self.multiplied, self.rounded = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.__name__.split(".")[0], func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, out)) if isinstance(x, Tensor)]
        if name in PRODUCTS:
            self.multiplied += [x.dtype for x in args if isinstance(x, Tensor)]
        if any(x.dtype == torch.bfloat16 for x in tensors):
            self.rounded.add(name)
        return out


def build(name, precision):
    choices, make, options = ALGORITHMS[name]
    env = ToyEnv(choices=choices)
    algo = make(env, precision=precision, **options)
    return env, algo, tdmarl.Collector(env, algo.explore, frames_per_batch=20, seed=0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_what_hidden_layers_multiply_is_rounded(name):
    """Acting, preparing, losses and their gradients; all that is kept is float32."""
    env, algo, collector = build(name, "bfloat16")
    parts = {}
    with Types() as parts["acting"]:
        batch = collector.rollout()
    with Types() as parts["learning"]:
        metrics = algo.learner(batch)
    for types in parts.values():
        assert set(types.multiplied) == {torch.float32, torch.bfloat16}
        allowed = KEEPING | {"_to_copy", "clone", "detach", "sum", "empty_like", "stack", "select_backward"}
        assert types.rounded <= allowed, types.rounded - allowed
    kept = [*pytree.tree_leaves(algo.learner.state_dict()), *batch.values(True, True), *metrics.values()]
    assert not any(x.dtype == torch.bfloat16 for x in kept if isinstance(x, Tensor))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_results_are_float32s_to_the_digits_that_are_left(name):
    found = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        _, algo, collector = build(name, precision)
        found[precision] = algo.learner(collector.rollout())
    for key in found["float32"].keys():
        one, other = (found[p][key] for p in ("float32", "bfloat16"))
        torch.testing.assert_close(
            one, other, rtol=0.05, atol=0.02, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert any(
        not torch.equal(found["float32"][key], found["bfloat16"][key]) for key in found["float32"].keys()
    )


@pytest.mark.parametrize("simulator", ["toy", "recorded"])
def test_a_policy_rounds_alike_where_it_acts_and_where_it_learns(simulator):
    """The first minibatch's ratios are one; not so if only learning rounds."""
    env = ToyEnv() if simulator == "toy" else tdmarl.VmasEnv("simple", num_envs=4, seed=0, mode="trace")
    found = []
    for acting in ("bfloat16", "float32"):
        algo = tdmarl.mappo(env, precision=acting, **ON_POLICY)
        for parameter in algo.policy.parameters():
            parameter.data.mul_(3)  # the first policy is nearly the same whatever it sees
        batch = tdmarl.Collector(env, algo.explore, frames_per_batch=20, seed=0).rollout()
        set_precision("bfloat16", algo.policy)
        found.append(algo.learner(batch)["kl_approx"].item())
    assert found[0] < 1e-9 < 1e-7 < found[1]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_recorded_step_rounds_the_same(name):
    learned = []
    for recorded in (False, True):
        torch.manual_seed(0)
        _, algo, collector = build(name, "bfloat16")
        steps = accelerate(algo.learner) if recorded else []
        for _ in range(2):
            metrics = algo.learner(collector.rollout())
        assert all(step.reason is None for step in steps)
        learned.append([*metrics.values(), *algo.policy.parameters()])
    for plain, found in zip(*learned):
        torch.testing.assert_close(plain, found, rtol=1e-3, atol=1e-4)


class Error(nn.Module):
    """``loss_x``: the mean square of a network's error."""

    in_keys, out_keys = ["x", "y"], ["loss_x"]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = AgentMLP(1, 4, 1, hidden=(16,))
        set_precision("bfloat16", self.net)

    def forward(self, td):
        return TensorDict(loss_x=(self.net(td["x"]) - td["y"]).square().mean())


def test_a_compiled_step_learns_the_same():
    """The only test here that compiles."""
    x = torch.randn(32, 1, 4, generator=torch.Generator().manual_seed(0))
    rows = TensorDict(x=x, y=x.sum(-1, keepdim=True), batch_size=[32])
    found = []
    for mode in ("eager", "compile"):
        loss = Error()
        step = tdmarl.Step([tdmarl.Part(loss, tdmarl.step.adam([*loss.parameters()], 0.01))])
        take = step.accelerate(mode)
        found.append([take(rows.clone())["loss_x"] for _ in range(20)])
    assert take.reason is None and found[0][-1] < found[0][0] / 2
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("share", [True, False])
def test_a_product_in_bfloat16_by_hand(share):
    """Eight binary digits: 257 is 256 and 1.01 is 1.0078125 before they are multiplied, 258 is 258."""
    layer = AgentLinear(2, 1, 1, share=share)
    nn.init.constant_(layer.weight, 1.01)
    layer.products = torch.bfloat16
    x = torch.tensor([[257.0], [2.0]])
    assert layer(x).flatten().tolist() == [258.0, 2.015625]
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.sum() == 258.0


def test_what_cannot_be_rounded_is_refused():
    env = ToyEnv()
    with pytest.raises(ValueError, match="one of .*'bfloat16'"):
        tdmarl.mappo(env, precision="half")
    with pytest.raises(ValueError, match=r"set_float32_matmul_precision\('high'\)"):
        tdmarl.mappo(env, precision="tf32")
    with pytest.raises(ValueError, match="recurrent"):
        tdmarl.mappo(env, precision="bfloat16", recurrent="gru")
    with pytest.raises(ValueError, match="conjugate gradients"):
        tdmarl.hatrpo(env, precision="bfloat16")
    with pytest.raises(ValueError, match="torch.autocast"):
        set_precision("bfloat16", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="there are none"):
        tdmarl.mappo(env, precision="bfloat16", hidden=())
