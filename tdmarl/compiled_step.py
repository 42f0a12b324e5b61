"""A whole optimization step as one compiled function: losses, gradients, clipping, optimizers, targets."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, fx, nn

from tdmarl import compiling, cpu_graph, tracing
from tdmarl.cpu_loops import suit_cpu
from tdmarl.cuda_graph import Captured
from tdmarl.frozen import frozen, plain
from tdmarl.keys import Key, as_tuple
from tdmarl.row_blocks import NotByRow, RowBlocks, block_size, fits_caches

if TYPE_CHECKING:
    from tdmarl.step import Step

aten = torch.ops.aten
MODES = ("trace", "compile", "cudagraph")
_MOST_BUILDS = 8
_MOST_OPERATIONS = 20_000  # beyond, compiling takes many minutes
_INDUCTOR = {"fallback_random": True, "size_asserts": False}


class InPlaceRecorder(tracing.Recorder):
    """Records a function that works on tensors of its own, such as parameters: they become inputs as it meets them.

    Attributes:
        found (list of Tensor): those inputs, in order, after the given ones.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__(inputs)
        self.found: list[Tensor] = []
        self._before: list[Tensor] = []
        self._last = [node for node in self.graph.graph.nodes if node.op == "placeholder"][-1]
        self._places = {_place(x): self._nodes[x] for x in inputs}
        self._is_new = False

    def node(self, tensor: Tensor) -> fx.Node:
        known = self._nodes.get(tensor)
        if known is not None:
            return known
        if self._is_new:
            return super().node(tensor)
        place = _place(tensor)
        node = self._places.get(place)  # two objects may be one tensor, such as `p` and `p.data`
        if node is None:
            if any(other[0] == place[0] for other in self._places):
                raise tracing.Untraceable(
                    f"a tensor of shape {tuple(tensor.shape)} shares memory with another of the step's"
                )
            with self.graph.graph.inserting_after(self._last):
                node = self.graph.graph.placeholder(f"found{len(self.found)}")
            tracing.describe(node, tensor)
            self._last = self._places[place] = node
            self.found.append(tensor)
            self._before.append(tensor.detach().clone())
        self._nodes[tensor] = node
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._fused_adam_.default, aten._fused_adam_.tensor_lr):
            with self:  # as elementwise operations, which become one loop
                return _adam(*args, **kwargs)
        self._is_new = func is aten.lift_fresh.default  # made from Python numbers just now
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_new = False

    def put_back(self) -> None:
        """Recording is no step: what was found has its values of before."""
        with torch.no_grad():
            for tensor, before in zip(self.found, self._before):
                tensor.copy_(before)


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


def _adam(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    _: list[Tensor],
    steps: list[Tensor],
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """What fused Adam computes; `steps` count this one already, and stand still where `found_inf` is 1."""
    if amsgrad or grad_scale is not None:
        raise tracing.Untraceable("Adam with amsgrad or a scale of gradients")
    for p, grad, mean, square, step in zip(params, grads, means, squares, steps):
        grad = -grad if maximize else grad
        grad = grad + weight_decay * p if weight_decay else grad
        new_mean = mean + (1 - beta1) * (grad - mean)
        new_square = beta2 * square + (1 - beta2) * grad * grad
        step = step.double()  # 1 - 0.999 in float32 is wrong in its fifth digit
        of_mean, of_square = 1 - torch.pow(beta1, step), (1 - torch.pow(beta2, step)).sqrt()
        new_p = p - (lr / of_mean) * new_mean / (new_square.sqrt() / of_square + eps)
        for old, new in ((p, new_p), (mean, new_mean), (square, new_square)):
            old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))


