"""All measurements of sparse attention on SmolLM2, one after the other, and their tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from math import log
from pathlib import Path
from typing import Any

import torch

from ....kernels.errors import OptionError
from ....kernels.omnisparse.selection import Choice
from ...video.measure import FRAMES, SCENES, answered
from ...video.model import load_projector
from ..subject import FIRST, Subject, load
from .attention import Attend, Noted, dense, sparse
from .baselines import flex_blocks, top_blocks, vertical_slash
from .decode import slimmed
from .quality import compare, log_probabilities, needles
from .speed import by_layer, inputs_of, over_lengths, prefill
from .training import LENGTH, losses

__all__ = ["PARTS", "run"]

# Settings of `omnisparse`, the shipped one first.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"active": 0.15},
    {"recall": 0.95},
    {"recall": 0.8},
    {"active": 0.0},
    {"heads": 0.5},
    {"lazy": "local"},
)  # fmt: skip
CACHES: tuple[dict[str, Any], ...] = (
    {"recall": 0.995}, {"recall": 0.99}, {"recall": 0.98}, {"recall": 0.95}, {"recall": 0.9},
    {"recall": 0.95, "probes": 64},
)  # fmt: skip
FOLLOWING = 256  # tokens that a slim cache is tried on
STEPS = 12  # of fine-tuning
VIDEOS, SHORT = 16, 24  # how many; frames of such as it was first trained on
VIDEO_CACHES: tuple[dict[str, Any], ...] = (
    {"recall": 0.99}, {"recall": 0.98}, {"recall": 0.95},
    {"recall": 0.99, "window": 16}, {"recall": 0.98, "window": 16},
    {"recall": 0.995, "window": 16, "heads": 0.9},
)  # fmt: skip
CONTEXTS = 2  # with 8 needles each
SCALED = 12  # the layer that is timed over lengths


class _Run:
    def __init__(self, length: int, repeats: int, progress: Callable[[str], None]) -> None:
        self.length, self.repeats, self.progress = length, repeats, progress
        self.subject: Subject = load()
        self.tokens = self.subject.text[FIRST : FIRST + length]

    def quality(self) -> list[dict[str, Any]]:
        """Each setting, and the other selectors at the share of pairs that the first one needs."""
        model, rows = self.subject.model, []
        wanted = log_probabilities(model, self.tokens, dense)

        def add(name: str, attend: Attend, noted: Noted | None, share: float) -> float:
            got = compare(log_probabilities(model, self.tokens, attend), wanted, self.tokens)
            if noted is not None:
                share = sum(noted.pairs) / len(noted.pairs)
            rows.append({"method": name, "pairs": share, **asdict(got)})
            self.progress(f"{name}: perplexity {got.change:+.2%} at {share:.3f} of the pairs")
            return share

        for index, setting in enumerate(SETTINGS):
            noted = Noted()
            used = add(_name(setting), sparse(Choice(**setting), noted), noted, 0.0)
            if index == 0:
                share = used
        for name, other in (
            ("top blocks", top_blocks), ("vertical-slash", vertical_slash),
            ("top blocks, FlexAttention", flex_blocks),
        ):  # fmt: skip
            add(name, other(share), None, share)
        return rows

    def needles(self) -> list[dict[str, Any]]:
        rows = []
        for name, attend in (("dense", dense), ("as shipped", sparse(Choice()))):
            found, score = needles(self.subject, self.length, attend, CONTEXTS)
            asked = 8 * CONTEXTS
            rows.append({"attention": name, "found": found, "of": asked, "log_probability": score})
            self.progress(f"needles, {name}: {found} of {asked}, {score:.2f}")
        return rows

    def layers(self) -> list[dict[str, Any]]:
        rows = by_layer(self.subject.model, self.tokens, Choice(), self.repeats)
        total = [sum(each) for each in zip(*((r.dense_seconds, r.sparse_seconds) for r in rows),
                                           strict=True)]  # fmt: skip
        self.progress(f"attention of all layers: {total[0] / total[1]:.2f}x")
        return [
            {"layer": row.layer, **asdict(row.selected), "pairs": row.pairs,
             "dense_seconds": row.dense_seconds, "sparse_seconds": row.sparse_seconds}
            for row in rows
        ]  # fmt: skip

    def lengths(self) -> list[dict[str, Any]]:
        """Up to four times the model's own context: the timing counts, not what it says."""
        lengths = [4096, 8192, 16384, 32768]
        tokens = self.subject.text[FIRST : FIRST + lengths[-1]]
        tensors = inputs_of(self.subject.model, tokens, SCALED, Choice())
        rows = over_lengths(tensors, lengths, Choice(), self.repeats)
        self.progress(f"over lengths: {rows}")
        names = ("length", "dense_seconds", "sparse_seconds", "pairs")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def prefill(self) -> list[dict[str, Any]]:
        # The last one leaves out nothing, but sees that the model's mask is causal.
        settings = [{}, SETTINGS[1], {"recall": 1.0}]
        plain, *others = prefill(self.subject.model, self.tokens, settings, self.repeats)
        rows = [{"run": "Inductor", "seconds": plain, "speedup": 1.0}]
        for setting, seconds in zip(settings, others, strict=True):
            rows.append({"run": _name(setting), "seconds": seconds, "speedup": plain / seconds})
            self.progress(f"prefill, {_name(setting)}: {plain / seconds:.2f}x")
        return rows

    def decode(self) -> list[dict[str, Any]]:
        rows = []
        prompt = self.length - FOLLOWING
        found = slimmed(self.subject.model, self.tokens, prompt, CACHES)
        for setting, (fewer, quality) in zip(CACHES, found, strict=True):
            rows.append({"cache": _name(setting), "fewer_bytes": fewer, **asdict(quality)})
            self.progress(f"cache, {_name(setting)}: {fewer:.2f} times fewer bytes, "
                          f"agreement {quality.agreement:.1%}")  # fmt: skip
        return rows

    def video(self) -> list[dict[str, Any]]:
        given = self.subject, load_projector(), VIDEOS
        (short,) = answered(*given, [], [], self.progress, frames=SHORT)
        found = answered(*given, VIDEO_CACHES, [Choice()], self.progress)
        found.append(replace(short, way=f"full, of {SHORT} frames"))
        for each in found:
            self.progress(f"{each.way}: {each.fewer_bytes:.2f} times fewer bytes, "
                          f"{each.agreement:.1%}, right {each.right:.1%}")  # fmt: skip
        return [asdict(each) for each in found]

    def training(self) -> list[dict[str, Any]]:
        sparse_one: dict[str, Any] = {"pade": False, "omnisparse": True}
        found = [losses(self.subject, each, STEPS, self.progress) for each in (None, sparse_one)]
        rows = []
        for step, (one, other) in enumerate(zip(*found, strict=True)):
            name = str(step + 1) if step < STEPS else "measured text"
            rows.append({"step": name, "dense": one, "sparse": other, "apart": other / one - 1})
        return rows


