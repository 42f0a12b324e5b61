"""VMAS scenarios as a TorchRL environment with TorchRL's own names, with correct ends and masked resets."""

from __future__ import annotations

import secrets
import warnings
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import MarlGroupMapType

from tdmarl import compiling, host
from tdmarl.envs.actions import ActionOptions
from tdmarl.envs.capture import Part
from tdmarl.envs.compiled import CompiledVmas
from tdmarl.envs.functional import FunctionalVmas, Merge
from tdmarl.envs.groups import Display, Group, make_groups, make_specs
from tdmarl.envs.scenarios import replaced
from tdmarl.functions import MOST_BUILDS
from tdmarl.tracing import Untraceable

MODES = "eager", "trace", "compile", "cudagraph", "auto"


def choose_mode(
    mode: str, device: torch.device, num_envs: int, expected_steps: int | None, grad_enabled: bool
) -> str:
    """The mode that "auto" stands for, others as they are.

    Of the scenarios that were measured on one CPU core, compiling pays last in simple_spread: it takes 14 s, the
    policy's part included, and a collector's step is faster by 1.4 ms and 0.65 us for each environment. So the least
    number of steps is 6,700 with 1,024 environments and 9,900 with 16; where steps are dearer (balance, navigation),
    it would have paid after a half or a third of that.

    Raises:
        ValueError: the mode is unknown, or not possible on the device or with gradients.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    if mode == "cudagraph" and device.type != "cuda":
        raise ValueError(f"mode='cudagraph' needs a CUDA device; this environment is on {device}.")
    if grad_enabled:
        if mode in ("trace", "compile", "cudagraph"):
            raise ValueError(f"grad_enabled=True runs eagerly; mode={mode!r} keeps no graph for gradients.")
        return "eager"
    if mode != "auto":
        return mode
    if expected_steps is None or expected_steps * (num_envs + 2_100) < 21_000_000:
        return "eager"
    return "cudagraph" if device.type == "cuda" else "compile"


class _Compiled(EnvBase):
    """Compiles an environment's functions, keeps them up to date, and does without where that is not possible."""

    core: FunctionalVmas
    mode: str
    fallback_reason: str | None
    _compiled: CompiledVmas | None
    _touched: bool
    _builds: int

    @property
    def scenario(self) -> Any:
        """The VMAS scenario object that runs, in its present state.

        In a compiled mode its Python is frozen in graphs: what is changed here holds from the next step on, and
        where that changes a frozen value, the graphs are made anew, which takes as long as the first time. Ask for
        it before each change; later changes to an object that was kept are not seen. State on which nothing depends
        that is shown stays there as it was when the graphs were made.
        """
        self._see_changes()
        self.core.into_objects()
        self._touched = True
        return self.core.simulation.scenario

    def _see_changes(self) -> None:
        """What was changed in the scenario's objects is the present state."""
        if self._touched:
            self.core.from_objects()

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """Compiles now instead of at the first step, where the mode is a compiled one; returns this environment."""
        if self.mode != "eager" and self._compiled is None:
            self._builds += 1
            if self._builds > MOST_BUILDS:
                self._fall_back(f"its Python values changed {MOST_BUILDS} times")
                return self
            try:
                with compiling.announced("the simulation"):
                    self._compiled = self._make_compiled()
            except Exception as error:  # whatever tracing and compiling come upon; eager always works
                self._fall_back(
                    str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"
                )
        return self

    @property
    def report(self) -> dict[str, Part]:
        """For each compiled function its operations and the seconds of recording and of compiling; empty if eager."""
        return {} if self._compiled is None else self._compiled.recording.report

    def _fall_back(self, reason: str) -> None:
        self.mode, self.fallback_reason = "eager", reason
        name = type(self.core.simulation.scenario).__module__.rpartition(".")[2]
        warnings.warn(f"VMAS scenario '{name}' runs eagerly, not compiled: {reason}.", stacklevel=3)
        self.core.into_objects()
        self.core.held = None
        self.core.simulation.grad_mode = (
            torch.inference_mode
        )  # as in an environment that was eager from the start

    def _runner(self) -> CompiledVmas | None:
        """What runs in place of the eager code, up to date with the scenario's Python."""
        known: set[str] = set()
        if self._touched and self._compiled is not None:
            self._see_changes()
            if self._compiled.is_stale():
                known, self._compiled = set(self._compiled.recording.names), None
        self._touched = False
        compiled = self.compile()._compiled
        if known and compiled is not None and not known.issuperset(compiled.recording.names):
            missed = sorted(set(compiled.recording.names) - known)
            warnings.warn(
                f"{missed} did not go on while nothing depended on it; reset all environments to begin anew.",
                stacklevel=4,
            )
        return compiled

    def _make_compiled(self) -> CompiledVmas:
        raise NotImplementedError


