"""The data as it really lies on disks: any bytes, any names, damaged and huge ZIPs, kills, full disks, changes while reading.

Whatever lies under a root, it is read, or listed as a problem, or refused with a PillSnapError; it never becomes another pill.
"""
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, example, given, settings as fuzz, strategies as st
from PIL import Image

from pillsnap import core, files, index, inspection
from pillsnap.aihub import K_CODE, Label, label_sources, parse_name, photo_sources, read_label, read_photo
from pillsnap.classifier import load_classifier
from pillsnap.core import PillSnapError, get_stage, load_settings
from pillsnap.disk import content_hash
from pillsnap.drugs import build_registry
from pillsnap.files import SUFFIXES, Source, ZipError, list_archive, tabulate_files, walk
from pillsnap.index import all_problems, build_index, count_parts, ensure_index, inspect_index, load_index
from pillsnap.inspection import LABEL_RESULT, PHOTO_RESULT, Store, in_processes, inspect, inspect_label, inspect_labels, inspect_photo
from pillsnap.manifest import make_manifest
from pillsnap.synthetic import make_label, make_looks
from pillsnap.train import fit, prepare_run
from pillsnap.trees import Cp949Entry, SynthSpec, synthesise

SMALL = SynthSpec(drugs=4, views=60, trays=5, width=64)
STEM, VIEW, CODE = "K-900001_0_0_0_0_60_000_200", (0, 0, 0, 60, 0), "K-900001"
GOOD = make_label(make_looks(1)[0], STEM, CODE, VIEW, (1280, 976), (300, 400, 200, 180))
ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False
NOBODY = 65534

bounded = fuzz(derandomize=True, deadline=None, database=None, max_examples=80, suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.explain, Phase.shrink})
text = st.text(st.characters(), max_size=12)  # half characters too, as JSON can write them
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from([10**400, 1e300, 2**63, "K-000001", "K-900001.png"]),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=8)


def nested(depth):
    "Lists in lists."
    return b"[" * depth + b"]" * depth


def dump(content):
    "A label file's bytes, half characters as \\ud800."
    return json.dumps(content).encode()


def picture(number=0, size=(40, 30), form="PNG", **more):
    "A photo's bytes, other ones for another number."
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(out, form, **more)
    return out.getvalue()


def settle(root, seconds=100):
    "Let every folder and ZIP under a root be old enough to be trusted."
    for folder, _, names in os.walk(root):
        for path in (folder, *(os.path.join(folder, n) for n in names if n.endswith(".zip"))):
            old = os.stat(path).st_mtime_ns - seconds * 10**9
            os.utime(path, ns=(old, old))


def in_child(work, user=None, kill_after=None):
    "Do work in a process of its own: its result, its error, or None if it was killed."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            if user is not None and ROOT:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            answer = ("done", work())
        except BaseException as e:
            answer = ("failed", (type(e).__name__, str(e), traceback.format_exc()))
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    if kill_after is not None:
        kill_after(pid) if callable(kill_after) else time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(data) if data else None


