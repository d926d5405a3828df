r"""SOLID against what it is made of, on MovieLens-100k: every model trained equally, over seeds.

    python -m accel.examples.recommender.experiment --output results

Writes runs.csv (a line for each model and seed, as soon as it is done; those in it already are not
run again), curves.csv, and of these summary.md and curves.png.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...compiler.extras import optional
from ...compiler.models.solid import Dynamics, dynamize
from .backbones import BACKBONES, DYNAMIC
from .data import MovieLens, load
from .measure import CUTS, Ranking
from .semantics import by_genre, by_text
from .train import trained

__all__ = ["Task", "main", "models", "plotted", "summary", "tasks"]

GENERATORS: dict[str, dict[str, Any]] = {"DUET": {}, "APG": {"rank": 16}}
FIELDS = ("backbone", "generator", "form", "semantics", "seed")
MEASURES = ("auc", "uauc", *(f"{name}@{cut}" for name in ("hr", "ndcg") for cut in CUTS))


class Task(NamedTuple):
    """Models that are trained one after the other, as the codebook of one comes from another.

    generator: None is the static backbone alone. semantics: None is without.
    """

    backbone: str
    generator: str | None
    semantics: str | None
    seed: int

    @property
    def forms(self) -> tuple[str, ...]:
        """The last is SOLID; those before it lack the codebook, and the items' remainder."""
        if self.semantics is None:
            return ("plain",)
        return ("semantics", "metacode", "SOLID")


def tasks(seeds: int) -> Iterator[Task]:
    """All of them, a seed after the other; labels from text with DUET alone, and DIN with those
    from genres alone, as all together would take a day."""
    backbones = "SASRec", "GRU4Rec"
    for group in (backbones, ("DIN",)):
        for seed in range(seeds):
            for backbone in group:
                yield Task(backbone, None, None, seed)
                for generator in GENERATORS:
                    yield Task(backbone, generator, None, seed)
                    yield Task(backbone, generator, "genres", seed)
        if group is backbones:
            for seed in range(seeds):
                for backbone in group:
                    yield Task(backbone, "DUET", "text", seed)


def models(task: Task, films: MovieLens, labels: Tensor | None) -> Iterator[tuple[str, nn.Module]]:
    """Every form's model in turn, not trained; what is trained before it is what it was given."""
    codes: Tensor | None = None
    for form in task.forms:
        torch.manual_seed(task.seed)
        static = BACKBONES[task.backbone](films.items)
        if task.generator is None:
            yield form, static
            continue
        dynamics = Dynamics(metacode=form != "semantics", **GENERATORS[task.generator])
        made = dynamize(
            static, DYNAMIC, history="history", items=films.items, semantics=labels,
            codebook=codes if form == "SOLID" else None, dynamics=dynamics,
        )  # fmt: skip
        yield form, made
        if form == "semantics":
            codes = made.codes


def _run(given: tuple[Task, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """All forms of a task: a line for each, with its curve."""
    torch.set_num_threads(1)
    task, labels = given
    films, lines = load(), []
    for form, model in models(task, films, labels.get(task.semantics or "")):
        started = time.time()
        _, found, curve = trained(model, films, task.seed, progress=lambda _: None)
        values = (task.backbone, task.generator or "static", form, task.semantics or "", task.seed)
        line: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
        line |= {name: round(each, 5) for name, each in _measures(found).items()}
        line |= {"seconds": round(time.time() - started)}
        lines.append(line | {"curve": curve})
    return lines


def _measures(found: Ranking) -> dict[str, float]:
    values = (found.auc, found.uauc, *found.hit_rate, *found.ndcg)
    return dict(zip(MEASURES, values, strict=True))


def summary(runs: Path) -> str:
    """A table of means and deviations over seeds, in Markdown."""
    with runs.open() as file:
        lines = list(csv.DictReader(file))
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in FIELDS[:-1]), []).append(line)
    shown = ("uauc", "hr@10", "ndcg@5", "ndcg@10", "ndcg@20")
    rows = [f"| {' | '.join((*FIELDS[:-1], 'seeds', *shown))} |"]
    rows.append("|---" * (len(FIELDS) + len(shown)) + "|")
    for key, group in groups.items():
        cells = [*key, str(len(group))]
        for name in shown:
            values = torch.tensor([float(line[name]) for line in group])
            spread = f" ± {float(values.std()):.4f}" if len(values) > 1 else ""
            cells.append(f"{float(values.mean()):.4f}{spread}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def plotted(curves: Path, picture: Path) -> None:
    """NDCG@10 of the validation items by epoch, means over seeds: a panel for each backbone and
    generator, with labels from genres."""
    pyplot: Any = optional("matplotlib.pyplot", "examples")
    panels: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    with curves.open() as file:
        for line in csv.DictReader(file):
            if line["semantics"] == "text":
                continue
            static = line["generator"] == "static"
            for generator in GENERATORS if static else (line["generator"],):
                name = "static" if static else line["form"]
                points = panels.setdefault((line["backbone"], generator), {}).setdefault(name, {})
                points.setdefault(int(line["epoch"]), []).append(float(line["ndcg@10"]))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.4 * len(panels), 3), sharey=True, squeeze=False
    )
    for ((backbone, generator), forms), axis in zip(panels.items(), axes[0], strict=True):
        for name, points in forms.items():
            means = [sum(each) / len(each) for each in points.values()]
            label = generator if name == "plain" else name
            axis.plot(list(points), means, label=label)
        axis.set(title=f"{backbone}, {generator}", xlabel="epoch")
        axis.legend()
    axes[0][0].set_ylabel("NDCG@10, validation")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("accel_solid"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs, curves = arguments.output / "runs.csv", arguments.output / "curves.csv"
    done = set()
    if runs.exists():
        with runs.open() as file:
            done = {tuple(line[name] for name in FIELDS) for line in csv.DictReader(file)}
    films = load()
    labels = {"genres": by_genre(films), "text": by_text(films)}
    wanted = [
        (task, labels)
        for task in tasks(arguments.seeds)
        if task.backbone in arguments.backbones and _last(task) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for lines in pool.imap_unordered(_run, wanted):
            for line in lines:
                curve = line.pop("curve")
                _append(runs, [line])
                own = {name: line[name] for name in FIELDS}
                _append(curves, [
                    own | {"epoch": epoch, "loss": round(loss, 4), "ndcg@10": round(ndcg, 5)}
                    for epoch, loss, ndcg in curve
                ])  # fmt: skip
                print(" ".join(f"{name}={each}" for name, each in line.items()), flush=True)
    (arguments.output / "summary.md").write_text(summary(runs))
    plotted(curves, arguments.output / "curves.png")


def _last(task: Task) -> tuple[str, ...]:
    """The line of a task's last form, by which it is known to be done."""
    return (
        task.backbone, task.generator or "static", task.forms[-1], task.semantics or "",
        str(task.seed),
    )  # fmt: skip


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
