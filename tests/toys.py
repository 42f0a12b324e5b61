"""A small environment and small networks that take every axis the library promises; nothing of tdmarl is used."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase


class ToyEnv(EnvBase):
    """Agents that see noise, their own index and the time; the reward is minus the distance of action and target.

    Args:
        batch (sequence of int): leading dimensions: environments, or seeds and environments.
        groups (dict): group name to (agents, observation size, action size).
        horizon (int): steps until ``terminated`` (or ``truncated``, with ``truncate``).
        choices (int): discrete actions instead of continuous ones.
        mortal (bool): the last agent of each group dies in the first step; its ``terminated`` and ``mask`` say so.
    """

    def __init__(
        self, batch=(4,), groups=None, horizon=5, choices=0, mortal=False, truncate=False, state=False, seed=0
    ):
        super().__init__(batch_size=list(batch))
        self.groups = groups or {"agents": (3, 4, 2)}
        self.group_map = {g: [f"{g}_{i}" for i in range(n)] for g, (n, _, _) in self.groups.items()}
        self.horizon, self.choices, self.mortal, self.truncate = horizon, choices, mortal, truncate
        self.shows_state = state
        self.random = torch.Generator().manual_seed(seed)
        self.time = torch.zeros(*batch, 1, dtype=torch.int64)
        observations, actions, rewards = (
            Composite(shape=batch),
            Composite(shape=batch),
            Composite(shape=batch),
        )
        for g, (n, o, a) in self.groups.items():
            entries = {"observation": Unbounded((*batch, n, o))}
            if mortal:
                entries["mask"] = Binary(shape=(*batch, n), dtype=torch.bool)
            if choices:
                entries["action_mask"] = Binary(shape=(*batch, n, choices), dtype=torch.bool)
            action = Categorical(choices, shape=(*batch, n)) if choices else Bounded(-1, 1, (*batch, n, a))
            observations[g] = Composite(entries, shape=(*batch, n))
            actions[g] = Composite({"action": action}, shape=(*batch, n))
            rewards[g] = Composite({"reward": Unbounded((*batch, n, 1))}, shape=(*batch, n))
        if state:
            observations["state"] = Unbounded((*batch, 2))
        self.observation_spec, self.action_spec, self.reward_spec = observations, actions, rewards
        names = ("done", "terminated", "truncated")
        ends = Composite({k: Binary(shape=(*batch, 1), dtype=torch.bool) for k in names}, shape=batch)
        for g, (n, _, _) in self.groups.items() if mortal else ():
            flags = {k: Binary(shape=(*batch, n, 1), dtype=torch.bool) for k in names}
            ends[g] = Composite(flags, shape=(*batch, n))
        self.done_spec = ends

    def _show(self, out: dict) -> TensorDict:
        batch = tuple(self.batch_size)
        for g, (n, o, _) in self.groups.items():
            noise = torch.randn(*batch, n, o, generator=self.random)
            noise[..., 0] = torch.arange(n)
            noise[..., 1] = self.time / self.horizon
            out.setdefault(g, {})["observation"] = noise
            if self.mortal:
                alive = torch.ones(*batch, n, dtype=torch.bool)
                alive[..., -1] = self.time.squeeze(-1) == 0
                out[g]["mask"] = alive
                noise[~alive] = 0.0
                for name in ("done", "terminated", "truncated"):
                    over = out[name].unsqueeze(-2).expand(*batch, n, 1)
                    out[g][name] = over if name == "truncated" else over | ~alive.unsqueeze(-1)
            if self.choices:
                available = torch.ones(*batch, n, self.choices, dtype=torch.bool)
                available[..., 0] = self.time % 2 == 0
                if self.mortal:
                    available[~alive] = False
                out[g]["action_mask"] = available
            out[g] = TensorDict(out[g], batch_size=[*batch, n])
        if self.shows_state:
            out["state"] = torch.cat([self.time / self.horizon, self.time.float()], -1)
        return TensorDict(out, batch_size=batch)

    def _reset(self, tensordict: TensorDictBase | None = None, **_) -> TensorDict:
        at = torch.ones_like(self.time, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            at = tensordict["_reset"].reshape(at.shape)
        self.time = torch.where(at, 0, self.time)
        no = torch.zeros_like(at)
        return self._show({"done": no, "terminated": no.clone(), "truncated": no.clone()})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.time = self.time + 1
        over = self.time >= self.horizon
        no = torch.zeros_like(over)
        out: dict = {
            "done": over,
            "terminated": no if self.truncate else over,
            "truncated": over if self.truncate else no,
        }
        for g, (n, _, _) in self.groups.items():
            action = tensordict[g, "action"].float()
            action = action.unsqueeze(-1) if self.choices else action
            out[g] = {"reward": -(action - 0.5).abs().sum(-1, keepdim=True)}
        return self._show(out)

    def _set_seed(self, seed: int | None) -> None:
        self.random.manual_seed(seed or 0)

    def state_dict(self, *args, **kwargs) -> dict:
        return {"time": self.time.clone(), "random": self.random.get_state()}

    def load_state_dict(self, state_dict, strict=True, assign=False) -> None:
        self.time = state_dict["time"].clone()
        self.random.set_state(state_dict["random"])


READS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "masked_select", "equal", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave.Tensor",
}  # fmt: skip


class NoHostRead(TorchDispatchMode):
    """Fails where the host reads a tensor: its value, or how many of its entries are set.

    ``numpy`` and ``tolist`` pass it by; on ``meta`` they raise, too.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, overload = func.__name__, func.__name__.split(".")[0]
        indices = args[1] if overload in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        assert not by_mask and not {name, overload} & READS, f"the host reads a tensor: {name}"
        return func(*args, **(kwargs or {}))