def same_tables(a, b):
    "Two tables with the same values."
    pd.testing.assert_frame_equal(a.reset_index(drop=True).astype(object), b.reset_index(drop=True).astype(object), check_dtype=False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Trees of one spec in other forms, each drawn once; read only."
    made = {}

    def draw(**more):
        key = json.dumps(more, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("drawn") / "tree"
            synthesise(made[key], replace(SMALL, **more))
        return made[key]
    return draw


@pytest.fixture
def copy(drawn, tmp_path):
    "A copy of a tree, to be changed."
    def make(name="copy", **more):
        return Path(shutil.copytree(drawn(**more), tmp_path / name))
    return make


def folder_of(settings, roots):
    "Where an index lies."
    return settings.work / "index" / content_hash([str(r) for r in roots])


class TestNames:
    @bounded
    @given(st.text(st.characters()) | st.from_regex(r"K(-[0-9]{5,7}){1,4}(_[0-9]){3,5}_[0-9]{1,3}_[0-9]{2,4}_[0-9]{1,5}", fullmatch=True))
    @example(STEM + "\n")
    @example("K-٠٠٠٠٠١_0_0_0_0_60_000_200")
    def test_a_name_is_read_exactly_or_refused(self, stem):
        try:
            name = parse_name(stem)
        except ValueError as e:
            assert "SZ" in str(e)
            return
        assert name.codes and all(K_CODE.fullmatch(c) for c in name.codes)
        assert all(type(n) is int and n >= 0 for n in vars(name).values() if n != name.codes)
        head, *rest = stem.split("_")
        assert "K" + "".join(c[1:] for c in name.codes) == head and [int(x) for x in rest] == list(vars(name).values())[1:]


def check_read(data):
    "Read bytes as a label: the Label, or None for a ValueError; anything else is a failure."
    try:
        label = read_label(data)
    except ValueError:
        return None
    assert isinstance(label, Label) and K_CODE.fullmatch(label.k_code) and type(label.file_name) is str
    assert [type(v) for v in (label.width, label.height, *label.box)] == [int] * 6 and 0 < label.width < 65536 and 0 < label.height < 65536
    row = json.loads(label.drug)
    assert row["k_code"] == label.k_code and list(build_registry([row]).index) == [label.k_code]
    assert json.loads(label.drug.encode().decode()) == row
    return label


def check_inspected(data, folder, number=count()):
    "Inspect bytes as a label and keep the result, as an inspection does."
    path = folder / f"{next(number)}.json"
    path.write_bytes(data)
    result = inspect_label((Source(folder, path.name), STEM))
    path.unlink()
    assert len(result) == len(LABEL_RESULT) and result[0] in ("", "label", "box", "wrong code")
    store = Store(folder / f"{path.stem}.store")
    store.add(pd.DataFrame([result], columns=list(LABEL_RESULT), index=pd.Index(np.array([7], np.uint64), name="key")))
    assert tuple(store.load(LABEL_RESULT).iloc[0]) == result
    shutil.rmtree(store.folder)


class TestLabels:
    def test_the_good_one_is_read(self):
        label = check_read(dump(GOOD))
        assert (label.k_code, label.file_name, label.box, label.width, label.cp949) == (CODE, STEM + ".png", (300, 400, 200, 180), 976, False)
        assert check_read(json.dumps(GOOD, ensure_ascii=False).encode("cp949")) == replace(label, cp949=True)

    @bounded
    @given(st.binary(max_size=200) | text.map(lambda t: t.encode("utf-8", "surrogatepass")))
    @example(b"")
    @example(b"\xef\xbb\xbf{}")
    @example(b"\xff\xfe{\x00}\x00")
    @example(b"9" * 5000)
    @example(nested(100_000))
    @example(b"[" * 100_000)
    def test_any_bytes(self, data):
        assert check_read(data) is None

    def test_nested_too_deeply_and_not_utf8(self):
        with pytest.raises(ValueError):
            read_label(b"[" * 100_000 + '"단일"'.encode("cp949") + b"]" * 100_000)

    @pytest.mark.parametrize("field", ["bbox", "dl_mapping_code", "width", "dl_name"])
    def test_a_value_nested_too_deeply_to_be_shown(self, field):
        content = json.loads(dump(GOOD))
        where = content["annotations"][0] if field == "bbox" else content["images"][0]
        where[field] = ["deep", 1, 1, 1] if field == "bbox" else "deep"
        with pytest.raises(ValueError):
            read_label(dump(content).replace(b'"deep"', nested(1000)))

    @bounded
    @given(values)
    def test_any_json(self, content):
        assert check_read(dump(content)) is None

    @fuzz(bounded, max_examples=200)
    @given(st.lists(st.tuples(st.sampled_from(["images", "annotations", "categories", *GOOD["images"][0], *GOOD["annotations"][0]]), values | st.just("gone")), min_size=1, max_size=2))
    @example([("bbox", [10**400, 1, 1, 1])])
    @example([("bbox", [1e300, 1.0, 2.0, 3.0])])
    @example([("bbox", "1234")])
    @example([("item_seq", float("nan"))])
    @example([("dl_name", "\ud800")])
    @example([("di_edi_code", ["a"])])
    def test_a_field_replaced_or_removed(self, changes):
        content = json.loads(dump(GOOD))
        image, annotation = content["images"][0], content["annotations"][0]
        for field, value in changes:
            part = content if field in content else annotation if field in annotation and field != "id" else image
            part.pop(field, None) if value == "gone" else part.__setitem__(field, value)
        label = check_read(dump(content))
        if label and not {"dl_mapping_code", "images"} & {f for f, _ in changes}:
            assert label.k_code == CODE

    @fuzz(bounded, max_examples=40)
    @given(st.integers(0, len(dump(GOOD)) - 1))
    def test_cut_off_anywhere(self, length):
        assert check_read(dump(GOOD)[:length]) is None

    @fuzz(bounded, max_examples=60)
    @given(st.binary(max_size=50) | values.map(dump) | st.tuples(st.sampled_from(["file_name", "dl_mapping_code", "bbox", "width", "dl_name"]), values).map(
        lambda change: dump({**GOOD, "images": [{**GOOD["images"][0], change[0]: change[1]}]} if change[0] != "bbox" else {**GOOD, "annotations": [{"bbox": change[1]}]})))
    def test_an_inspection_keeps_what_it_found(self, data):
        with tempfile.TemporaryDirectory() as folder:
            check_inspected(data, Path(folder))

    @pytest.mark.parametrize("change", [{"file_name": "\ud800.png"}, {"file_name": "a\0.png"}, {"file_name": 5}, {"width": 10**30}])
    def test_a_strange_photo_name_is_kept_as_a_problem(self, tmp_path, change):
        check_inspected(dump({**GOOD, "images": [{**GOOD["images"][0], **change}]}), tmp_path)

    def test_an_inspection_survives_labels_nested_too_deeply(self, tmp_path):
        for data in (dump(GOOD).replace(b"[300, ", b"[" + nested(1000) + b", "), b"[" * 100_000 + '"단일"'.encode("cp949")):
            check_inspected(data, tmp_path)

    @pytest.mark.parametrize("field, first, second", [("thick", 1, True), ("dl_name", 1, 1.0), ("item_seq", 1, True)])
    def test_a_label_reads_the_same_whatever_was_read_before(self, field, first, second):
        def read(value):
            try:
                return read_label(dump({**GOOD, "images": [{**GOOD["images"][0], field: value}]})).drug
            except ValueError as e:
                return f"refused: {e}"
        alone = in_child(lambda: read(second))[1]
        assert in_child(lambda: (read(first), read(second))[1])[1] == alone


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=80).filter(lambda n: n not in (".", "..") and len(n.encode()) < 250)
nearly = st.sampled_from([STEM + x for x in (".png\n", ".PNG", ".Png", ".png.png", ".jpg", ".json", "_index.png", " .png", "..png", ".png.part", ".JSON")] + [
    "K-900001.png", "K-90000_0_0_0_0_60_000_200.png", "k-900001_0_0_0_0_60_000_200.png", "K-９00001_0_0_0_0_60_000_200.png", "K-900001-_0_0_0_0_60_000_200.png",
    "💊.png", "단일경구약제_5000종", unicodedata.normalize("NFD", "라벨링데이터.json"), "a\nb.png", "a\tb.json", "x" * 200 + ".png", "한" * 80, ".png", ".zip", ".hidden.json", "K-900001", "K-900001_json"])
any_name = names | nearly | names.map(lambda n: n[:40] + ".png") | names.map(lambda n: unicodedata.normalize("NFD", n[:20]) + ".json")


class TestFileNames:
    @fuzz(bounded, max_examples=40)
    @given(st.dictionaries(any_name, st.none() | st.lists(any_name, max_size=5), max_size=5))
    def test_any_tree_is_listed_or_ignored(self, tree):
        "Names map to None for a file, to a list of files for a folder."
        with tempfile.TemporaryDirectory() as scratch:
            root, good = Path(scratch), [f"K-9000{n:02}_0_0_0_0_60_000_200" for n in range(2, 40)]
            (root / "good").mkdir()
            for stem in good:
                (root / "good" / f"{stem}.png").touch()
                (root / "good" / f"{stem}.json").touch()
            for name, inside in tree.items():
                if name == "good":
                    continue
                try:
                    (root / name).touch() if inside is None else (root / name).mkdir(exist_ok=True)
                    for file in inside or ():
                        (root / name / file).touch()
                except (FileExistsError, NotADirectoryError, IsADirectoryError):
                    continue
            listed = tabulate_files(list(walk(root)))
            expected = [str(Path(folder, n).relative_to(root)) for folder, _, found in os.walk(root) for n in found if n.lower().endswith(SUFFIXES)]
            assert sorted(listed.path(i) for i in range(len(listed.names))) == sorted(expected)
            if any(p.rpartition("/")[2] == "data.yaml" for p in expected):
                return
            tables = build_index([root]).tables
            stems = {Path(p).name[:-4] for p in expected if p.lower().endswith(".png")}
            assert set(tables.images.photo) == {s for s in stems if fits(s)} >= set(good) and tables.images.photo.is_unique
            named = tables.problems[tables.problems.what.isin(["name", "index picture"])]["count"].sum()
            strange = [p for p in expected if (p.lower().endswith(".png") and not fits(Path(p).name[:-4])) or p.lower().endswith((".jpg", ".jpeg")) or (p.lower().endswith(".json") and not (p.endswith(".json") and fits(Path(p).name[:-5])))]
            assert named == len(strange)

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_not_utf8(self, copy, settings):
        root = copy()
        single = root / "data/train/images/single/TS_1_single"
        drug = sorted(single.iterdir())[0]
        photos = sorted(drug.iterdir())
        before = build_index([root]).tables
        os.rename(photos[0], os.fsencode(drug) + b"/\xb4\xdc\xc0\xcf.png")
        (Path(os.fsdecode(os.fsencode(single) + b"/\xc1\xb6\xc7\xd5"))).mkdir()
        for _ in range(2):  # listed, and read from the listing
            tables = ensure_index([root], settings).tables
            assert set(before.images.photo) - set(tables.images.photo) == {photos[0].stem}
            found = tables.problems[tables.problems.what == "name"]
            assert sorted(found.file) == sorted([str(drug.relative_to(root)), str(single.relative_to(root))])

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_a_root_whose_name_is_not_utf8(self, copy, tmp_path, settings):
        root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xb4\xdc\xc0\xcf"))
        os.rename(copy(), root)
        try:
            assert len(ensure_index([root], settings).tables.images) == 255
        except PillSnapError as e:
            assert "UTF-8" in str(e)

    def test_a_link_to_itself_costs_only_itself(self, copy):
        root = copy()
        drug = next((root / "data/train/images/single/TS_1_single").iterdir())
        os.symlink("loop.png", drug / "loop.png")
        tables = build_index([root]).tables
        assert len(tables.images) == 255
        assert list(tables.problems.what) == ["unreadable"] and tables.problems.file[0] == f"{drug.relative_to(root)}/loop.png"

    def test_links_to_folders_above(self, copy):
        root = copy()
        os.symlink(root, root / "data/again")
        os.symlink("..", root / "data/train/up")
        tables = build_index([root]).tables
        assert len(tables.images) == 255 and tables.images.usable.all() and list(tables.problems.what) == ["double"] * 2

    def test_folders_a_thousand_deep(self, tmp_path):
        here = os.open(tmp_path, os.O_RDONLY)
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
            os.close(above)
        os.close(here)
        try:
            assert len(list(walk(tmp_path))) > 1000
        finally:
            subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def fits(stem):
    "Whether a stem is a capture name."
    try:
        return bool(parse_name(stem))
    except ValueError:
        return False


def write_zip(path, entries, prefix=b"", comment=b""):
    "Write a ZIP of (name, data, method, cp949)."
    with open(path, "wb") as file:
        file.write(prefix)
        with zipfile.ZipFile(file, "w") as archive:
            for name, data, method, cp949 in entries:
                entry = (Cp949Entry if cp949 else zipfile.ZipInfo)(name)
                entry.compress_type = method
                archive.writestr(entry, data)
            archive.comment = comment


def read_all(path):
    "Every entry of a ZIP as we read it: name → bytes or error; the problems."
    folders = list_archive(path.parent, path.name, path.stat().st_size, -1)
    listed = tabulate_files(folders)
    content = {}
    for i in range(len(listed.names)):
        try:
            content[listed.path(i)[len(path.name) + 1 :]] = Source(path.parent, listed.path(i), *listed.places[i, :2].tolist()).fetch()
        except (OSError, ZipError) as e:
            content[listed.path(i)[len(path.name) + 1 :]] = e
    return content, listed.problems


part = st.text(st.sampled_from("abcK-_0129 .단일조합원천데이터라벨링경구약제"), min_size=1, max_size=12).filter(lambda p: p.strip(". ") == p)
entry = st.tuples(st.lists(part, min_size=1, max_size=3).map("/".join), st.binary(max_size=300) | st.binary(max_size=20).map(lambda b: b * 50), st.sampled_from([0, 8]), st.booleans())
zips = st.lists(entry, max_size=6, unique_by=lambda e: e[0]).map(lambda found: [(n + (".png", ".json", ".txt", ".csv")[i % 4], *rest) for i, (n, *rest) in enumerate(found)])
PILLS = [("K-900001/a.png", picture(1), 0, False), ("K-900001/b.json", dump(GOOD) * 3, 8, False), ("단일/K-900002/c.png", picture(2), 0, True), ("라벨/d.json", b"x" * 999, 8, False), ("e.txt", b"", 0, False)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "a.zip"
    write_zip(path, PILLS)
    return path.read_bytes()


class TestZips:
    @bounded
    @given(zips, st.binary(max_size=60), st.binary(max_size=60))
    def test_a_valid_zip_reads_as_in_python(self, entries, prefix, comment):
        assume(b"PK" not in comment)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "a.zip"
            write_zip(path, entries, prefix, comment)
            with zipfile.ZipFile(path, metadata_encoding="cp949") as archive:
                truth = {info.filename: archive.read(info) for info in archive.infolist() if info.filename.lower().endswith(SUFFIXES)}
            content, problems = read_all(path)
            assert content == truth and not problems

    @pytest.mark.parametrize("name", ["/K-900001/a.png", "K-900001//a.png", "\\K-900001\\a.png", "./K-900001/a.png", "K-900001/../a.png"])
    def test_unusual_names_are_read_as_well_as_listed(self, tmp_path, name):
        data = picture()
        write_zip(tmp_path / "a.zip", [(name, data, 0, False), ("K-900001/b.png", data, 0, False)])
        content, _ = read_all(tmp_path / "a.zip")
        assert list(content.values()) == [data, data]

    @fuzz(bounded, max_examples=80)
    @given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda b: b + b"PK\5\6" + b"\0" * 18) | st.binary(max_size=100).map(lambda b: b"PK\1\2" + b + b"PK\5\6" + b"\0" * 8 + struct.pack("<2LH", len(b) + 4, 0, 0)))
    def test_any_bytes_are_a_problem(self, data):
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "a.zip").write_bytes(data)
            assert all(isinstance(x, ZipError | OSError) for x in read_all(Path(scratch) / "a.zip")[0].values())

    @fuzz(bounded, max_examples=200)
    @given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3), st.none() | st.floats(0, 1))
    def test_flipped_and_cut_bytes_never_give_other_bytes(self, sound, flips, cut):
        "A photo comes out as it went in, or as an error."
        data = bytearray(sound)
        for at, mask in flips:
            data[int(at * len(data))] ^= mask
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "a.zip").write_bytes(data if cut is None else data[: int(cut * len(data))])
            content, _ = read_all(Path(scratch) / "a.zip")
        true = {name: bytes_ for name, bytes_, *_ in PILLS}
        for name, found in content.items():
            assert isinstance(found, ZipError | OSError) or found == true.get(name), name

    @fuzz(bounded, max_examples=60)
    @given(st.integers(0, len(PILLS) - 1), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def test_a_damaged_entry_costs_only_itself(self, sound, number, at, mask):
        with zipfile.ZipFile(io.BytesIO(sound), metadata_encoding="cp949") as archive:
            starts = [info.header_offset for info in archive.infolist()] + [archive.start_dir]
        data = bytearray(sound)
        data[starts[number] + int(at * (starts[number + 1] - starts[number]))] ^= mask
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "a.zip").write_bytes(data)
            content, problems = read_all(Path(scratch) / "a.zip")
        assert not problems and list(content) == sorted(content, key=lambda n: (n.rpartition("/")[0], n))
        for i, (name, true, *_) in enumerate(PILLS):
            assert i == number or content[name] == true

    def test_a_damaged_entry_of_a_streamed_zip_is_noticed(self, tmp_path):
        "Written to a pipe, the checksum follows the data instead of leading it."
        class Pipe:
            data = b""

            def write(self, more):
                self.data += more
                return len(more)

            def flush(self):
                pass

        out = Pipe()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data, method, _ in PILLS[:2]:
                archive.writestr(name, data, method)
        (tmp_path / "a.zip").write_bytes(out.data)
        assert read_all(tmp_path / "a.zip")[0] == {name: data for name, data, *_ in PILLS[:2]}
        at = out.data.index(PILLS[0][1]) + 60
        damaged = bytearray(out.data)
        damaged[at] ^= 1
        (tmp_path / "b.zip").write_bytes(damaged)
        content, _ = read_all(tmp_path / "b.zip")
        assert isinstance(content["K-900001/a.png"], ZipError) and content["K-900001/b.json"] == PILLS[1][1]

    def test_a_size_beyond_the_file_is_an_error(self, sound, tmp_path):
        (tmp_path / "a.zip").write_bytes(sound)
        for packed in (10**6, 2**33, 2**45, 2**62):
            with pytest.raises((ZipError, OSError)):
                Source(tmp_path, "a.zip/K-900001/a.png", 0, packed).fetch()

    def test_a_bomb_is_an_error(self, tmp_path, monkeypatch):
        "One that says how large it is is not listed; one that lies is stopped while it unpacks."
        write_zip(tmp_path / "a.zip", [("a.png", b"\0" * (1 << 21), 8, False)])
        entries = files.read_entries(tmp_path / "a.zip", SUFFIXES)
        monkeypatch.setattr(files, "LARGEST", 1 << 20)
        with pytest.raises(ZipError, match="more than"):
            files.read_entry(str(tmp_path / "a.zip"), "a.png", *entries.places[0, :2].tolist())
        assert files.read_entries(tmp_path / "a.zip", SUFFIXES).left_out == {"larger than any photo": 1}

    def test_a_cut_zip_beside_whole_ones(self, copy):
        root = copy(zips="all")
        before = build_index([root]).tables
        cut = root / "data/train/labels/combination/TL_1_combo.zip"
        cut.write_bytes(cut.read_bytes()[:-30])
        tables = build_index([root]).tables
        assert (tables.problems.what == "zip").sum() == 1 and len(tables.images) == len(before.images)
        assert (tables.images.usable == (tables.images.kind == "single")).all()


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    "Entries beyond 4 GB behind a hole that takes no disk."
    path = tmp_path_factory.mktemp("huge") / "TS_1_single.zip"
    with open(path, "wb") as file:
        file.seek(5 << 30)
        with zipfile.ZipFile(file, "w") as archive:
            for n in range(1, 4):
                archive.writestr(f"K-90000{n}/K-90000{n}_0_0_0_0_60_000_200.png", picture(n), zipfile.ZIP_STORED if n < 3 else zipfile.ZIP_DEFLATED)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    return path


