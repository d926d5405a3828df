"""Trying a predictor that a user hands over, on small tensors, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...kernels.errors import OptionError, first_line
from ...kernels.predictors import Predictor, moments, predictor_name, registered_name, resolve
from ...kernels.predictors.base import GRANULARITIES
from ..graph.emit import inline

__all__ = ["accepted"]

METHODS = ("coefficients", "predict")
FLAGS = ("keeps_predictions", "reads_inputs")
SHAPE = (2, 3, 4)  # batch, tokens, channels
SCALES = (2.0**-10, 2.0**10)
TOLERANCE = 1e-3  # relative: rounding, and no more than that


def accepted(predictor: Any) -> str | Predictor:
    """A predictor as the options keep it: a name of accel's own, else an object that was tried.

    An object equal to one of accel's own becomes its name. Raises OptionError for an unknown name,
    and for an object that lacks a part of `kernels.predictors.Predictor`, is no function of its
    arguments, can't be written into a graph, does not reproduce a constant, is not
    scale-equivariant, or yields NaN or Inf.
    """
    if isinstance(predictor, str):
        resolve(predictor)
        return predictor
    _check_parts(predictor)
    name = registered_name(predictor)
    if name is not None:
        return name
    trial = _Trial(predictor)
    trial.on_constants()
    trial.on_scales()
    trial.in_a_graph()
    checked: Predictor = predictor
    return checked


def _check_parts(predictor: Any) -> None:
    """Raise OptionError naming all that the protocol asks for and the object has not."""
    if isinstance(predictor, type):
        raise OptionError(
            f"predictor is the class {predictor.__qualname__}; hand over an object of it: "
            f"{predictor.__qualname__}()"
        )
    parts = ("history", "granularity", *FLAGS, *METHODS)
    lacking = [name for name in parts if not hasattr(predictor, name)]
    wrong = []
    if "history" not in lacking:
        history = predictor.history
        if not isinstance(history, int) or isinstance(history, bool) or history < 1:
            wrong.append(f"history is {history!r}; it has to be a whole number from 1")
    if "granularity" not in lacking and predictor.granularity not in GRANULARITIES:
        known = ", ".join(map(repr, GRANULARITIES))
        wrong.append(f"granularity is {predictor.granularity!r}; it has to be one of {known}")
    for name in FLAGS:
        if name not in lacking and not isinstance(getattr(predictor, name), bool):
            wrong.append(f"{name} is {getattr(predictor, name)!r}; it has to be True or False")
    for name in METHODS:
        if name not in lacking and not callable(getattr(predictor, name)):
            wrong.append(f"{name} is {getattr(predictor, name)!r}; it has to be a method")
    if lacking:
        wrong.insert(0, f"it lacks {', '.join(lacking)}")
    if wrong:
        raise OptionError(
            f"predictor {_called(predictor)} is neither a known name nor an object that follows "
            f"accel.kernels.predictors.Predictor: {'; '.join(wrong)}"
        )


def _called(predictor: Any) -> str:
    plain = predictor is None or isinstance(predictor, (int, float, list, tuple, dict))
    return repr(predictor) if plain else predictor_name(predictor)


class _Trial:
    """One predictor on small tensors. Its methods raise OptionError with what they saw."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.name = predictor_name(predictor)
        self.form: list[int] | None = None  # sizes of the coefficients; [] for none
        self.random = torch.Generator().manual_seed(0)

    def on_constants(self) -> None:
        """A constant history comes back, on all kinds of times; zeros are one, too."""
        for size in (1.0, 0.0):
            constant = self._draw() * size
            for kind, times in self._times().items():
                history = [constant.clone() for _ in range(self.predictor.history)]
                got = self._forecast(history, times, [constant, constant], f"a constant, {kind}")
                if _apart(got, constant) > TOLERANCE:
                    raise OptionError(
                        f"predictor {self.name} does not reproduce a constant: it answers "
                        f"{_first(constant):.4g} with {_first(got):.4g} ({kind})"
                    )

    def on_scales(self) -> None:
        """The same again gives the same, and scaled residuals and inputs the scaled forecast."""
        history = [self._draw() for _ in range(self.predictor.history)]
        inputs = [self._draw(), self._draw()]
        for kind, times in self._times().items():
            once = self._forecast(history, times, inputs, f"random residuals, {kind}")
            again = self._forecast(history, times, inputs, f"random residuals, {kind}")
            if not torch.equal(once, again):
                raise OptionError(
                    f"predictor {self.name} answers {_first(once):.4g} and then, to the same "
                    f"question, {_first(again):.4g}; it must not draw numbers or remember calls"
                )
            for scale in SCALES:
                where = f"random residuals times {scale:g}, {kind}"
                scaled = [each * scale for each in history], [each * scale for each in inputs]
                got = self._forecast(scaled[0], times, scaled[1], where) / scale
                if _apart(got, once) > TOLERANCE:
                    raise OptionError(
                        f"predictor {self.name} is not scale-equivariant: residuals times "
                        f"{scale:g} give {_first(got):.4g} times that, where the residuals "
                        f"themselves give {_first(once):.4g} ({kind})"
                    )

    def in_a_graph(self) -> None:
        """`predict` can be written down as a graph that computes the same."""
        predictor, history = self.predictor, self.predictor.history
        times = self._times()["even times"]
        residuals = [self._draw() for _ in range(history)]
        inputs = [self._draw(), self._draw()]
        measured = self._moments(residuals)
        values = [*residuals, *inputs] if predictor.reads_inputs else list(residuals)
        advice = "Both methods have to be plain torch without control flow on values"
        with FakeTensorMode() as mode:
            blank = torch.zeros(times.shape), torch.ones(()), torch.zeros(measured.shape)
            known = self._call(partial(predictor.coefficients, *blank), "coefficients", advice)
        if known is not None:
            coefficients: Any = predictor.coefficients(times, _left(), measured)
            values.append(coefficients.float())
        graph = fx.Graph()
        nodes = []
        for index, value in enumerate(values):
            node = graph.placeholder(f"value_{index}")
            node.meta["example_value"] = mode.from_tensor(value)
            nodes.append(node)

        def forecast(*flat: Tensor) -> Tensor:
            rest = list(flat)
            coefficients = None if known is None else rest.pop()
            return predictor.predict(rest[:history], coefficients, rest[history:])

        advice += (
            ", and predict without tensors of its own and without operations that return several "
            "tensors; coefficients may use both"
        )
        graph.output(self._call(lambda: inline(graph, forecast, nodes)[0], "predict", advice))
        got = fx.GraphModule({}, graph)(*values)
        expected = forecast(*values)
        if _apart(got, expected) > TOLERANCE:
            raise OptionError(
                f"predict of predictor {self.name} computes something else as a graph: "
                f"{_first(got):.4g} instead of {_first(expected):.4g}. A graph does not hold what "
                "is written into a tensor in place; compute a new one"
            )

    def _forecast(
        self, history: list[Tensor], times: Tensor, inputs: Sequence[Tensor], where: str
    ) -> Tensor:
        """As a run does it, with all that the protocol says of the results."""
        predictor = self.predictor
        coefficients = self._call(
            lambda: predictor.coefficients(times, _left(), self._moments(history)),
            "coefficients", where,
        )  # fmt: skip
        self._check_coefficients(coefficients, where)
        given = [*history, *inputs] if predictor.reads_inputs else list(history)
        before = [each.clone() for each in given]
        known = None if coefficients is None else coefficients.float()
        rest = given[len(history) :]
        got = self._call(lambda: predictor.predict(history, known, rest), "predict", where)
        wrong = None
        if not isinstance(got, Tensor):
            wrong = f"a {type(got).__name__}, not a tensor"
        elif got.shape != SHAPE or got.dtype != torch.float32:
            wrong = f"{got.dtype} {list(got.shape)}; it has to be float32 {list(SHAPE)} here"
        elif any(got.untyped_storage()._cdata == each.untyped_storage()._cdata for each in given):
            wrong = "one of its arguments or a view of it; it has to be a new tensor (clone it)"
        elif not torch.isfinite(got).all():
            wrong = f"NaN or Inf for {where}"
        if wrong is not None:
            raise OptionError(f"predict of predictor {self.name} returns {wrong}")
        if not all(map(torch.equal, given, before)):
            raise OptionError(
                f"predict of predictor {self.name} changes its arguments in place; they are the "
                "run's state"
            )
        result: Tensor = got
        return result

    def _check_coefficients(self, found: Any, where: str) -> None:
        if found is not None and not (isinstance(found, Tensor) and found.is_floating_point()):
            seen = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(
                f"coefficients of predictor {self.name} returns {seen}; it has to be a "
                "floating-point tensor or None"
            )
        form = [] if found is None else list(found.shape)
        if self.form is None:
            self.form = form
        if form != self.form or (found is not None and not form):
            raise OptionError(
                f"coefficients of predictor {self.name} has the shape {form} for {where}, before "
                f"{self.form}; it has to be [count, batch, ...] with one count for all times"
            )

    def _call(self, function: Callable[[], Any], name: str, where: str) -> Any:
        try:
            return function()
        except Exception as error:  # whatever a user's code raises
            raise OptionError(
                f"{name} of predictor {self.name} raises {type(error).__name__}: "
                f"{first_line(error)} ({where})"
            ) from error

    def _draw(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.random)

    def _moments(self, history: Sequence[Tensor]) -> Tensor:
        newest, *older = history
        older = older or [newest]
        return moments(newest, older, older[0], self.predictor.granularity).double()

    def _times(self) -> dict[str, Tensor]:
        """Kinds of times, each `[history + 1, batch]`, the step to predict first."""
        count = self.predictor.history + 1
        even = torch.arange(count, dtype=torch.float64)[:, None].expand(-1, SHAPE[0]).clone()
        newest = even.clamp(max=1)
        return {
            "even times": even,
            "rising times": 1000 - 50 * even,
            "uneven times, other ones for each sample": even.square() * torch.tensor([0.1, 3.0]),
            "one residual known": newest,
            "two residuals known": even.clamp(max=min(2, count - 1)),
            "all times equal": torch.full_like(even, 500.0),
        }


def _left() -> Tensor:
    return torch.tensor(0.5, dtype=torch.float64)


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value; 0 where both are 0."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def _first(tensor: Tensor) -> float:
    return float(tensor.flatten()[0])
