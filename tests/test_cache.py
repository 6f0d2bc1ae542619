"""The cache of decoded pills: kills, builders side by side, full disks, broken photos, ZIPs; one order for any number of workers.

Builders run in sessions of their own, forked from a server that has imported everything, so a kill costs no import. PILLSNAP_KILLS=100 kills more often.
"""
import contextlib
import ctypes
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from pillsnap import core, data
from pillsnap.aihub import image_paths, pill_source
from pillsnap.core import PillSnapError, load_settings, read_events, read_json, read_metrics, show_work
from pillsnap.data import Cache, CacheCut, PillDataset, batches, ensure_cache, epoch_order, open_cache
from pillsnap.index import build_index
from pillsnap.inspection import inspect
from pillsnap.manifest import make_manifest
from pillsnap.preprocess import Preprocess
from pillsnap.train import fit, prepare_run
from pillsnap.trees import SynthSpec, synthesise

KILLS = int(os.environ.pop("PILLSNAP_KILLS", 6))  # taken out: the settings refuse names they do not know
SMALL = SynthSpec(drugs=4, views=12, trays=3, width=96)
SHARD = 4  # pills; a small tree has 20 shards
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pillsnap.train"])


@dataclass(frozen=True)
class Build:
    "A cache that is to be built; another process can be told to."
    pills: pd.DataFrame
    root: Path
    work: Path
    kind: str = "jpeg"
    workers: int = 2

    @property
    def folder(self) -> Path:
        "Where it lies, once its folder is there; there is one cache in a work folder."
        return next(iter((self.work / "cache").glob("*")), self.work / "nothing")

    def run(self, show=show_work) -> Cache:
        return ensure_cache(self.pills, [self.root], CacheCut(0.3, 48, self.kind), load_settings({"PILLSNAP_WORK": str(self.work)}), "a test", self.workers, show)

    def finish(self) -> str:
        return self.run().key


def tabulate(root):
    "The pills of a tree, as a manifest has them."
    seen = inspect(build_index([root]).tables, [root])
    pills = seen.pills.merge(seen.images.assign(image=image_paths(seen.images)), left_on="row", right_index=True)
    return pills.sort_values(["photo", "pill"], ignore_index=True).assign(label=lambda t: t.k_code.astype("category").cat.codes)


def contents(folder):
    "Every file of a folder with its bytes, and every folder in it: leftovers too."
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def stamps(folder):
    "The finished shards; one that is built again gets another stamp."
    found = {path.parent.name: path.stat() for path in folder.glob("[0-9]*/pixels.bin")}
    return {shard: (stat.st_ino, stat.st_mtime_ns) for shard, stat in found.items()}


def break_photo(pills, row, root):
    "Cut a pill's photo short; give the function that mends it."
    path = Path(str(pill_source(pills.iloc[row], [root])))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    return path, lambda: path.write_bytes(good)


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", SHARD)
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A tree, read only, and its pills."
    root = tmp_path_factory.mktemp("drawn") / "tree"
    synthesise(root, SMALL)
    return root, tabulate(root)


@pytest.fixture
def plan_build(drawn, tmp_path):
    "Plan a cache of the tree in a folder of the test's own."
    return lambda name="work", **more: Build(drawn[1], drawn[0], tmp_path / name, **more)


@pytest.fixture
def lone(plan_build):
    "What an undisturbed build without any worker gives."
    return lambda kind="jpeg": contents(plan_build(f"lone {kind}", kind=kind, workers=0).run().folder)


def in_session(pipe, work, *given):
    "Do work as the first process of a session; send the result, or the refusal."
    os.setsid()
    data.SHARD = SHARD
    pipe.send("began")
    try:
        pipe.send(work(*given))
    except PillSnapError as e:
        pipe.send(e)


def living(session):
    "The processes of a session."
    def belongs(process):
        try:
            return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False
    return [process for process in psutil.process_iter() if belongs(process)]


def wait_until(there, seconds=60):
    "Wait for something that is sure to come."
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"not there after {seconds} s"
        time.sleep(0.001)


