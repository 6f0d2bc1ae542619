"""How well detectors find pills on real phone photos when they have seen many composed pictures and few real ones.

    python tests/benchmark_detector.py DATA                              # everything: about two hours and a half on two cores
    python tests/benchmark_detector.py DATA --seeds 1 --arms plain both  # a part of it

DATA is a YOLO folder of photos, here pushin-pill: 103 phone photos of pills in a palm, on paper and on a table, with up to three
augmented copies each (267 files, 1,383 boxes). One class, yolo11n from random weights, 320 px, the same number of batches of 16 for every arm:

    plain     ultralytics with its own defaults, on the real training photos
    ours      the same photos, with the settings of OURS
    composed  no box of a real photo: drawn pills laid on grounds, with the pills of the real training photos taken out or left out
    both      real training photos and composed pictures

Two splits: `photo` holds out 30 % of the photos, `session` every photo that --train-session does not match. The copies of a photo stay
together. What is composed uses only photos that train in both splits, so `composed` is one training a seed. Nothing is selected: the
averaged weights after the last batch are scored on all files of the test photos. The interval draws photos, with their copies, and is
of the mean over the seeds. What is finished lies in the work folder and is not repeated.
"""
import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from pillsnap.aihub import image_paths, pill_source, read_photo
from pillsnap.compose import Composer, ComposeSettings, make_composer, write_trays
from pillsnap.core import get_stage, read_json, write_json
from pillsnap.cutouts import ensure_bank
from pillsnap.detector import Detector, build_network, detector_epochs, import_ultralytics, start_from, train_detector
from pillsnap.index import build_index
from pillsnap.inspection import inspect
from pillsnap.manifest import PLACE, unit_hash
from pillsnap.scores import average_precision, detection_metrics, draw_clusters, rank_boxes
from pillsnap.trays import FIELDS, add_composed, write_yolo_set
from pillsnap.trees import SynthSpec, synthesise

ARMS, SPLITS = ("plain", "ours", "composed", "both"), ("photo", "session")
MODEL, SIZE, BATCH, STEPS = "yolo11n", 320, 16, 360


def read_pills(root: Path) -> tuple[pd.DataFrame, list[Path], pd.DataFrame]:  # a row per pill; its roots; registry
    "Read the pills of a data root, with the place and the kind of their photos."
    index = build_index([root])
    seen = inspect(index.tables, index.roots)
    images = seen.images.assign(image=image_paths(seen.images)).astype({"photo": "str", "ending": "str", "kind": "str"})
    columns = [*PLACE, "photo", "ending", "kind", "back", "latitude"]
    return seen.pills.join(images.loc[images.usable, columns], on="row", how="inner"), index.roots, seen.drugs


def split_photos(photos: pd.Series, train_session: str) -> pd.DataFrame:  # index: photo; bool per split: does it test?
    "Say which photos test in each split."
    names = pd.Series(sorted(set(photos)))
    return pd.DataFrame({"photo": unit_hash(names, "fold") < 0.3, "session": ~names.str.contains(train_session).to_numpy()}).set_axis(names)


REPEAT = 2  # times that a real photo is listed beside composed pictures: two fifths of what is seen


def write_set(pills: pd.DataFrame, roots: Sequence[Path], folder: Path, train: pd.Series, composed: Sequence[Path] = ()) -> Path:
    "Write a YOLO folder: photos that train, composed pictures, and a few of both for the validation that the trainers insist on and nothing uses."
    once = pills[train].assign(split="train", masked=False)[FIELDS]
    rows = pd.concat([once.assign(photo=once.photo + f"#{i}") for i in range(REPEAT if composed else 1)])
    for trays in composed:
        rows, roots = add_composed(rows, roots, trays, read_composed(trays))
    few = rows[rows.photo.isin(sorted(set(rows.photo))[:2])].assign(split="val")
    write_yolo_set(pd.concat([rows, few], ignore_index=True), roots, folder, SIZE)
    return folder


def count_photos(yolo_set: Path) -> int:
    "Count the files that train."
    return read_json(yolo_set / "set.json")["counts"]["train"]["photos"]