class _FromNumbers(TorchFunctionMode):
    """Notes the tensors on ``meta`` that are made from Python's numbers, which a GPU would have to be sent."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if makes and out.is_meta and not (args and isinstance(args[0], Tensor) and func is not Tensor.new_tensor):
            self.made.append(f"{func.__name__}({args[-1]})")
        return out


class OnMeta(TorchDispatchMode):
    """Lets whole iterations run on ``meta``, where a tensor has no values: who reads one fails.

    Fused Adam, which has no kernel there, does nothing.

    Args:
        answers (bool): say 1 to who reads, as specs and networks do while they are built.

    Attributes:
        copied (list of str): operations that send tensors between the host and ``meta``, for which a GPU waits, too.
    """

    def __init__(self, answers=False):
        super().__init__()
        self.answers, self.copied = answers, []
        self._numbers = _FromNumbers(self.copied)

    def __enter__(self):
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name.startswith("_fused_adam_"):
            return None
        if self.answers and name.startswith(("_local_scalar_dense", "allclose")) and args[0].is_meta:
            return 1
        out = func(*args, **(kwargs or {}))
        if not name.startswith(("_record_function", "profiler")):
            found = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            moved = [x for x in found if not x.is_meta and (x.ndim or "copy" in name)]
            if moved and len(moved) < len(found) and any(x.is_meta for x in found):
                self.copied.append(f"{name} of {[tuple(x.shape) for x in moved]}")
        return out


class SeededLinear(nn.Module):
    """One linear layer per seed: ``[S, ..., in] -> [S, ..., out]``."""

    def __init__(self, seeds: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(seeds, n_in, n_out) / n_in**0.5)
        self.bias = nn.Parameter(torch.zeros(seeds, n_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return (torch.bmm(flat, self.weight) + self.bias.unsqueeze(1)).reshape(*x.shape[:-1], -1)


def record(run, count):
    """Stands in for the capture of a CUDA graph: a replay writes its results to where they were when it was captured.

    Args:
        run (callable): with a cell `outputs`, the list of what it made.
        count (list of one int): how many replays there were.
    """
    for _ in range(3):
        run()
    cells = dict(zip(run.__code__.co_freevars, run.__closure__ or ()))
    outputs = cells["outputs"].cell_contents
    static = list(outputs)

    def replay():
        run()
        for place, value in zip(static, outputs):
            if torch._debug_has_internal_overlap(place) != 1:  # else a view of another result, repeated
                place.copy_(value)
        outputs[:] = static
        count[0] += 1

    return replay
