#!/usr/bin/env bash
# Every check of the project, each step timed. Run it through `make test`.
set -euo pipefail  # inside a function that `step` calls, a failure is handed on by hand
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
export PATH="$bin:$PATH"
scratch=$(mktemp -d)
lanes=()
signal_lanes() { local lane; for lane in "${lanes[@]}"; do kill "-$1" -- "-$lane" 2> /dev/null || true; done; }
lanes_live() { local lane; for lane in "${lanes[@]}"; do kill -0 -- "-$lane" 2> /dev/null && return 0; done; return 1; }
end_lanes() {
    signal_lanes INT  # so that tests end what they have started
    for _ in {1..50}; do lanes_live || break; sleep 0.2; done
    signal_lanes KILL
    rm -rf "$scratch"
}
trap end_lanes EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
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

# Two lanes at once, each in a group of its own, which an interruption ends.
both() {
    local failed=0 lane
    lanes=()
    set -m
    for lane in "$@"; do
        "$lane" < /dev/null &
        lanes+=($!)
    done
    set +m
    for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done
    lanes=()
    return $failed
}

stages='^(04_|05|06|07)'  # notebooks that need what the one before them trained, wrote or exported
stage_notebooks() { step "stages' notebooks run (nbdev_test)" nbdev_test --n_workers 1 --file_re "$stages"; }
other_notebooks() { step "the other notebooks run (nbdev_test)" nbdev_test --n_workers 1 --skip_file_re "$stages|^[_.]"; }

saved="nbs/00_core.ipynb nbs/00aa_disk.ipynb nbs/00ab_runs.ipynb nbs/00b_drugs.ipynb nbs/03_preprocess.ipynb"
collect_saved() { python tests/count_cells.py "$scratch/saved" $saved; }
saved_outputs() { step "saved outputs hold (nbval)" python -m pytest -q --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider --rootdir "$scratch" "$scratch/saved"; }
a_stage() { step "a stage through papermill" papermill nbs/04_train.ipynb "$scratch/04_train.ipynb" -p stage 0 -p overrides "epochs=2 detector_epochs=1 name=papermill" --no-progress-bar; }

begin=$SECONDS
step "notebooks clean, module in sync" in_sync
both stage_notebooks other_notebooks
collect_saved
both a_stage saved_outputs
step "tests, two at a time (pytest)" python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not alone and not slow" tests
step "tests that want the machine alone (pytest)" python -m pytest -q -m "alone and not slow" tests
echo "── all: $((SECONDS - begin)) s"