class _Saved(_Compiled):
    """State of an environment that has a `core` and keeps what it showed `_last`: saved, set, and gone on from."""

    groups: list[Group]
    num_envs: int
    _last: TensorDict

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All that this environment's future depends on, as tensors: world, step counters, random streams."""
        self._say_if_short()
        self._see_changes()
        last = {_name_of_last(key): value.detach().clone() for key, value in self._leaves().items()}
        spares = {} if self._compiled is None else self._compiled.state_dict()
        return {**self.core.state_dict(), **last, **spares}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        """Continues to the last bit where `state_dict` was taken, also in another process.

        One from another kind of device has no random numbers for this one: they begin anew, the same ones each time.

        Raises:
            KeyError, ValueError: it is of another environment; this one is then as it was.
        """
        missing = [name for name in map(_name_of_last, self._leaves()) if name not in state_dict]
        if missing:
            raise KeyError(f"{missing[0]!r} is missing: the state dict is not of an environment with these groups.")
        compiled = self._runner() if "drawn:0" in state_dict else self._compiled
        others = ("last:", "drawn:") if compiled is None else ("last:", "drawn:", "spare:")
        self.core.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith(others)})
        if compiled is not None:
            compiled.load_state_dict(state_dict)
        for key in self._leaves():
            self._last.set(key, state_dict[_name_of_last(key)].to(self.device, copy=True))

    def _leaves(self) -> dict[tuple[str, ...], Tensor]:
        leaves = self._last.items(include_nested=True, leaves_only=True)
        return {key if isinstance(key, tuple) else (key,): value for key, value in leaves}

    def get_state(self) -> TensorDict:
        """A copy of the world and the step counters; random streams are in `state_dict` alone.

        In a compiled mode an entry on which nothing depends that is shown is as it was when the graphs were made.
        """
        self._see_changes()
        return self.core.get_state()

    def set_state(self, state: TensorDict) -> None:
        """Goes on from a copy of `state`, which the next step shows; until then the last step is shown."""
        self.core.set_state(state)

    def detach(self) -> None:
        """Cuts the graph of `grad_enabled=True` here: later rewards depend on later actions alone."""
        self.core.set_state(self.core.get_state().detach())

    def transitions(self) -> CompiledVmas | None:
        """What makes a step and the reset of what ended as functions of tensors, for a collector; None if it runs
        eagerly, or if a subclass changes what a step or a reset does."""
        if any(
            getattr(type(self), name) is not getattr(VmasEnv, name) for name in ("step", "_step", "_reset")
        ):
            return None
        return self._runner()

    def go_on_from(self, shown: dict[str, Any]) -> None:
        """Takes what the last of `transitions` showed, nested entries, for this environment's present."""
        self._last = self._tensordict(shown)

    def _say_if_short(self) -> None:
        if self._compiled is not None and self._compiled.ran_short:
            warnings.warn(
                "episodes were so short that some environments began twice from one initial state;"
                " spare_resets=False draws anew at every end.",
                stacklevel=4,
            )

    def _tensordict(self, entries: dict[str, Any]) -> TensorDict:
        for group in self.groups:
            size = torch.Size([self.num_envs, len(group.indices)])
            entries[group.name] = _tensordict(entries[group.name], size, self.device)
        return _tensordict(entries, self.batch_size, self.device)


