"""One model's engines, made once for all tests and workers that only read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import accel
import pytest
import torch
from accel.tests.models import dit, noise
from filelock import FileLock

EngineFile = Callable[[str], Path]


@pytest.fixture(scope="session")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> EngineFile:
    """The file of `dit(2)` in a format ("onnx", "pt2", "ep"), of which nothing may be changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines"
    folder.mkdir(exist_ok=True)
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": torch.tensor([1, 2])}

    def made(kind: str) -> Path:
        path = folder / f"dit.{kind}"
        with FileLock(folder / f"{kind}.lock"):
            if not path.exists():
                accel.export(dit(2), (noise(),), kwargs, path=path)
        return path

    return made
