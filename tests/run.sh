#!/usr/bin/env bash
# Everything that CI checks, from nothing but Python: bash tests/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy has to see the repository's root under its import name.
mkdir -p .venv/typing
ln -sfn "$PWD" .venv/typing/accel
(cd .venv/typing && ../bin/mypy --config-file ../../pyproject.toml \
    -p accel.compiler -p accel.passes -p accel.kernels -p accel.examples)
# A worker for each core, with one thread each: twice as fast as one worker with all threads.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
.venv/bin/python -m pytest --numprocesses auto --dist worksteal "$@"