class TestHugeZips:
    def test_entries_beyond_4_gb_are_listed_and_read(self, huge):
        tables = build_index([huge.parent]).tables
        assert list(tables.images.offset > 1 << 32) == [True] * 3
        for n, source in enumerate(photo_sources(tables.images, [huge.parent]), 1):
            assert source.fetch() == picture(n)
            assert (read_photo(source) == np.asarray(Image.open(io.BytesIO(picture(n))))).all()

    @fuzz(bounded, max_examples=60)
    @given(st.integers(1, 480), st.integers(1, 255))
    def test_flipped_bytes_in_its_list(self, huge, back, mask):
        "The list of entries, its 64-bit fields and its two ends are the last 480 bytes."
        size = huge.stat().st_size
        with open(huge, "rb") as file:
            file.seek(size - 20_000)
            tail = bytearray(file.read())
        tail[-back] ^= mask
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "TS_1_single.zip"
            with open(path, "wb") as file:
                file.seek(size - 20_000)
                file.write(tail)
            for found in read_all(path)[0].values():
                assert isinstance(found, ZipError | OSError) or found in [picture(n) for n in (1, 2, 3)]

    def test_a_place_that_no_file_has(self, huge, tmp_path):
        "An offset of more than 63 bits."
        with open(huge, "rb") as file:
            file.seek(5 << 30)
            data = bytearray(file.read())
        at = data.index(struct.pack("<Q", 5 << 30))
        data[at + 7] |= 0x80
        path = tmp_path / "a.zip"
        with open(path, "wb") as file:
            file.seek(5 << 30)
            file.write(data)
        content, problems = read_all(path)
        assert problems or sum(isinstance(x, bytes) for x in content.values()) == 2


