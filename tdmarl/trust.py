"""A trust region step: conjugate gradients and a line search in place of an optimizer, for one agent at a time.

With the surrogate ``L(x) = E[r(x) M A]`` of an actor's parameters ``x``, its gradient ``g``, and the Hessian ``F`` of
``KL(pi_old || pi_x)`` at the old parameters, the full step is

    ``s = sqrt(2 delta / (d^T F d)) d``,  ``F d = g``

which to second order moves the policy by ``delta``. Of ``s, c s, c^2 s, ...`` the first one is taken that keeps the
measured ``KL`` below ``delta`` and gains at least a given part of what ``g`` promises; if there is none, the actor
stays as it is. Source: Schulman et al. 2015 (TRPO); details as in HARL's HATRPO, the damping of ``F`` included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import kl_divergence
from torchrl.modules import set_recurrent_mode

from tdmarl import host, reduce
from tdmarl.step import MODES


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, steps: int = 10, tol: float = 1e-10
) -> Tensor:
    """Solves ``F x = b`` for a positive definite ``F`` that is given by its products, without a host read.

    Args:
        product (callable): ``x -> F x``.
        b (Tensor): ``[k]``.
        steps (int): at most; in exact arithmetic ``k`` solve it.
        tol (float): once the squared residual is below this, ``x`` stays as it is.

    Example:
        >>> F = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda x: F @ x, torch.tensor([3.0, 4.0])).round(decimals=4)
        tensor([1., 1.])
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    size = residual.dot(residual)
    for _ in range(steps):
        running = size > tol
        moved = product(direction)
        length = (size / direction.dot(moved)).masked_fill(~running, 0)
        x, residual = x + length * direction, residual - length * moved
        before, size = size, residual.dot(residual)
        direction = residual + (size / before).masked_fill(~running, 0) * direction
    return x


