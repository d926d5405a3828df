#!/usr/bin/env bash
# Everything that CI checks, from nothing but Python: bash tests/run.sh
#   --core    only the core tests, without linters: within a minute where .venv is complete
#   --newest  all tests with the newest versions that pyproject.toml allows, in .venv-newest
# Anything else goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
tier=all
case "${1:-}" in --core | --newest) tier=${1#--}; shift ;; esac

environment=.venv
constraint=(--constraint constraints.txt)
if [ "$tier" = newest ]; then
    environment=.venv-newest
    constraint=(--upgrade --upgrade-strategy eager)
fi
# Complete is what was installed to the end from these two files as they are.
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$tier" != core ] || [ "$wanted" != "$(cat "$environment/installed" 2>/dev/null)" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet "${constraint[@]}" --editable '.[dev]'
    echo "$wanted" > "$environment/installed"
fi

# A worker for each core, with one thread each: twice as fast as one worker with all threads.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
run_tests() { "$environment/bin/python" -m pytest --numprocesses auto --dist worksteal "$@"; }

case "$tier" in
core)
    # What the others stand on: layers, facts, patterns, predictors, schedules, runs.
    run_tests tests/test_layers.py tests/test_pages.py tests/kernels/predictors \
        tests/kernels/omnisparse/test_selection.py \
        tests/passes/graph tests/passes/test_blocks.py tests/passes/zipar tests/passes/pade \
        tests/passes/codebook/test_{rows,single_query}.py --deselect \
        tests/passes/graph/test_facts.py::test_facts_of_all_of_torchs_operators \
        tests/compiler/test_{options,pipeline}.py \
        tests/compiler/runtime/test_{digest,provenance,runs,sizes}.py \
        tests/compiler/export/test_{paths,trial}.py tests/compiler/models/zipar/test_sampling.py "$@"
    ;;
newest)
    run_tests "$@"
    ;;
all)
    "$environment/bin/ruff" check .
    "$environment/bin/ruff" format --check .
    # mypy has to see the repository's root under its import name.
    mkdir -p "$environment/typing"
    ln -sfn "$PWD" "$environment/typing/accel"
    (cd "$environment/typing" && ../bin/mypy --config-file ../../pyproject.toml \
        -p accel.compiler -p accel.passes -p accel.kernels -p accel.examples)
    run_tests "$@"
    ;;
esac