def yolo(root, label="0 0.5 0.5 0.5 0.5", names="names: [advil, midol]\n", photo=None):
    "Write a YOLO folder of one photo."
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "images/a.png").write_bytes(picture() if photo is None else photo)
    (root / "labels/a.txt").write_bytes(label if isinstance(label, bytes) else label.encode())
    (root / "data.yaml").write_bytes(names if isinstance(names, bytes) else names.encode("utf-8", "surrogatepass"))
    return root


def coco(root, content, photo=None):
    "Write a COCO folder of one photo."
    (root / "a.png").write_bytes(picture() if photo is None else photo)
    (root / "coco.json").write_bytes(content if isinstance(content, bytes) else dump(content))
    return root


def check_small(root, settings=None):
    "Index a small layout: its tables, every box in its photo; None if it was refused."
    try:
        found = ensure_index([root], settings) if settings else build_index([root])
    except PillSnapError as e:
        assert str(root) in str(e)
        return None
    tables = found.tables
    sizes = tables.images.loc[tables.pills.row]
    assert (tables.pills[list("xywh")].to_numpy() >= 0).all() and np.isfinite(tables.pills[list("xywh")].to_numpy()).all()
    assert ((tables.pills.x + tables.pills.w).to_numpy() <= sizes.width.to_numpy() + 0.1).all() and ((tables.pills.y + tables.pills.h).to_numpy() <= sizes.height.to_numpy() + 0.1).all()
    inspect_index(found)
    return tables


ONE = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}], "categories": [{"id": 1, "name": "advil"}]}
numbers = st.floats().map(str) | st.integers().map(str) | st.sampled_from(["0", "1", "0.5", "1e999", "-0.1", "nan", "٣", "0x1", "1_0", "9" * 5000, "\x1c", "K"])


class TestSmallLayouts:
    @fuzz(bounded, max_examples=30)
    @given(st.lists(st.lists(numbers, max_size=6).map(" ".join), max_size=4).map("\n".join).map(lambda t: t.encode()) | st.binary(max_size=40))
    @example(b"\xef\xbb\xbf0 0.5 0.5 0.5 0.5")
    @example(b"0 1.7e308 0.5 -1.7e308 0.5")
    def test_any_label_lines(self, label):
        with tempfile.TemporaryDirectory() as root:
            tables = check_small(yolo(Path(root), label))
            assert len(tables.images) == 1 and bool(tables.images.usable[0]) == tables.problems.empty

    @fuzz(bounded, max_examples=40)
    @given(st.binary(max_size=60) | st.text(st.sampled_from("names: [ab, c]{}-&*!'\"\n\t%#@0123\\ud8"), max_size=60) | values.map(lambda v: "names: " + json.dumps(v)) | st.dictionaries(text, values, max_size=3).map(lambda v: yaml.safe_dump(v, allow_unicode=False)))
    @example("names: {0: a, 1: b}\n  bad: [")
    def test_any_data_yaml(self, content):
        with tempfile.TemporaryDirectory() as root:
            check_small(yolo(Path(root), names=content))

    @pytest.mark.parametrize("content", ["names: " + "[" * 3000, "names: [a]\nnc: !!timestamp pill\n", "names: [a]\nnc: !!int ''\n", "names: [a]\nday: 2024-13-45\n", 'names: ["\\ud800"]\n',
                                         "names: &x [*x]\n", "names: [a, null, 3]\n", "? {a: 1}\n: 2\n", "names: {1: a}\n", "names: [a]\n---\nnames: [b]\n"],
                             ids=["deep", "timestamp", "int", "day", "half character", "itself", "mixed", "map key", "from one", "two documents"])
    def test_strange_data_yaml(self, tmp_path, settings, content):
        check_small(yolo(tmp_path / "a", names=content), settings)

    @fuzz(bounded, max_examples=40)
    @given(st.binary(max_size=40) | values.map(dump) | st.tuples(st.sampled_from(["images", "annotations", "categories"]), st.sampled_from(["id", "file_name", "image_id", "category_id", "bbox", "name"]), values).map(
        lambda c: dump({**ONE, c[0]: [{**ONE[c[0]][0], c[1]: c[2]}]})) | st.lists(st.floats() | st.integers() | text, min_size=4, max_size=4).map(lambda b: dump({**ONE, "annotations": [{**ONE["annotations"][0], "bbox": b}]})))
    @example(dump(ONE))
    @example(nested(100_000))
    def test_any_coco(self, content):
        with tempfile.TemporaryDirectory() as root:
            check_small(coco(Path(root), content))

    @pytest.mark.parametrize("box", [[float("nan"), 2, 3, 4], [1, 2, float("nan"), 4], [float("inf"), 2, 3, 4], [10**400, 2, 3, 4], [1, 2, 10**400, 4], ["1", "2", "3", "x"], [1, 2, 3], None], ids=lambda b: str(b)[:12])
    def test_boxes_that_are_none(self, tmp_path, box):
        tables = check_small(coco(tmp_path, {**ONE, "annotations": [{**ONE["annotations"][0], "bbox": box}]}))
        assert tables.pills.empty and not tables.problems.empty and not tables.images.usable.any()

    def test_a_photo_that_is_named_twice_is_counted_once(self, tmp_path):
        "As where one file lists the training and another all photos."
        (coco(tmp_path, ONE) / "all.json").write_bytes(dump(ONE))
        tables = check_small(tmp_path)
        assert len(tables.images) == 1 == len(tables.pills) and list(tables.problems.what) == ["double"]

    @pytest.mark.parametrize("part, field", [("images", "file_name"), ("categories", "name")])
    def test_half_characters(self, tmp_path, settings, part, field):
        (tmp_path / "a").mkdir()
        check_small(coco(tmp_path / "a", {**ONE, part: [{**ONE[part][0], field: "\ud800"}]}), settings)


def with_exif(orientation):
    "A JPEG whose EXIF orientation is these bytes of a TIFF entry: type, count, value."
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<H", 0x0112) + orientation + b"\0\0\0\0"
    data = picture(form="JPEG")
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def png_of_size(width, height):
    "A PNG that claims a size."
    head = b"IHDR" + struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)
    good = picture()
    return good[:8] + struct.pack(">L", 13) + head + struct.pack(">L", zlib.crc32(head)) + good[33:]


STRANGE = {"bomb": png_of_size(60_000, 60_000), "no area": png_of_size(0, 10), "orientation as text": with_exif(struct.pack("<HL4s", 2, 2, b"6\0\0\0")),
           "two orientations": with_exif(struct.pack("<HL2H", 3, 2, 6, 6)), "orientation of no type": with_exif(struct.pack("<HL4s", 99, 1, b"\6\0\0\0")), "empty": b"", "text": b"no picture"}


