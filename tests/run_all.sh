#!/usr/bin/env bash
# Every check of the project, each step timed. Run it through `make test`.
set -euo pipefail  # inside a function that `step` calls, a failure is handed on by hand
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
export PATH="$bin:$PATH"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# what the tests write never meets what a person has made
export PILLSNAP_WORK=$scratch/work PILLSNAP_REPORTS=$scratch/reports PILLSNAP_MANIFESTS=$scratch/manifests PILLSNAP_DATA_ROOT=

step() {
    local name=$1 start=$SECONDS
    shift
    echo "── $name"
    "$@" || { echo "── $name: FAILED after $((SECONDS - start)) s"; return 1; }
    echo "── $name: $((SECONDS - start)) s"
}

in_sync() {
    local before after
    before=$(git status --porcelain; git diff | sha256sum)
    nbdev_clean && nbdev_export || return 1
    after=$(git status --porcelain; git diff | sha256sum)
    [ "$before" = "$after" ] || { git status --porcelain; echo "notebooks were not clean, or not in sync with pillsnap/: nbdev_clean and nbdev_export have just mended it; commit that"; return 1; }
}

# Two lanes, one for each core: in the first a notebook needs what the one before it trained, wrote or exported.
notebooks() {
    local stages='^(04_|05|06|07)' failed=0
    step "stages' notebooks run (nbdev_test)" nbdev_test --n_workers 1 --file_re "$stages" &
    step "the other notebooks run (nbdev_test)" nbdev_test --n_workers 1 --skip_file_re "$stages|^[_.]" || failed=1
    wait $! || failed=1
    return $failed
}

saved_outputs() {
    python tests/count_cells.py "$scratch/saved" nbs/00_core.ipynb nbs/00aa_disk.ipynb nbs/00ab_runs.ipynb nbs/00b_drugs.ipynb nbs/03_preprocess.ipynb &&
        python -m pytest -q --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider --rootdir "$scratch" "$scratch/saved"
}

a_stage() {
    papermill nbs/04_train.ipynb "$scratch/04_train.ipynb" -p stage 0 -p overrides "epochs=2 detector_epochs=1 name=papermill" --no-progress-bar
}

begin=$SECONDS
step "notebooks clean, module in sync" in_sync
step "notebooks" notebooks
step "saved outputs hold (nbval)" saved_outputs
step "a stage through papermill" a_stage
step "tests, two at a time (pytest)" python -m pytest -q -n 2 --dist loadfile -m "not alone and not slow" tests
step "tests that want the machine alone (pytest)" python -m pytest -q -m "alone and not slow" tests
echo "── all: $((SECONDS - begin)) s"
