"""How fast data is listed, indexed, read and sampled, beside `find`, `zipfile` and plain scripts, all in one run.

    python tests/benchmark_data.py                 # everything: about five minutes, 2 GB of disk
    python tests/benchmark_data.py --files 30000   # quicker

Prints Markdown tables. Each time is the best of three, the two sides alternating, with files in the disk's cache.
"""
import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from pillsnap.core import STAGES, load_settings
from pillsnap.files import Source, by_unit, list_archive, load_listing, save_listing, tabulate_files, walk
from pillsnap.index import build_index, count_drugs, count_kinds, ensure_index, grid_names, load_index, make_up_boxes, simulate_folders, stage_outlook, write_index
from pillsnap.inspection import inspect_labels
from pillsnap.synthetic import make_label, make_looks

SETTLED = 2.2  # seconds; a folder that changed more recently is listed again by design


def best(*functions: Callable[[], object], times: int = 3) -> list[float]:
    "Time functions in turn, several times, and give the best of each."
    seconds = [[] for _ in functions]
    for _ in range(times):
        for function, found in zip(functions, seconds):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [min(s) for s in seconds]


def names_of_drugs(files: int) -> list[tuple[str, list[str]]]:
    "Give drugs with up to 324 photo names each, half as many photos as files."
    drugs, left = [], files // 2
    while left > 0:
        code = f"K-{len(drugs) + 1:06d}"
        drugs.append((code, grid_names(code, 324, 0)[:left]))
        left -= 324
    return drugs


def make_tree(root: Path, files: int) -> None:
    "Write a tree of nearly empty files under AIHub names."
    for number, (code, names) in enumerate(names_of_drugs(files)):
        for kind, volume, ending in (("images", "TS", ".png"), ("labels", "TL", ".json")):
            folder = root / f"data/train/{kind}/single/{volume}_{number // 60}_single/{code}{'_json' * (kind == 'labels')}"
            folder.mkdir(parents=True)
            for name in names:
                (folder / (name + ending)).write_bytes(b"{}")


def make_zips(root: Path, files: int) -> None:
    "Write the same as unextracted ZIPs."
    drugs = names_of_drugs(files)
    for first in range(0, len(drugs), 60):
        for kind, volume, ending in (("images", "TS", ".png"), ("labels", "TL", ".json")):
            path = root / f"data/train/{kind}/single/{volume}_{first // 60}_single.zip"
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w") as archive:
                for code, names in drugs[first : first + 60]:
                    for name in names:
                        archive.writestr(f"{code}{'_json' * (kind == 'labels')}/{name}{ending}", b"{}")