class TestPictures:
    @fuzz(bounded, max_examples=100)
    @given(st.sampled_from(["PNG", "JPEG"]), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4), st.none() | st.floats(0, 1))
    def test_damaged_pictures(self, form, flips, cut):
        data = bytearray(picture(form=form, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"))
        for at, mask in flips:
            data[int(at**3 * len(data))] ^= mask
        with tempfile.TemporaryDirectory() as root:
            (Path(root) / "a.png").write_bytes(data if cut is None else data[: int(cut * len(data))])
            result = inspect_photo(Source(Path(root), "a.png"))
            assert len(result) == len(PHOTO_RESULT) and result[0] in ("", "photo")
            try:
                pixels = read_photo(Path(root) / "a.png")
            except PillSnapError:
                return
            assert result[0] or pixels.shape == (result[3], result[2], 3)

    @pytest.mark.parametrize("kind", STRANGE)
    def test_strange_pictures(self, tmp_path, kind):
        (tmp_path / "a.png").write_bytes(STRANGE[kind])
        result = inspect_photo(Source(tmp_path, "a.png"))
        try:
            pixels = read_photo(tmp_path / "a.png")
        except PillSnapError:
            assert result[0] == "photo"
            return
        assert result[0] or pixels.shape == (result[3], result[2], 3)

    @pytest.mark.parametrize("kind", STRANGE)
    def test_strange_pictures_of_small_layouts(self, tmp_path, kind):
        (tmp_path / "coco").mkdir()
        for root in (yolo(tmp_path / "yolo", photo=STRANGE[kind]), coco(tmp_path / "coco", ONE, STRANGE[kind])):
            assert check_small(root) is not None


@contextmanager
def reads():
    "Count what is fetched while the block runs, by path."
    seen, fetch = Counter(), Source.fetch

    def counted(source):
        seen[source.path] += 1
        return fetch(source)
    Source.fetch = counted
    try:
        yield seen
    finally:
        Source.fetch = fetch


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "Three thousand labels in a ZIP, and photos that nobody opens."
    root = tmp_path_factory.mktemp("many")
    look = make_looks(1)[0]
    with zipfile.ZipFile(root / "TS_1_single.zip", "w") as photos, zipfile.ZipFile(root / "TL_1_single.zip", "w") as labels:
        for n in range(3000):
            code = f"K-{900_001 + n // 300:06}"
            stem = f"{code}_0_{n % 3}_{n // 3 % 2}_{n // 6 % 3}_60_{n % 300:03}_200"
            content = make_label(replace(look, number=900_001 + n // 300), stem, code, VIEW, (1280, 976), (300, 400, 200 + n % 7, 180))
            photos.writestr(f"{code}/{stem}.png", b"")
            labels.writestr(f"{code}_json/{stem}.json", json.dumps(content, ensure_ascii=False), zipfile.ZIP_DEFLATED)
    return root


def keep_often(monkeypatch, number):
    "As on a computer of one core, with batches of another size."
    monkeypatch.setattr(inspection, "BATCH", number)
    monkeypatch.setattr(inspection, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(inspection.os, "cpu_count", lambda: 1)


class TestInspection:
    def test_a_killed_inspection_goes_on_where_it_was(self, many, tmp_path, monkeypatch):
        keep_often(monkeypatch, 300)
        tables, store = build_index([many]).tables, tmp_path / "store"
        assert len(tables.images) == len(tables.labels) == 3000
        whole = inspect(tables, [many], photos=np.array([], int))

        def slowly():
            fetch = Source.fetch
            Source.fetch = lambda source: (time.sleep(0.0005), fetch(source))[1]
            inspect(tables, [many], photos=np.array([], int), store=store)

        def until_some_are_kept(pid):
            end = time.time() + 20
            while len(list(store.glob("labels/*.parquet"))) < 3 and time.time() < end:
                time.sleep(0.005)
        assert in_child(slowly, kill_after=until_some_are_kept) is None
        kept = len(Store(store / "labels").load(LABEL_RESULT))
        assert 900 <= kept < 3000 and kept % 300 == 0
        with reads() as seen:
            again = inspect(tables, [many], photos=np.array([], int), store=store)
        assert sum(seen.values()) == len(seen) == 3000 - kept
        for name in ("images", "pills", "drugs", "problems"):
            same_tables(getattr(again, name), getattr(whole, name))
        with reads() as seen:
            inspect(tables, [many], photos=np.array([], int), store=store)
        assert not seen

    def test_many_small_batches_become_one(self, many, tmp_path, monkeypatch):
        keep_often(monkeypatch, 50)
        tables = build_index([many]).tables
        whole = inspect(tables, [many], photos=np.array([], int), store=tmp_path)
        assert len(list((tmp_path / "labels").iterdir())) == 1
        with reads() as seen:
            same_tables(inspect(tables, [many], photos=np.array([], int), store=tmp_path).pills, whole.pills)
        assert not seen

    def test_processes_give_what_one_process_gives(self, many):
        sources = label_sources(tables := build_index([many]).tables, tables.labels, [many])
        tasks = [(sources[0], tables.images.photo[tables.labels.row[0]]), (sources[-1], "K-900001_0_0_0_0_60_000_200")] * 10_500
        found = [x for batch in in_processes(inspect_labels, tasks, 2) for x in batch]
        assert len(found) == 21_000 and found == inspect_labels(tasks[:2]) * 10_500 and found[1][0] == "wrong code"

    def test_a_killed_reading_process_is_an_error(self, many):
        tables = build_index([many]).tables
        tasks = [(label_sources(tables, tables.labels[:1], [many])[0], "")] * 200_000
        results = in_processes(inspect_labels, tasks, 2)
        next(results)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(PillSnapError, match="run the same again"):
            list(results)

    def test_reading_processes_end_with_the_one_they_read_for(self, many, tmp_path):
        "Killed for lack of memory, it must not leave processes behind that hold more of it."
        code = ("from pathlib import Path; import sys; from pillsnap.files import Source; from pillsnap.inspection import in_processes, inspect_labels\n"
                "if __name__ == '__main__':\n"
                "    for n, x in enumerate(in_processes(inspect_labels, [(Source(Path('.'), 'gone'), '')] * 60_000, 2)):\n"
                "        if n == 0:\n"
                "            import multiprocessing, time\n"
                "            print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
                "            time.sleep(60)\n")
        (tmp_path / "read.py").write_text(code)
        process = subprocess.Popen([sys.executable, tmp_path / "read.py"], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])})
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
        process.wait()
        end = time.time() + 2
        while any(running(pid) for pid in workers) and time.time() < end:
            time.sleep(0.05)
        left = [pid for pid in workers if running(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert len(workers) == 2 and not left

    @pytest.mark.parametrize("zipped", ["none", "all"])
    def test_what_was_edited_in_place_is_read_again(self, copy, settings, zipped):
        root = copy(zips=zipped)
        settle(root)
        first = inspect_index(ensure_index([root], settings))
        assert first.problems.empty and (first.images.digest > 0).all()
        if zipped == "none":
            photo = next(root.rglob("*single/K-*/*.png"))
            photo.write_bytes(photo.read_bytes()[:-50])
            label = next(p for p in root.rglob("*.json") if p.stem != photo.stem and "single" in str(p))
            label.write_text(label.read_text("utf-8").replace('"bbox": [', '"bbox": [9999, '), "utf-8")
            names = [str(p.relative_to(root)) for p in (photo, label)]
        else:
            names = [spoil_in_zip(next(root.rglob("TS_1_single.zip")), lambda data: data[:200] + b"\0\0" + data[202:], root), spoil_in_zip(next(root.rglob("TL_1_single.zip")), lambda data: data.replace(b"bbox", b"bxxx"), root)]
        with reads() as seen:
            again = inspect_index(ensure_index([root], settings))
        assert sorted(again.problems.what) == ["label", "photo"] and sorted(again.problems.file) == sorted(names)
        assert not again.images.usable.all() and (zipped != "none" or len(seen) == 2)

    def test_a_zip_replaced_while_the_program_runs(self, copy, settings):
        "As in a notebook: the damaged ZIP is fetched again, the cell is run again."
        root = copy(zips="all")
        path = next(root.rglob("TL_1_single.zip"))
        whole = path.with_suffix(".whole")
        shutil.copy2(path, whole)
        name = spoil_in_zip(path, lambda data: data.replace(b'"width"', b'"breit"'), root)
        first = inspect_index(ensure_index([root], settings))
        assert list(first.problems.file) == [name]
        os.replace(whole, path)
        again = inspect_index(ensure_index([root], settings))
        assert again.problems.empty and again.images.usable.all()
        assert in_child(lambda: len(inspect_index(ensure_index([root], settings)).problems)) == ("done", 0)

    def test_a_label_that_could_not_be_opened_is_tried_again(self, settings):
        "A permission is mended without touching the file."
        with open_folder() as folder:
            root = synthesised(folder / "tree")
            label, photo = next(root.rglob("labels/single/**/*.json")), next(root.rglob("images/single/**/*.png"))
            store = folder / "store"
            store.mkdir()
            store.chmod(0o777)

            def look():
                tables = build_index([root]).tables
                return sorted(inspect(tables, [root], store=store).problems.file)
            label.chmod(0)
            photo.chmod(0)
            assert in_child(look, NOBODY) == ("done", sorted(str(p.relative_to(root)) for p in (label, photo)))
            label.chmod(0o644)
            photo.chmod(0o644)
            assert in_child(look, NOBODY) == ("done", [])

    def test_a_store_that_is_damaged(self, many, tmp_path):
        tables = build_index([many]).tables
        inspect(tables, [many], np.arange(50), np.array([], int), tmp_path)
        kept = next((tmp_path / "labels").iterdir())
        kept.write_bytes(kept.read_bytes()[:-100])
        try:
            assert len(inspect(tables, [many], np.arange(50), np.array([], int), tmp_path).pills) == 50
        except PillSnapError as e:
            assert str(kept) in str(e)


def running(pid):
    "Whether a process lives; one that ended and was not waited for does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def spoil_in_zip(path, change, root):
    "Rewrite a ZIP in place with its first entry changed; that entry's path."
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info), info.compress_type, False) for info in archive.infolist()]
    name, data, *rest = entries[0]
    write_zip(path, [(name, change(data), *rest), *entries[1:]])
    return f"{path.relative_to(root)}/{name}"


@contextmanager
def open_folder():
    "A folder that any user may enter."
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", folder])
        shutil.rmtree(folder)


def synthesised(root, **more):
    "A tree that any user may read."
    synthesise(root, SynthSpec(**{"drugs": 2, "views": 4, "trays": 0, "width": 64} | more))
    return root


class TestPermissions:
    def test_a_folder_without_permission_costs_only_itself(self):
        with open_folder() as folder:
            root = synthesised(folder / "tree")
            closed = next(root.rglob("TS_1_single")) / "K-900001"
            work = load_settings({"PILLSNAP_WORK": str(folder / "work")})

            def look():
                tables = ensure_index([root], work).tables
                return len(tables.images), sorted(set(tables.problems.what))
            closed.chmod(0)
            assert in_child(look, NOBODY) == ("done", (4, ["no photo", "unreadable"]))
            closed.chmod(0o755)
            assert in_child(look, NOBODY) == ("done", (8, []))

    def test_a_zip_without_permission_costs_only_itself(self):
        with open_folder() as folder:
            root = synthesised(folder / "tree", zips="all")
            closed = next(root.rglob("TL_1_single.zip"))
            work = load_settings({"PILLSNAP_WORK": str(folder / "work")})

            def look():
                tables = ensure_index([root], work).tables
                return int(tables.images.usable.sum()), sorted(set(tables.problems.what))
            settle(root)
            closed.chmod(0)
            assert in_child(look, NOBODY) == ("done", (0, ["no label", "zip"]))
            closed.chmod(0o644)
            assert in_child(look, NOBODY) == ("done", (8, []))

    @pytest.mark.parametrize("mode", [0, 0o444])
    def test_a_small_layout_without_permission(self, mode):
        "444: the names can be listed, the files not opened."
        with open_folder() as folder:
            root = yolo(folder / "yolo")
            work = load_settings({"PILLSNAP_WORK": str(folder / "work")})
            (root / "labels").chmod(mode)
            kind, answer = in_child(lambda: sorted(set(ensure_index([root], work).tables.problems.what)), NOBODY)
            assert kind == "done" and set(answer) & {"unreadable", "label"} or answer[0] == "PillSnapError", answer

    def test_a_photo_without_permission_names_itself(self):
        with open_folder() as folder:
            root = synthesised(folder / "tree")
            photo = next(root.rglob("*.png"))
            photo.chmod(0)
            kind, (error, message, _) = in_child(lambda: read_photo(photo), NOBODY)
            assert (kind, error) == ("failed", "PillSnapError") and str(photo) in message


@contextmanager
def small_disk(path, options="size=1m"):
    "A real file system of little room; only root may mount one."
    path.mkdir()
    mounted = ROOT and shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(disk):
    "Take all room."
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError as e:
                    assert e.errno == errno.ENOSPC
                    break


class TestFullDisk:
    def test_a_full_disk_leaves_the_old_index(self, copy, tmp_path):
        root = copy()
        with small_disk(tmp_path / "disk") as disk:
            settings = load_settings({"PILLSNAP_WORK": str(disk / "work")})
            old = ensure_index([root], settings)
            fill(disk)
            gone = next(root.rglob("*single/K-*/*.png"))
            gone.unlink()
            with pytest.raises(PillSnapError, match="no space left for .*free space") as e:
                ensure_index([root], settings)
            assert str(disk) in str(e.value)
            folder = folder_of(settings, [root])
            assert load_index(folder).hash == old.hash and [p.name for p in folder.parent.iterdir()] == [folder.name]
            (disk / "filler").unlink()
            assert len(ensure_index([root], settings).tables.images) == 254

    @pytest.mark.parametrize("fullest, error", [(0.85, "reading labels writes no further: .*free space"), (2.0, "no space left for .*free space")], ids=["past 85 percent", "no room at all"])
    def test_a_full_disk_keeps_what_was_inspected(self, many, tmp_path, monkeypatch, fullest, error):
        keep_often(monkeypatch, 100)
        monkeypatch.setattr(core, "FULLEST", fullest)
        tables = build_index([many]).tables
        with small_disk(tmp_path / "disk", "size=192k") as disk:
            with pytest.raises(PillSnapError, match=error) as e:
                inspect(tables, [many], photos=np.array([], int), store=disk / "store")
            assert str(disk / "store") in str(e.value)
            kept = len(Store(disk / "store/labels").load(LABEL_RESULT))
            assert 100 <= kept < 3000
            shutil.copytree(disk / "store", tmp_path / "store")
        with reads() as seen:
            assert len(inspect(tables, [many], photos=np.array([], int), store=tmp_path / "store").pills) == 3000
        assert sum(seen.values()) == 3000 - kept

    def test_a_disk_that_was_full_from_the_start(self, drawn, tmp_path):
        with small_disk(tmp_path / "disk", "size=64k,nr_inodes=3") as disk:
            (disk / "a").touch()
            (disk / "b").touch()
            with pytest.raises(PillSnapError, match="no space left"):
                ensure_index([drawn()], load_settings({"PILLSNAP_WORK": str(disk / "work")}))


class TestKilledIndexing:
    def test_killed_at_any_moment_the_next_call_succeeds(self, copy, settings):
        root = copy()
        before = ensure_index([root], settings)
        next(root.rglob("*single/K-*/*.png")).unlink()
        after = build_index([root])
        folder = folder_of(settings, [root])
        start = time.perf_counter()
        assert in_child(lambda: build_index([root]).hash)[1] == after.hash
        took, killed = time.perf_counter() - start, 0
        rng = random.Random(7)
        for _ in range(8):
            killed += in_child(lambda: ensure_index([root], settings, full=True).hash, kill_after=rng.uniform(0, 2 * took)) is None
            assert load_index(folder).hash in (before.hash, after.hash)
        assert killed
        assert ensure_index([root], settings).hash == after.hash == load_index(folder).hash

    def test_killed_at_every_step_of_writing(self, copy, settings):
        "Killed before the first rename or flush, before the second, and so on until none is left."
        root = copy()
        before = ensure_index([root], settings)
        next(root.rglob("*single/K-*/*.png")).unlink()
        after, folder = build_index([root]), folder_of(settings, [root])
        saved = shutil.copytree(folder, settings.work / "saved")
        for step in count():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved, folder)
            done = in_child(lambda: ensure_index([root], killed_at(step, settings)).hash)
            if done:
                break
            if folder.exists():
                assert load_index(folder).hash in (before.hash, after.hash)
            assert ensure_index([root], settings).hash == after.hash == load_index(folder).hash
        assert step > 8 and done == ("done", after.hash)

    def test_leftovers_are_no_index(self, drawn, settings):
        root = drawn()
        made = ensure_index([root], settings)
        folder = folder_of(settings, [root])
        left = folder.with_name(f".{folder.name}.1.abcdef.part")
        shutil.copytree(folder, left)
        (left / "index.json").write_text("{")
        store = settings.work / "inspected" / folder.name / "labels"
        store.mkdir(parents=True)
        (store / ".0123.parquet.1.abcdef.part").write_bytes(b"PAR1")
        assert ensure_index([root], settings).hash == made.hash
        shutil.rmtree(folder)
        assert ensure_index([root], settings).hash == made.hash
        assert inspect_index(ensure_index([root], settings)).problems.empty

    @pytest.mark.parametrize("name", ["index.json", "listing-0.parquet", "images.parquet", "labels.parquet", "problems.parquet"])
    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_a_damaged_index_is_made_again_or_refused(self, drawn, settings, name, damage):
        root = drawn()
        settle(root)
        made = ensure_index([root], settings)
        path = folder_of(settings, [root]) / name
        path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:40])
        try:
            assert ensure_index([root], settings).hash == made.hash
        except PillSnapError as e:
            assert name in str(e)


