"""How fast pills reach a model: a stock PNG DataLoader, the JPEG cache and the memory map, each beside its own limit, all in one run.

    .venv/bin/python tests/benchmark_loading.py                     # everything: about fifteen minutes on two cores, 2 GB of disk
    .venv/bin/python tests/benchmark_loading.py --side 288 --seconds 0.5 --no-build
    .venv/bin/python tests/benchmark_loading.py --no-loading --patience 10   # only the building of caches

Prints Markdown tables. Photos are drawn at the real size, 976 x 1280. Every number is the best of --times, after a round that does not count; the
sides take turns within a round, and files are in the disk's cache. A loader's rate is its steady one: the clock starts when as many batches
have arrived as there are workers, so starting threads and processes counts for no side. On a machine with other work, --patience measures again what that disturbed.

The stock loader is what a user of timm, torchvision or fastai writes: Pillow, the same square cut, Resize, ToTensor, Normalize, workers that stay. A
limit is the sum of what cannot be left out (decode, cut, recipe, normalisation), each measured alone on as many cores; the share is how much of it is reached.
"""
import argparse
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import psutil
import torch
from benchmark_data import scratch_folder, show
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pillsnap.aihub import image_paths, pill_source, read_photo
from pillsnap.classifier import to_input
from pillsnap.core import STAGES, load_settings, pick_device
from pillsnap.data import SHIFT, Cache, CacheCut, PillDataset, batches, cut_wide, encode, ensure_cache, make_augmentation, plan_cut
from pillsnap.index import build_index
from pillsnap.inspection import inspect
from pillsnap.preprocess import Preprocess, cut_square, place_square
from pillsnap.trees import SynthSpec, pack_folder, synthesise

BATCH, WARM, LEAST = 64, 8, 12  # images of a batch; batches of the round that only warms up; fewest of a measurement
STOCK = 10  # batches of the stock loader: some seconds
VIEWS = 16  # photos of a drug
BUILT = 768  # photos of a cache that is built: six shards
KINDS, LOADERS, FORMS = {"jpeg": "JPEG", "raw": "memory map"}, ("threads", "processes"), ("uint8", "normalised")
FRAMINGS = ("fixed cut", "random framing", "random framing, recipe")
STAGE = STAGES["3"]

Rate = Callable[[int], float]  # about so many images → images per second


# Photos

