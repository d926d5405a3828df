"""`accel.accelerate`: pipelines of diffusers, which say themselves where in a run each call is."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...kernels.errors import AccelError
from ..options import parse_options
from ..runtime.trajectory import Explicit, Moment, enter_explicit
from .callbacks import noticing
from .schedulers import weights_of
from .second_look import SecondLook

__all__ = ["accelerate", "release"]

CALLBACKS = "callback_on_step_end", "callback"  # as pipelines name them

_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Module, _Users] = weakref.WeakKeyDictionary()


@dataclass
class _Users:
    """Of a model: how many accelerated pipelines share it, how it was called before, and how it is
    called now."""

    count: int
    before: Any
    now: SecondLook | None = None


@dataclass(eq=False)
class _PipelineRun:
    """One call of a pipeline: what its scheduler says.

    given, times: the scheduler's timesteps, as it holds them and as numbers; weights: of the
    outputs at each, if known; first: the index of the run's first. made: how often the scheduler
    has stepped since. A pipeline may sample several times in one call, with other timesteps or the
    same again: these are runs one after the other.
    """

    pipeline: Any
    scheduler: Any
    given: Any = None
    times: list[float] = field(default_factory=list)
    weights: list[float] | None = None
    first: int = 0
    made: int = 0
    newest: int = 0
    explicit: list[Explicit] = field(default_factory=list)

    def moment(self) -> Moment | None:
        """The step of a call of a model now; None where the scheduler does not say."""
        times = getattr(self.scheduler, "timesteps", None)
        if times is None:
            return None
        if times is not self.given or self._index() < self.newest:
            self._begin(times)
        index = self.newest = self._index()
        if not self.first <= index < len(self.times):
            return None
        return Moment(index - self.first, self.times[index])

    def _index(self) -> int:
        """Of the timestep that comes next; not all schedulers know it themselves."""
        known = getattr(self.scheduler, "step_index", None)
        return self.first + self.made if known is None else int(known)

    def _begin(self, times: Any) -> None:
        self.given = times
        self.times = (
            times.tolist() if isinstance(times, Tensor) else [float(each) for each in times]
        )
        self.weights = weights_of(self.scheduler)
        # Pipelines that begin with a picture leave out the first steps.
        count = getattr(self.pipeline, "_num_timesteps", None)
        begun = getattr(self.scheduler, "begin_index", None)
        if begun is None and count is not None and count <= len(self.times):
            begun = len(self.times) - count
        self._start_at(begun or 0)
        for explicit in self.explicit:
            explicit.runs.clear()
            explicit.kept.clear()

    def _start_at(self, first: int) -> None:
        self.first = self.newest = first
        self.made = 0
        weights = None if self.weights is None else self.weights[first:]
        for explicit in self.explicit:
            explicit.steps, explicit.weights = len(self.times) - first, weights
            for runs in explicit.runs.values():
                runs.steps_known, runs.weights = explicit.steps, weights

    def edited(self) -> None:
        """A callback has changed a tensor: what comes next does not continue what was."""
        for explicit in self.explicit:
            for runs in explicit.runs.values():
                runs.drop_states()

    def stepped(self, timestep: Any) -> None:
        """The scheduler has made a step at this timestep."""
        if self.given is None:
            return
        if self.made == 0 and timestep is not None:
            # Where a run began later than was thought, it shows here.
            # Some pipelines give each sample its own; where these differ, they say nothing.
            given = set(timestep.flatten().tolist() if isinstance(timestep, Tensor) else [timestep])
            time = float(given.pop())
            if not given and time in self.times and time != self.times[self.first]:
                self._start_at(self.times.index(time))
        self.made += 1


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
    models = _checked(pipeline)
    if _accelerated(pipeline):
        release(pipeline)
    with _lock:
        for model in models:
            users = _users.setdefault(model, _Users(0, model._compiled_call_impl))
            users.count += 1
            if users.now is not None:
                users.now.undo()
            model.compile(backend="accel", options=options)
            model._compiled_call_impl = users.now = SecondLook(model)
            if hasattr(model, "cache_context"):
                _name_branches(model)
        # A class of its own, in which one method is another.
        kind = type(pipeline)
        own = {
            "__call__": _call(kind.__call__), "accel_models": [weakref.ref(m) for m in models],
            "__module__": kind.__module__, "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }  # fmt: skip
        pipeline.__class__ = type(kind.__name__, (kind,), own)
    return pipeline


def release(pipeline: Any) -> Any:
    """Undo `accelerate`: the pipeline and its models are what they were. Returns the pipeline.

    Models that another accelerated pipeline shares stay compiled.
    Raises AccelError for a pipeline that is not accelerated.
    """
    if not _accelerated(pipeline):
        raise AccelError(f"{type(pipeline).__name__} is not accelerated; nothing to release")
    with _lock:
        # Those that were compiled, whatever the pipeline has by now.
        models = [each() for each in type(pipeline).accel_models]
        pipeline.__class__ = type(pipeline).__mro__[1]
        for model in models:
            users = None if model is None else _users.get(model)
            if model is None or users is None:
                continue
            users.count -= 1
            if not users.count:
                del _users[model]
                if users.now is not None:
                    users.now.undo()
                model._compiled_call_impl = users.before
                model.__dict__.pop("cache_context", None)
    return pipeline


def _transformers(components: Mapping[str, Any]) -> list[nn.Module]:
    """The models that a pipeline samples with."""
    return [
        each for name, each in components.items()
        if isinstance(each, nn.Module) and "transformer" in name
    ]  # fmt: skip


def _checked(pipeline: Any) -> list[nn.Module]:
    """The models of a pipeline that can be served; AccelError for another."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise AccelError(
            f"expected a pipeline of diffusers, with components, got {type(pipeline).__name__}; "
            'compile a model by itself with torch.compile(model, backend="accel")'
        )
    found = _transformers(components)
    if not found:
        named = ", ".join(
            f"{name}: {type(each).__name__}" for name, each in components.items()
            if isinstance(each, nn.Module)
        )  # fmt: skip
        raise AccelError(
            f"{type(pipeline).__name__} has no transformer; it has {named or 'no models yet'}. "
            "accel skips the block stacks of diffusion transformers"
        )
    scheduler = getattr(pipeline, "scheduler", None)  # not among the components of all
    if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "timesteps"):
        raise AccelError(
            f"{type(pipeline).__name__} has {type(scheduler).__name__} for a scheduler, which has "
            "no `step` and `timesteps` to tell a run's steps by; compile its transformer with "
            'torch.compile(..., backend="accel")'
        )
    return found