def killed_at(step, settings):
    "Kill this process before the given flush or rename; give the settings back."
    left = [step]

    def deadly(call):
        def counted(*words, **more):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*words, **more)
        return counted
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    return settings


class TestChanges:
    @pytest.mark.parametrize("way", ["in place", "another file", "gone", "cut"])
    def test_a_zip_that_changes_after_it_was_indexed(self, tmp_path, way):
        "An error, never another pill's bytes."
        stems = [f"K-90000{n}_0_0_0_0_60_000_200" for n in range(1, 5)]
        path = tmp_path / "TS_1_single.zip"
        write_zip(path, [(f"{s[:8]}/{s}.png", picture(n), 0, False) for n, s in enumerate(stems)])
        sources = photo_sources(build_index([tmp_path]).tables.images, [tmp_path])
        other = tmp_path / "other"
        write_zip(other, [(f"{s[:8]}/{s}.png", picture(n), 0, False) for n, s in reversed(list(enumerate(stems)))])
        if way == "in place":
            path.write_bytes(other.read_bytes())
        elif way == "another file":
            os.replace(other, path)
        elif way == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:5000])
        for n, source in enumerate(sources):
            try:
                assert source.read() == picture(n)
            except PillSnapError as e:
                assert str(source) in str(e) and "index" in str(e)
                assert inspect_photo(source)[0] in ("photo", "unreadable")
            else:
                assert way == "cut" and n == 0

    @pytest.mark.parametrize("first", [False, True], ids=["not yet opened", "opened before"])
    def test_a_zip_replaced_by_a_new_version_is_read_anew(self, tmp_path, first):
        "The same names and sizes, other bytes: indexed again, the new ones are read, in the same process."
        path = tmp_path / "TS_1_single.zip"
        name = f"{CODE}/{STEM}.png"
        write_zip(path, [(name, b"old" * 100, 0, False)])
        old = photo_sources(build_index([tmp_path]).tables.images, [tmp_path])[0]
        assert not first or old.fetch() == b"old" * 100
        write_zip(tmp_path / "new", [(name, b"new" * 100, 0, False)])
        os.replace(tmp_path / "new", path)
        assert photo_sources(build_index([tmp_path]).tables.images, [tmp_path])[0].fetch() == b"new" * 100

    def test_a_tree_that_changes_while_it_is_walked(self, copy, settings):
        root = copy()
        single = root / "data/train/images/single/TS_1_single"
        listing = walk(root)
        met = []
        for folder in listing:
            met.append(folder)
            if folder.path.endswith("TS_1_single"):
                os.rename(single / "K-900002", root / "moved")
                shutil.rmtree(single / "K-900003")
        assert [f.path.rpartition("/")[2] for f in met if f.what] == ["K-900002", "K-900003"]
        assert {f.what for f in met if f.what} == {"unreadable"}
        assert len(ensure_index([root], settings).tables.images) == 255 - 60

    def test_an_index_of_a_tree_that_keeps_changing(self, copy, settings):
        root, stop = copy(), threading.Event()
        drugs = sorted((root / "data/train/images/single/TS_1_single").iterdir())

        def disturb():
            rng = random.Random(1)
            while not stop.is_set():
                drug = rng.choice(drugs[1:])
                away = drug.with_name("away")
                os.rename(drug, away)
                (drugs[1].parent / f"K-{rng.randrange(10**6):06}").mkdir(exist_ok=True)
                os.rename(away, drug)
                photo = rng.choice(sorted(drug.iterdir()))
                data = photo.read_bytes()
                photo.unlink()
                photo.write_bytes(data)
        worker = threading.Thread(target=disturb)
        worker.start()
        try:
            for _ in range(8):
                images = ensure_index([root], settings).tables.images
                assert (images.codes == "K-900001").sum() == 60 and images.photo.is_unique
        finally:
            stop.set()
            worker.join()
        same = ensure_index([root], settings)
        assert len(same.tables.images) == 255 and same.hash == build_index([root]).hash

    def test_labels_and_photos_that_vanish_before_they_are_read(self, copy):
        root = copy()
        tables = build_index([root]).tables
        photo = next(root.rglob("*single/K-900001/*.png"))
        label = next(root.rglob("*single/K-900002_json/*.json"))
        photo.unlink()
        label.unlink()
        found = inspect(tables, [root])
        assert sorted(found.problems.file) == sorted(str(p.relative_to(root)) for p in (label, photo))
        assert set(found.images.photo[~found.images.usable]) == {photo.stem, label.stem}