def draw_photos(scratch: Path, photos: int) -> tuple[Path, Path]:  # a tree of folders; the same with its photos in a ZIP
    "Draw studio photos of the real size."
    synthesise(scratch / "tree", SynthSpec(drugs=photos // VIEWS, views=VIEWS, trays=0, width=976))
    zips, images = scratch / "zips", "data/train/images/single/TS_1_single"
    shutil.copytree(scratch / "tree/data/train/labels", zips / "data/train/labels")
    (zips / images).parent.mkdir(parents=True)
    pack_folder(scratch / "tree" / images, zips / f"{images}.zip")
    return scratch / "tree", zips


def read_pills(root: Path) -> pd.DataFrame:
    "Make a table like a manifest's pills."
    tables = build_index([root]).tables
    seen = inspect(tables, [root])
    pills = seen.pills.merge(seen.images.assign(image=image_paths(seen.images)), left_on="row", right_index=True)
    return pills.assign(label=pills.k_code.astype("category").cat.codes).reset_index(drop=True)


def model_size(side: int) -> int:
    "Give the model's input for a cached square: plan_cut's ratio, in whole 32 px."
    ratio = (1 + 2 * STAGE.margin) / (1 + 2 * plan_cut(STAGE, "raw").context)
    return 32 * round(side * ratio / 32)


def cut_of(side: int, kind: str) -> CacheCut:
    "Give what is kept of a pill, as for stage 3 with another side."
    return replace(plan_cut(STAGE, kind), side=side)


# The stock loader

class StockPills(Dataset):
    "Pills of PNG photos, as a user of torchvision writes it."

    def __init__(self, pills: pd.DataFrame, root: Path, pre: Preprocess, recipe: bool):
        self.paths, self.labels = [root / image for image in pills.image], pills.label.tolist()
        self.squares = [place_square(box, pre.margin) for box in pills[list("xywh")].to_numpy(float)]
        augmentation = make_augmentation(1.0)
        augment = [np.asarray, lambda crop: augmentation(image=crop)["image"]] if recipe else []
        self.transform = transforms.Compose([transforms.Resize((pre.size, pre.size)), *augment, transforms.ToTensor(), transforms.Normalize(pre.mean, pre.std)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        left, top, side = self.squares[row]
        photo = Image.open(self.paths[row]).convert("RGB")
        return self.transform(photo.crop((left, top, left + side, top + side))), self.labels[row]


def stock_loader(dataset: StockPills, workers: int) -> DataLoader:
    return DataLoader(dataset, BATCH, sampler=repeat_rows(len(dataset), STOCK * BATCH).tolist(), num_workers=workers, persistent_workers=True)


# Ours

@dataclass(eq=False)
class FramedPills(PillDataset):
    "Pills with the random framing of training and nothing after it."

    def cut(self, picture: np.ndarray, box: Sequence[float], row: int) -> np.ndarray:
        margin, shift = draw_framing(self.pre, self.framing, [self.seed, self.epoch, row])
        return cut_square(picture, box, margin, self.pre.size, shift, fast=True)


def draw_framing(pre: Preprocess, framing: float, key: list[int]) -> tuple[float, tuple[float, float]]:  # margin, shift
    "Draw margin and shift as `cut_randomly` does."
    rng = np.random.default_rng(key)
    shift = tuple(rng.uniform(-SHIFT, SHIFT, 2))
    cover = rng.uniform(1 / (1 + 2 * framing), 1 / (1 + 0.4 * pre.margin))
    return (1 / cover - 1) / 2, shift


def make_dataset(framing: str, pills: pd.DataFrame, cache: Cache, pre: Preprocess) -> PillDataset:
    kind = FramedPills if framing == "random framing" else PillDataset
    return kind(pills, cache, pre, augment=float("recipe" in framing), framing=STAGE.framing)


def repeat_rows(pills: int, images: int) -> np.ndarray:  # (images,) rows
    "Shuffle the pills, and take them again and again."
    return np.resize(np.random.default_rng(0).permutation(pills), images)


def loader_rate(loader: Iterable, skip: int, take: Callable[[torch.Tensor], object]) -> float:
    "Take a loader's batches: images per second after the first ones."
    images, start = 0, 0.0
    for n, batch in enumerate(loader, 1):
        take(batch[0])
        images += len(batch[0]) * (n > skip)
        start = time.perf_counter() if n == skip else start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def our_rate(dataset: PillDataset, loader: str, workers: int, take: Callable) -> Rate:
    return lambda images: loader_rate(batches(dataset, repeat_rows(len(dataset), images), BATCH, workers=workers, loader=loader), workers, take)


def our_rates(pills: pd.DataFrame, caches: dict[str, Cache], pre: Preprocess, workers: int, device: str) -> dict[tuple, Rate]:
    "Give every way of ours: framing, cache, loader, delivered as uint8 or normalised."
    take = dict(zip(FORMS, (lambda crops: crops, lambda crops: to_input(crops.to(device, non_blocking=True), pre))))
    return {(framing, kind, loader, form): our_rate(make_dataset(framing, pills, caches[kind], pre), loader, workers, take[form])
            for framing, kind, loader, form in product(FRAMINGS, KINDS, LOADERS, FORMS)}


def stock_rates(pills: pd.DataFrame, root: Path, pre: Preprocess, workers: int, device: str) -> dict[tuple, Rate]:
    "Give the stock loader with and without the recipe."
    loaders = {recipe: stock_loader(StockPills(pills, root, pre, recipe), workers) for recipe in (False, True)}
    return {("stock", recipe): lambda images, recipe=recipe: loader_rate(loaders[recipe], workers, lambda inputs: inputs.to(device)) for recipe in loaders}


# Limits

def thread_rate(work: Callable[[int, int], object], items: int, workers: int) -> Rate:  # work: item, thread
    "Do something for every item in threads, with nothing around it."
    def run(thread: int, rows: list[int]) -> None:
        for row in rows:
            work(row, thread)

    def rate(images: int) -> float:
        parts = [part.tolist() for part in np.array_split(repeat_rows(items, images), workers)]
        with ThreadPoolExecutor(workers) as pool:
            start = time.perf_counter()
            list(pool.map(run, range(workers), parts))
            return images / (time.perf_counter() - start)
    return rate


def process_rate(work: Callable, argument: object, pool: Pool, workers: int) -> Rate:  # work: argument, images → images per second
    "Do something in processes that are there already."
    return lambda images: sum(pool.starmap(work, [(argument, -(-images // workers))] * workers, 1))


def decode_photos(paths: list[Path], images: int) -> float:  # images per second
    "Decode some PNG photos as the stock loader does."
    chosen = [paths[i] for i in repeat_rows(len(paths), min(images, 2 * BATCH))]
    start = time.perf_counter()
    for path in chosen:
        Image.open(path).convert("RGB")
    return len(chosen) / (time.perf_counter() - start)


def augment_crops(file: Path, images: int) -> float:  # images per second
    "Run the recipe on crops in memory."
    crops, augment = np.load(file), make_augmentation(1.0)
    start = time.perf_counter()
    for i in range(images):
        augment(image=crops[i % len(crops)])
    return images / (time.perf_counter() - start)


def input_rate(crops: np.ndarray, pre: Preprocess, device: str) -> Rate:
    "Normalise batches, with as many threads as torch takes."
    batch = torch.from_numpy(np.resize(crops, (BATCH, *crops.shape[1:])))

    def rate(images: int) -> float:
        start = time.perf_counter()
        for _ in range(images // BATCH):
            to_input(batch.to(device), pre)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return images / (time.perf_counter() - start)
    return rate


def reading_limits(caches: dict[str, Cache], workers: int) -> dict[str, Rate]:
    "Give what reading a cache takes at least."
    stored = [caches["jpeg"].data(row) for row in range(len(caches["jpeg"]))]
    squares = [caches["raw"].read(row)[0] for row in range(len(caches["raw"]))]
    batch = np.zeros((workers, *max(s.shape for s in squares)), np.uint8)  # a place for each thread
    return {"JPEG decode": thread_rate(lambda row, _: cv2.imdecode(stored[row], cv2.IMREAD_COLOR_RGB), len(stored), workers),
            "JPEG checksum": thread_rate(lambda row, _: zlib.crc32(stored[row]), len(stored), workers),
            "memory map, whole squares": thread_rate(lambda row, thread: np.copyto(batch[thread, : len(squares[row]), : len(squares[row])], squares[row]), len(squares), workers)}


def cutting_limits(cache: Cache, pre: Preprocess, workers: int) -> dict[str, Rate]:
    "Give what cutting takes at least, from squares in memory."
    squares, boxes = zip(*(cache.read(row) for row in range(len(cache))))
    framing = [draw_framing(pre, STAGE.framing, [0, 0, row]) for row in range(len(cache))]
    batch = [pre.cut(square, box) for square, box in zip(squares[:BATCH], boxes)]
    return {"fixed cut": thread_rate(lambda row, _: pre.cut(squares[row], boxes[row]), len(cache), workers),
            "random framing": thread_rate(lambda row, _: cut_square(squares[row], boxes[row], framing[row][0], pre.size, framing[row][1], fast=True), len(cache), workers),
            "stack of a batch": lambda images: BATCH * thread_rate(lambda row, _: np.stack(batch), 1, workers)(max(workers, images // BATCH))}


def limit_rates(pills: pd.DataFrame, root: Path, caches: dict[str, Cache], pre: Preprocess, scratch: Path, pool: Pool, workers: int, device: str) -> dict[str, Rate]:
    "Give every part of the work alone."
    crops = np.stack([pre.cut(*caches["raw"].read(row)) for row in range(len(pills))])
    np.save(scratch / "crops.npy", crops)
    recipes = [make_augmentation(1.0) for _ in range(workers)]
    return {"PNG decode": process_rate(decode_photos, [root / image for image in pills.image], pool, workers), **reading_limits(caches, workers), **cutting_limits(caches["raw"], pre, workers),
            "recipe": process_rate(augment_crops, scratch / "crops.npy", pool, workers), "recipe in threads": thread_rate(lambda row, thread: recipes[thread](image=crops[row]), len(crops), workers),
            "to_input": input_rate(crops, pre, device)}


# Measuring

def time_of_others() -> tuple[float, float]:  # seconds of all cores, seconds by the clock
    "Say how long the cores have worked for anything but this process and its children."
    spent, children = psutil.cpu_times(), psutil.Process().children(recursive=True)
    own = sum(os.times()[:4]) + sum(sum(child.cpu_times()[:2]) for child in children)
    return sum(spent) - spent.idle - spent.iowait - own, time.monotonic()


def undisturbed(measure: Callable[[], Any], deadline: float) -> Any:
    "Measure again, until the deadline, while other work takes more than a twentieth of the cores."
    while True:
        before = time_of_others()
        found = measure()
        busy, seconds = np.subtract(time_of_others(), before)
        if busy < seconds * os.cpu_count() / 20 or time.monotonic() > deadline:
            return found
        time.sleep(1)


def best_rates(measures: dict, given: argparse.Namespace) -> dict:
    "Measure in turn, several times after a round to warm up, and give the best rates."
    images = {name: BATCH * max(LEAST, round(measure(WARM * BATCH) * given.seconds / BATCH)) for name, measure in measures.items()}
    rounds = [{name: undisturbed(lambda: measure(images[name]), given.deadline) for name, measure in measures.items()} for _ in range(given.times)]
    return {name: max(found[name] for found in rounds) for name in measures}


def needed_parts(framing: str, kind: str, form: str) -> list[str]:
    "List what cannot be left out."
    cut = "fixed cut" if framing == "fixed cut" else "random framing"
    return ["JPEG decode"] * (kind == "jpeg") + [cut] + ["recipe"] * ("recipe" in framing) + ["to_input"] * (form == "normalised")


def limit_of(rates: dict, parts: list[str]) -> tuple[float, str]:  # images per second; what takes the most of it
    "Add up the times of parts that share the cores."
    times = {part: 1 / rates[part] for part in parts}
    most = max(times, key=times.get)
    return 1 / sum(times.values()), f"{most} {times[most] / sum(times.values()):.0%}"


def our_row(rates: dict, framing: str, kind: str, loader: str, form: str, auto: str) -> dict:
    "Compare one way of ours with the stock loader and with its limit."
    rate, (limit, most) = rates[framing, kind, loader, form], limit_of(rates, needed_parts(framing, kind, form))
    return {"cut": framing, "cache": KINDS[kind], "loader": loader + " (auto)" * (loader == auto), "images/s": f"{rate:,.0f}", "times stock": f"{rate / rates['stock', 'recipe' in framing]:.1f}",
            "limit": f"{limit:,.0f}", "share of it": f"{rate / limit:.0%}", "most of the limit": most}


def our_table(rates: dict, form: str, auto: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame([our_row(rates, framing, kind, loader, form, auto[framing]) for framing, kind, loader in product(FRAMINGS, KINDS, LOADERS)])


def stock_table(rates: dict) -> pd.DataFrame:
    "Show the stock loader beside the decode of its photos alone."
    parts = {False: ["PNG decode"], True: ["PNG decode", "recipe"]}
    return pd.DataFrame([{"stock PNG DataLoader": "with the recipe" if recipe else "fixed cut", "images/s, normalised": f"{rates['stock', recipe]:.1f}",
                          "limit": f"{limit_of(rates, parts[recipe])[0]:.1f}", "share of it": f"{rates['stock', recipe] / limit_of(rates, parts[recipe])[0]:.0%}"} for recipe in parts])


def limit_table(rates: dict, limits: Iterable[str], workers: int) -> pd.DataFrame:
    return pd.DataFrame([{"alone": name, "images/s": f"{rates[name]:,.0f}", "µs of one core per image": f"{1e6 * workers / rates[name]:,.0f}"} for name in limits])


def compare_inputs(pills: pd.DataFrame, root: Path, caches: dict[str, Cache], pre: Preprocess) -> dict[str, float]:  # grey levels
    "Say how far our inputs are from the stock loader's: both have to do the same work."
    stock = StockPills(pills, root, pre, False)
    def away(row: int, cache: Cache) -> float:
        return float((to_input(torch.from_numpy(pre.cut(*cache.read(row)))[None], pre)[0] - stock[row][0]).abs().mean() * 255 * pre.std[0])
    found = {kind: float(np.mean([away(row, cache) for row in range(0, len(pills), 16)])) for kind, cache in caches.items()}
    assert max(found.values()) < 6, found  # small inputs differ more
    return found


def measure_loading(pills: pd.DataFrame, root: Path, side: int, scratch: Path, pool: Pool, given: argparse.Namespace) -> None:
    "Print the tables of one side."
    settings, pre, device = load_settings({"PILLSNAP_WORK": str(scratch / "work")}), Preprocess(model_size(side), STAGE.margin), pick_device()
    caches = {kind: ensure_cache(pills, [root], cut_of(side, kind), settings, "benchmark", given.workers, quietly) for kind in KINDS}
    away, sizes = compare_inputs(pills, root, caches, pre), {kind: cache.facts["bytes"].mean() / 1e3 for kind, cache in caches.items()}
    limits = limit_rates(pills, root, caches, pre, scratch, pool, given.workers, device)
    rates = best_rates(stock_rates(pills, root, pre, given.workers, device) | limits | our_rates(pills, caches, pre, given.workers, device), given)
    auto = {framing: "threads" if batches(make_dataset(framing, pills, caches["raw"], pre), [0, 1], 1, workers=2).threads else "processes" for framing in FRAMINGS}
    print(f"\n## Squares of {side} px, model input {pre.size} px\n\nplan_cut keeps {plan_cut(replace(STAGE, size=pre.size), 'raw').side} px for such a model. A square takes {sizes['jpeg']:.0f} kB as JPEG, "
          f"{sizes['raw']:.0f} kB as pixels. Inputs differ from the stock loader's by {away['raw']:.1f} grey levels from pixels, {away['jpeg']:.1f} from JPEG. to_input runs on {device}.")
    show("Stock", stock_table(rates))
    for form in FORMS:
        show(f"Ours, delivered {'as uint8' if form == 'uint8' else 'and normalised'}", our_table(rates, form, auto))
    show(f"Parts alone, {given.workers} workers", limit_table(rates, limits, given.workers))


# Building

@contextmanager
def quietly(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def build_seconds(pills: pd.DataFrame, roots: list[Path], cut: CacheCut, scratch: Path, workers: int) -> float:
    "Build a cache from nothing."
    settings = load_settings({"PILLSNAP_WORK": tempfile.mkdtemp(dir=scratch)})
    start = time.perf_counter()
    ensure_cache(pills, roots, cut, settings, "benchmark", workers, quietly)
    seconds = time.perf_counter() - start
    shutil.rmtree(settings.work)
    return seconds


def photo_seconds(pills: pd.DataFrame, roots: list[Path], cut: CacheCut, photos: int = 48) -> np.ndarray:  # read, decode; cut, resize; encode
    "Time what one photo takes at least, one after the other in this process."
    spent = np.zeros(3)
    for pill in pills.iloc[:: max(1, len(pills) // photos)].itertuples():
        marks = [time.perf_counter()]
        photo = read_photo(pill_source(pill, roots))
        marks.append(time.perf_counter())
        square, _ = cut_wide(photo, (pill.x, pill.y, pill.w, pill.h), cut)
        marks.append(time.perf_counter())
        encode(square, cut)
        spent += np.diff([*marks, time.perf_counter()])
    return spent / len(pills.iloc[:: max(1, len(pills) // photos)])


def build_table(trees: dict[str, Path], side: int, scratch: Path, given: argparse.Namespace) -> pd.DataFrame:
    "Compare builds with their limit."
    jobs = {}
    for (source, root), kind in product(trees.items(), KINDS):
        pills = read_pills(root)
        copies = -(-BUILT // len(pills))  # the same photos under several roots: read and decoded anew each time
        jobs[source, kind] = pd.concat([pills.assign(root=n) for n in range(copies)], ignore_index=True), [root] * copies, cut_of(side, kind)
    measure = lambda args: (undisturbed(lambda: build_seconds(*args, scratch, given.workers), given.deadline), undisturbed(lambda: photo_seconds(*args), given.deadline))
    rounds = [{job: measure(args) for job, args in jobs.items()} for _ in range(given.times)]
    return pd.DataFrame([build_row(job, len(jobs[job][0]), min(r[job][0] for r in rounds), min((r[job][1] for r in rounds), key=sum), given.workers) for job in jobs])


def build_row(job: tuple[str, str], photos: int, seconds: float, parts: np.ndarray, workers: int) -> dict:
    rate, limit = photos / seconds, workers / parts.sum()
    return {"photos": f"{photos} in {job[0]}", "cache": KINDS[job[1]], "photos/s": f"{rate:.1f}", "limit": f"{limit:.1f}", "share of it": f"{rate / limit:.0%}",
            "ms of a photo: read, decode": f"{parts[0] * 1e3:.1f}", "cut, resize": f"{parts[1] * 1e3:.2f}", "encode": f"{parts[2] * 1e3:.2f}"}


# Showing

def describe_machine() -> str:
    "Name the machine and the versions that matter."
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "pillow", "opencv-python", "albumentations", "numpy"))
    return f"{os.cpu_count()} cores, {models[0] if models else platform.processor()}, {pick_device()}; Python {platform.python_version()}, {packages}, PNG of Pillow by zlib{'-ng ' + features.version('zlib_ng') if features.check('zlib_ng') else ' ' + features.version('zlib')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=192, help=f"drawn photos, in whole {VIEWS}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", type=int, nargs="+", default=[384, 288], help="sides of the cached squares, px")
    parser.add_argument("--seconds", type=float, default=1.2, help="length of a measurement")
    parser.add_argument("--times", type=int, default=3, help="of which the best counts")
    parser.add_argument("--patience", type=float, default=0, help="minutes after the start, until which a disturbed measurement is repeated")
    parser.add_argument("--no-build", action="store_true", help="leave out the building of caches")
    parser.add_argument("--no-loading", action="store_true", help="leave out everything else")
    parser.add_argument("--where", default=None, help="folder for scratch files")
    given = parser.parse_args()
    cv2.setNumThreads(0)  # also in the processes forked from here: the workers are the parallelism, on both sides
    print(describe_machine())
    before, given.deadline = time_of_others(), time.monotonic() + 60 * given.patience
    with scratch_folder(given.where) as scratch, multiprocessing.get_context("fork").Pool(given.workers) as pool:
        tree, zips = draw_photos(scratch, given.photos)
        pills = read_pills(tree)
        size = np.mean([(tree / image).stat().st_size for image in pills.image]) / 1e6
        print(f"\n{len(pills)} drawn photos, PNG of {size:.2f} MB on average; batches of {BATCH}, {given.workers} workers, best of {given.times}")
        for side in given.side if not given.no_loading else ():
            measure_loading(pills, tree, side, scratch, pool, given)
        if not given.no_build:
            show(f"Building a cache, squares of {given.side[0]} px, {given.workers} workers", build_table({"folders": tree, "a ZIP": zips}, given.side[0], scratch, given))
    busy, seconds = np.subtract(time_of_others(), before)
    print(f"\nThe run took {seconds / 60:.0f} minutes; other work meanwhile kept {busy / seconds:.2f} of {os.cpu_count()} cores busy.")


if __name__ == "__main__":
    main()
