"""What do other grounds bring the classifier, and composed trays the detector? What does the cache cost? Stage 0, every arm with the same steps, several seeds, in one run.

    .venv/bin/python tests/benchmark_ablation.py grounds|trays|cache [--seeds 3]

`grounds`: the share of training crops laid on another ground. `trays`: composed trays for every real one. `cache`: pills read from their PNG in every epoch, from the pixels kept of them, from JPEG. Prints a table in Markdown with means over the
seeds, the least and the most. Results are kept in work/ablation; a run that is stopped goes on there.
"""
import argparse
import math
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from pillsnap.core import Parameters, get_stage, load_settings, read_json, read_metrics, run_state
from pillsnap.detector import load_detector
from pillsnap.evaluate import evaluate_run
from pillsnap.index import ensure_index
from pillsnap.manifest import Manifest, ensure_manifest
from pillsnap.pipeline import draw_fresh, run_detector
from pillsnap.scores import detection_metrics
from pillsnap.train import fit, prepare_run

GROUNDS = {"as photographed": "backgrounds=0", "half on another ground": "backgrounds=0.5"}
TRAYS = {"real trays only": 0, "1 composed for each real": 1, "3 for each": 3, "10 for each": 10}
CACHES = {"PNG, decoded in every epoch": "cache=off", "pixels": "cache=raw", "JPEG": "cache=jpeg"}
STEPS = 216  # of the detector's batches, in every arm of `trays`
SHOWN = {"grounds": ["test_top1", "tray_pill_top1", "new_ground_top1", "background_only_top1"], "trays": ["det_map50", "det_map50_95", "det_recall"],
         "cache": ["val_top1", "test_top1", "tray_pill_top1", "train_images_per_s"]}


def open_plan(overrides: str) -> Parameters:
    "Make the parameters of a run under work/ablation."
    settings = load_settings()
    return Parameters(get_stage(0, overrides), [], replace(settings, work=settings.work / "ablation", manifests=settings.work / "ablation/manifests"), {"run": "", "resume": "auto", "overrides": overrides})


def train_once(overrides: str) -> tuple[Path, Parameters]:
    "Train a run, go on with a stopped one, or take the complete one."
    plan = open_plan(overrides)
    for run in (plan.settings.work / "runs" / plan.key).glob("*/run.json"):
        if read_json(run)["stage"] == asdict(plan.stage) and run_state(run.parent) == "end":
            return run.parent, plan
    index = ensure_index([], plan.settings)
    run = prepare_run(plan, ensure_manifest(plan, index), index)
    fit(run)
    return run, plan


def measure_classifier(name: str, fields: str, seed: int) -> dict[str, float]:
    "Train and evaluate one arm of the classifier."
    run, plan = train_once(f"name={name} strategy=classifier tensorboard=false seed={seed} {fields}")
    return read_metrics(run) if "test_top1" in read_metrics(run) else read_metrics(run) | evaluate_run(run, plan).metrics


def measure_trays(name: str, seed: int) -> dict[str, float]:
    "Train one arm of the detector, and score it on fresh arrangements."
    plan = open_plan(f"name=trays seed={seed}")
    manifest: Manifest = ensure_manifest(plan, ensure_index([], plan.settings))
    real = manifest.pills[(manifest.pills.split == "train") & (manifest.pills.kind == "combination")].photo.nunique()
    epochs = math.ceil(STEPS / math.ceil(real * (1 + TRAYS[name]) / plan.stage.detector_batch))
    run, _ = train_once(f"name=trays strategy=detector tensorboard=false seed={seed} composed={TRAYS[name]} detector_epochs={epochs}")
    trays = draw_fresh(manifest)
    found = run_detector(load_detector(run / "detector/best.safetensors", threshold=0.001).detect, trays)
    return detection_metrics(found, [t.truth.boxes for t in trays], [t.truth.tray for t in trays], draws=1)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("what", choices=SHOWN)
    words.add_argument("--seeds", type=int, default=3)
    asked = words.parse_args()
    arms, measure = {"grounds": (GROUNDS, lambda name, seed: measure_classifier("grounds", GROUNDS[name], seed)), "trays": (TRAYS, measure_trays),
                     "cache": (CACHES, lambda name, seed: measure_classifier("cache", CACHES[name], seed))}[asked.what]
    rows = [{"arm": name, **{k: measured[k] for k in SHOWN[asked.what]}} for name in arms for seed in range(asked.seeds) for measured in [measure(name, seed)]]
    table = pd.DataFrame(rows).groupby("arm", sort=False).agg(lambda v: f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})")
    for row in [["", *table.columns], ["---"] * (len(table.columns) + 1), *table.reset_index().to_numpy().tolist()]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