def count_epochs(yolo_set: Path) -> int:
    "Give the whole number of epochs that comes closest to STEPS batches."
    return round(STEPS / math.ceil(count_photos(yolo_set) / BATCH))


def train_plain(yolo_set: Path, run: Path, seed: int) -> tuple[Path, float]:  # weights, seconds
    "Train as ultralytics does by itself."
    start = time.perf_counter()
    model = import_ultralytics().YOLO(f"{MODEL}.yaml")
    model.train(data=str(yolo_set / "data.yaml"), imgsz=SIZE, batch=BATCH, epochs=count_epochs(yolo_set), seed=seed, val=False, plots=False, verbose=False, device="cpu", project=str(run), name="plain", exist_ok=True)
    return run / "plain/weights/last.pt", time.perf_counter() - start


DRAWN = SynthSpec(drugs=240, views=4, trays=0, width=320)
PICTURES = {(1, 3): 288, (4, 9): 144, (14, 22): 144}  # pills on a composed picture: pictures
ACROSS = (60.0, 240.0)  # millimetres: a phone held over a hand or a table
LOOSE = 1.2  # people draw boxes loosely; sides of a composed pill's box, as multiples of the exact ones


def take_pills_out(photo: np.ndarray, boxes: np.ndarray) -> np.ndarray:  # square
    "Paint over the pills of a photo with what lies around them, and mirror its borders until it is square."
    hole = np.zeros(photo.shape[:2], np.uint8)
    for x, y, w, h in boxes:
        room = 0.25 * max(w, h)
        hole[max(0, round(y - room)) : round(y + h + room), max(0, round(x - room)) : round(x + w + room)] = 1
    bare = cv2.inpaint(photo, hole, 5, cv2.INPAINT_TELEA)
    h, w = bare.shape[:2]
    more = [(max(h, w) - side) // 2 for side in (h, w)]
    return cv2.copyMakeBorder(bare, more[0], max(h, w) - h - more[0], more[1], max(h, w) - w - more[1], cv2.BORDER_REFLECT_101)


def weigh_drugs(composer: Composer, drugs: pd.DataFrame) -> Composer:
    "Lay white pills and capsules most often, odd shapes least, as they are taken."
    common, usual = drugs.index[drugs.colour2.notna() | (drugs.colour1 == "하양")], drugs.index[drugs["shape"].isin(["원형", "타원형", "장방형"])]
    weights = {code: 4 if code in common else 2 if code in usual else 1 for code, _ in composer.rows}
    return replace(composer, rows=tuple(row for row in composer.rows for _ in range(weights[row[0]])))


def make_composers(pills: pd.DataFrame, roots: Sequence[Path], folder: Path) -> Iterator[tuple[Path, Composer, int]]:  # folder, composer, pictures
    "Draw pills, cut them out, and make ready to lay them on photos without their pills, twice as often as on drawn grounds."
    photos = [(read_photo(pill_source(rows.iloc[0], roots)), rows[list("xywh")].to_numpy()) for _, rows in pills.groupby(["photo", "ending"])]
    grounds = [take_pills_out(*photo) for photo in photos]
    if not (folder / "drawn").exists():
        synthesise(folder / "drawn", DRAWN)
    drawn, places, drugs = read_pills(folder / "drawn")
    bank = ensure_bank(drawn.assign(split="train"), places, drugs, folder / "bank", DRAWN.views)
    kinds = ("photo",) * 14 + ("studio", "plain", "paper", "wood", "cloth", "stone", "skin")
    for (low, high), n in PICTURES.items():
        composer = make_composer(ComposeSettings(low, 480, (low, high), 0.0, ACROSS, kinds), bank, grounds)
        yield folder / f"{low}-{high}", weigh_drugs(composer, drugs), n


def compose_pictures(pills: pd.DataFrame, roots: Sequence[Path], folder: Path) -> list[Path]:  # a folder per entry of PICTURES
    "Compose pictures once, of photos that train in every split."
    folders = [folder / f"{low}-{high}" for low, high in PICTURES]
    if not all(pictures.exists() for pictures in folders):
        for pictures, composer, n in make_composers(pills, roots, folder):
            write_trays(composer, pictures, n)
    return folders


def read_composed(folder: Path) -> pd.DataFrame:  # columns image, boxes
    "Read the boxes of composed pictures and give them LOOSE."
    table = pd.read_parquet(folder / "pills.parquet")
    table[["x", "y"]] -= table[["w", "h"]].to_numpy() * (LOOSE - 1) / 2
    table[["w", "h"]] *= LOOSE
    return pd.DataFrame([(image, rows[list("xywh")].to_numpy()) for image, rows in table.groupby("image")], columns=["image", "boxes"])


OURS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.02, "warmup": 1, "augment": 1.0, "precision": "fp32", "workers": 0}  # optimizer AdamW, a step each batch


