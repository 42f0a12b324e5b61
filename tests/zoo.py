"""PettingZoo environments whose every number is known, for tests; workers import it, so without torch."""

from __future__ import annotations

import os
import signal

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv, ParallelEnv

ENDS = {"runner_0": (2, "terminated"), "runner_1": (4, "terminated"), "guard_0": (5, "truncated")}


class Zoo(ParallelEnv):
    """Agents see ``[seed % 1000, time, last own action, how many are there]`` and end when ``ends`` says.

    The reward is ``10 * index + time``. Agent ``i`` may not do ``(time + i) % choices``. It is an error to give an
    action to who is gone, or none to who is there.

    Args:
        ends (dict): agent to the step of its end and the kind of end.
        masks (str): where the action mask is, "info", "observation" or "".
        fail (str): what happens in step 3: "error", "exit", "kill" or nothing.
        choices (int): number of actions.
        keep (bool): leave those that ended in ``agents``, and go on showing them, as some environments do.
    """

    metadata = {"name": "zoo_v0"}

    def __init__(self, ends=ENDS, masks="", fail="", choices=4, keep=False):
        self.ends, self.masks, self.fail, self.choices, self.keep = dict(ends), masks, fail, choices, keep
        self.possible_agents = list(ends)
        self.closed = False

    def observation_space(self, agent):
        box = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        if self.masks == "observation":
            return spaces.Dict(
                {"observation": box, "action_mask": spaces.Box(0, 1, (self.choices,), np.int8)}
            )
        return box

    def action_space(self, agent):
        return spaces.Discrete(self.choices, start=5 if agent.startswith("guard") else 0)

    def _mask(self, agent):
        mask = np.ones(self.choices, np.int8)
        mask[(self.time + self.possible_agents.index(agent)) % self.choices] = 0
        return mask

    def _show(self, agents):
        observations, infos = {}, {}
        for agent in agents:
            observations[agent] = np.array(
                [self.seed % 1000, self.time, self.last.get(agent, -1), len(self.agents)]
            )
            infos[agent] = {"time": self.time, "pair": np.array([1, self.time]), "text": "no number"}
            if agent == "guard_0":
                infos[agent]["own"] = 1.0
            if self.masks == "info":
                infos[agent]["action_mask"] = self._mask(agent)
            if self.masks == "observation":
                observations[agent] = {"observation": observations[agent], "action_mask": self._mask(agent)}
        return observations, infos

    def reset(self, seed=None, options=None):
        self.seed, self.time, self.last, self.agents = seed, 0, {}, self.possible_agents[:]
        return self._show(self.agents)

    def step(self, actions):
        assert set(actions) == set(self.agents), f"actions {set(actions)} for agents {self.agents}"
        assert all(self.action_space(agent).contains(action) for agent, action in actions.items()), actions
        if self.masks:
            assert all(self._mask(a)[u - self.action_space(a).start] for a, u in actions.items()), (
                "unavailable"
            )
        self.time += 1
        if self.fail and self.time == 3:
            if self.fail == "error":
                raise FloatingPointError("the simulator diverged")
            os._exit(7) if self.fail == "exit" else os.kill(os.getpid(), signal.SIGKILL)
        acting, self.last = self.agents, dict(actions)
        rewards = {agent: 10.0 * self.possible_agents.index(agent) + self.time for agent in acting}
        over = {
            kind: {a: self.ends[a] == (self.time, kind) for a in acting}
            for kind in ("terminated", "truncated")
        }
        if not self.keep:
            self.agents = [a for a in acting if not over["terminated"][a] and not over["truncated"][a]]
        observations, infos = self._show(acting)
        return observations, rewards, over["terminated"], over["truncated"], infos

    def close(self):
        self.closed = True


class Spaces(Zoo):
    """Dictionaries to see, and several choices at once or a box to do."""

    def __init__(self, action):
        super().__init__({"agent_0": (3, "terminated"), "agent_1": (3, "terminated")})
        self.action = action

    def observation_space(self, agent):
        return spaces.Dict({"where": spaces.Box(-1, 1, (2, 2)), "kind": spaces.Discrete(3)})

    def action_space(self, agent):
        return self.action

    def _show(self, agents):
        where = np.full((2, 2), self.time / 10, np.float32)
        done = [np.mean(self.last[a]) if a in self.last else 0.0 for a in agents]
        seen = {a: {"where": where, "kind": self.possible_agents.index(a)} for a in agents}
        return seen, {a: {"did": float(d)} for a, d in zip(agents, done)}

    def state(self):
        return np.array([[self.time, 2.0], [3.0, 4.0]])


class Turns(AECEnv):
    """One move each, in turn; PettingZoo may convert it or not."""

    def __init__(self, parallelizable):
        super().__init__()
        self.metadata = {"name": "turns_v0", "is_parallelizable": parallelizable}
        self.possible_agents = ["player_0", "player_1"]
        self.render_mode = None

    def observation_space(self, agent):
        return spaces.Discrete(3)

    def action_space(self, agent):
        return spaces.Discrete(2)

    def observe(self, agent):
        return self.moves

    def reset(self, seed=None, options=None):
        self.agents, self.moves, self.agent_selection = self.possible_agents[:], 0, "player_0"
        self.rewards = self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations, self.truncations = (
            dict.fromkeys(self.agents, False),
            dict.fromkeys(self.agents, False),
        )
        self.infos = {agent: {} for agent in self.agents}

    def step(self, action):
        if self.terminations[self.agent_selection]:
            self._was_dead_step(action)
            return
        self.moves = min(self.moves + 1, 2)
        self.agent_selection = "player_1" if self.agent_selection == "player_0" else "player_0"
        if self.agent_selection == "player_0":
            self.rewards = dict.fromkeys(self.agents, 1.0)
            self.terminations = dict.fromkeys(self.agents, True)
