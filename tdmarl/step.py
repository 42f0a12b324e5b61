"""One optimization step as one function of a minibatch: the only place in the library that calls ``backward``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdmarl import reduce
from tdmarl.compiled_step import CompiledStep

MODES = ("auto", "eager", "compile", "cudagraph")


def adam(params: Sequence[Tensor], lr: float, mode: str = "auto", eps: float = 1e-5) -> torch.optim.Optimizer:
    """The Adam of all algorithms: fused, its learning rate a tensor that a schedule may change in place.

    Args:
        params (sequence of Tensor): what it trains.
        lr (float): the learning rate.
        mode (str): see :meth:`Step.accelerate`; a captured step needs it capturable.
        eps (float): as the papers' code.
    """
    device = params[0].device
    capturable = device.type == "cuda" and mode == "cudagraph"
    optim = torch.optim.Adam(params, lr, eps=eps, fused=True, capturable=capturable)
    for group in optim.param_groups:  # given a tensor, Adam would read it
        group["lr"] = torch.tensor(lr, device=device)
    return optim


@dataclass(frozen=True)
class Part:
    """A loss with the optimizer of the parameters it trains.

    Args:
        loss (TensorDictModuleBase): writes scalars; those named ``loss_*`` are summed and differentiated, the
            others are metrics. Its ``in_keys`` (and ``optional_keys``, if it has that attribute) are what it reads.
        optim (torch.optim.Optimizer): over what this part trains, and nothing else gets a gradient from it.
        max_grad_norm (float, optional): clips the gradients of this part by their common norm; None measures only.
        every (int): take part in every so many steps only, such as TD3's delayed actor.
        stop_above (tuple of str and float, optional): once the metric of that name exceeds the number, this part
            stands still until :meth:`Step.begin` is called; how PPO stops early by KL. Decided on the device, so it
            needs a fused optimizer: its ``found_inf`` leaves parameters, moments and step count unchanged.
        name (str): tells this part's ``grad_norm_<name>`` from the others'.
        prefix (str): put before all of this part's metrics, such as the group's name where there are several.
        row_keys (sequence of NestedKey): entries ``[M, ...]`` that the loss writes into the minibatch, such as the
            priorities of its rows; the step hands them back beside the metrics.
    """

    loss: TensorDictModuleBase
    optim: torch.optim.Optimizer
    max_grad_norm: float | None = None
    every: int = 1
    stop_above: tuple[str, float] | None = None
    name: str = ""
    prefix: str = ""
    row_keys: Sequence[NestedKey] = ()

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1.")
        if self.stop_above is not None and not self.optim.defaults.get("fused"):
            raise ValueError(
                "stop_above needs an optimizer made with fused=True, whose found_inf can hold a step back."
            )

    @property
    def params(self) -> list[Tensor]:
        """The parameters that the optimizer holds and that are not frozen."""
        return [p for group in self.optim.param_groups for p in group["params"] if p.requires_grad]


class Step:
    """Losses, optimizers, clipping and target update, as one function of a minibatch.

    The parts run in order, each with a backward to its own parameters, its own clipping and its own optimizer
    step; then the targets are updated. Nothing is read back to the host, so the call can be recorded and compiled.

    Args:
        parts (sequence of Part): such as PPO's actor and critic, or MADDPG's critic and then its actor.
        after (callable, optional): called last, such as a :class:`~tdmarl.targets.TargetUpdate` (a module, so its
            count is part of the state) or the ``step`` of one of TorchRL's updaters.
        seed_axis (bool): the first dimension of parameters and data is one of seeds: losses of all seeds are added
            up (they share no parameter), metrics are ``[seeds]``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> square = TensorDictModule(torch.nn.Linear(1, 1), in_keys=["x"], out_keys=["loss_square"])
        >>> step = Step([Part(square, torch.optim.SGD(square.parameters(), 0.1))])
        >>> sorted(step(TensorDict(x=torch.ones(1))).keys())
        ['grad_norm', 'loss_square']
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        after: Callable[[], Any] | None = None,
        seed_axis: bool = False,
    ) -> None:
        if not parts:
            raise ValueError("Step needs at least one Part(loss, optim).")
        if seed_axis and any(part.stop_above for part in parts):
            raise ValueError("stop_above would stop all seeds at once: train the seeds apart, or without it.")
        self.parts, self.after, self.seed_axis, self.count = list(parts), after, seed_axis, 0
        self.begun = 0  # how often a batch began or a state was loaded
        for part in self.parts:
            if part.stop_above is not None:
                part.optim.found_inf = torch.zeros((), device=part.params[0].device)  # type: ignore[attr-defined]

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the losses need of a minibatch."""
        return list(dict.fromkeys(key for part in self.parts for key in part.loss.in_keys))

    @property
    def optional_keys(self) -> list[NestedKey]:
        """What the losses read where it is there: masks."""
        return list(dict.fromkeys(k for part in self.parts for k in getattr(part.loss, "optional_keys", ())))

    @property
    def row_keys(self) -> list[NestedKey]:
        """What comes back beside the metrics for each row."""
        return [key for part in self.parts for key in part.row_keys]

    def begin(self) -> None:
        """A new batch begins: parts that stopped early go on."""
        self.begun += 1
        for part in self.parts:
            if part.stop_above is not None:
                part.optim.found_inf.zero_()  # type: ignore[attr-defined]

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        """Takes one step.

        Args:
            batch (TensorDictBase): ``[M]`` or ``[M, L]``; ``[seeds, M, ...]`` with a seed axis.

        Returns:
            TensorDict: detached scalars: what the losses write, and each part's ``grad_norm`` before clipping; and
            the parts' ``row_keys``.
        """
        metrics = self.take(batch, self.due())
        self.count += 1
        return metrics

    def due(self) -> tuple[bool, ...]:
        """Which parts take part in the next step."""
        return tuple(self.count % part.every == 0 for part in self.parts)

    def take(self, batch: TensorDictBase, due: Sequence[bool]) -> TensorDict:
        """A step of some of the parts, which changes tensors alone: it can be recorded."""
        metrics = TensorDict({}, device=batch.device)
        with reduce.seed_axis(self.seed_axis):
            for part, takes_part in zip(self.parts, due):
                if takes_part:
                    metrics.update(self._update(part, batch))
        if self.after is not None:
            self.after()
        return metrics

    @staticmethod
    def _update(part: Part, batch: TensorDictBase) -> dict[str, Tensor]:
        params = part.params
        given = batch.copy()  # a module may return its inputs, too, or write into them
        out = part.loss(given)
        losses = [value for key, value in out.items() if key.startswith("loss_")]
        if not losses:
            raise KeyError(
                f"{type(part.loss).__name__} wrote {list(out.keys())}; at least one entry must be named loss_*."
            )
        total = torch.stack([loss.sum() for loss in losses]).sum()
        for p, grad in zip(params, torch.autograd.grad(total, params, allow_unused=True)):
            p.grad = _laid_out_as(p, grad)
        reduce.sum_gradients(params)
        norm = reduce.clip_gradients(params, part.max_grad_norm)
        if part.stop_above is not None:
            key, limit = part.stop_above
            found = part.optim.found_inf  # type: ignore[attr-defined]
            found.copy_(torch.maximum(found, (out.get(key) > limit).to(found.dtype)))
        part.optim.step()
        label = f"grad_norm_{part.name}" if part.name else "grad_norm"
        written = [key for key in out.keys() if key not in batch.keys()]
        found = {key: reduce.scalar(out.get(key).detach()) for key in written} | {label: norm.detach()}
        found = {f"{part.prefix}_{key}": value for key, value in found.items()} if part.prefix else found
        return found | {key: given.get(key) for key in part.row_keys}

    def accelerate(self, mode: str) -> Callable[[TensorDictBase], TensorDictBase]:
        """The step as ``mode`` asks: itself, or as one compiled function, or captured as one CUDA graph.

        Args:
            mode (str): ``eager``; ``compile`` records the whole step and compiles it, see
                :class:`~tdmarl.compiled_step.CompiledStep`; ``cudagraph`` captures that, too (CUDA only); ``auto`` is
                eager.

        Raises:
            ValueError: for an unknown mode, or one that the parameters' device cannot have.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {MODES}.")
        device = self.parts[0].params[0].device
        if mode == "cudagraph" and device.type != "cuda":
            raise ValueError(
                f"mode='cudagraph' needs CUDA; the parameters are on {device}. Use 'eager' or 'compile'."
            )
        return CompiledStep(self, mode) if mode in ("compile", "cudagraph") else self

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes: losses (with targets, moments and coefficients), optimizers, the count."""
        parts = [{"loss": part.loss.state_dict(), "optim": part.optim.state_dict()} for part in self.parts]
        state = {"count": self.count, "parts": {str(i): part for i, part in enumerate(parts)}}
        return state | ({"after": self.after.state_dict()} if isinstance(self.after, nn.Module) else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.count = int(state["count"])
        self.begun += 1
        for i, part in enumerate(self.parts):
            saved = state["parts"][str(i)]
            part.loss.load_state_dict(saved["loss"])
            part.optim.load_state_dict(
                copy.deepcopy(saved["optim"])
            )  # it would keep references to the tensors
        if isinstance(self.after, nn.Module):
            self.after.load_state_dict(state["after"])


def _laid_out_as(p: Tensor, grad: Tensor | None) -> Tensor | None:
    """The gradient in its parameter's memory layout, which fused optimizers take for granted.

    ``backward`` sees to it; what ``torch.autograd.grad`` returns may be transposed, and fused Adam would then update
    entry by entry of memory, the wrong ones.
    """
    if grad is None or grad.stride() == p.stride():
        return grad
    return torch.empty_like(p).copy_(grad)


class Annealing:
    """Lets numbers fall linearly to zero over a horizon of frames: learning rates and coefficients, on the device.

    Args:
        frames (int): the horizon; after it the numbers stay at zero.
        optims (sequence of Optimizer): whose learning rates fall; made with ``lr`` a tensor.
        buffers (sequence of (module, name)): coefficients that are buffers, such as ``(loss, "entropy_coeff")``.
    """

    def __init__(
        self,
        frames: int,
        *,
        optims: Sequence[torch.optim.Optimizer] = (),
        buffers: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        if frames < 1:
            raise ValueError(f"The annealing horizon must be at least one frame; got {frames}.")
        self.horizon, self.frames = frames, 0
        self._numbers: list[tuple[Callable[[], Tensor], Tensor]] = []
        for optim in optims:
            for index, group in enumerate(optim.param_groups):
                if not isinstance(group["lr"], Tensor):
                    raise ValueError(
                        "Annealing changes lr in place: make the optimizer with lr=torch.tensor(...)."
                    )
                start = group["lr"].detach().to(torch.float64, copy=True)
                self._numbers.append((lambda o=optim, i=index: o.param_groups[i]["lr"], start))  # type: ignore[misc]
        for module, name in buffers:
            start = getattr(module, name).detach().to(torch.float64, copy=True)
            self._numbers.append((lambda m=module, n=name: getattr(m, n), start))  # type: ignore[misc]

    def advance(self, frames: int) -> None:
        """So many more frames were collected."""
        self.frames += frames
        left = max(0.0, 1 - self.frames / self.horizon)
        for number, start in self._numbers:
            number().copy_(start * left)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is; the numbers themselves are in the step's state."""
        return {"frames": self.frames}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; the numbers are those of this schedule's own horizon."""
        self.frames = int(state["frames"])
        self.advance(0)
