"""The pass pipeline: from a captured graph to a rewritten one, with a record of each pass."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from torch import fx

from ..kernels.errors import VerificationError, first_line
from ..kernels.predictors import resolve
from ..passes import (
    PASSES,
    CodebookPass,
    GraphPass,
    OmniSparsePass,
    OutlinePass,
    PadePass,
    PassResult,
    Program,
    Reason,
    Skip,
    verify,
)
from .options import Options

__all__ = ["configured_passes", "rewrite"]

log = logging.getLogger("accel")


def configured_passes(options: Options) -> dict[str, GraphPass | None]:
    """The passes in their order; None for one that is turned off."""
    pade, sparse = options.pade_options, options.omnisparse_options
    codebook = options.codebook_options
    available: dict[str, GraphPass | None] = {
        "codebook": CodebookPass(codebook.table_bytes) if codebook else None,
        "omnisparse": OmniSparsePass(sparse, sparse.minimum) if sparse else None,
        "pade": PadePass(resolve(pade.predictor)) if pade else None,
        "outline": OutlinePass() if options.outline else None,
    }
    return {name: available[name] for name in PASSES}


def rewrite(
    module: fx.GraphModule, options: Options, left_out: Mapping[str, str] | None = None
) -> tuple[Program, tuple[PassResult, ...]]:
    """Run the passes over a graph from Dynamo, which stays as it is; verify after each.

    left_out: passes whose result the target can't hold, and why.
    """
    program = Program.capture(module)
    results = []
    for name, graph_pass in configured_passes(options).items():
        if graph_pass is None:
            detail = f"options={{{name!r}: False}}"
            results.append(PassResult(name, skipped=(Skip(Reason.OFF, detail),)))
            continue
        if left_out and name in left_out:
            results.append(PassResult(name, skipped=(Skip(Reason.FORMAT, left_out[name]),)))
            continue
        try:
            rewritten, result = graph_pass.run(program)
            if rewritten is not program:
                verify(program, rewritten, name, deep=options.verify)
        except Exception as error:
            # A rewrite makes a new graph, so the one before the pass is whole: go on with it.
            rewritten, result = program, PassResult(name, skipped=(_failed(name, error),))
            if options.verify:
                raise
        program = rewritten
        results.append(result)
        log.debug("%s: matched %s, skipped %s", name, result.matched, result.skipped)
    log.info(
        "compiled graph: %s; state %d bytes",
        ", ".join(f"{r.name} x{len(r.matched)}" for r in results),
        program.state.bytes() if program.state else 0,
    )
    return program, tuple(results)


def _failed(name: str, error: Exception) -> Skip:
    """What the report says of a pass that did not hold; also said as a warning."""
    if isinstance(error, VerificationError):
        log.warning("%s", error)
        return Skip(Reason.BROKEN, str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    detail = (
        f"{type(error).__name__}: {first_line(error)} ({last.filename.rpartition('/')[2]}, line "
        f"{last.lineno}). This is a bug in accel; the graph is compiled as it was before the pass"
    )
    log.warning("the pass %r raised %s", name, detail, exc_info=error)
    return Skip(Reason.RAISED, detail)