@dataclass
class Child:
    "A process in a session of its own."
    process: Any
    pipe: Any

    def answer(self):
        "What it sends: a result; a refusal is raised here."
        assert self.pipe.poll(60), "no answer after 60 s"
        told = self.pipe.recv()
        if isinstance(told, Exception):
            raise told
        return told

    def kill(self):
        "Kill the whole session, and wait until nothing of it is left."
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        wait_until(lambda: not living(self.process.pid), 20)
        self.process.join()


@pytest.fixture
def begin():
    "Begin work in another process."
    children = []

    def start(work, *given):
        here, there = SERVER.Pipe()
        child = Child(SERVER.Process(target=in_session, args=(there, work, *given)), here)
        child.process.start()
        there.close()
        assert child.answer() == "began"
        children.append(child)
        return child
    yield start
    for child in children:
        child.kill()


def finish(build):
    return build.finish()


class TestKills:
    @pytest.mark.parametrize("kind", ["raw", "jpeg"])
    def test_killed_at_random_moments_it_is_incomplete_or_whole_and_goes_on(self, begin, plan_build, lone, kind):
        "Builder and workers are killed together; whenever a cache got whole before its kill, the next one is begun."
        build, whole, rng, met = plan_build(kind=kind), lone(kind), random.Random(7), Counter()
        for _ in range(KILLS):
            before, more = stamps(build.folder), rng.randrange(1, 5)
            builder = begin(finish, build)
            wait_until(lambda: len(stamps(build.folder)) >= min(20, len(before) + more))
            time.sleep(rng.uniform(0, 0.02))
            met["workers"] += len(living(builder.process.pid)) > 1
            builder.kill()
            found = {name: text for name, text in contents(build.folder).items() if ".part" not in name}
            assert found.items() <= whole.items() and before.items() <= stamps(build.folder).items()
            if "cache.json" in found:
                assert found == whole and open_cache(build.folder, build.run().cut)
                shutil.rmtree(build.folder)
            else:
                met["killed"] += builder.process.exitcode == -signal.SIGKILL
        assert met["killed"] and met["workers"]
        before = stamps(build.folder)
        build.run()
        assert contents(build.folder) == whole and before.items() <= stamps(build.folder).items()

    def test_workers_leave_when_only_their_builder_is_killed(self, begin, plan_build, lone):
        "As when memory runs out; another builder need not wait for them."
        build = plan_build()
        builder = begin(finish, build)
        wait_until(lambda: stamps(build.folder))
        assert len(living(builder.process.pid)) == 3
        builder.process.kill()
        begin(finish, build).answer()
        wait_until(lambda: not living(builder.process.pid), 30)
        assert contents(build.folder) == lone()


def die_at(step, build):
    "Finish a build in this process, killed before the given change of a folder."
    left = [step]

    def hook(event, given):
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(given[0]).startswith(str(build.work / "cache")):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return build.finish()


class TestEveryMoment:
    "Killed before the first change of a folder, before the second, and so on until none is left."

    @pytest.fixture
    def build(self, drawn, tmp_path):
        root = Path(shutil.copytree(drawn[0], tmp_path / "copy"))
        return Build(drawn[1].iloc[:8], root, tmp_path / "work", workers=0)

    def check(self, begin, build):
        "Kill builders of a cache as it is now, everywhere; what comes after is the cache of a lone builder."
        whole, saved = contents(replace(build, work=build.work / "lone").run().folder), build.work / "saved"
        (build.work / "cache").mkdir(parents=True, exist_ok=True)
        shutil.copytree(build.work / "cache", saved)
        for step in count():
            shutil.rmtree(build.work / "cache")
            shutil.copytree(saved, build.work / "cache")
            builder = begin(die_at, step, build)
            builder.process.join()
            if builder.process.exitcode == 0:
                break
            assert builder.process.exitcode == -signal.SIGKILL
            build.run()
            assert contents(build.folder) == whole, f"step {step}"
        assert step > 8 and contents(build.folder) == whole

    def test_a_new_cache(self, begin, build):
        self.check(begin, build)

    def test_a_cache_with_a_shard_cut_short(self, begin, build):
        pixels = build.run().folder / "00000/pixels.bin"
        pixels.write_bytes(pixels.read_bytes()[:1000])
        self.check(begin, build)

    def test_a_cache_whose_photo_can_be_read_by_now(self, begin, build):
        _, mend = break_photo(build.pills, 1, build.root)
        assert list(build.run().errors) == [1]
        mend()
        self.check(begin, build)

    def test_a_cache_whose_shard_and_photo_are_lost(self, begin, build):
        "The new shard is another one than the old table of facts says."
        shutil.rmtree(build.run().folder / "00000")
        break_photo(build.pills, build.run().facts["at"].argmin(), build.root)
        shutil.rmtree(build.folder / "00000")
        self.check(begin, build)


