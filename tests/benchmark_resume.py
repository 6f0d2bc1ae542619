"""How exactly a detector's training goes on after it was stopped: ultralytics' own resume beside ours, on the same drawn trays, with the same settings.

    python tests/benchmark_resume.py

Each trains four epochs in one go, again in one go, and a third time stopped in the middle of the third epoch and resumed. Printed is how far the final
weights of the second and third are from the first's, and how many epochs' work the stop cost.
"""
import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["YOLO_OFFLINE"] = "1"

import pandas as pd

from pillsnap.core import get_stage, read_events
from pillsnap.detector import import_ultralytics, plan_detector, train_detector, trainer_settings
from pillsnap.index import build_index
from pillsnap.manifest import make_manifest
from pillsnap.trays import detector_pills, write_yolo_set
from pillsnap.trees import SynthSpec, synthesise

import torch
from safetensors.torch import load_file

STAGE = get_stage(0, "name=tiny images=250 classes=10 tray_share=0.35 allow_short=true detector_size=128 detector_batch=8 detector_epochs=4 warmup=1")


def make_set(scratch):
    "Draw trays and write them as a YOLO set."
    synthesise(scratch / "data", SynthSpec(drugs=10, views=24, trays=40, width=160))
    manifest = make_manifest(index := build_index([scratch / "data"]), STAGE)
    pills = pd.concat([detector_pills(manifest, split)[0] for split in ("train", "val")])
    write_yolo_set(pills, index.roots, scratch / "set", 128, ".png")
    return scratch / "set"


class Stopped(Exception):
    pass


def train_plainly(yolo_set, home, stop):
    "Train as ultralytics does, and as its page says to resume."
    import_ultralytics()
    from ultralytics import YOLO

    settings = trainer_settings(plan_detector(STAGE), yolo_set, home, "cpu")
    settings = {k: v for k, v in settings.items() if k not in ("task", "mode", "model", "pretrained", "save_dir", "exist_ok")} | {"project": str(home), "name": "run"}
    model, steps = YOLO("yolo11n.yaml"), []

    def end_batch(trainer):
        steps.append((trainer.epoch, len(trainer.train_loader)))
        if stop and len(steps) == round(2.5 * steps[0][1]):
            raise Stopped

    model.add_callback("on_train_batch_end", end_batch)
    try:
        model.train(**settings)
    except Stopped:
        model = YOLO(home / "run/weights/last.pt")
        model.add_callback("on_train_batch_end", lambda trainer: steps.append((trainer.epoch, len(trainer.train_loader))))
        model.train(resume=True)
    weights = {k: v.float() for k, v in torch.load(home / "run/weights/last.pt", weights_only=False)["model"].state_dict().items()}
    table = pd.read_csv(home / "run/results.csv")
    return weights, float(table["metrics/mAP50-95(B)"].iloc[-1]), len(steps) / steps[0][1]


def train_ours(yolo_set, home, stop):
    "Train as PillSnap does."
    home.mkdir(parents=True)
    steps = []

    def on_step(step, of):
        steps.append(of)
        if stop and len(steps) == round(2.5 * of):
            raise Stopped

    try:
        train_detector(STAGE, yolo_set, home, on_step=on_step)
    except Stopped:
        train_detector(STAGE, yolo_set, home, on_step=lambda step, of: steps.append(of))
    state = torch.load(home / "detector/last.pt", weights_only=True)
    return {k: v.half().float() for k, v in state["ema"].items()}, read_events(home, "detector_epoch")[-1]["val_map50_95"], len(steps) / steps[0]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        yolo_set, rows = make_set(scratch), []
        for name, train in (("ultralytics", train_plainly), ("ours", train_ours)):
            whole, again, resumed = (train(yolo_set, scratch / name / kind, kind == "resumed") for kind in ("whole", "again", "resumed"))
            far = lambda other: max(float((whole[0][k] - other[0][k]).abs().max()) for k in whole[0])
            rows.append(f"| {name} | {far(again):.2g} | {far(resumed):.2g} | {whole[1]:.4f} | {resumed[1]:.4f} | {resumed[2] - 4:.1f} |")
    finally:
        shutil.rmtree(scratch)
    print("| detector | largest difference of a weight: trained twice | stopped and resumed | mAP50-95 whole | resumed | epochs done twice |", "|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
