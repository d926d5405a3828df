"""How much of sampling is proven: diffusers' schedulers, forms of guidance, types.

    python -m accel.examples.runs.recognition [FOLDER]

writes `recognition.md` and `recognition.csv`. Each row samples with a small model that is anything
but linear: for each run the share of steps whose parent is found, and for pairs of a sample and a
step that it does not come from (of another seed, prompt or weight of guidance, and other steps of
its own run), how many are taken for a proof.
"""

from __future__ import annotations

import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compiler.runtime.digest import digest
from ...compiler.runtime.provenance import (
    fit,
    flattened,
    limits_of,
    positions,
    rounding,
)
from ...compiler.runtime.runs import Runs
from ...compiler.runtime.steps import Call, Sample
from .. import records

__all__ = ["FORMS", "SCHEDULERS", "Row", "measured", "sampled", "write"]

CHANNELS, SIDE, STEPS = 4, 32, 20
PAIRS = 400  # of each row that are tried
FOLDER = Path(__file__).parent / "results"
TYPES = (torch.float32, torch.bfloat16)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow Euler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler, Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "DDIM, no clipping": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM, clipping": ("DDIMScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++ 2M, Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ single step": ("DPMSolverSinglestepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM-Solver++": ("EDMDPMSolverMultistepScheduler", {}),
    "IPNDM": ("IPNDMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
# Those that add fresh noise at each step; nothing can prove their steps.
NOISY = ("Euler ancestral", "DDPM", "LCM")


def output(sample: Tensor, time: float, prompt: float, broken: float = 0.0) -> Tensor:
    """Of a model that is anything but linear. broken: how much of it is left out, as guidance by a
    worse model does."""
    wide = sample.float()
    near = wide.roll(1, -1) + wide.roll(1, -2) - wide.roll(-1, -1) + 0.5 * wide.roll(1, 1)
    mixed = torch.tanh((0.6 - broken) * near + prompt) + 0.3 * wide * wide.cos()
    return (mixed + 0.2 * time).to(sample.dtype)


@dataclass
class Guidance:
    """What a form of guidance keeps from step to step. weight: how strong it is."""

    weight: float
    momentum: Tensor | float = 0.0


Branches = list[tuple[str, Tensor]]
Form = Callable[[Callable[..., Tensor], Guidance, float], tuple[Branches, Tensor]]


def _none(model: Callable[..., Tensor], guidance: Guidance, gone: float) -> tuple[Branches, Tensor]:
    yes = model(0.7)
    return [("yes", yes)], yes


def _both(model: Callable[..., Tensor], guidance: Guidance, gone: float) -> tuple[Branches, Tensor]:
    yes, no = model(0.7), model(-0.2)
    return [("yes", yes), ("no", no)], no + guidance.weight * (yes - no)


def _rescaled(
    model: Callable[..., Tensor], guidance: Guidance, gone: float
) -> tuple[Branches, Tensor]:
    """Lin and others, arXiv 2305.08891: the mix has the spread of the branch with the prompt."""
    branches, mix = _both(model, guidance, gone)
    return branches, 0.7 * mix * branches[0][1].std() / mix.std() + 0.3 * mix


def _projected(
    model: Callable[..., Tensor], guidance: Guidance, gone: float
) -> tuple[Branches, Tensor]:
    """Adaptive projected guidance (arXiv 2410.02416): with momentum, a bound, and a projection."""
    branches, _ = _both(model, guidance, gone)
    yes, no = (each for _, each in branches)
    apart = (yes - no).float() - 0.5 * guidance.momentum
    guidance.momentum = apart
    apart = apart * min(1.0, float(20 / apart.norm()))
    unit = yes.float() / yes.float().norm()
    along = (apart * unit).sum() * unit
    return branches, (yes + (guidance.weight - 1) * (apart - along)).to(yes.dtype)


def _layers(
    model: Callable[..., Tensor], guidance: Guidance, gone: float
) -> tuple[Branches, Tensor]:
    """Skip-layer guidance: a third call without some of the layers."""
    branches, mix = _both(model, guidance, gone)
    worse = model(0.7, 0.4)
    return [*branches, ("worse", worse)], mix + 2.8 * (branches[0][1] - worse)


def _perturbed(
    model: Callable[..., Tensor], guidance: Guidance, gone: float
) -> tuple[Branches, Tensor]:
    """Perturbed attention guidance (arXiv 2403.17377)."""
    yes, worse = model(0.7), model(0.7, 0.4)
    return [("yes", yes), ("worse", worse)], yes + guidance.weight * (yes - worse)


def _interval(
    model: Callable[..., Tensor], guidance: Guidance, gone: float
) -> tuple[Branches, Tensor]:
    """Guidance in the middle of a run only (arXiv 2404.07724)."""
    return (_both if 0.2 < gone < 0.7 else _none)(model, guidance, gone)


FORMS: dict[str, Form] = {
    "none": _none, "two calls": _both, "one call of both": _both, "rescaled": _rescaled,
    "projected": _projected, "skip-layer": _layers, "perturbed attention": _perturbed,
    "interval": _interval,
}  # fmt: skip


@dataclass
class Seen:
    """One step of a run: the sample that the model was given, and its outputs by branch."""

    sample: Tensor
    branches: Branches
    time: float


def sampled(
    scheduler: str, form: str, dtype: torch.dtype, seed: int = 0, weight: float = 4.0
) -> list[Seen]:
    """A run of a scheduler of diffusers."""
    import diffusers

    name, settings = SCHEDULERS[scheduler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers warn of what others would set
        own = getattr(diffusers, name)(**settings)
        own.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator)
    state = (state * getattr(own, "init_noise_sigma", 1.0)).to(dtype)
    more = {"generator": generator} if "generator" in _parameters(own.step) else {}
    guidance, seen = Guidance(weight), []
    for index, time in enumerate(own.timesteps):
        given = own.scale_model_input(state, time) if hasattr(own, "scale_model_input") else state
        given = given.to(dtype)

        def model(prompt: float, broken: float = 0.0, x: Tensor = given, t: Any = time) -> Tensor:
            return output(x, float(t) / 1000, prompt, broken)

        branches, mix = FORMS[form](model, guidance, index / len(own.timesteps))
        seen.append(Seen(given.clone(), branches, float(time)))
        state = own.step(mix, time, state, **more).prev_sample.to(dtype)
    return seen


def _parameters(function: Any) -> Any:
    return inspect.signature(function).parameters


# Recognised


@dataclass(eq=False)
class _Record:
    evaluations: list[Any] = field(default_factory=list)


def recognised(runs: list[list[Seen]], fused: bool) -> tuple[float, int]:
    """The share of steps whose parent was found, of runs in turn; how many found a wrong one."""
    known = Runs(limit=64)
    flat = _flat()
    owner: dict[int, tuple[int, int]] = {}
    right = wrong = steps = 0
    for step in range(max(map(len, runs))):
        for number, run in enumerate(runs):
            if step >= len(run):
                continue
            seen = run[step]
            groups = [seen.branches] if fused else [[each] for each in seen.branches]
            for group in groups:
                values = seen.sample.flatten()[flat].float()
                sample = Sample((values,), digest(seen.sample))
                conditions = [(f"{name} {number % 2}", seen.time) for name, _ in group]
                call = Call(("form",), [sample] * len(group), conditions, frozenset({1}),
                            seen.sample.dtype)  # fmt: skip
                placed = known.locate(call)
                record = _Record()
                record.evaluations = known.add(call, placed, record)
                for each, (_, answer) in zip(record.evaluations, group, strict=True):
                    each.outputs = (answer.flatten()[flat].float(),)
                found = placed[0].step
                if id(found) not in owner:
                    owner[id(found)] = number, step
                    if step:
                        steps += 1
                        parent = found.parent
                        if parent is not None:
                            right += owner[id(parent)] == (number, step - 1)
                            wrong += owner[id(parent)] != (number, step - 1) and not _same(
                                runs, owner[id(parent)], (number, step - 1)
                            )
    return right / max(steps, 1), wrong


def _same(runs: list[list[Seen]], left: tuple[int, int], right: tuple[int, int]) -> bool:
    """Whether two steps are on one sample: runs may begin together."""
    one, other = (runs[run][step].sample for run, step in (left, right))
    return torch.equal(one, other)


# Taken for a proof


def pairs(runs: list[list[Seen]], reach: int) -> Iterator[tuple[Tensor, list[Seen]]]:
    """Samples, each with steps that it does not come from."""
    for (one, run), (other, base) in itertools.product(enumerate(runs), repeat=2):
        for at, step in itertools.product(range(1, len(run)), range(len(base))):
            if torch.equal(run[at - 1].sample, base[step].sample):
                continue  # its own parent, or a common one
            if one == other and step >= at:
                continue  # what comes after it is no candidate
            path = [base[step - age] for age in range(min(reach, step + 1))]
            if any(torch.equal(run[at].sample, each.sample) for each in path):
                continue
            yield run[at].sample, path


def proofs(cases: list[tuple[Tensor, list[Seen]]]) -> tuple[int, float]:
    """How many pairs count as a proof, and the least that any refused one left."""
    flat, taken, least = _flat(), 0, float("inf")
    limits = limits_of(cases[0][0].dtype)
    for start in range(0, len(cases), 64):
        part = cases[start : start + 64]
        targets, bases, newest = [], [], []
        for sample, path in part:
            columns, marks = [], []
            for age, seen in enumerate(path):
                columns += [seen.sample, *(answer for _, answer in seen.branches)]
                marks += [False, *[age == 0] * len(seen.branches)]
            width = limits.reach * 4
            nothing = torch.zeros_like(columns[0])
            columns += [nothing] * (width - len(columns))
            targets.append(sample.flatten()[flat].double())
            bases.append(torch.stack([each.flatten()[flat].double() for each in columns], -1))
            newest.append(marks + [False] * (width - len(marks)))
        target = torch.stack(targets)
        dtype = part[0][0].dtype
        found = fit(target, torch.stack(bases), torch.tensor(newest), rounding(dtype),
                    torch.zeros(target.shape, dtype=torch.bool))  # fmt: skip
        taken += int(found.proves(limits).sum())
        refused = found.left[found.left > limits.unexplained]
        least = min(least, float(refused.min()) if len(refused) else least)
    return taken, least


def _flat() -> Tensor:
    box = (CHANNELS, SIDE, SIDE)
    return flattened(positions(box, 2048), box)


@dataclass(frozen=True)
class Row:
    """One scheduler, form of guidance and type. wrong: steps with a wrong parent, of runs side by
    side; pairs, proofs: foreign pairs, and how many counted as a proof; least: what any left."""

    scheduler: str
    guidance: str
    dtype: str
    recognised: float
    wrong: int
    pairs: int
    proofs: int
    least: float


@torch.no_grad()
def measured(scheduler: str, form: str, dtype: torch.dtype) -> Row:
    """Four runs: two seeds, and of the first two other weights of guidance."""
    runs = [sampled(scheduler, form, dtype, seed, weight)
            for seed, weight in ((1, 4.0), (2, 4.0), (1, 6.0), (1, 4.5))]  # fmt: skip
    share, wrong = recognised(runs, form == "one call of both")
    cases = list(pairs(runs, limits_of(dtype).reach))
    cases = random.Random(0).sample(cases, min(len(cases), PAIRS))
    taken, least = proofs(cases)
    return Row(scheduler, form, str(dtype)[6:], share, wrong, len(cases), taken, least)


def run(folder: Path, say: Callable[[str], None] = print) -> None:
    """Measure all rows and write them."""
    rows = []
    for dtype, scheduler, form in itertools.product(TYPES, SCHEDULERS, FORMS):
        rows.append(measured(scheduler, form, dtype))
        say(str(rows[-1]))
    write(folder, rows)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write the table, and a page that says what it shows."""
    records.write(folder / "recognition.csv", [asdict(row) for row in rows])
    (folder / "recognition.md").write_text(_page(rows))


def _page(rows: Sequence[Row]) -> str:
    lines = [
        "# Steps whose parent is proven",
        "",
        f"{STEPS} steps, four runs in turn: two seeds, and of one three weights of guidance. In a "
        "cell the share of steps that were recognised; in brackets how many found a parent that "
        "is not theirs (of some 76 to 152), where any did. Nothing can prove steps that add noise, "
        "as those of the last three do, but for the last one of Euler's.",
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        some = [row for row in rows if row.dtype == dtype]
        forms = dict.fromkeys(row.guidance for row in some)
        lines += [
            "",
            f"## {dtype}",
            "",
            f"{sum(row.wrong for row in some)} wrong parents. Besides, of "
            f"{sum(row.pairs for row in some):,} pairs of a sample and a step that it does not "
            f"come from, each looked at by itself, {sum(row.proofs for row in some)} would count "
            "as a proof: forks of one seed that hardly differ, and earlier steps of the same run. "
            "In a run its own step is there, too: it explains the sample better, or none is "
            "proven.",
            "",
            "| scheduler | " + " | ".join(forms) + " |",
            "|---" * (len(forms) + 1) + "|",
        ]
        for scheduler in dict.fromkeys(row.scheduler for row in some):
            own = {row.guidance: row for row in some if row.scheduler == scheduler}
            cells = [
                f"{own[form].recognised:.0%}" + (f" ({own[form].wrong})" if own[form].wrong else "")
                for form in forms
            ]
            lines.append(f"| {scheduler} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
