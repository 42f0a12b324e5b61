"""Scenario arguments of the published comparisons, where they differ from VMAS's own defaults.

They are BenchMARL's task settings, with 100 steps an episode, so that returns can be compared across libraries.
"""

from __future__ import annotations

from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "balance": {"n_agents": 4, "package_mass": 5},
    "navigation": {"n_agents": 3, "collisions": True, "shared_rew": False},
}