def train_ours(yolo_set: Path, run: Path, seed: int) -> tuple[Path, float]:  # weights, seconds
    "Train with PillSnap's trainer, which goes on where it was interrupted, and keep the last averaged weights."
    stage = get_stage(0, f"detector={MODEL} detector_size={SIZE}")
    train_detector(stage, yolo_set, run, batch=BATCH, epochs=count_epochs(yolo_set), seed=seed, **OURS)
    weights = run / "last.safetensors"
    save_file(torch.load(run / "detector/last.pt", weights_only=True)["ema"], weights)
    return weights, float(detector_epochs(run).seconds.sum())


def detect_all(weights: Path, pills: pd.DataFrame, roots: Sequence[Path]) -> dict[str, np.ndarray]:  # file → (n, 5)
    "Find pills on every photo, down to the lowest scores."
    network = build_network(MODEL)
    start_from(network, weights)
    detector = Detector(network.eval(), SIZE, {}, threshold=0.001)
    photos = pills.drop_duplicates(["photo", "ending"])
    found = detector.detect([read_photo(pill_source(photo, roots)) for photo in photos.itertuples()])
    return dict(zip(photos.photo + photos.ending, found))


def prepare_set(arm: str, split: str, pills: pd.DataFrame, roots: Sequence[Path], tests: pd.DataFrame, work: Path) -> Path:
    "Write what an arm trains on in a split, if it is not there."
    folder, free = work / f"sets/{arm}-{split}", ~pills.photo.map(tests.any(axis=1))
    if not folder.exists():
        composed = compose_pictures(pills[free], roots, work / "composed") if arm in ("composed", "both") else []
        write_set(pills, roots, folder, ~pills.photo.map(tests[split]) if arm != "composed" else free & False, composed)
    return folder


def run_arm(arm: str, split: str, seed: int, pills: pd.DataFrame, roots: Sequence[Path], tests: pd.DataFrame, work: Path) -> None:
    "Train, find the pills of the test photos, and keep both, if that is not done."
    run = work / f"runs/{arm}-{split}-{seed}"
    if (run / "result.json").exists():
        return
    yolo_set = prepare_set("plain" if arm == "ours" else arm, split, pills, roots, tests, work)
    weights, seconds = (train_plain if arm == "plain" else train_ours)(yolo_set, run, seed)
    found = detect_all(weights, pills[pills.photo.map(tests[split] if split in SPLITS else tests.any(axis=1))], roots)
    np.savez_compressed(run / "found.npz", **found)
    write_json(run / "result.json", {"seconds": seconds, "images_per_s": count_epochs(yolo_set) * count_photos(yolo_set) / seconds})


def trainings(arms: Sequence[str], splits: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int]]:  # arm, split, seed
    "List the trainings so that each seed gives a whole table."
    for seed in range(seeds):
        yield from dict.fromkeys((arm, "any" if arm == "composed" else split, seed) for split in splits for arm in arms)


def load_finished(arm: str, split: str, seeds: int, work: Path) -> list[tuple[dict[str, np.ndarray], dict[str, float]]]:  # per seed: boxes of each file, figures
    "Read the finished trainings of an arm."
    runs = [work / f"runs/{arm}-{'any' if arm == 'composed' else split}-{seed}" for seed in range(seeds)]
    return [(dict(np.load(run / "found.npz")), read_json(run / "result.json")) for run in runs if (run / "result.json").exists()]


