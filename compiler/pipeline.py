"""The pass pipeline: from a captured graph to a rewritten one, with a record of each pass."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from torch import fx

from ..kernels.errors import OptionError, VerificationError, first_line
from ..passes import PASSES, Feature, Pass, PassResult, Program, Reason, Skip, verify
from .options import Options

__all__ = ["rewrite"]

log = logging.getLogger("accel")
_graphs = itertools.count()


def rewrite(
    module: fx.GraphModule, options: Options, cannot: Mapping[Feature, str] | None = None
) -> tuple[Program, tuple[PassResult, ...]]:
    """Run the passes over a graph from Dynamo, which stays as it is; verify after each.

    cannot: features that whoever takes the result can't hold, and why. A pass that needs one is
    left out, with that reason.
    """
    program = Program.capture(module)
    dump = None if options.dump is None else _Dump(options.dump, program)
    results = []
    for kind in PASSES:
        each = options.passes.get(kind.name)
        skip = _left_out(kind, each, cannot or {})
        if each is None or skip is not None:
            assert skip is not None
            results.append(PassResult(kind.name, skipped=(skip,)))
            continue
        begin = time.perf_counter()
        rewritten, result = _run(each, program, options.verify)
        result = dataclasses.replace(result, seconds=time.perf_counter() - begin)
        if dump is not None:
            dump.write(each.name, rewritten, rewritten is not program)
        program = rewritten
        results.append(result)
        log.debug("%s: matched %s, skipped %s", each.name, result.matched, result.skipped)
    log.info(
        "compiled graph: %s; state %d bytes",
        ", ".join(f"{r.name} x{len(r.matched)}" for r in results),
        program.state.bytes() if program.state else 0,
    )
    return program, tuple(results)


def _left_out(kind: type[Pass], each: Pass | None, cannot: Mapping[Feature, str]) -> Skip | None:
    """Why a pass is not run, if it is not."""
    if each is None:
        return Skip(Reason.OFF, f"options={{{kind.name!r}: False}}")
    why = next((cannot[feature] for feature in kind.features if feature in cannot), None)
    return None if why is None else Skip(Reason.FORMAT, why)


def _run(each: Pass, program: Program, deep: bool) -> tuple[Program, PassResult]:
    """One pass, verified. Where it fails the program stays as it was, and the result says why."""
    try:
        rewritten, result = each.run(program)
        if rewritten is not program:
            features = rewritten.features | each.features
            rewritten = dataclasses.replace(rewritten, features=features)
            verify(program, rewritten, each.name, deep=deep)
        return rewritten, result
    except Exception as error:
        # A rewrite makes a new graph, so the one before the pass is whole: go on with it.
        if deep:
            raise
        return program, PassResult(each.name, skipped=(_failed(each.name, error),))


def _failed(name: str, error: Exception) -> Skip:
    """What the report says of a pass that did not hold; also said as a warning."""
    if isinstance(error, VerificationError):
        log.warning("%s", error)
        return Skip(Reason.BROKEN, str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    detail = (
        f"{type(error).__name__}: {first_line(error)} ({Path(last.filename).name}, line "
        f"{last.lineno}). This is a bug in accel; the graph is compiled as it was before the pass"
    )
    log.warning("the pass %r raised %s", name, detail, exc_info=error)
    return Skip(Reason.RAISED, detail)


class _Dump:
    """Writes a graph as text before the passes and after each that changed it."""

    def __init__(self, directory: Path, program: Program) -> None:
        self.number = next(_graphs)
        self.stage = 0
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"graphs can't be dumped to {directory}: {error}") from error
        self.write("captured", program, True)

    def write(self, name: str, program: Program, changed: bool) -> None:
        """`graph<number>-<stage>-<pass>.txt`: the code of the graph and of its subgraphs."""
        if changed:
            text = program.module.print_readable(print_output=False)
            path = self.directory / f"graph{self.number}-{self.stage}-{name}.txt"
            path.write_text(text)
        self.stage += 1
