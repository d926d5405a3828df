"""Importing accel, and compiling with it, pulls in torch alone."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "rich",
    "typer",
    "triton",
)


def loaded_after(code: str) -> list[str]:
    script = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_import_is_lean() -> None:
    # Some builds of torch import triton themselves: compare with torch alone.
    assert loaded_after("import accel") == loaded_after("import torch")


def test_backend_needs_no_import() -> None:
    code = (
        "import torch\n"
        "f = torch.compile(torch.nn.Linear(2, 2), backend='accel', options={'lowering': 'eager'})\n"
        "f(torch.ones(1, 2))\n"
        "assert 'accel' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", "import sys\n" + code], check=True)