def _accelerated(pipeline: Any) -> bool:
    return "accel_models" in vars(type(pipeline))


def _call(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _running(self) as run:
            given = signature.bind(self, *args, **kwargs)
            for name in CALLBACKS:
                if callable(given.arguments.get(name)):
                    given.arguments[name] = noticing(given.arguments[name], run.edited)
            return original(*given.args, **given.kwargs)

    return call


@contextlib.contextmanager
def _running(pipeline: Any) -> Iterator[_PipelineRun]:
    scheduler = pipeline.scheduler
    run = _PipelineRun(pipeline, scheduler)
    if hasattr(pipeline, "_num_timesteps"):
        pipeline._num_timesteps = None  # of the last call
    token, own = _run.set(run), "step" not in vars(scheduler)
    if own:
        scheduler.step = _Step(scheduler)
    try:
        with contextlib.ExitStack() as stack:
            for model in _transformers(pipeline.components):
                tensors = frozenset(map(id, [*model.parameters(), *model.buffers()]))
                explicit = Explicit(tensors, where=run.moment, named=_branch.get)
                run.explicit.append(explicit)
                stack.enter_context(enter_explicit(explicit))
            yield run
    finally:
        _run.reset(token)
        if own:
            del scheduler.step


class _Step:
    """Stands for a scheduler's `step`. In a deep copy of the scheduler (audio beside video has one)
    it is the copy's."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        # Pipelines ask which arguments it has.
        self.__signature__ = inspect.signature(type(scheduler).step.__get__(scheduler))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self.scheduler).step(self.scheduler, *args, **kwargs)
        run = _run.get()
        if run is not None and run.scheduler is self.scheduler:
            given = self.__signature__.bind(*args, **kwargs).arguments
            run.stepped(given.get("timestep"))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Step:
        return _Step(memo[id(self.scheduler)])


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