class _Function:
    """A recorded step for batches of one layout; of many rows in blocks, where it treats each row by itself.

    Attributes:
        blocks (int): how many; ``whole_because`` says why one, where more would have been worth it.
    """

    def __init__(
        self, step: Step, due: tuple[bool, ...], batch: TensorDictBase, keys: list[Key], mode: str
    ) -> None:
        self._keys, self._device = keys, batch.device
        self._names: list[Key] = []
        inputs = [batch.get(key).detach() for key in keys]
        graph, met = self._functional(step, due, inputs, batch.batch_size)
        self._found = [x.detach() for x in met]
        everything = [*inputs, *self._found]
        copies = [x.clone() for x in everything]
        self.blocks, self.whole_because = 1, ""
        is_small = fits_caches(graph) and all(x.device.type == "cpu" for x in everything)
        self._call: Callable[..., Any]
        try:
            cut = self._cut(step, due, inputs, batch.batch_size, graph, met, copies, mode)
        except NotByRow as error:
            cut, self.whole_because = None, str(error)
        if cut is not None:
            self._call, self.blocks, self.operations = cut, cut.blocks, cut.operations
        else:
            tracing.tidy(graph)
            self.operations = tracing.operations(graph)
            self._call = self._guarded(self._compiled, graph, copies, mode=mode)
        if mode == "cudagraph":
            own = list(range(len(self._keys), len(everything)))
            self._call = Captured(self._call, everything, own, [])
        elif mode == "compile" and (is_small or self.blocks > 1):
            self._call = cpu_graph.Replayed(self._call, len(self._keys))

    def _cut(
        self,
        step: Step,
        due: tuple[bool, ...],
        inputs: list[Tensor],
        size: torch.Size,
        graph: fx.GraphModule,
        met: list[Tensor],
        copies: list[Tensor],
        mode: str,
    ) -> RowBlocks | None:
        """The step in blocks of rows, where that is a gain.

        Raises:
            NotByRow: it cannot be cut.
        """
        rows = block = size[0] if size else 1
        if not step.seed_axis and all(x.device.type == "cpu" for x in copies):  # caches are small there
            block = block_size(graph, rows)
        if block == rows:
            return None
        few = [x[:block] for x in inputs]
        part, found = self._functional(step, due, few, torch.Size([block, *size[1:]]))
        if [id(x) for x in found] != [id(x) for x in met]:
            raise NotByRow("it works on other tensors for fewer rows")
        compiler = functools.partial(self._compiled, mode=mode)
        return self._guarded(RowBlocks, graph, part, copies, compiler)

    @staticmethod
    def _guarded(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Whatever the compiler comes upon, such as that there is none for C++, is a reason to run eagerly."""
        try:
            return make(*args, **kwargs)
        except (tracing.Untraceable, NotByRow):
            raise
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise tracing.Untraceable(f"compiling failed: {type(error).__name__}: {first}") from error

    @staticmethod
    def _compiled(graph: fx.GraphModule, examples: list[Tensor], mode: str) -> Callable[..., Any]:
        operations = tracing.operations(graph)
        if operations > _MOST_OPERATIONS:
            raise tracing.Untraceable(
                f"the step has {operations} operations, and more than {_MOST_OPERATIONS} take too long to compile"
            )
        if mode == "trace":
            return graph
        if all(x.device.type == "cpu" for x in examples):
            suit_cpu(graph)
        return cpu_graph.Compiled(graph, examples, _INDUCTOR)

    def _functional(
        self, step: Step, due: tuple[bool, ...], inputs: list[Tensor], size: torch.Size
    ) -> tuple[fx.GraphModule, list[Tensor]]:
        """The step's operations, with all that is written written at their end; what they work on besides inputs."""
        graph, found = self._recorded(step, due, inputs, size)
        everything: list[Tensor] = [*inputs, *(x.detach() for x in found)]
        with torch.no_grad():
            copies = [x.clone() for x in everything]
            graph = tracing.record(torch.func.functionalize(graph, remove="mutations"), copies)
        return graph, found

    def _recorded(
        self, step: Step, due: tuple[bool, ...], inputs: list[Tensor], size: torch.Size
    ) -> tuple[fx.GraphModule, list[Tensor]]:
        """The step's operations in order, and the tensors that it works on besides the inputs."""
        recorder = InPlaceRecorder(inputs)
        known = [set(part.optim.state) for part in step.parts]
        new = []
        try:
            with recorder, tracing.Watch(recorder):
                rows = TensorDict(batch_size=size, device=self._device)
                for key, x in zip(self._keys, inputs):
                    rows.set(key, x)
                out = step.take(rows, due)
                self._names = [as_tuple(key) for key in out.keys(True, True)]
                graph = recorder.finish([out.get(key) for key in self._names])
        finally:
            recorder.put_back()
            for part in step.parts:
                for p in part.params:
                    p.grad = None
            for part, before in zip(step.parts, known):
                new += [part.optim.state.pop(p) for p in set(part.optim.state) - before]
        if any(new):
            raise tracing.Untraceable(
                "an optimizer makes its state at its first step; tdmarl.adam's is known before"
            )
        return graph, recorder.found

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        with torch.no_grad():
            outputs = self._call(*(batch.get(key) for key in self._keys), *self._found)
        if any(len(key) > 1 for key in self._names):
            found = TensorDict({}, device=self._device)
            for key, value in zip(self._names, outputs):
                found.set(key, value)
            return found
        entries: dict[str, Any] = {key[0]: value for key, value in zip(self._names, outputs)}
        return TensorDict._new_unsafe(entries, batch_size=torch.Size([]), device=self._device)

    def describe(self) -> str:
        """Of how many operations it is and in which pieces; why not in others that would have been worth it."""
        blocks = f" in {self.blocks} blocks of rows" if self.blocks > 1 else ""
        said = [f"{self.operations} operations{blocks}"]
        if self.whole_because:
            said.append(f"not in blocks of rows: {self.whole_because}")
        if isinstance(self._call, cpu_graph.Replayed):
            why = self._call.whole_because
            said.append(f"called through Python: {why}" if why else "its kernels recorded")
        return ", ".join(said)


class CompiledStep:
    """Stands for a :class:`~tdmarl.step.Step`, whose Python runs once for each layout of minibatches, to be recorded.

    The parameters, moments and targets stay the step's own tensors and are written where they are; state and resume
    are the step's. Recorded anew is what was replaced or whose Python has changed, looked at when a batch begins. A
    step that cannot be recorded is called as it is, after one warning; `reason` says why.

    Args:
        step (Step): any.
        mode (str): ``compile`` (Inductor), ``cudagraph`` (captured besides), ``trace`` (the recorded operations).

    Attributes:
        reason (str, optional): why the step is called as it is.
        made (_Function, optional): what was recorded last, with its `operations` and `blocks` of rows.
    """

    def __init__(self, step: Step, mode: str) -> None:
        self.step, self.mode = step, mode
        self.reason: str | None = None
        self.made: _Function | None = None
        self._builds = 0
        self._functions: dict[Any, _Function] = {}
        self._frozen_at: Any = None
        self._begun = -1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._give_up("gradients are summed over ranks")

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        function = None
        if self.reason is None:
            try:
                function = self._function(batch)
            except tracing.Untraceable as error:
                self._give_up(f"{error}")
        if function is None:
            return self.step(batch)
        metrics = function(batch)
        self.step.count += 1
        return metrics

    def describe(self) -> str:
        """How steps are taken, and why not otherwise."""
        if self.reason is not None:
            return f"eager ({self.reason})"
        return f"{self.mode} ({'at its first minibatch' if self.made is None else self.made.describe()})"

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(f"The optimization step runs as mode='eager': {reason}.", stacklevel=3)

    def _function(self, batch: TensorDictBase) -> _Function:
        step = self.step
        if self._begun != step.begun:
            self._begun, now = step.begun, _frozen(step)
            if now != self._frozen_at:
                self._frozen_at = now
                self._functions.clear()
        leaves = {as_tuple(key): x for key, x in batch.items(True, True)}
        due = step.due()
        layout = [(key, x.shape, x.stride(), x.dtype) for key, x in leaves.items()]
        key = due, batch.batch_size, tuple(layout), _rates(step)
        if key not in self._functions:
            self._builds += 1
            if self._builds > _MOST_BUILDS:
                raise tracing.Untraceable(
                    f"minibatches, learning rates or its Python changed {_MOST_BUILDS} times; a learning rate that "
                    "falls must be a tensor, as tdmarl.adam's is"
                )
            for part in step.parts:
                _begin_adam(part.optim)
            self._frozen_at = _frozen(step)
            devices = [batch.device] if batch.device is not None and batch.device.type == "cuda" else []
            with compiling.announced("updates"), torch.random.fork_rng(devices):  # recording is no draw
                self._functions[key] = _Function(step, due, batch, list(leaves), self.mode)
            if _frozen(step) != self._frozen_at:
                raise tracing.Untraceable("its Python changes from step to step")
            self.made = self._functions[key]
        return self._functions[key]


def _frozen(step: Step) -> list[Any]:
    """What of a step is fixed in its functions: see `frozen`; the optimizers' numbers and where their tensors are."""
    modules: list[Any] = [part.loss for part in step.parts]
    found: list[Any] = []
    if isinstance(step.after, nn.Module):
        modules.append(step.after)
    elif step.after is not None:  # such as the method of one of TorchRL's updaters, which may count
        owner = getattr(step.after, "__self__", step.after)
        found += [id(step.after), plain(step.after, live=True), plain(getattr(owner, "__dict__", {}), live=True)]
    found += [frozen(module, live=True) for module in modules]
    for part in step.parts:
        for group in part.optim.param_groups:
            fixed = {name: value for name, value in group.items() if name not in ("params", "lr")}
            found.append((repr(fixed), [id(p) for p in group["params"]]))
            found += [
                sorted((k, id(x)) for k, x in part.optim.state[p].items())
                for p in group["params"]
                if p in part.optim.state
            ]
        found.append(
            (
                part.max_grad_norm,
                part.stop_above,
                part.prefix,
                part.name,
                id(getattr(part.optim, "found_inf", None)),
            )
        )
    return found


def _rates(step: Step) -> tuple[Any, ...]:
    rates = [group["lr"] for part in step.parts for group in part.optim.param_groups]
    return tuple(id(rate) if isinstance(rate, Tensor) else rate for rate in rates)


def _begin_adam(optim: torch.optim.Optimizer) -> None:
    """Makes the moments of a fused Adam, as its first step would."""
    if (
        type(optim) is not torch.optim.Adam
        or not optim.defaults.get("fused")
        or optim.defaults.get("amsgrad")
    ):
        return
    for group in optim.param_groups:
        for p in group["params"]:
            if p.requires_grad and not optim.state[p]:
                optim.state[p].update(
                    step=torch.zeros((), device=p.device),
                    exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                    exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                )