def draw_map50(found: Sequence[Sequence[np.ndarray]], true: Sequence[np.ndarray], photos: Sequence[str], draws: int = 1000) -> np.ndarray:  # (draws,)
    "Draw photos with their copies, and give the mean over the seeds of mAP50 of each draw; equal photos give equal draws, so arms can be compared."
    codes, names = pd.factorize(np.asarray(photos, object))
    counts, pills = draw_clusters(len(names), draws, 0)[:, codes], np.array([len(boxes) for boxes in true])
    ranked = [rank_boxes(boxes, true) for boxes in found]
    return np.mean([[average_precision(r.hits[:, 0], c @ pills, c[r.photo]) for c in counts] for r in ranked], axis=0)


def true_boxes(pills: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:  # photo and ending → (m, 4)
    "Give the boxes of each file."
    return {key: rows[list("xywh")].to_numpy() for key, rows in pills.groupby(["photo", "ending"])}


def score_split(split: str, arms: Sequence[str], seeds: int, truth: dict[tuple[str, str], np.ndarray], work: Path) -> pd.DataFrame:  # a row per arm
    "Score the finished arms on the test photos of a split, beside the first of them."
    true, photos, rows, drawn = list(truth.values()), [photo for photo, _ in truth], {}, {}
    for arm in arms:
        if not (finished := load_finished(arm, split, seeds, work)):
            continue
        found = [[boxes[photo + ending] for photo, ending in truth] for boxes, _ in finished]
        scores = pd.DataFrame([detection_metrics(boxes, true, photos, draws=1) for boxes in found])
        figures = pd.DataFrame([result for _, result in finished]).mean()
        drawn[arm] = draw_map50(found, true, photos)
        first = next(iter(drawn))
        rows[arm] = {"mAP50": f"{scores.det_map50.mean():.2f}", "95 % interval": span(drawn[arm]), "each seed": " ".join(f"{v:.2f}" for v in scores.det_map50), f"more than {first}": span(drawn[arm] - drawn[first], "+") if arm != first else "",
                     "mAP50-95": f"{scores.det_map50_95.mean():.2f}", "seconds": f"{figures.seconds:.0f}", "images/s": f"{figures.images_per_s:.1f}"}
    return pd.DataFrame(rows).T.rename_axis("arm").reset_index()


def span(values: np.ndarray, sign: str = "") -> str:
    "Write the middle 95 % of values."
    return " to ".join(f"{v:{sign}.2f}" for v in np.percentile(values, [2.5, 97.5]))


def show(title: str, table: pd.DataFrame) -> None:
    "Print a table as Markdown."
    print(f"\n### {title}\n\n| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}")
    for row in table.itertuples(index=False):
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="YOLO folder of photos")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--train-session", default="IMG_6[01]", help="regular expression: photos that train in the split by session")
    parser.add_argument("--work", type=Path, default=Path("work/benchmark_detector"), help="folder for pictures, weights and results")
    given = parser.parse_args()
    work = given.work.resolve()
    os.environ["YOLO_CONFIG_DIR"] = str(work / "ultralytics")
    pills, roots, _ = read_pills(given.data)
    tests = split_photos(pills.photo, given.train_session)
    todo = list(trainings(given.arms, given.splits, given.seeds))
    for number, (arm, split, seed) in enumerate(todo, 1):
        print(f"{time.strftime('%H:%M:%S')} {number} of {len(todo)}: {arm}, split {split}, seed {seed}", flush=True)
        run_arm(arm, split, seed, pills, roots, tests, work)
    for split in given.splits:
        truth = true_boxes(pills[pills.photo.map(tests[split])])
        show(f"Split by {split}: {len({photo for photo, _ in truth})} test photos in {len(truth)} files", score_split(split, given.arms, given.seeds, truth, work))


if __name__ == "__main__":
    main()
