"""How the steps of a run are decided and predicted, and what a calibration says of that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...kernels.errors import OptionError, first_line
from ...kernels.predictors import PREDICTORS, Predictor, resolve
from ...kernels.predictors.recorded import Recorded
from .schedule import Planned, Schedule

__all__ = ["FORMAT", "OWN", "RECORDED", "Forecast", "Point", "Profile"]

FORMAT = 1  # of the file
OWN, RECORDED = "as compiled", "recorded"  # predictors of a point


@dataclass(frozen=True)
class Forecast:
    """schedule: which steps are computed. predictors: of each stream, or one for all. correction:
    see the option of that name."""

    schedule: Schedule
    predictors: tuple[Predictor, ...]
    correction: float


@dataclass(frozen=True)
class Point:
    """One way to sample that was tried. computed: its computed steps. predictor: RECORDED for the
    recorded run's slopes, OWN for the option `predictor`, or a name of `PREDICTORS`. correction:
    see the option.

    psnr: decibels to the full run, the mean over the samples of a run on noise that had no part in
    any choice. error: its standard error; None where there was one sample.
    """

    computed: tuple[int, ...]
    predictor: str
    correction: float
    psnr: float
    error: float | None


@dataclass(frozen=True)
class Profile:
    """What `accel.calibrate` found out about one model with one sampler.

    weights: a digest of each. shapes: of each predicted residual, without the batch.
    times: of the recorded run's steps. products: for each stream, see `Recorded`.
    share: what a predicted step costs, in computed ones. points: by the steps they compute, fewest
    first.
    Raises OptionError where it is none.
    """

    weights: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    times: tuple[float, ...]
    products: tuple[tuple[tuple[float, ...], ...], ...]
    share: float
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if not self.points or not self.weights:
            raise OptionError("a profile has at least one point, and the digest of one weight")
        numbers: list[Any] = [
            self.share,
            *self.times,
            *(n for s in self.products for row in s for n in row),
        ]
        for point in self.points:
            numbers += [*point.computed, point.correction, point.psnr, point.error or 0.0]
        strange = [each for each in numbers if not _is_number(each)]
        strange += [each for each in self.weights if not isinstance(each, str)]
        if strange:
            raise OptionError(f"a profile can't hold {strange[0]!r} where it has it")
        if len(self.products) != len(self.shapes):
            raise OptionError(
                f"a profile has products for {len(self.products)} streams and shapes of "
                f"{len(self.shapes)}"
            )
        for point in self.points:
            if point.predictor not in (OWN, RECORDED, *PREDICTORS):
                raise OptionError(f"a profile names the unknown predictor {point.predictor!r}")
            steps = list(point.computed)
            if steps != sorted(set(steps)) or steps[:1] != [0] or steps[-1] >= self.steps:
                raise OptionError(
                    f"a profile of {self.steps} steps can't compute {steps}: they rise from 0"
                )
        self.predictors()  # raises where products do not fit

    @property
    def steps(self) -> int:
        """Of the recorded run."""
        return len(self.times)

    def predictors(self) -> tuple[Predictor, ...]:
        """The recorded run's, one for each stream."""
        return tuple(Recorded(self.times, each) for each in self.products)

    def speed(self, point: Point) -> float:
        """How much faster a run is that samples so, by the costs of its steps."""
        computed = len(point.computed)
        return self.steps / (computed + (self.steps - computed) * self.share)

    def fewest(self, min_psnr: float) -> Point | None:
        """The fastest point that keeps to so many decibels, by its mean less its standard error
        (where it has one); None if none does."""
        for point in self.points:
            if point.psnr - (point.error or 0.0) >= min_psnr:
                return point
        return None

    def fastest(self, speed: float) -> Point | None:
        """The best point that is at least so much faster; None if none is."""
        found = [point for point in self.points if self.speed(point) >= speed]
        return max(found, key=lambda point: point.psnr, default=None)

    def nearest(self, computed: float) -> Point:
        """The point whose number of computed steps is nearest."""
        return min(self.points, key=lambda point: abs(len(point.computed) - computed))

    def forecast(self, point: Point, predictor: Predictor) -> Forecast:
        """predictor: the option's."""
        if point.predictor == RECORDED:
            predictors = self.predictors()
        else:
            predictors = (predictor if point.predictor == OWN else resolve(point.predictor),)
        return Forecast(Planned(point.computed, self.steps), predictors, point.correction)

    def differs(self, weights: Sequence[str], shapes: Sequence[Sequence[int]]) -> str:
        """What of a model is not as it was when it was calibrated; empty where all is.

        weights: digests of those that a graph uses; none where they can't change.
        """
        strange = len(set(weights) - set(self.weights))
        if strange:
            return f"{strange} of its {len(weights)} weights are others"
        if [list(each) for each in shapes] != [list(each) for each in self.shapes]:
            return (
                f"it predicts residuals of sizes {[list(each) for each in shapes]}, and "
                f"{[list(each) for each in self.shapes]} were recorded"
            )
        return ""

    # As a file

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a write that is cut off leaves what was there."""
        place = Path(path)
        temporary = place.with_name(place.name + ".tmp")
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False) + "\n")
        temporary.replace(place)

    @staticmethod
    def read(path: str | Path) -> Profile:
        """From a file that `save` wrote. Raises OptionError where it is none."""
        try:
            plain = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise OptionError(f"{path} is no profile: {first_line(error)}") from error
        return Profile.of(plain, str(path))

    @staticmethod
    def of(plain: Any, where: str = "profile") -> Profile:
        """From what JSON holds. where: for errors. Raises OptionError where it is none."""
        if not isinstance(plain, Mapping):
            raise OptionError(f"{where} is no profile: it is a {type(plain).__name__}")
        found = dict(plain)
        version = found.pop("format", FORMAT)
        if version != FORMAT:
            raise OptionError(
                f"{where} has format {version}, this version of accel reads {FORMAT}: calibrate "
                "again"
            )
        try:
            points = tuple(
                Point(**{**each, "computed": tuple(each["computed"])}) for each in found["points"]
            )
            return Profile(
                **{each.name: _tuples(found[each.name]) for each in fields(Profile)}
                | {"points": points, "share": float(found["share"])}
            )
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(
                f"{where} is no profile: {type(error).__name__}: {first_line(error)}"
            ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