@pytest.fixture
def scans(monkeypatch):
    "The folders that are listed."
    seen, scandir = [], os.scandir
    monkeypatch.setattr(files.os, "scandir", lambda path: (seen.append(str(path)) if "copy" in str(path) else None, scandir(path))[1])
    return seen


def unchanged(a, b):
    "Two indexes of the same data."
    assert (a.hash, a.places) == (b.hash, b.places)
    for name in index.TABLES:
        same_tables(getattr(a.tables, name), getattr(b.tables, name))


class TestRescan:
    def test_nothing_changed(self, copy, settings, scans, monkeypatch):
        root = copy(zips="labels")
        settle(root)
        made = ensure_index([root], settings)
        assert scans
        scans.clear()
        monkeypatch.setattr(files, "read_entries", None)
        unchanged(ensure_index([root], settings), made)
        assert not scans
        ensure = pytest.raises(TypeError, ensure_index, [root], settings, full=True)  # would open every ZIP again
        assert ensure and scans

    @pytest.mark.parametrize("change", ["added", "removed", "renamed"])
    def test_one_file(self, copy, settings, scans, change):
        root = copy()
        settle(root)
        before = ensure_index([root], settings)
        photo = next(root.rglob("*single/K-900002/*.png"))
        scans.clear()
        new = photo.with_name("K-900002_0_0_0_0_60_010_200.png")
        if change == "added":
            shutil.copy(photo, new)
        elif change == "removed":
            photo.unlink()
        else:
            photo.rename(new)
        after = ensure_index([root], settings)
        assert scans == [str(photo.parent)] and after.hash != before.hash
        lost, more = set(before.tables.images.photo) - set(after.tables.images.photo), set(after.tables.images.photo) - set(before.tables.images.photo)
        assert lost == {"added": set()}.get(change, {photo.stem}) and more == {"removed": set()}.get(change, {new.stem})
        assert Counter(after.tables.problems.what) == {"added": {"no label": 1}, "removed": {"no photo": 1}, "renamed": {"no label": 1, "no photo": 1}}[change]
        unchanged(after, ensure_index([root], settings, full=True))

    def test_a_new_folder_and_a_lost_one(self, copy, settings, scans):
        root = copy()
        settle(root)
        ensure_index([root], settings)
        scans.clear()
        single = root / "data/train/images/single/TS_1_single"
        os.rename(single / "K-900002", single / "K-900002 again")
        after = ensure_index([root], settings)
        assert scans == [str(single), str(single / "K-900002 again")]
        assert len(after.tables.images) == 255 and after.tables.images.folder.astype(str).str.endswith(" again").sum() == 60

    def test_one_zip_replaced(self, copy, settings, monkeypatch):
        root = copy(zips="all")
        settle(root)
        before = ensure_index([root], settings)
        path = next(root.rglob("TL_1_single.zip"))
        with zipfile.ZipFile(path) as archive:
            entries = [(info.filename, archive.read(info), info.compress_type, False) for info in archive.infolist()]
        write_zip(path.with_suffix(".new"), entries[1:])
        os.replace(path.with_suffix(".new"), path)
        opened, read_entries = [], files.read_entries
        monkeypatch.setattr(files, "read_entries", lambda p, s: (opened.append(p), read_entries(p, s))[1])
        after = ensure_index([root], settings)
        assert opened == [path] and after.hash != before.hash
        assert list(after.tables.problems.what) == ["no label"] and Path(after.tables.problems.file[0]).stem == Path(entries[0][0]).stem
        unchanged(after, build_index([root]))

    def test_what_changed_just_now_is_not_trusted(self, copy, settings, scans):
        "Two changes within one tick of the disk's clock leave one time."
        root = copy()
        settle(root)
        drug = next(root.rglob("*single/K-900002"))
        photo = next(drug.iterdir())
        ensure_index([root], settings)
        now = time.time_ns()
        for number, name in enumerate(("K-900002_0_0_0_0_60_010_200.png", "K-900002_0_0_0_0_60_030_200.png"), 1):
            shutil.copy(photo, drug / name)
            os.utime(drug, ns=(now, now))
            scans.clear()
            assert len(ensure_index([root], settings).tables.images) == 255 + number and scans == [str(drug)]
        os.utime(drug, ns=(now - 10**10, now - 10**10))
        ensure_index([root], settings)
        scans.clear()
        ensure_index([root], settings)
        assert not scans

    def test_a_small_layout_edited_in_place(self, tmp_path, settings):
        root = yolo(tmp_path / "yolo")
        settle(root)
        before = ensure_index([root], settings)
        (root / "labels/a.txt").write_text("1 0.5 0.5 0.5 0.5")
        after = ensure_index([root], settings)
        assert [list(x.tables.pills.k_code) for x in (before, after)] == [["advil"], ["midol"]] and before.hash != after.hash