class VmasEnv(_Saved):
    """Trains on any VMAS scenario; keys and arguments are those of `torchrl.envs.VmasEnv`.

    Unlike there, the time limit is `truncated` and only the scenario's own end is `terminated`, both at the
    root `[E, 1]` and per group `[E, n, 1]`; `next` holds the true last observation; any subset of the
    environments is reset in one vectorized operation, without reading from the device; random choices are
    each environment's own; random numbers come from this environment's streams alone; and `state_dict` holds
    everything that the future depends on.

    Groups are agents of one size and kind: by default those whose names are `<name>_<int>` with one `<name>`,
    split further where observation or action sizes differ, or padded with `pad=True`.

    Args:
        scenario (str, BaseScenario or BaseScenario class): a shipped scenario's name, or one's own.
        num_envs (int): number of environments, E.
        continuous_actions (bool): False gives each agent a number of choices.
        max_steps (int, optional): time limit of an episode.
        categorical_actions (bool): False encodes choices as one-hot vectors.
        seed (int, optional): starts the random streams; None takes one from the operating system.
        group_map (dict or MarlGroupMapType, optional): names of the agents of each group.
        device (torch.device, optional): where everything lives; None is torch's default device.
        time_limit (str): "truncate", or "terminate" to set `terminated` at the limit too, as TorchRL does.
        pad (bool): pads unlike agents of a group: observations with zeros, continuous actions with dimensions
            whose bounds are both 0, choices with ones that are False in `(group, "action_mask")`.
        mode (str): "eager" runs VMAS's Python in every step. "compile" records it once and compiles what it does,
            at the first step or in `compile()`; "cudagraph" also captures that on a GPU; "trace" runs what was
            recorded without compiling it. What cannot be recorded runs eagerly, and a warning names the line.
            "auto" compiles if that pays within `expected_steps`.
        expected_steps (int, optional): how often the environment will be stepped, for "auto"; None is few.
        spare_resets (bool): draws initial states for all environments at once and lets each wait until its
            environment ends, instead of drawing them at every end (the eager mode does so on the CPU only). False
            for scenarios whose resets must follow what changes during training, such as a curriculum.
        check_nan (bool): raises on actions that are NaN or no valid choice; on CUDA asynchronously.
        multidiscrete_actions (bool): a choice per action dimension instead of one from their product.
        grad_enabled (bool): rewards and observations stay differentiable with respect to actions, through
            time; `detach()` ends that.
        **scenario_kwargs: the scenario's own arguments.

    Attributes:
        mode (str): how it runs; what "auto" chose, and "eager" after a fallback.
        fallback_reason (str or None): why it does not run compiled though it should.

    Raises:
        ValueError: the scenario is unknown, or a group holds unlike agents without `pad`.
        NotImplementedError: the scenario is not supported, see `tdmarl.envs.scenarios.UNSUPPORTED`.

    Examples:
        >>> env = VmasEnv("balance", num_envs=4, max_steps=100, seed=0)
        >>> env.rollout(3)["next", "agents", "reward"].shape
        torch.Size([4, 3, 3, 1])
    """

    def __init__(
        self,
        scenario: Any,
        *,
        num_envs: int,
        continuous_actions: bool = True,
        max_steps: int | None = None,
        categorical_actions: bool = True,
        seed: int | None = None,
        group_map: MarlGroupMapType | dict[str, list[str]] | None = None,
        device: torch.device | str | int | None = None,
        time_limit: str = "truncate",
        pad: bool = False,
        mode: str = "eager",
        expected_steps: int | None = None,
        spare_resets: bool = True,
        check_nan: bool = True,
        multidiscrete_actions: bool = False,
        grad_enabled: bool = False,
        **scenario_kwargs: Any,
    ) -> None:
        if time_limit not in ("truncate", "terminate"):
            raise ValueError(f"time_limit is {time_limit!r}; expected 'truncate' or 'terminate'.")
        if multidiscrete_actions and continuous_actions:
            raise ValueError("multidiscrete_actions=True needs continuous_actions=False.")
        device = torch.get_default_device() if device is None else torch.device(device)
        self.mode = choose_mode(mode, device, num_envs, expected_steps, grad_enabled)
        super().__init__(device=device, batch_size=[num_envs], allow_done_after_reset=True)
        seed = secrets.randbits(31) if seed is None else seed
        plain = self.mode != "eager"
        self.core = FunctionalVmas(scenario, num_envs, device, seed, grad_enabled, scenario_kwargs, plain)
        self.num_envs, self.max_steps, self.time_limit = num_envs, max_steps, time_limit
        self.continuous_actions, self.categorical_actions = continuous_actions, categorical_actions
        self.check_nan = check_nan
        self.spare_resets = spare_resets and not grad_enabled
        self._viewer: Any = None
        self._compiled: CompiledVmas | None = None
        self.fallback_reason: str | None = None
        self._touched, self._builds = False, 0
        self.agents = self.core.simulation.agents
        self.n_agents, self.agent_names = len(self.agents), [agent.name for agent in self.agents]
        out = self.core.restart()
        options = ActionOptions(continuous_actions, multidiscrete_actions, one_hot=not categorical_actions)
        self.groups = make_groups(self.agents, self.core.simulation.world, out, group_map, pad, options)
        self.group_map = {group.name: [self.agent_names[i] for i in group.indices] for group in self.groups}
        self._display = Display(self.groups, max_steps, time_limit)
        action, observation, reward, done = make_specs(self.groups, out, device)
        self.full_action_spec_unbatched, self.full_observation_spec_unbatched = action, observation
        self.full_reward_spec_unbatched, self.full_done_spec_unbatched = reward, done
        self.core.seed(seed)
        self._reset()

    def _make_compiled(self) -> CompiledVmas:
        return CompiledVmas(
            self.core, self._display, self.mode, self.check_nan, self.spare_resets, self.max_steps
        )

    def _set_seed(self, seed: int | None) -> None:
        self.core.seed(secrets.randbits(31) if seed is None else seed)
        if self._compiled is not None:
            self._compiled.forget_spares()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        compiled = self._runner()
        if compiled is None:
            actions: list[Any] = [None] * self.n_agents
            for group in self.groups:
                for i, action in zip(group.indices, group.act(tensordict, self.check_nan)):
                    actions[i] = action
            out = self.core.advance(actions)
            entries = self._display.with_ends(self._display(out, self.core.simulation.steps))
            rewards = self._display.rewards(out)
        else:
            entries, rewards = compiled.step([group.action(tensordict) for group in self.groups])
        self._last = self._tensordict(entries)
        shown = self._last.copy()
        for group in self.groups:
            shown.get(group.name).set("reward", rewards[group.name]["reward"])
        return shown

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Resets all environments, or those of the root `_reset` [E, 1]; others show what they did."""
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._say_if_short()
            self._see_changes()
            out = self.core.restart()
            if self._compiled is not None:
                self._compiled.forget_spares()
            shown = self._display(out, torch.zeros_like(self.core.simulation.steps))
            self._last = self._tensordict(self._display.with_ends(shown))
            return self._last.copy()
        mask = mask.reshape(self.num_envs)
        compiled = self._runner()
        if compiled is not None:
            self._last = self._tensordict(compiled.reset(mask, self._last))
            return self._last.copy()
        spares = self.spare_resets and host.is_free(mask.device)
        out = (self.core.restart_from_spares if spares else self.core.restart)(mask)
        shown = self._display(out, self.core.simulation.steps)
        self._last = self._tensordict(self._display.with_ends(_merged(Merge(mask), shown, self._last)))
        return self._last.copy()

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Adds random actions, valid ones also where choices are padded."""
        if tensordict is None:
            tensordict = TensorDict({}, batch_size=self.batch_size, device=self.device)
        for group in self.groups:
            tensordict.set((group.name, "action"), group.actions.random(self.num_envs))
        return tensordict

    def reset_done(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        """What the policy sees after a step: the `next` entries of that step, with finished environments
        reset.

        Stands for `step_mdp` and `maybe_reset` together in a collector's loop. On a CPU nothing is done when no
        environment ended; elsewhere nothing is asked.

        Args:
            next_tensordict (TensorDict): `tensordict["next"]` of the step made last.

        Returns:
            A new tensordict [E] with the observation entries and done, terminated, truncated; no reward.
        """
        done = next_tensordict.get("done")
        if host.is_surely_false(done):
            return self._last.copy()
        return self._reset(TensorDict({"_reset": done}, batch_size=self.batch_size, device=self.device))

    def render(self, env_index: int = 0, **kwargs: Any) -> Any:
        """One environment's picture from VMAS's viewer, uint8 `[height, width, 3]`."""
        if self._viewer is None:
            self._viewer = make_viewer(self.core.simulation, self.continuous_actions)
        self._see_changes()
        self.core.into_objects()
        entities = self.core.simulation.world.entities
        own = [
            (e, "_color", e._color[env_index])
            for e in entities
            if isinstance(e._color, Tensor) and e._color.ndim > 1
        ]
        with replaced(*own):  # where a choice of each environment's own colours entities
            return self._viewer.render(mode="rgb_array", env_index=env_index, **kwargs)

    def to(self, device: Any) -> VmasEnv:
        """This environment if it is there already.

        Raises:
            NotImplementedError: it is elsewhere. VMAS leaves some of a scenario's tensors behind when moved.
        """
        wanted = self.device if device is None else torch.device(device)
        here = wanted.index in (None, self.device.index) or wanted.type == "cpu"
        if wanted.type != self.device.type or not here:
            raise NotImplementedError(
                f"VmasEnv lives on {self.device} and cannot move to {device}; build it with"
                f" device={str(device)!r} and carry the state over with load_state_dict."
            )
        return self


def _name_of_last(key: tuple[str, ...]) -> str:
    return f"last:{'/'.join(key)}"


def _tensordict(entries: dict[str, Any], batch_size: torch.Size, device: torch.device) -> TensorDict:
    """A tensordict of entries known to fit; without checks, which cost 0.3 ms per step."""
    for key, value in entries.items():
        if isinstance(value, dict):
            entries[key] = _tensordict(value, batch_size, device)
    return TensorDict._new_unsafe(entries, batch_size=batch_size, device=device)


def _merged(merge: Merge, new: Any, old: Any) -> dict[str, Any]:
    """Nested entries, each merged."""
    found = {}
    for key, value in new.items():
        mine = old.get(key)
        found[key] = merge(value, mine) if isinstance(value, Tensor) else _merged(merge, value, mine)
    return found


def make_viewer(simulation: Any, continuous_actions: bool) -> Any:
    """VMAS's own environment around a world that is already there, for its viewer only."""
    from vmas.simulator.environment import Environment

    viewer = Environment.__new__(Environment)
    attributes = {
        "scenario": simulation.scenario,
        "world": simulation.world,
        "num_envs": simulation.envs,
        "agents": simulation.agents,
        "n_agents": len(simulation.agents),
        "continuous_actions": continuous_actions,
        "_batch_dim": simulation.envs,
        "_device": simulation.device,
    }
    vars(viewer).update(attributes, viewer=None, headless=None, visible_display=None, text_lines=None)
    return viewer
