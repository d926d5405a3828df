"""The Padé bench: its second implementation of the branch, its searches and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import accel
import pytest
import torch
from accel.examples.fashion import model
from accel.examples.fashion.bench.fidelity import Contender, Fidelity, Row
from accel.examples.fashion.bench.peers import Peer, peers
from accel.examples.fashion.bench.placement import best_placement, family
from accel.examples.fashion.bench.report import recorded, table, write
from accel.examples.fashion.bench.run import run
from accel.examples.fashion.bench.simulate import SkippingStack
from accel.examples.fashion.bench.subjects import SUBJECTS, final
from accel.kernels.predictors import PREDICTORS
from torch import nn

PLACEMENT = (0, 1, 3, 5, 8, 11, 14, 18)
SMALL = replace(
    SUBJECTS["reference"], tuning=1, samples=2, seeds=1, placements=1, sweeps=0, settings=2
)


@pytest.mark.parametrize(
    "name",
    ["pade", "pade-token", "taylor-2", "hermite", "chebyshev", "reuse", "tc-pade-release"],
)
def test_the_simulation_equals_the_backend(name: str) -> None:
    """Two implementations of one algorithm, on the trained model."""
    noise, labels = SMALL.noise(2, 0)
    pade = {"predictor": name, "schedule": [*PLACEMENT, 120], "max_error": 1e9, "correction": 0.0}
    torch.compiler.reset()
    fast = torch.compile(
        model.load(), backend="accel", fullgraph=True, options={"lowering": "eager", "pade": pade}
    )
    got = final(fast, noise, labels, 20)
    assert accel.stats(fast).predicted_steps == 12

    network = model.load()
    blocks = network.get_submodule("transformer_blocks")
    assert isinstance(blocks, nn.ModuleList)
    stack = SkippingStack(blocks, PREDICTORS[name])
    network.add_module("transformer_blocks", nn.ModuleList([stack]))
    stack.begin(PLACEMENT, 20)
    torch.testing.assert_close(got, final(network, noise, labels, 20), rtol=1e-3, atol=1e-3)


def test_the_search_finds_a_placement() -> None:
    target = (0, 2, 3, 7)

    def fidelity(placement: Sequence[int]) -> float:
        return -sum(abs(a - b) for a, b in zip(placement, target, strict=True))

    assert best_placement(10, [(0, 1, 4, 8), (0, 3, 6, 9)], fidelity, sweeps=5) == (target, 0)
    for placement in family(20, 8):
        assert placement[0] == 0
        assert list(placement) == sorted(set(placement))
        assert len(placement) == 8
        assert placement[-1] < 20


def test_fidelity_of_accel_and_of_peers() -> None:
    bench = Fidelity(SMALL, 20, 8)
    fewer = bench.fewer_steps().row
    ours = bench.predictor("pade").row
    assert ours.cost == 8
    assert ours.psnr > fewer.psnr + 3
    found: list[Contender | None] = [
        bench.peer(peer) for peer in peers(bench.magnitudes()) if peer.placed is None
    ]
    rows = [contender.row for contender in found if contender is not None]
    assert rows
    for row in rows:
        assert 1 <= row.cost < 8.5
        assert row.psnr > 15


def test_a_peer_without_an_affordable_setting_is_left_out() -> None:
    never = Peer("never", lambda steps: iter([("plain", lambda network: None)]))
    assert Fidelity(SMALL, 4, 2).peer(never) is None


def test_table_and_record(tmp_path: Path) -> None:
    rows = [
        Row("reference", 20, 8, "worse", "threshold 1", 8.1, 30.0, 0.02, [30.0], 2.0, 1.5),
        Row("reference", 20, 8, "better", "", 8.0, 40.0, 0.01, [40.0], None, None, "it failed"),
    ]
    lines = table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines if "| 4" in line or "| 3" in line] == [
        "| better", "| worse",
    ]  # fmt: skip
    assert "| 2.0x / 1.5x |" in table(rows)
    assert "it failed" in table(rows)
    write(tmp_path, SMALL, rows, "a command")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert recorded(tmp_path, SMALL) == rows


def test_an_unknown_subject_is_refused(tmp_path: Path) -> None:
    with pytest.raises(accel.OptionError, match="random-dit-b2"):
        run(tmp_path, subject="refrence")
