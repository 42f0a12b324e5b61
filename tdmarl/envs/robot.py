"""A MuJoCo robot whose joints are shared out among agents; what each worker of :func:`tdmarl.mamujoco` runs.

Like ``copies.py`` this file is run by its path, without tdmarl and torch, and needs only NumPy and the package
``gymnasium-robotics``.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

FIELDS = "qpos", "qvel", "cinert", "cvel", "qfrc_actuator", "cfrc_ext"


def package() -> Any:
    """The package's module, without what it writes about its other environments whenever it is imported."""
    with contextlib.redirect_stderr(io.StringIO()):
        from gymnasium_robotics.envs.multiagent_mujoco import mujoco_multi
    return mujoco_multi


@contextlib.contextmanager
def alone(scenario: str) -> Iterator[None]:
    """Lets one process at a time make a robot of segments: the package writes, reads and removes a file of one name."""
    if not scenario.startswith("ManySegment"):
        yield
        return
    import fcntl

    with open(os.path.join(tempfile.gettempdir(), f"tdmarl-{os.getuid()}-segments.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def split(scenario: str, shipped: str, agents: int) -> dict[str, Any]:
    """The package's graph of a robot with its joints shared out evenly, in the order of the actuators.

    Args:
        scenario (str): the robot.
        shipped (str): any partition that the package has for it.
        agents (int): how many; they divide the number of joints.

    Raises:
        ValueError: they do not.
    """
    parts, edges, shared = package().get_parts_and_edges(scenario, shipped)
    joints = sorted((node for part in parts for node in part), key=lambda node: node.act_ids)
    each, left = divmod(len(joints), agents)
    if left:
        raise ValueError(
            f"the {len(joints)} joints of {scenario} cannot be shared out among {agents} agents."
        )
    rows = [tuple(joints[i * each : (i + 1) * each]) for i in range(agents)]
    return {"partition": rows, "edges": edges, "globals": shared}


class Robot:
    """The package's environment, which shows and does the same in less time.

    The package goes through the joints of every agent in Python for each observation, and asks the simulator for the
    state that the step had just given. Here each agent's observation is a clipped gather from the simulator's arrays;
    its indices and bounds are found by showing the package arrays of known numbers. Where that fails, because a robot
    observes more than these arrays, the package observes.

    Args:
        scenario, partition, agent_obsk, options: see :func:`tdmarl.mamujoco`; ``options`` are the package's.
        factorization (dict, optional): the package's ``agent_factorization``.
        infos (bool): show the step's infos to every agent.
    """

    def __init__(
        self,
        scenario: str,
        partition: str | None,
        agent_obsk: int | None,
        options: dict[str, Any],
        factorization: dict[str, Any] | None = None,
        infos: bool = True,
    ) -> None:
        with alone(scenario):
            self.package = package().MultiAgentMujocoEnv(
                scenario, partition, agent_obsk, agent_factorization=factorization, **options
            )
        self.single, self.infos = self.package.single_agent_env, infos
        self.possible_agents = list(self.package.possible_agents)
        self.agents = self.possible_agents
        self.metadata = {"name": f"{scenario} {partition}"}
        self.actuators = [
            np.array([node.act_ids for node in part]) for part in self.package.agent_action_partitions
        ]
        if self.package.agent_obsk is not None:  # some joints of Pusher have one name, and their order is then anyone's
            self.package.k_dicts = [
                {k: sorted(nodes, key=lambda node: (node.label, node.act_ids)) for k, nodes in near.items()}
                for near in self.package.k_dicts
            ]
        self.gather = None if self.package.agent_obsk is None else self._find_gather()

    def observation_space(self, agent: str) -> Any:
        return self.package.observation_space(agent)

    def action_space(self, agent: str) -> Any:
        return self.package.action_space(agent)

    def state(self) -> Any:
        """What the single agent of Gymnasium's environment sees."""
        return self._state

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        self._state, info = self.single.reset(seed=seed, options=options)
        self.agents = self.possible_agents
        return self._observe(), self._for_all(info if self.infos else {})

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        joint = actions[self.possible_agents[0]]  # all of it where there is one agent
        if self.package.agent_obsk is not None:
            joint = np.empty(self.single.action_space.shape)
            for agent, own in zip(self.possible_agents, self.actuators):
                joint[own] = actions[agent]
        self._state, reward, terminated, truncated, info = self.single.step(joint)
        if terminated or truncated:
            self.agents = []
        return (
            self._observe(), self._for_all(reward), self._for_all(terminated), self._for_all(truncated),
            self._for_all(info if self.infos else {}),
        )  # fmt: skip

    def close(self) -> None:
        self.package.close()

    def _for_all(self, value: Any) -> dict[str, Any]:
        return dict.fromkeys(self.possible_agents, value)

    def _observe(self) -> dict[str, Any]:
        if self.gather is None:
            if self.package.agent_obsk is None:
                return self._for_all(self._state)
            return self.package._get_obs()
        fields, index, low, high, parts = self.gather
        data = self.single.unwrapped.data
        flat = np.concatenate([getattr(data, field).ravel() for field in fields])[index]
        flat = np.minimum(np.maximum(flat, low), high)
        return {agent: flat[part] for agent, part in zip(self.possible_agents, parts)}

    def _find_gather(self) -> Any:
        """The arrays read, the index and the bounds of all agents' numbers, and which are whose."""
        stock, data, build = self.package, self.single.unwrapped.data, package().build_obs
        asked = {c for level in stock.local_categories for c in level} | set(stock.global_categories)
        fields = [field for field in FIELDS if field in asked]
        shapes = [np.shape(getattr(data, field)) for field in fields]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])

        def shown(values: Any) -> list[Any]:
            arrays = [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes)]
            fake = SimpleNamespace(**dict(zip(fields, arrays)))
            known = stock.local_categories, stock.mujoco_globals, stock.global_categories
            return [build(fake, near, *known) for near in stock.k_dicts]

        size, far = int(ends[-1]), 1e6
        try:
            index = (
                np.rint(np.concatenate(shown(np.arange(1, size + 1) / (size + 1))) * (size + 1)).astype(int)
                - 1
            )
            high, low = (np.concatenate(shown(np.full(size, sign * far))) for sign in (1, -1))
        except AttributeError:  # it observes something else
            return None
        high, low = np.where(high == far, np.inf, high), np.where(low == -far, -np.inf, low)
        values = np.random.default_rng(0).normal(scale=20, size=size)
        own = shown(values)
        if index.min() < 0 or index.max() >= size or (low > high).any():
            return None
        if not np.array_equal(np.clip(values[index], low, high), np.concatenate(own)):
            return None
        cuts = [0, *np.cumsum([len(part) for part in own])]
        return fields, index, low, high, [slice(a, b) for a, b in zip(cuts, cuts[1:])]