def touch_some(root: Path, share: float) -> int:
    "Add and remove files in a few folders: the share of all files that change."
    folders = sorted(p for p in root.rglob("K-*") if p.is_dir())
    changes = round(share * sum(1 for f in folders for _ in f.iterdir()))
    chosen = folders[:: max(1, len(folders) // 4)][:4]  # what a person adds or mends lies in few folders
    for i in range(changes):
        folder = chosen[i % len(chosen)]
        name = f"K-{999_000 + i % len(chosen):06d}_0_0_0_0_{60 + i // 324:02d}_{i % 324:03d}_200.png"
        (folder / name).write_bytes(b"{}")
    return changes


@contextmanager
def scratch_folder(where: str | None):
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def listing_table(scratch: Path, files: int) -> pd.DataFrame:
    "Time listing a tree and its ZIPs."
    tree, zips = scratch / "tree", scratch / "zips"
    make_tree(tree, files)
    make_zips(zips, files)
    find = lambda: subprocess.run(["find", tree, "-type", "f"], stdout=subprocess.DEVNULL, check=True)
    script = lambda: sum(p.is_file() for p in tree.rglob("*"))
    stdlib = lambda: [zipfile.ZipFile(p).infolist() for p in zips.rglob("*.zip")]
    time.sleep(SETTLED)
    find_s, walk_s, script_s = best(find, lambda: list(walk(tree)), script)
    before = by_unit(list(walk(tree)))
    zip_s, stdlib_s, find_again_s = best(lambda: list(walk(zips)), stdlib, find)
    zips_before = by_unit(list(walk(zips)))
    rezip_s, = best(lambda: list(walk(zips, zips_before)))
    changed = touch_some(tree, 0.001)
    time.sleep(SETTLED)
    rescan_s, = best(lambda: list(walk(tree, before)))
    settings = load_settings({"PILLSNAP_WORK": str(scratch / "work"), "PILLSNAP_DATA_ROOT": ""})
    rows = [("walk of a tree", walk_s, "find -type f", find_s), ("the same tree", walk_s, "rglob + is_file", script_s), ("list of ZIP entries", zip_s, "find on the tree", find_again_s), ("the same ZIPs", zip_s, "zipfile infolist", stdlib_s),
            (f"walk again, {changed} files changed", rescan_s, "first walk", walk_s), ("list ZIPs again", rezip_s, "first list", zip_s)]
    index_s, = best(lambda: ensure_index([tree], settings, full=True), times=1)
    again_s, = best(lambda: ensure_index([tree], settings))
    rows.append(("unchanged index, loaded", again_s, "index built and saved", index_s))
    return pd.DataFrame([{"what": a, "seconds": round(s, 3), "beside": b, "its seconds": round(t, 3), "times as long": round(s / t, 2)} for a, s, b, t in rows])


def label_table(scratch: Path, labels: int) -> pd.DataFrame:
    "Time reading real labels from a ZIP on one core."
    looks, path = make_looks(40), scratch / "TL_1_single.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for look in looks:
            for name in grid_names(look.k_code, 1296, 0)[: labels // len(looks)]:
                view = tuple(int(x) for x in name.split("_")[2:7])
                archive.writestr(f"{look.k_code}_json/{name}.json", json.dumps(make_label(look, name, look.k_code, view, (1280, 976), (300, 400, 200, 180)), ensure_ascii=False, indent=4))
    files = tabulate_files(list_archive(scratch, path.name, path.stat().st_size, 1))
    tasks = [(Source(scratch, files.path(i), *files.places[i, :2].tolist()), files.names[i].as_py()[:-5]) for i in range(len(files.names))]

    def plain() -> None:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                json.loads(archive.read(info))
    ours, theirs = best(lambda: inspect_labels(tasks), plain)
    size = np.mean([z.file_size for z in zipfile.ZipFile(path).infolist()])
    return pd.DataFrame([{"what": f"{len(tasks)} labels of {size:.0f} bytes, one core", "labels a second, read, checked, registry row": round(len(tasks) / ours), "zipfile + json.loads, nothing checked": round(len(tasks) / theirs), "times as fast": round(theirs / ours, 2)}])


def in_child(function: Callable, *arguments: object) -> object:
    "Run in a fresh process, so that its peak memory is its own."
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def write_listing(path: Path) -> None:
    save_listing(simulate_folders(), path)


def index_full(listing: Path, folder: Path) -> dict:
    "Index a simulated listing of the real shape, as ensure_index does it."
    folders = load_listing(listing)
    files = [tabulate_files(folders)]
    del folders
    start = time.perf_counter()
    index = build_index([Path("simulated")], files)
    built = time.perf_counter() - start
    peak = peak_gb()
    folder.mkdir()
    write_index(index, "", folder)
    return {"photos": len(index.tables.images), "label files": len(index.tables.labels), "index built (s)": round(built, 1), "peak GB": peak}


def audit_full(folder: Path) -> dict:
    "Load the full index and make the tables of the report."
    start = time.perf_counter()
    index = load_index(folder)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    count_kinds(index.tables.images), count_drugs(index), stage_outlook(index)
    return {"index loaded (s)": round(loaded, 2), "audit tables (s)": round(time.perf_counter() - start, 2), "peak GB": peak_gb()}


def manifest_full(folder: Path, stage: str) -> dict:
    "Make one stage's manifest on the full index with made-up labels."
    from pillsnap.manifest import assign_splits, make_manifest  # here, so that the memory of the other children is theirs

    index = load_index(folder)
    start = time.perf_counter()
    made = make_manifest(index, STAGES[stage], make_up_boxes(index))
    seconds = time.perf_counter() - start
    images = assign_splits(index.tables.images, STAGES[stage])
    trays = images[(images.kind == "combination") & images.usable & (images.split != "unused")]
    known = set(made.classes)
    inside = trays[[set(text.split()) <= known for text in trays.codes]]
    counts = made.report["photos"]
    total = {s: sum(kind.get(s, 0) for kind in counts.values()) for s in ("train", "val", "test", "frame")}
    return {"photos": made.report["images"], "drugs": made.report["classes"], **total, "tray photos taken": sum(counts["combination"].values()), "complete trays of its drugs": len(inside), "of all complete": len(trays), "left out": len(made.report["left_out"]), "seconds": round(seconds, 1), "peak GB": peak_gb()}


def show(title: str, table: pd.DataFrame) -> None:
    "Print a table as Markdown."
    print(f"\n### {title}\n")
    print("| " + " | ".join(map(str, table.columns)) + " |\n|" + "---|" * len(table.columns))
    for row in table.itertuples(index=False):
        print("| " + " | ".join(str(x) for x in row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300_000, help="files of the generated tree")
    parser.add_argument("--labels", type=int, default=40_000, help="labels in the generated ZIP")
    parser.add_argument("--where", default=None, help="folder for scratch files")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores; pandas {pd.__version__}, numpy {np.__version__}")
    with scratch_folder(given.where) as scratch:
        show(f"Listing {given.files:,} files", listing_table(scratch, given.files))
        show("Labels from a ZIP", label_table(scratch, given.labels))
        in_child(write_listing, scratch / "listing.parquet")
        folder = scratch / "index"
        show("Full size, simulated names", pd.DataFrame([in_child(index_full, scratch / "listing.parquet", folder)]))
        show("Report on the full index", pd.DataFrame([in_child(audit_full, folder)]))
        show("Stages on the full index", pd.DataFrame([{"stage": s} | in_child(manifest_full, folder, s) for s in "1234"]))


if __name__ == "__main__":
    main()