PARTS = ("quality", "layers", "prefill", "decode", "needles", "lengths", "video", "training")


def run(
    output: Path,
    parts: Sequence[str] = PARTS,
    length: int = 8192,
    repeats: int = 3,
    progress: Callable[[str], None] = print,
) -> None:
    """Measure, and write `omnisparse.json` and `.md` after each part; others' results stay.

    length: tokens of the text, at most the model's 8192. repeats: of each timing, whose median
    counts. Raises OptionError for parts that there are not, and MissingDependencyError.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise OptionError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    path = output / "omnisparse.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    output.mkdir(parents=True, exist_ok=True)
    measured = _Run(length, repeats, progress)
    for part in parts:
        torch.compiler.reset()
        found[part] = {"length": length, "rows": getattr(measured, part)()}
        path.write_text(json.dumps(found, indent=1) + "\n")
        (output / "omnisparse.md").write_text(_text(found))


def _name(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "as shipped"


TITLES = {
    "quality": "Perplexity of the text, against dense attention",
    "layers": "Attention layer by layer, on its own queries and keys",
    "prefill": "The whole model's prefill, compiled",
    "decode": f"SlimCache: the {FOLLOWING} tokens after the prompt, against a full cache",
    "needles": "Numbers hidden in the text, asked for afterwards",
    "lengths": f"Attention of layer {SCALED} over the length of the text",
    "video": f"Our small video model (a projector before SmolLM2): {VIDEOS} of {FRAMES} frames",
    "training": f"Loss of fine-tuning on {LENGTH} tokens a step, compiled",
}


def _text(found: dict[str, Any]) -> str:
    where = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    parts = [
        "Made by `accel bench omnisparse`: SmolLM2-135M (Q4_1 weights, as float32) on the Debian "
        f"handbook from token {FIRST}; {where}.\n"
    ]
    for part, title in TITLES.items():
        if part in found:
            rows = found[part]["rows"]
            own = part in ("lengths", "video", "training")
            length = "" if own else f" ({found[part]['length']} tokens)"
            parts.append(f"## {title}{length}\n\n{_table(rows)}\n")
            if part in SUMMARIES:
                parts.append(SUMMARIES[part](rows) + "\n")
    return "\n".join(parts)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(each) for each in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _layers_together(rows: Iterable[dict[str, Any]]) -> str:
    full, part = (sum(row[f"{kind}_seconds"] for row in rows) for kind in ("dense", "sparse"))
    ratio = f"{full / part:.2f} times faster"
    return f"All layers together: {full:.1f} s dense, {part:.1f} s sparse, {ratio}."


def _exponents(rows: Sequence[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    longer = log(last["length"] / first["length"])
    powers = [
        f"{log(last[f'{kind}_seconds'] / first[f'{kind}_seconds']) / longer:.2f} {kind}"
        for kind in ("dense", "sparse")
    ]
    return f"Time grows with the length to the power of {', '.join(powers)}."


def _games(rows: Sequence[dict[str, Any]]) -> str:
    return (
        f"Each shows {SCENES} games of recordings that the model was not trained on, and is asked "
        "for their names in order."
    )


SUMMARIES: dict[str, Callable[[Any], str]] = {
    "layers": _layers_together, "lengths": _exponents, "video": _games,
}  # fmt: skip