FORMS = {
    "korean": {"names": "korean"}, "korean nfd": {"names": "korean", "nfd": True}, "zips": {"zips": "all"}, "korean zips": {"names": "korean", "nfd": True, "zips": "all"},
    "cp949 zips": {"names": "korean", "zips": "all", "cp949": True}, "photos in zips": {"zips": "images"}, "labels in zips": {"names": "korean", "zips": "labels", "cp949": True}}


def pixels(found):
    "Every photo of an index, decoded."
    return {name: read_photo(source).tobytes() for name, source in zip(found.tables.images.photo, photo_sources(found.tables.images, found.roots))}


def seen_as(found, stage, truth):
    "Check that an index is the true one, in all that does not depend on where files lie."
    assert found.hash == truth[0].hash
    manifest = make_manifest(found, stage)
    assert manifest.hash == truth[1].hash and manifest.classes == truth[1].classes
    assert pixels(found) == truth[2]


@pytest.fixture(scope="module")
def truth(drawn):
    "Index, manifest and pixels of the plain tree."
    found = build_index([drawn()])
    return found, make_manifest(found, get_stage(0, "name=tiny images=80 classes=4")), pixels(found)


class TestForms:
    @pytest.fixture
    def stage(self, plan):
        return plan().stage

    def test_the_plain_tree_is_whole(self, truth):
        found, manifest, photos = truth
        assert len(photos) == 255 and len(set(photos.values())) == 255 and found.tables.problems.empty and found.tables.images.usable.all()
        assert manifest.pills.photo.nunique() == 80 and set(manifest.pills.kind) == {"single", "combination"}

    @pytest.mark.parametrize("form", FORMS)
    def test_other_forms(self, drawn, truth, stage, form):
        found = build_index([drawn(**FORMS[form])])
        assert found.tables.problems.empty and found.layouts[0].kind == "aihub" and found.layouts[0].sure == 1
        seen_as(found, stage, truth)

    @pytest.mark.parametrize("order", [1, -1])
    def test_photos_and_labels_under_two_roots(self, copy, tmp_path, truth, stage, order):
        root = copy(**FORMS["labels in zips"])
        labels = tmp_path / "other disk"
        for folder in sorted(root.glob("01.데이터/*/라벨링데이터")):
            target = labels / folder.relative_to(root)
            target.parent.mkdir(parents=True)
            os.rename(folder, target)
        seen_as(build_index([root, labels][::order]), stage, truth)

    @pytest.mark.parametrize("way", ["twice", "link", "copy", "below", "zips"])
    def test_the_same_tree_under_two_roots(self, copy, drawn, tmp_path, truth, stage, way):
        root = copy() if way == "copy" else drawn()
        if way == "link":
            (tmp_path / "link").symlink_to(root)
        other = {"twice": root, "link": tmp_path / "link", "below": root / "data/train/images", "copy": drawn(), "zips": drawn(**FORMS["cp949 zips"])}[way]
        found = build_index([root, other])
        assert set(found.tables.problems.what) == {"double"}
        seen_as(found, stage, truth)

    def test_training_through_folders_and_through_zips_ends_the_same(self, drawn, plan):
        weights = []
        for form in ({}, FORMS["cp949 zips"]):
            root = drawn(**form)
            here = replace(plan("images=40 epochs=1", run="zips" if form else "folders"), roots=[root])
            found = build_index([root])
            run = prepare_run(here, make_manifest(found, here.stage), found)
            fit(run)
            weights.append((torch.load(run / "last.pt", weights_only=True)["model"], load_classifier(run / "best.safetensors")[0].state_dict()))
        for a, b in zip(*weights):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestDefects:
    @pytest.mark.parametrize("form", [{}, {"names": "korean", "nfd": True}, {"names": "korean", "zips": "all", "cp949": True}, {"zips": "images"}, {"names": "korean", "zips": "labels"}], ids=str)
    def test_exactly_the_planted_ones_are_found(self, tmp_path, plan, form):
        root = tmp_path / "bad"
        synthesise(root, SynthSpec(drugs=8, views=36, trays=6, width=96, val_drugs=1, defects=True, **form))
        planted = pd.read_csv(root / "defects.csv")
        found = build_index([root], store=tmp_path / "store")
        listed = all_problems(found, inspect_index(found))
        assert Counter(zip(listed.what, listed.file)) == Counter(zip(planted.what, planted.file)) and (listed["count"] == 1).all()
        stage = replace(plan().stage, images=300, classes=7, allow_short=True)
        manifest = make_manifest(found, stage)
        bad = planted[planted.what.isin(["photo", "size", "label", "box", "loose box", "wrong code", "no label", "incomplete tray", "index picture", "name", "unreadable"])]
        assert len(bad) >= 14 and manifest.pills.photo.nunique() > 100
        assert not set(manifest.pills.photo) & {Path(f).stem for f in bad.file}
        for source in photo_sources(found.tables.images[found.tables.images.photo.isin(manifest.pills.photo)], [root]):
            read_photo(source)


class TestValidation:
    @pytest.mark.parametrize("form", [{}, {"names": "korean", "zips": "all"}], ids=str)
    def test_its_drugs_never_enter_classes_or_splits(self, tmp_path, plan, form):
        synthesise(tmp_path / "tree", SynthSpec(drugs=6, views=60, trays=4, width=64, val_drugs=2, **form))
        found = build_index([tmp_path / "tree"])
        assert count_parts(found.tables.images).to_dict("index") == {"Training": {"photos": 252, "drugs": 4}, "Validation": {"photos": 120, "drugs": 2}, "in both": {"photos": 0, "drugs": 0}}
        manifest = make_manifest(found, replace(plan().stage, images=120, classes=6, allow_short=True))
        assert manifest.classes == [f"K-90000{n}" for n in range(1, 5)]
        assert set(manifest.pills.part) == {"train"} and not {"K-900005", "K-900006"} & set(manifest.pills.k_code)
        with pytest.raises(PillSnapError, match="the data has 4"):
            make_manifest(found, replace(plan().stage, classes=5))

    def test_drugs_in_both_parts_are_reported(self, tmp_path, plan):
        root = tmp_path / "tree"
        synthesise(root, SynthSpec(drugs=6, views=60, trays=4, width=64, val_drugs=2))
        photos = sorted((root / "data/train/images/single/TS_1_single/K-900001").iterdir())[:10]
        for photo in photos:
            label = root / "data/train/labels/single/TL_1_single/K-900001_json" / f"{photo.stem}.json"
            for file in (photo, label):
                target = Path(str(file).replace("/train/", "/val/").replace("TS_", "VS_").replace("TL_", "VL_"))
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(file, target)
        found = build_index([root])
        assert count_parts(found.tables.images).loc["in both"].to_dict() == {"photos": found.tables.images.codes.astype(str).str.contains("K-900001").sum(), "drugs": 1} and found.tables.problems.empty
        manifest = make_manifest(found, replace(plan().stage, images=120, classes=4, allow_short=True))
        assert set(manifest.pills.part) == {"train"} and not {p.stem for p in photos} & set(manifest.pills.photo)