class TestDamage:
    @pytest.mark.parametrize("kind", ["raw", "jpeg"])
    @pytest.mark.parametrize("damage", ["gone", "empty", "half"])
    def test_any_file_lost_or_cut_short_is_made_again(self, plan_build, lone, kind, damage):
        build, whole = plan_build(kind=kind), lone(kind)
        folder = build.run().folder
        for name in ("00001/pixels.bin", "00001/facts.npy", "00001/shard.json", "facts.npy", "cache.json"):
            path = folder / name
            path.unlink() if damage == "gone" else path.write_bytes(whole[name][: len(whole[name]) // 2 if damage == "half" else 0])
            before = stamps(folder)
            build.run()
            assert contents(folder) == whole
            assert {shard for shard in before if stamps(folder)[shard] != before[shard]} <= {"00001"}

    @pytest.mark.parametrize("lost", ["00000/pixels.bin", "cache.json"])
    def test_changed_pixels_are_noticed_when_something_else_is_missing_too(self, plan_build, lone, lost):
        build = plan_build(kind="raw")
        folder = build.run().folder
        path = folder / "00001/pixels.bin"
        path.write_bytes(b"\0\1\2\3" + path.read_bytes()[4:])
        (folder / lost).unlink()
        build.run()
        assert contents(folder) == lone("raw")

    def test_pixels_changed_after_a_kill_are_noticed(self, begin, plan_build, lone):
        build = plan_build(kind="raw")
        builder = begin(finish, build)
        wait_until(lambda: len(stamps(build.folder)) > 1)
        builder.kill()
        path = next(build.folder.glob("[0-9]*/pixels.bin"))
        path.write_bytes(b"\0\1\2\3" + path.read_bytes()[4:])
        build.run()
        assert contents(build.folder) == lone("raw")

    def test_a_photo_mended_after_a_kill_is_read(self, begin, plan_build, drawn, tmp_path):
        build = replace(plan_build(), root=Path(shutil.copytree(drawn[0], tmp_path / "copy")))
        _, mend = break_photo(build.pills, 0, build.root)
        folder = build.run().folder
        (folder / "cache.json").unlink()
        mend()
        assert not build.run().errors


def finish_noting(build, note, start):
    "Build beside another builder; note every shard that is put in its place, by whichever process."
    def hook(event, given):
        if event == "os.rename" and Path(given[1]).parent.parent == build.work / "cache":
            with open(note, "a") as file:
                file.write(f"{Path(given[1]).name}\n")
    sys.addaudithook(hook)
    start.wait()
    return build.finish()


class TestSideBySide:
    def test_two_builders_write_each_shard_once(self, begin, plan_build, lone, tmp_path):
        build, note, start = plan_build(), tmp_path / "note", SERVER.Barrier(2)
        two = [begin(finish_noting, replace(build, workers=workers), note, start) for workers in (2, 1)]
        assert {builder.answer() for builder in two} == {build.folder.name}
        assert contents(build.folder) == lone()
        assert Counter(note.read_text().split()) == Counter([name for name in lone() if name.isdigit()] + ["facts.npy", "cache.json"])

    def test_who_waits_goes_on_where_the_first_was_killed(self, begin, plan_build, lone):
        build = plan_build()
        first = begin(finish, build)
        wait_until(lambda: stamps(build.folder))
        second = begin(finish, build)
        first.kill()
        before = stamps(build.folder)
        second.answer()
        assert contents(build.folder) == lone() and before.items() <= stamps(build.folder).items()

    def test_any_number_of_workers_gives_the_same_bytes(self, plan_build, lone):
        for kind in ("raw", "jpeg"):
            assert contents(plan_build("one", kind=kind, workers=1).run().folder) == contents(plan_build("four", kind=kind, workers=4).run().folder) == lone(kind)
