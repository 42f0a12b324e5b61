"""What an algorithm is."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict.nn import TensorDictModuleBase

from tdmarl.learners import Learner, SequentialLearner


@dataclass(frozen=True)
class Algorithm:
    """Three parts that an algorithm's function returns; it has no methods, and the loop is yours.

    Replace a part with ``dataclasses.replace(algorithm, explore=...)``.

    Args:
        policy (TensorDictModuleBase): acts; under ``ExplorationType.DETERMINISTIC`` without exploring. What is
            evaluated and saved.
        explore (TensorDictModuleBase): what the collector runs.
        learner (Learner or SequentialLearner): a collected batch to a tensordict of scalar metrics on
            the device; has ``state_dict`` and ``load_state_dict`` over all that learning changes.
    """

    policy: TensorDictModuleBase
    explore: TensorDictModuleBase
    learner: Learner | SequentialLearner
