"""Target networks: losses that have them, and updates that move them softly or copy them exactly every so often."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from tdmarl import host, tracing


def target_pairs(loss: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each target tensor of a loss with the trained one that it follows.

    Args:
        loss (nn.Module): has children ``target_<name>`` beside ``<name>``, as TorchRL's losses have.

    Raises:
        ValueError: if there are none, such as with ``delay_value=False``.
    """
    children, found = dict(loss.named_children()), False
    for name, target in children.items():
        source = children.get(name.removeprefix("target_"))
        if name.startswith("target_") and source is not None:
            found = True
            trained = source.state_dict(keep_vars=True)
            for key, tensor in target.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    yield tensor.data, trained[key].data
    if not found:
        raise ValueError(
            f"{type(loss).__name__} has no target networks, children target_<name> beside <name>: build it with "
            "delay_value=True, or leave the target update out."
        )


class DelayedLoss(LossModule):
    """A loss whose networks, and their targets, are ordinary modules under the names that TorchRL's losses use.

    For each network given to :meth:`own` there are the module ``<name>``, its parameters ``<name>_params``, and with
    ``delayed`` also ``target_<name>`` and ``target_<name>_params``; so TorchRL's ``SoftUpdate`` works on it.
    ``LossModule.convert_to_functional`` would swap parameters in and out of one module at every call, which takes
    longer than a small network's forward pass; here each module keeps its own.
    """

    def own(self, name: str, module: TensorDictModuleBase, delayed: bool) -> None:
        """Registers a network, and a target that starts as its copy."""
        networks = {name: module}
        if delayed:
            networks[f"target_{name}"] = copy.deepcopy(module).requires_grad_(False)
        self.__dict__.update(networks)
        for key, network in networks.items():
            setattr(self, f"{key}_params", TensorDictParams(TensorDict.from_module(network), no_convert=True))
        self._has_update_associated[name] = True  # TorchRL would warn that it knows of no updater

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> DelayedLoss:  # type: ignore[override]
        super()._apply(fn)
        for key in [name.removesuffix("_params") for name in self._modules if name.endswith("_params")]:
            network = self.__dict__[key]._apply(fn)  # its buffers, which are not among the parameters
            setattr(self, f"{key}_params", TensorDictParams(TensorDict.from_module(network), no_convert=True))
        return self

    def network(self, name: str) -> TensorDictModuleBase:
        """A network; the trained one in place of a target that there is not."""
        return self.__dict__.get(name) or self.__dict__[name.removeprefix("target_")]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are trained."""
        found = super().named_parameters(*args, **kwargs)
        return ((name, p) for name, p in found if not name.startswith("target_"))

    def __deepcopy__(self, memo: dict[int, Any]) -> DelayedLoss:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for key in [
            name for name in twin._modules if name.endswith("_params")
        ]:  # copied apart from the networks
            params = TensorDict.from_module(twin.__dict__[key.removesuffix("_params")])
            setattr(twin, key, TensorDictParams(params, no_convert=True))
        return twin

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """TorchRL calls this when keys change; these losses have no estimator of their own to tell."""


class TargetUpdate(nn.Module):
    """Lets a loss's targets follow its networks; what a :class:`~tdmarl.step.Step` calls ``after`` its parts.

    Either softly, ``target <- target + tau (trained - target)`` at every call, or by a copy at every ``every``-th
    call exactly (TorchRL's ``HardUpdate`` copies at every ``every + 1``-th). With both, softly at the first of every
    ``every`` calls, which are those at which a :class:`~tdmarl.step.Part` with the same ``every`` is trained (TD3). The
    count of calls is a tensor on the device and part of the state, so that the update can be captured and resumed.

    Args:
        loss (nn.Module): see :func:`target_pairs`; on its final device.
        tau (float, optional): of the soft update.
        every (int, optional): of the hard one; of a soft one 1 if not given.

    Example:
        >>> loss = nn.Module()
        >>> loss.net, loss.target_net = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> update = TargetUpdate(loss, every=2)
        >>> same = []
        >>> for _ in range(3):
        ...     update.step()
        ...     same.append(torch.equal(loss.net.weight, loss.target_net.weight))
        ...     _ = loss.net.weight.data.add_(1)
        >>> same
        [False, True, False]
    """

    def __init__(self, loss: nn.Module, *, tau: float | None = None, every: int | None = None) -> None:
        super().__init__()
        if tau is None and every is None:
            raise ValueError("Give tau (soft) or every (hard), or both; got neither.")
        if tau is not None and not 0 < tau <= 1:
            raise ValueError(f"tau={tau} must be above 0 and at most 1.")
        if every is not None and every < 1:
            raise ValueError(f"every={every} must be at least 1.")
        self._given = tau, every
        self.tau, self.every = 1.0 if tau is None else tau, every or 1
        self.due = 0 if tau is None else 1 % self.every  # which of every so many calls
        self.__dict__["_loss"] = loss  # not a part of the state
        pairs = list(target_pairs(loss))
        self._targets, self._trained = [t for t, _ in pairs], [s for _, s in pairs]
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=self._targets[0].device))

    @torch.no_grad()
    def step(self) -> None:
        """After an update."""
        self.count += 1
        if self.every == 1:
            self._move(self.tau)
        elif host.is_free(self.count.device) and not tracing.is_recording():  # reading it waits for nothing
            if int(self.count) % self.every == self.due:
                self._move(self.tau)
        else:  # lerp by 0 or 1 is exact
            self._move((self.count % self.every == self.due).to(self._targets[0].dtype) * self.tau)

    def _move(self, weight: float | Tensor) -> None:
        if isinstance(weight, Tensor):
            torch._foreach_lerp_(self._targets, self._trained, [weight] * len(self._targets))
        elif weight == 1:
            torch._foreach_copy_(self._targets, self._trained)
        else:
            torch._foreach_lerp_(self._targets, self._trained, weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetUpdate:
        """Of the loss's copy, whose tensors are others."""
        tau, every = self._given
        twin = TargetUpdate(copy.deepcopy(self.__dict__["_loss"], memo), tau=tau, every=every)
        twin.count.copy_(self.count)
        memo[id(self)] = twin
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The same as :meth:`step`."""
        self.step()
