"""`accel.accelerate`: pipelines of diffusers, which say themselves where in a run each call is."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...kernels.errors import AccelError
from ..options import parse_options
from ..runtime.trajectory import Explicit, Moment, enter_explicit

__all__ = ["accelerate", "release"]

_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class _PipelineRun:
    """One call of a pipeline: what its scheduler says.

    begun: whether the model has been called; step: how often the scheduler has stepped since.
    times: the run's timesteps; first: the one that it began with.
    """

    pipeline: Any
    scheduler: Any
    begun: bool = False
    step: int = 0
    times: list[float] = field(default_factory=list)
    explicit: list[Explicit] = field(default_factory=list)

    def moment(self) -> Moment | None:
        """The step of a call of a model now; None where the scheduler does not say."""
        if not self.begun:
            self._begin()
        if self.step >= len(self.times):
            return None
        return Moment(self.step, self.times[self.step])

    def _begin(self) -> None:
        times = getattr(self.scheduler, "timesteps", None)
        if times is None:
            return
        self.begun = True
        times = times.tolist() if isinstance(times, Tensor) else [float(each) for each in times]
        # Pipelines that begin with a picture leave out the first steps.
        count = getattr(self.pipeline, "_num_timesteps", None)
        first = len(times) - count if count is not None else self.scheduler.begin_index or 0
        self._take(times[max(first, 0) :])

    def _take(self, times: list[float]) -> None:
        self.times = times
        for explicit in self.explicit:
            explicit.steps = len(times)
            for runs in explicit.runs.values():
                runs.steps_known = len(times)

    def stepped(self, timestep: Any) -> None:
        """The scheduler has made a step at this timestep."""
        if not self.begun:
            return
        if self.step == 0:
            # Where a run began later than was thought, it shows here.
            time = float(timestep)
            if time in self.times and time != self.times[0]:
                self._take(self.times[self.times.index(time) :])
        self.step += 1


_run: ContextVar[_PipelineRun | None] = ContextVar("accel_pipeline_run", default=None)
_branch: ContextVar[str | None] = ContextVar("accel_pipeline_branch", default=None)


def accelerate(pipeline: Any, **options: Any) -> Any:
    """Compile a diffusers pipeline's transformers in place; the pipeline says what each call is.

    The pipeline's own call is the run; its scheduler knows the step, its time and how many there
    are; its `cache_context` names the branch of guidance. So nothing is guessed, no tensor is read,
    and samplers that add noise skip, too. Later calls may have other prompts, sizes, batches and
    numbers of steps.

    options: as those of `torch.compile(..., options=...)`; see `accel.Options`.
    Returns the pipeline. `accel.release` undoes it; a second call compiles with other options.
    Raises AccelError for what is no such pipeline, naming what was found, and OptionError for
    unknown options; the pipeline is then as it was.
    """
    parse_options(options)
    models = _transformers(pipeline)
    if _accelerated(pipeline):
        release(pipeline)
    with _lock:
        for model in models.values():
            _users[model] = _users.get(model, 0) + 1
            model._compiled_call_impl = None
            model.compile(backend="accel", options=options)
            if hasattr(model, "cache_context"):
                _name_branches(model)
        _in_place_of(pipeline, "__call__", _call)
        if not _accelerated(pipeline.scheduler):
            _in_place_of(pipeline.scheduler, "step", _step)
    return pipeline


def release(pipeline: Any) -> Any:
    """Undo `accelerate`: the pipeline and its models are what they were. Returns the pipeline.

    Models that another accelerated pipeline shares stay compiled.
    Raises AccelError for a pipeline that is not accelerated.
    """
    if not _accelerated(pipeline):
        raise AccelError(f"{type(pipeline).__name__} is not accelerated; nothing to release")
    with _lock:
        pipeline.__class__ = type(pipeline).__mro__[1]
        for model in _transformers(pipeline).values():
            _users[model] = _users.get(model, 1) - 1
            if _users[model] <= 0:
                del _users[model]
                model._compiled_call_impl = None
                model.__dict__.pop("cache_context", None)
        scheduler = pipeline.scheduler
        if _accelerated(scheduler):
            scheduler.__class__ = type(scheduler).__mro__[1]
    return pipeline


def _transformers(pipeline: Any) -> dict[str, nn.Module]:
    """The models that a pipeline samples with."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise AccelError(
            f"expected a pipeline of diffusers, with components, got {type(pipeline).__name__}; "
            'compile a model by itself with torch.compile(model, backend="accel")'
        )
    found = {
        name: each for name, each in components.items()
        if isinstance(each, nn.Module) and name.startswith("transformer")
    }  # fmt: skip
    if not found:
        named = ", ".join(
            f"{name}: {type(each).__name__}" for name, each in components.items()
            if isinstance(each, nn.Module)
        )  # fmt: skip
        raise AccelError(
            f"{type(pipeline).__name__} has no transformer; it has {named or 'no models yet'}. "
            "accel skips the block stacks of diffusion transformers"
        )
    scheduler = components.get("scheduler")
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "timesteps"):
        raise AccelError(
            f"{type(pipeline).__name__} has {type(scheduler).__name__} for a scheduler, which has "
            "no `step` and `timesteps` to tell a run's steps by; compile its transformer with "
            'torch.compile(..., backend="accel")'
        )
    return found


def _accelerated(owner: Any) -> bool:
    return "accel_accelerated" in vars(type(owner))


def _in_place_of(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Give an object a class of its own, in which one method is another. Copies keep it."""
    kind = type(owner)
    body = {
        name: make(getattr(kind, name)), "accel_accelerated": True,
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
    }  # fmt: skip
    owner.__class__ = type(kind.__name__, (kind,), body)


def _call(original: Any) -> Any:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _running(self):
            return original(self, *args, **kwargs)

    return call


@contextlib.contextmanager
def _running(pipeline: Any) -> Iterator[None]:
    if not _accelerated(pipeline.scheduler):  # it is another by now
        _in_place_of(pipeline.scheduler, "step", _step)
    run = _PipelineRun(pipeline, pipeline.scheduler)
    if hasattr(pipeline, "_num_timesteps"):
        pipeline._num_timesteps = None  # of the last call
    token = _run.set(run)
    try:
        with contextlib.ExitStack() as stack:
            for model in _transformers(pipeline).values():
                tensors = frozenset(map(id, [*model.parameters(), *model.buffers()]))
                explicit = Explicit(tensors, where=run.moment, named=_branch.get)
                run.explicit.append(explicit)
                stack.enter_context(enter_explicit(explicit))
            yield
    finally:
        _run.reset(token)


def _step(original: Any) -> Any:
    @functools.wraps(original)
    def step(self: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, model_output, timestep, *args, **kwargs)
        run = _run.get()
        # A copy for another stream (audio beside video) steps along; the run's own counts.
        if run is not None and run.scheduler is self:
            run.stepped(timestep)
        return result

    return step


def _name_branches(model: Any) -> None:
    original = type(model).cache_context

    @contextlib.contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        token = _branch.set(name)
        try:
            with original(model, name, *args, **kwargs) as found:
                yield found
        finally:
            _branch.reset(token)

    model.__dict__["cache_context"] = cache_context
