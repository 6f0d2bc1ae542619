"""Are wrong labels found? Faults are planted in stage 0's manifest, both models are trained on it as always, and the audit looks for them.

    .venv/bin/python tests/benchmark_labels.py [--seeds 3] [--swapped 0.02] [--missing 0.1]

Planted are swapped labels (another drug of the class list) and boxes dropped from trays. Printed are precision and recall of each kind over the seeds, which draw other faults.
"""
import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from pillsnap.core import Parameters, get_stage, load_settings

import numpy as np
import pandas as pd

from pillsnap.index import ensure_index
from pillsnap.labels import audit_labels
from pillsnap.manifest import ensure_manifest
from pillsnap.train import fit, prepare_run
from pillsnap.trees import SMOKE, ensure_synthetic


def plant(manifest, seed, swapped, missing):
    "Swap labels of singles and drop boxes of trays: the manifest with the faults, and which they are."
    rng, pills = np.random.default_rng(seed), manifest.pills.copy()
    singles = pills.index[(pills.kind == "single") & pills.split.isin(["train", "val"]) & (pills.label >= 0)].to_numpy()
    wrong = rng.choice(singles, round(swapped * len(singles)), replace=False)
    pills.loc[wrong, "label"] = (pills.label[wrong] + rng.integers(1, len(manifest.classes), len(wrong))) % len(manifest.classes)
    pills.loc[wrong, "k_code"] = [manifest.classes[label] for label in pills.label[wrong]]
    trays = pills[pills.kind == "combination"].drop_duplicates("photo").photo.to_numpy()
    short = rng.choice(trays, round(missing * len(trays)), replace=False)
    gone = [rng.choice(pills.index[pills.photo == photo]) for photo in short]
    found = pills.photo[wrong].tolist(), pills.loc[gone, ["photo", *"xywh"]]
    return replace(manifest, pills=pills.drop(index=gone).reset_index(drop=True)), *found


def rates(found, planted):
    hits = len(set(found) & set(planted))
    return {"planted": len(planted), "suspected": len(set(found)), "found": hits, "precision": hits / max(1, len(set(found))), "recall": hits / max(1, len(planted))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--swapped", type=float, default=0.02, help="share of the singles' labels")
    parser.add_argument("--missing", type=float, default=0.1, help="share of the trays that lose a box")
    given = parser.parse_args()
    settings, rows = load_settings(), []
    root = ensure_synthetic(settings, SMOKE)
    index = ensure_index([root], settings)
    for seed in range(given.seeds):
        scratch = Path(tempfile.mkdtemp())
        own = replace(settings, work=scratch, manifests=scratch / "manifests")
        plan = Parameters(get_stage(0, f"name=labels tensorboard=false hard=0 seed={seed}"), [root], own, {"resume": "none"})
        try:
            manifest, swapped, gone = plant(ensure_manifest(plan, index), seed, given.swapped, given.missing)
            fit(run := prepare_run(plan, manifest, index))
            table = audit_labels(run, plan).table
        finally:
            shutil.rmtree(scratch)
        label = table[table.what == "label"]
        rows += [{"seed": seed, "fault": "swapped label, excluded", **rates(label.photo[label.exclude], swapped)}, {"seed": seed, "fault": "swapped label, listed", **rates(label.photo, swapped)}, {"seed": seed, "fault": "missing box", **rates(table.photo[table.what == "box"], gone.photo)}]
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    together = pd.DataFrame(rows).groupby("fault")[["planted", "suspected", "found"]].sum()
    print("\n", together.assign(precision=together.found / together.suspected, recall=together.found / together.planted).round(3).to_string(), sep="")


if __name__ == "__main__":
    main()
