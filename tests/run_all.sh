#!/usr/bin/env bash
# Every check of the project, each step timed. Run it through `make test`.
set -euo pipefail
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
    "$@"
    echo "── $name: $((SECONDS - start)) s"
}

in_sync() {
    local before after
    before=$(git status --porcelain; git diff | sha256sum)
    nbdev_clean
    nbdev_export
    after=$(git status --porcelain; git diff | sha256sum)
    [ "$before" = "$after" ] || { git status --porcelain; echo "notebooks were not clean, or not in sync with pillsnap/: nbdev_clean and nbdev_export have just mended it; commit that"; return 1; }
}

begin=$SECONDS
step "notebooks clean, module in sync" in_sync
step "notebooks run (nbdev_test)" nbdev_test --n_workers 2
python tests/count_cells.py "$scratch/saved" nbs/00_core.ipynb nbs/00b_drugs.ipynb nbs/03_preprocess.ipynb
step "saved outputs hold (nbval)" python -m pytest -q --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider --rootdir "$scratch" "$scratch/saved"
step "a stage through papermill" papermill nbs/04_train.ipynb "$scratch/04_train.ipynb" -p stage 0 -p overrides "epochs=2 detector_epochs=1 name=papermill" --no-progress-bar
step "tests, two at a time (pytest)" python -m pytest -q -n 2 --dist loadfile -m "not alone and not slow" tests
step "tests that want the machine alone (pytest)" python -m pytest -q -m "alone and not slow" tests
echo "── all: $((SECONDS - begin)) s"
