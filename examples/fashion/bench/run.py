"""The bench itself: `accel bench pade`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from ....kernels.errors import OptionError
from ....kernels.predictors import PREDICTORS
from .fidelity import Contender, Fidelity, Row
from .peers import peers
from .report import recorded, write
from .speed import measure_speed
from .subjects import SUBJECTS

__all__ = ["LENGTHS", "run"]

LENGTHS = (20, 30, 50)
SHARE = 0.4  # of the steps: 8 of 20, what preset "balanced" computes
TIMED = 20  # the run length that is timed
SAME = {"taylor-1"}  # another name of "linear"


def run(
    output: Path,
    *,
    subject: str = "reference",
    lengths: Sequence[int] = LENGTHS,
    pictures: int = 0,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure everything; write `pade-<subject>.json`, `.md` and `.png` into `output`.

    Rows of other run lengths that are recorded there already stay.
    pictures: batch of the timed runs (guidance doubles it); 0: no timing. progress(text) is told
    each result. Raises OptionError for an unknown subject.
    """
    if subject not in SUBJECTS:
        raise OptionError(f"unknown subject {subject!r}; known: {', '.join(SUBJECTS)}")
    chosen = SUBJECTS[subject]
    command = f"accel bench pade --subject {subject} --lengths N --pictures {pictures}"
    rows = [row for row in recorded(output, chosen) if row.steps not in lengths]
    contenders: list[Contender] = []  # of the present run length

    def add(contender: Contender | None, steps: int, name: str) -> None:
        if contender is None:
            progress(f"{steps} steps, {name}: no setting within the allowance")
            return
        contenders.append(contender)
        row = contender.row
        rows.append(row)
        write(output, chosen, rows, command)  # a long run that is cut off leaves what it has
        progress(f"{steps} steps, {name}: {row.psnr} dB at {row.cost}")
        gc.collect()

    for steps in lengths:
        contenders.clear()
        bench = Fidelity(chosen, steps, round(SHARE * steps))
        add(bench.fewer_steps(), steps, "fewer plain steps")
        shipped = bench.accel("accel as shipped", 'preset "balanced"', {"preset": "balanced"})
        add(shipped, steps, "accel as shipped")
        for name in PREDICTORS:
            if name not in SAME:
                add(bench.predictor(name), steps, f"accel {name}")
        for peer in peers(bench.magnitudes()):
            add(bench.peer(peer), steps, peer.name)
        if pictures and steps == TIMED:
            measure_speed(chosen, contenders, pictures, repeats, progress)
            write(output, chosen, rows, command)
    return rows
