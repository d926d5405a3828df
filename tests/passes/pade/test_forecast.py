"""Profiles: what they are checked for, chosen by, and read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accel import OptionError, Options, PadeOptions, Profile
from accel.compiler.options import parse_options
from accel.kernels.predictors.recorded import Recorded
from accel.passes.pade.forecast import Point
from accel.passes.pade.schedule import Planned
from hypothesis import given, settings
from hypothesis import strategies as st

TIMES = (900.0, 700.0, 500.0, 200.0, 10.0)


def products(seed: int = 0, steps: int = 5) -> tuple[tuple[float, ...], ...]:
    values = residuals(seed, steps)
    return tuple(tuple(row) for row in (values @ values.T).tolist())


def residuals(seed: int = 0, steps: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 30, generator=draw, dtype=torch.float64)


def profile(**changed: Any) -> Profile:
    points = (
        Point((0, 2), "recorded", 0.5, 31.0, 0.5),
        Point((0, 1, 3), "as compiled", 0.75, 38.0, None),
        Point((0, 1, 2, 4), "pade", 1.0, 44.0, 2.0),
    )
    fields: dict[str, Any] = {
        "weights": ("aa", "bb"), "shapes": ((4, 8),), "times": TIMES, "products": (products(),),
        "share": 0.1, "points": points,
    }  # fmt: skip
    return Profile(**{**fields, **changed})


def test_points_are_chosen_by_what_was_measured() -> None:
    known = profile()
    first, second, third = known.points
    assert known.fewest(30) == first
    assert known.fewest(30.6) == second  # its mean is above, but not by its standard error
    assert known.fewest(38) == second
    assert known.fewest(42.5) is None
    assert known.speed(second) == pytest.approx(5 / 3.2)
    assert known.fastest(1.5) == second
    assert known.fastest(1.0) == third
    assert known.fastest(2.4) is None
    assert known.nearest(2.4) == first
    with pytest.raises(OptionError, match=r"at most 2\.17 times"):
        PadeOptions(profile=known, speed=2.4)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    profile().save(path)
    assert Profile.read(path) == profile()
    options = Options(pade={"profile": path, "min_psnr": 38})
    # As an engine's manifest holds it.
    plain = json.loads(json.dumps(options.plain()))
    assert parse_options(plain) == options


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_file_is_named_and_never_half_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Anything in its place, or nothing: an error, or a profile that holds together."""
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    profile().save(path)
    plain = json.loads(path.read_text())
    place: Any = plain
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(
            st.none() | st.integers(-3, 9) | st.just("x") | st.just([]) | st.just({})
        )
    path.write_text(json.dumps(plain))
    try:
        found = Profile.read(path)
    except OptionError:
        return
    assert Profile.of(json.loads(json.dumps(plain))) == found
    for point in found.points:
        found.speed(point)
        (predictor, *_) = found.forecast(point, Recorded(TIMES, products())).predictors
        times = torch.tensor(TIMES[1:] + TIMES[:1]).double()[:, None][:4]
        known = predictor.coefficients(times, torch.tensor(0.4).double(), torch.zeros(5, 1, 1))
        assert known is not None
        assert torch.isfinite(known).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no profile"), ("[1]", "it is a list"), ("{}", "KeyError"),
     ('{"format": 9}', "format 9")],
)  # fmt: skip
def test_what_is_no_profile(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        PadeOptions(profile=path)
    with pytest.raises(OptionError, match="no profile"):
        PadeOptions(profile=tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"points": ()}, "at least one point"),
        ({"weights": ()}, "digest of one weight"),
        ({"points": (Point((1, 2), "pade", 0.5, 31.0, None),)}, "rise from 0"),
        ({"points": (Point((0, 2), "magic", 0.5, 31.0, None),)}, "unknown predictor 'magic'"),
        ({"points": (Point((0, 5), "recorded", 0.5, 31.0, None),)}, "rise from 0"),
        ({"times": (3.0, 1.0, 2.0, 0.5, 0.1)}, "fall, or rise"),
        ({"products": ()}, "0 streams"),
        ({"products": (products(steps=4),)}, "5 x 5"),
    ],
)
def test_what_does_not_hold_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        profile(**changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_psnr": 40}, "needs a profile"),
        ({"speed": 2}, "needs a profile"),
        ({"profile": profile(), "min_psnr": 40, "speed": 2}, "contradict"),
        ({"profile": profile(), "min_psnr": 40, "preset": "fast"}, "preset contradict"),
        ({"profile": profile(), "schedule": [0, 1, 2]}, "contradict"),
        ({"profile": profile(), "min_psnr": -1}, "above 0"),
        ({"profile": profile(), "min_psnr": 1, "predictor": "taylor-2"}, "stand in for"),
        ({"profile": profile(), "min_psnr": 1, "predictor": "hermite"}, "stand in for"),
        ({"profile": profile(), "speed": "much"}, "above 0"),
        ({"profile": profile(), "mismatch": "ignore"}, "'warn' or 'raise'"),
    ],
)
def test_options_that_can_not_be_kept(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PadeOptions(**options)


# The schedule


@given(st.integers(3, 60), st.integers(2, 120), st.data())
def test_plans_of_other_lengths(length: int, steps: int, data: st.DataObject) -> None:
    rest = data.draw(st.sets(st.integers(1, length - 1), min_size=1))
    planned = Planned((0, *sorted(rest)), length)
    computed, last = [], -1
    for step in range(steps):
        if planned.computes(step, last, steps):
            computed.append(step)
            last = step
    assert computed == list(planned.placed(steps))
    assert computed[0] == 0
    if steps == length:
        assert computed == [0, *sorted(rest)]
    assert planned.computes(steps, last, steps)  # beyond what is known
    assert planned.computes(3, 0, None)
