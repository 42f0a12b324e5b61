"""What an algorithm is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase


class BatchLearner(Protocol):
    """What the loop asks of a learner."""

    def __call__(self, batch: TensorDictBase) -> TensorDict: ...  # noqa: D102, E704

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102, E704

    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102, E704


@dataclass(frozen=True)
class Algorithm:
    """Three parts that an algorithm's function returns; it has no methods, and the loop is yours.

    Replace a part with ``dataclasses.replace(algorithm, explore=...)``.

    Args:
        policy (TensorDictModuleBase): acts; under ``ExplorationType.DETERMINISTIC`` without exploring. What is
            evaluated and saved.
        explore (TensorDictModuleBase): what the collector runs.
        learner (callable): a :class:`~tdmarl.learners.Learner` or its like: a collected batch to a tensordict of
            scalar metrics on the device; has ``state_dict`` and ``load_state_dict`` over all that learning changes.
    """

    policy: TensorDictModuleBase
    explore: TensorDictModuleBase
    learner: BatchLearner