class TrustRegionStep:
    """HATRPO's update of an agent, in place of a :class:`~tdmarl.Step` and called like one.

    Means are over live agents. There is no optimizer, so the state is the actor's. Nothing is read back to the host on
    a GPU; on a CPU the line search ends where a step is accepted.

    Args:
        actor (TensorDictModuleBase): a ``ProbabilisticActor`` of one agent, with flat keys, whose distribution has a
            closed-form ``kl_divergence``: ours have, and most of torch's.
        max_kl (float): ``delta``.
        cg_steps (int): of the conjugate gradients.
        damping (float): added to the diagonal of ``F``.
        line_search_steps (int): how many lengths are tried.
        backtrack (float): ``c``, from one to the next.
        accept_ratio (float): the least part of the gain promised.

    Returns:
        calling it with a batch ``[M]`` or ``[M, L]`` returns a tensordict of scalars: ``accepted`` (1 or 0),
        ``kl`` as measured and ``surrogate_gain`` (0 where nothing was accepted), ``expected_gain`` of the full step,
        ``entropy``, ``loss_objective`` and ``grad_norm_actor``, all three before the step.

    Reads ``"advantage"`` ``[*B, 1]``, which holds the factor, ``"action"``, ``"action_log_prob"`` ``[*B]``, the
    actor's inputs, and ``"mask"`` ``[*B]`` if there.
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        *,
        max_kl: float = 0.01,
        cg_steps: int = 10,
        damping: float = 0.1,
        line_search_steps: int = 10,
        backtrack: float = 0.8,
        accept_ratio: float = 0.5,
    ) -> None:
        positive = {"max_kl": max_kl, "cg_steps": cg_steps, "line_search_steps": line_search_steps}
        for name, number in positive.items():
            if number <= 0:
                raise ValueError(f"{name}={number} must be above 0.")
        for name, number in (("backtrack", backtrack), ("accept_ratio", accept_ratio)):
            if not 0 < number < 1:
                raise ValueError(f"{name}={number} must be between 0 and 1.")
        if damping < 0:
            raise ValueError(f"damping={damping} must not be negative.")
        self.actor: Any = actor
        self.params = [p for p in actor.parameters() if p.requires_grad]
        self.max_kl, self.cg_steps, self.damping = max_kl, cg_steps, damping
        self.lengths = [backtrack**k for k in range(line_search_steps)]
        self.accept_ratio = accept_ratio
        self.in_keys: list[NestedKey] = [*actor.in_keys, "action", "action_log_prob", "advantage"]
        self.optional_keys: list[NestedKey] = ["mask"]

    def begin(self) -> None:
        """A new batch begins: nothing is carried over from the last one."""

    def accelerate(self, mode: str) -> Callable[[TensorDictBase], TensorDictBase]:
        """The step itself, for ``eager`` and ``auto``.

        Raises:
            ValueError: for another mode: neither the compiler nor a captured graph takes second derivatives.
        """
        if mode not in ("auto", "eager"):
            known = (
                f"one of {MODES}" if mode not in MODES else "'auto' or 'eager' here, for second derivatives"
            )
            raise ValueError(f"mode={mode!r} must be {known}.")
        return self

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        mask = batch.get("mask", None)
        with set_recurrent_mode(True):
            return self._update(batch, None if mask is None else mask.unsqueeze(-1))

    def _update(self, batch: TensorDictBase, mask: Tensor | None) -> TensorDict:
        with torch.no_grad():
            before = self._dist(batch)
        dist = self._dist(batch)
        surrogate = self._surrogate(dist, batch, mask)
        grad = self._flat_grad(surrogate)
        slope = self._flat_grad(self._kl(before, dist, mask), again=True)

        def fisher(vector: Tensor) -> Tensor:
            return self._flat_grad(slope.dot(vector)) + self.damping * vector

        direction = conjugate_gradient(fisher, grad.detach(), self.cg_steps)
        curved = direction.dot(fisher(direction)).clamp_min(torch.finfo(grad.dtype).tiny)
        full = (2 * self.max_kl / curved).sqrt() * direction
        expected = grad.dot(full)
        with torch.no_grad():
            found = self._search(batch, mask, before, surrogate.detach(), full, expected)
            entropy = reduce.mean(before.entropy().unsqueeze(-1), mask)
        return TensorDict(
            **found, expected_gain=expected, entropy=entropy, loss_objective=-surrogate.detach(),
            grad_norm_actor=grad.norm(),
        )  # fmt: skip

    def _search(
        self,
        batch: TensorDictBase,
        mask: Tensor | None,
        before: Any,
        surrogate: Tensor,
        full: Tensor,
        expected: Tensor,
    ) -> dict[str, Tensor]:
        """Writes the first acceptable parameters, or the old ones; which of them it was, as numbers."""
        old = torch.cat([p.reshape(-1) for p in self.params])
        none = torch.zeros_like(expected)
        chosen, accepted, found, gained = old, none.bool(), none, none
        for length in self.lengths:
            new = old + length * full
            self._write(new)
            dist = self._dist(batch)
            gain, kl = self._surrogate(dist, batch, mask) - surrogate, self._kl(before, dist, mask)
            good = (
                (kl < self.max_kl) & (gain > 0) & (gain > self.accept_ratio * length * expected) & ~accepted
            )
            chosen, found, gained = (
                torch.where(good, *pair) for pair in ((new, chosen), (kl, found), (gain, gained))
            )
            accepted = accepted | good
            if host.is_free(old.device) and accepted:  # reading costs nothing, and the other lengths would
                break
        self._write(chosen)
        return {"accepted": accepted.to(old.dtype), "kl": found, "surrogate_gain": gained}

    def _dist(self, batch: TensorDictBase) -> Any:
        return self.actor.get_dist(batch.select(*self.actor.in_keys))

    def _surrogate(self, dist: Any, batch: TensorDictBase, mask: Tensor | None) -> Tensor:
        log_ratio = (dist.log_prob(batch.get("action")) - batch.get("action_log_prob")).unsqueeze(
            -1
        )  # [*B, 1]
        if mask is not None:  # before the exponential: a dead agent's entries may hold anything
            log_ratio = log_ratio.masked_fill(~mask, 0)
        return reduce.mean(log_ratio.exp() * batch.get("advantage"), mask)

    @staticmethod
    def _kl(before: Any, dist: Any, mask: Tensor | None) -> Tensor:
        return reduce.mean(kl_divergence(before, dist).unsqueeze(-1), mask)

    def _flat_grad(self, value: Tensor, *, again: bool = False) -> Tensor:
        """The gradient as a vector, summed over ranks; with ``again`` this rank's share, to differentiate again."""
        grads = torch.autograd.grad(
            value,
            self.params,
            retain_graph=True,
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        return flat if again else reduce.over_ranks(flat)

    def _write(self, flat: Tensor) -> None:
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params])):
            p.copy_(part.view_as(p))

    def state_dict(self) -> dict[str, Any]:
        """The actor's parameters."""
        return {"actor": self.actor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.actor.load_state_dict(state["actor"])
