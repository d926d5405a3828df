"""What a run's length does to its plan: diffusers' schedulers, numbers of steps, types.

    python -m accel.examples.runs.lengths [FOLDER]

writes `lengths.md` and `lengths.csv`. Each row samples twice with a small DiT of its own (random
weights, the default options but for `max_error`: they predict badly), from other noise the second
time, and once more as an explicit run; of each run how many calls were computed, beside how many
the plan has for its number of calls.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import stats, trajectory
from ...passes.pade.schedule import PRESETS, Auto
from .. import records

__all__ = ["Row", "measured", "schedulers", "write"]

STEPS = (8, 20, 28, 30, 50)
TYPES = (torch.float32, torch.bfloat16)
CHANNELS, SIDE = 4, 16
PLAN = Auto(PRESETS["balanced"])
OPTIONS: dict[str, Any] = {"lowering": "eager", "pade": {"max_error": 1e9}}
FOLDER = Path(__file__).parent / "results"
# How a class's times can be spaced, besides its own default way.
SPACINGS: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "Lu": {"use_lu_lambdas": True},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "shift 3": {"shift": 3.0},
    "exponential schedule": {"sigma_schedule": "exponential"},
    "no clipping": {"clip_sample": False},
}
NEEDED = {"PNDMScheduler": {"skip_prk_steps": True}}  # its own pipelines' setting


@functools.cache
def schedulers() -> dict[str, tuple[type, dict[str, Any]]]:
    """By name: each class that diffusers exports, by default and in each spacing that it has."""
    import diffusers

    found: dict[str, tuple[type, dict[str, Any]]] = {}
    for name in sorted(dir(diffusers.schedulers)):
        one = getattr(diffusers.schedulers, name)
        if not isinstance(one, type) or not _samples(one):
            continue
        short, given = name.removesuffix("Scheduler"), NEEDED.get(name, {})
        found[short] = one, given
        for spacing, settings in SPACINGS.items():
            if set(settings) <= set(_defaults(one)) and not _default(one, settings):
                found[f"{short}, {spacing}"] = one, {**given, **settings}
    return found


def _samples(one: type) -> bool:
    """Whether a class has timesteps. A stand-in for one that is not installed does not say."""
    named = one.__name__.endswith("Scheduler") and "_backends" in vars(one)
    return named or any("set_timesteps" in vars(base) for base in one.__mro__)


def _defaults(one: type) -> dict[str, Any]:
    return {key: each.default for key, each in inspect.signature(one).parameters.items()}


def _default(one: type, settings: dict[str, Any]) -> bool:
    own = _defaults(one)
    return all(own[key] == value for key, value in settings.items())


@functools.cache
def model(dtype: torch.dtype) -> nn.Module:
    """diffusers' DiT: 3 blocks, 64 tokens, gates that let every block matter."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    made: Any = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=3, sample_size=SIDE, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    model: nn.Module = made.eval().to(dtype)
    return model


@torch.no_grad()
def sampled(
    fast: Callable[..., Any], own: Any, steps: int, dtype: torch.dtype, seed: int,
    explicit: bool = False,
) -> int:  # fmt: skip
    """A run by a scheduler, as pipelines do it; how often it called the model."""
    own.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator)
    state = (state * getattr(own, "init_noise_sigma", 1.0)).to(dtype)
    more = {"generator": generator} if "generator" in _defaults(own.step) else {}
    calls = len(own.timesteps)
    scale = getattr(own, "scale_model_input", None)
    with trajectory(fast, calls) if explicit else nullcontext():
        for time in own.timesteps:
            given = state if scale is None else scale(state, time)
            when = time.expand(1)
            when = when.to(dtype) if when.is_floating_point() else when
            output = fast(given.to(dtype), timestep=when, class_labels=torch.tensor([1]),
                          return_dict=False)[0]  # fmt: skip
            after = own.step(output, time, state, **more)
            state = (after[0] if isinstance(after, tuple) else after.prev_sample).to(dtype)
    return calls


@dataclass(frozen=True)
class Row:
    """One scheduler, number of steps and type. calls: of the model in a run; planned: how many of
    them are computed where it is known; first, second, explicit: how many were, in the first and
    the second run, and in one with `accel.trajectory`; declined: why it can't be sampled so."""

    scheduler: str
    steps: int
    dtype: str
    calls: int = 0
    planned: int = 0
    first: int = 0
    second: int = 0
    explicit: int = 0
    declined: str = ""


def measured(name: str, steps: int, dtype: torch.dtype) -> Row:
    """Sample three times with a model of its own, which no earlier row's runs are of."""
    one, settings = schedulers()[name]
    own_type = str(dtype)[6:]
    plain = copy.deepcopy(model(dtype))
    fast = torch.compile(plain, backend="accel", options=OPTIONS)
    counts = [0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers warn of what others would set
        try:
            calls = sampled(plain, one(**settings), steps, dtype, 1)
        except Exception as error:  # whatever a scheduler raises is its row
            return Row(name, steps, own_type, declined=f"{type(error).__name__}: {error}")
        for seed in (1, 2, 3):
            sampled(fast, one(**settings), steps, dtype, seed, explicit=seed == 3)
            counts.append(stats(fast).full_steps)
    first, second, explicit = (after - before for before, after in itertools.pairwise(counts))
    planned = len(PLAN.placed(calls))
    return Row(name, steps, own_type, calls, planned, first, second, explicit)


def run(folder: Path, say: Callable[[str], None] = print) -> None:
    """Measure all rows and write them."""
    rows = []
    for dtype, name, steps in itertools.product(TYPES, schedulers(), STEPS):
        rows.append(measured(name, steps, dtype))
        say(str(rows[-1]))
    write(folder, rows)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write the table, and a page that says what it shows."""
    records.write(folder / "lengths.csv", [asdict(row) for row in rows])
    (folder / "lengths.md").write_text(_page(rows))


def _page(rows: Sequence[Row]) -> str:
    served = [row for row in rows if not row.declined]
    lines = [
        "# Steps that are planned, and steps that are computed",
        "",
        "In a cell: calls of the model in a run, how many of them the plan computes where the "
        "number is known, and how many were computed in the first and the second run of a model, "
        "and in an explicit one (`accel.trajectory`).",
    ]
    for dtype in dict.fromkeys(row.dtype for row in served):
        some = [row for row in served if row.dtype == dtype]
        numbers = sorted({row.steps for row in some})
        lines += ["", f"## {dtype}", ""]
        lines.append("| scheduler | " + " | ".join(f"{each} steps" for each in numbers) + " |")
        lines.append("|---" * (len(numbers) + 1) + "|")
        for name in dict.fromkeys(row.scheduler for row in some):
            own = {row.steps: row for row in some if row.scheduler == name}
            cells = [_cell(own.get(each)) for each in numbers]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    declined = {row.scheduler: row.declined for row in rows if row.declined}
    lines += ["", "## Not sampled", ""]
    lines += [f"- {name}: {why.splitlines()[0]}" for name, why in declined.items()]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.calls}, {row.planned}: {row.first}, {row.second}, {row.explicit}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
