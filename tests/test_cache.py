"""The cache of decoded pills: kills at any moment, builders side by side, full disks, broken photos, ZIPs, and one order for any number of workers.

Builders run in sessions of their own, forked from a server that has imported everything, so a kill costs no import. PILLSNAP_KILLS=100 kills more often.
"""
import contextlib
import ctypes
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from conftest import KILLS
from pillsnap import core, data
from pillsnap.aihub import image_paths, pill_source
from pillsnap.core import PillSnapError, load_settings
from pillsnap.data import Cache, CacheCut, PillDataset, batches, ensure_cache, epoch_order, reading_order
from pillsnap.disk import show_work
from pillsnap.index import build_index
from pillsnap.inspection import inspect
from pillsnap.manifest import make_manifest
from pillsnap.preprocess import Preprocess
from pillsnap.runs import read_events
from pillsnap.trees import SynthSpec, synthesise

SMALL = SynthSpec(drugs=4, views=12, trays=3, width=96)
SHARD, SHARDS = 4, 20  # pills of a shard, shards of the small tree
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pillsnap.manifest", "pillsnap.data"])
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@dataclass(frozen=True)
class Build:
    "A cache that is to be built, here or by another process."
    pills: pd.DataFrame
    root: Path
    work: Path  # holds this cache alone
    kind: str = "jpeg"
    workers: int = 2
    side: int = 48  # px

    @property
    def folder(self) -> Path:
        "Where it lies, once it was begun."
        return next(iter((self.work / "cache").glob("*")), self.work / "nowhere")

    def run(self, show=show_work) -> Cache:
        return ensure_cache(self.pills, [self.root], CacheCut(0.3, self.side, self.kind), load_settings({"PILLSNAP_WORK": str(self.work)}), "a test", self.workers, show)


def tabulate(root):
    "The pills of a tree, as a manifest has them."
    seen = inspect(build_index([root]).tables, [root])
    pills = seen.pills.merge(seen.images.assign(image=image_paths(seen.images)), left_on="row", right_index=True)
    return pills.sort_values(["photo", "pill"], ignore_index=True).assign(label=lambda t: t.k_code.astype("category").cat.codes)


def contents(folder):
    "All that lies in a folder, leftovers too: files with their bytes, folders."
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def stamps(folder):
    "The finished shards; one that is written again gets another stamp."
    found = {path.parent.name: path.stat() for path in folder.glob("[0-9]*/pixels.bin")}
    return {shard: (stat.st_ino, stat.st_mtime_ns) for shard, stat in found.items()}


def photo_of(build, row):
    "The file that a pill lies on."
    return Path(str(pill_source(build.pills.iloc[row], [build.root])))


def spoil(path, at=0):
    "Change some bytes of a file."
    old = path.read_bytes()
    path.write_bytes(old[:at] + bytes(255 - b for b in old[at : at + 4]) + old[at + 4 :])


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
    return lambda name="work", **more: replace(Build(drawn[1], drawn[0], tmp_path / name), **more)


@pytest.fixture
def plan_own(plan_build, tmp_path):
    "Plan a cache of a copy of the tree, whose photos can be broken."
    return lambda **more: replace(plan_build(**more), root=Path(shutil.copytree(plan_build().root, tmp_path / "copy")))


@pytest.fixture(scope="module")
def lone(drawn, tmp_path_factory):
    "What an undisturbed builder without workers gives: the contents of the folder."
    work = tmp_path_factory.mktemp("lone")
    return {kind: contents(Build(drawn[1], drawn[0], work / kind, kind, 0).run().folder) for kind in ("raw", "jpeg")}


def living(session):
    "The states of a session's processes, by their numbers."
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.status()
    return found


def wait_until(there, seconds=60):
    "Wait for what is sure to come."
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"not there after {seconds} s"
        time.sleep(0.001)


def in_session(pipe, work, *given):
    "Do work as the first process of a session; send its result, or the error it ended in."
    os.setsid()
    data.SHARD = SHARD
    pipe.send("began")
    try:
        pipe.send(work(*given))
    except Exception as e:
        pipe.send(e)


@dataclass
class Child:
    "A process in a session of its own."
    process: Any
    pipe: Any

    def answer(self):
        "Wait for what it sends; its error is raised here."
        assert self.pipe.poll(120), "no answer after 120 s"
        told = self.pipe.recv()
        if isinstance(told, Exception):
            raise told
        return told

    def signal(self, number):
        "Send a signal to all processes of the session."
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def freeze(self):
        "Stop all processes of the session, and wait until they are; say how many there are."
        self.signal(signal.SIGSTOP)
        wait_until(lambda: set(living(self.process.pid).values()) <= {psutil.STATUS_STOPPED})
        return len(living(self.process.pid))

    def kill(self):
        "Kill the whole session, and wait until nothing of it is left."
        self.signal(signal.SIGKILL)
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
    "Build to the end."
    return build.run().folder.name


@contextlib.contextmanager
def pause(what, total):
    "Stop for good after the first shard."
    yield lambda n: time.sleep(1000)


def begin_only(build):
    "Build one shard, and those that workers have in hand; then pause."
    return build.run(pause).folder.name


def stop_workers_at_birth(build):
    "Build with workers that stop before they do anything."
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    finish(build)


def stop_worker_at(step, build):
    "Build with a worker that stops before it opens a file, makes a folder or renames one for the given time."
    builder, left = os.getpid(), [step]

    def hook(event, given):
        if os.getpid() != builder and event in ("open", "os.mkdir", "os.rename") and str(given[0]).startswith(str(build.work / "cache")):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGSTOP)
    sys.addaudithook(hook)
    finish(build)


def finish_waking(build, session):
    "Build to the end; just before what another builder left is removed, the workers of that go on, until they have put it in its place or given up."
    def hook(event, given):
        if event == "shutil.rmtree" and str(given[0]).endswith(".part"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGCONT)
            wait_until(lambda: not os.path.exists(given[0]) or not living(session))
    sys.addaudithook(hook)
    return finish(build)


def freeze_in_a_shard(begin, build):
    "Stop a builder and its workers, each of which has built some shards, while a shard is being written."
    for _ in range(20):
        builder = begin(finish, build)
        wait_until(lambda: len(stamps(build.folder)) >= 2 * build.workers)
        while not (build.folder / "cache.json").exists():
            builder.freeze()
            if list(build.folder.glob(".0*.part/pixels.bin")):
                return builder
            builder.signal(signal.SIGCONT)
            time.sleep(0.001)
        builder.kill()
        shutil.rmtree(build.folder)
    raise AssertionError("all were done before they could be stopped")


class TestKills:
    @pytest.mark.parametrize("kind", ["raw", "jpeg"])
    def test_killed_at_random_moments_it_is_incomplete_or_whole_and_goes_on(self, begin, plan_build, lone, kind):
        "Builder and workers are killed at once; whenever a cache was complete before that, the next one is begun."
        build, whole, rng, met = plan_build(kind=kind), lone[kind], random.Random(7), Counter()
        for number in range(KILLS + 100):
            if number >= (KILLS + 1) // 2 and met["incomplete"] and met["with workers"]:
                break
            before, more = stamps(build.folder), rng.randrange(1, 6)
            builder = begin(finish, build)
            wait_until(lambda: len(stamps(build.folder)) >= min(SHARDS, len(before) + more))
            time.sleep(rng.uniform(0, 0.02))
            met["with workers"] += builder.freeze() > 1
            builder.kill()
            found = {name: content for name, content in contents(build.folder).items() if ".part" not in name}
            assert found.items() <= whole.items() and before.items() <= stamps(build.folder).items()
            met["complete" if "cache.json" in found else "incomplete"] += 1
            if "cache.json" in found:
                assert found == whole
                shutil.rmtree(build.folder)
        assert met["incomplete"] and met["with workers"]
        before = stamps(build.folder)
        build.run()
        assert contents(build.folder) == whole and before.items() <= stamps(build.folder).items()

    def test_workers_that_have_only_just_begun_leave_when_their_builder_is_killed(self, begin, plan_build):
        build = plan_build()
        builder = begin(stop_workers_at_birth, build)
        wait_until(lambda: list(living(builder.process.pid).values()).count(psutil.STATUS_STOPPED) == build.workers)
        builder.process.kill()
        builder.process.join()
        builder.signal(signal.SIGCONT)
        wait_until(lambda: not living(builder.process.pid), 30)

    def test_who_waits_for_a_builder_goes_on_where_that_is_killed(self, begin, plan_build, lone):
        build = plan_build()
        first = begin(begin_only, build)
        wait_until(lambda: stamps(build.folder))
        second = begin(finish, build)
        first.kill()
        before = stamps(build.folder)
        assert 0 < len(before) < SHARDS and second.answer() == build.folder.name
        assert contents(build.folder) == lone["jpeg"] and before.items() <= stamps(build.folder).items()

    def test_workers_left_alone_do_not_stop_another_builder(self, begin, plan_build, lone):
        "As when memory runs out: only their builder is killed, while they are in the middle of a shard."
        build = plan_build()
        first = freeze_in_a_shard(begin, build)
        first.process.kill()
        first.process.join()
        assert begin(finish_waking, build, first.process.pid).answer() == build.folder.name
        wait_until(lambda: not living(first.process.pid), 30)
        assert contents(build.folder) == lone["jpeg"]

    def test_a_worker_left_alone_at_any_moment_spoils_nothing_and_leaves(self, begin, plan_build):
        "It goes on when another builder is done."
        one = plan_build(workers=0, pills=plan_build().pills[-SHARD:])
        whole, left = contents(one.run().folder), []
        for step in count():
            build = replace(one, work=one.work / f"{step}")
            first = begin(stop_worker_at, step, replace(build, workers=1))
            wait_until(lambda: psutil.STATUS_STOPPED in living(first.process.pid).values() or not first.process.is_alive())
            if not first.process.is_alive():
                break
            first.process.kill()
            first.process.join()
            build.run()
            assert contents(build.folder) == whole
            first.signal(signal.SIGCONT)
            left.append((first, build))
        wait_until(lambda: not any(living(first.process.pid) for first, _ in left), 30)
        assert len(left) > 4 and [step for step, (_, build) in enumerate(left) if contents(build.folder) != whole] == []


def die_at(step, build):
    "Build in this process, killed before the given rename or removal; end it."
    left = [step]

    def hook(event, given):
        if event in ("os.rename", "os.rmdir") and str(given[0]).startswith(str(build.work / "cache")):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    try:
        build.run()
        os._exit(0)
    finally:
        os._exit(1)


def kill_everywhere(build):
    "Kill builders of a cache as it is now, before the first step, the second, until one is done; say what the next builder makes of each."
    saved, made = Path(shutil.copytree(build.work / "cache", build.work / "saved")), []
    for step in count():
        shutil.rmtree(build.work / "cache")
        shutil.copytree(saved, build.work / "cache")
        pid = os.fork()
        if not pid:
            die_at(step, build)
        status = os.waitpid(pid, 0)[1]
        if status == 0:
            return made
        assert status == signal.SIGKILL, f"step {step} ended with status {status}"
        build.run()
        made.append(contents(build.folder))


class TestEveryMoment:
    "A builder is killed before the first rename or removal of a folder, before the second, and so on until none is left."

    @pytest.fixture
    def build(self, plan_own):
        own = plan_own(workers=0)
        (own.work / "cache").mkdir(parents=True)
        return replace(own, pills=own.pills.iloc[-2 * SHARD :].reset_index(drop=True))

    def check(self, begin, build):
        whole = contents(replace(build, work=build.work / "lone").run().folder)
        made = begin(kill_everywhere, build).answer()
        assert len(made) >= 4
        assert [step for step, found in enumerate(made) if found != whole] == []

    def test_of_a_new_cache(self, begin, build):
        self.check(begin, build)

    def test_of_a_cache_with_a_shard_cut_short(self, begin, build):
        path = build.run().folder / "00000/pixels.bin"
        path.write_bytes(path.read_bytes()[:1000])
        self.check(begin, build)

    def test_of_a_cache_whose_photo_was_mended(self, begin, build):
        photo = photo_of(build, 1)
        good = photo.read_bytes()
        photo.write_bytes(good[:3000])
        assert list(build.run().errors) == [1]
        photo.write_bytes(good)
        self.check(begin, build)

    def test_of_a_cache_that_lost_a_shard_and_a_photo(self, begin, build):
        "The new shard is another one than the old table of facts says."
        shutil.rmtree(build.run().folder / "00000")
        photo = photo_of(build, 1)
        photo.write_bytes(photo.read_bytes()[:3000])
        self.check(begin, build)


class TestDamage:
    @pytest.mark.parametrize("kind", ["raw", "jpeg"])
    @pytest.mark.parametrize("damage", ["gone", "empty", "half"])
    def test_a_file_lost_or_cut_short_is_made_again(self, plan_build, lone, kind, damage):
        build, whole = plan_build(kind=kind, workers=0), lone[kind]
        folder = build.run().folder
        for name in ("00001/pixels.bin", "00001/facts.npy", "00001/shard.json", "facts.npy", "cache.json"):
            path, before = folder / name, stamps(folder)
            path.unlink() if damage == "gone" else path.write_bytes(whole[name][: len(whole[name]) // 2 if damage == "half" else 0])
            build.run()
            assert contents(folder) == whole
            assert {shard for shard in before if stamps(folder)[shard] != before[shard]} <= {"00001"}

    @pytest.mark.parametrize("lost", ["00000/pixels.bin", "cache.json"])
    def test_changed_pixels_are_noticed_where_something_else_is_lost_too(self, plan_build, lone, lost):
        build = plan_build(kind="raw")
        folder = build.run().folder
        spoil(folder / "00001/pixels.bin")
        (folder / lost).unlink()
        build.run()
        assert contents(folder) == lone["raw"]

    def test_a_whole_cache_needs_no_photo(self, plan_own, lone):
        build = plan_own()
        build.run()
        photo_of(build, 0).unlink()
        build.run()
        assert contents(build.folder).keys() == lone["jpeg"].keys()

    def test_a_photo_mended_after_a_kill_is_read(self, begin, plan_own):
        build = plan_own(workers=1)
        photo = photo_of(build, reading_order(build.pills)[0])
        good = photo.read_bytes()
        photo.write_bytes(b"")
        builder = begin(begin_only, build)
        wait_until(lambda: stamps(build.folder))
        builder.kill()
        photo.write_bytes(good)
        assert not build.run().errors


def finish_noting(build, note, start):
    "Build beside another builder; note every file and shard that is put in its place, by whichever process."
    def hook(event, given):
        if event == "os.rename" and Path(given[1]).parent.parent == build.work / "cache":
            with open(note, "a") as file:
                file.write(f"{Path(given[1]).name}\n")
    sys.addaudithook(hook)
    start.wait()
    return build.run().folder.name


class TestSideBySide:
    def test_two_builders_write_each_shard_once(self, begin, plan_build, lone, tmp_path):
        build, note, start = plan_build(), tmp_path / "note", SERVER.Barrier(2)
        two = [begin(finish_noting, replace(build, workers=workers), note, start) for workers in (2, 1)]
        assert {builder.answer() for builder in two} == {build.folder.name}
        assert contents(build.folder) == lone["jpeg"]
        assert sorted(note.read_text().split()) == sorted(name for name in lone["jpeg"] if "/" not in name)

    @pytest.mark.parametrize("workers, kind", [(1, "jpeg"), (2, "raw"), (4, "jpeg")])
    def test_any_number_of_workers_gives_the_same_bytes(self, plan_build, lone, workers, kind):
        assert contents(plan_build(kind=kind, workers=workers).run().folder) == lone[kind]


def mount_disk(folder, size):
    "Mount a small disk that only this process sees; Linux lets anyone do that in a user namespace of his own."
    system, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    folder.mkdir()
    if system.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "no user namespace")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "no mount")


def fill(disk, leave):
    "Take all room of a disk but some bytes, whoever else takes some meanwhile."
    with open(disk / "filler", "wb") as file:
        while (room := shutil.disk_usage(disk).free - leave) > 0:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)


@contextlib.contextmanager
def filled_after_a_shard(disk, leave, what, total):
    yield lambda n: (disk / "filler").exists() or fill(disk, leave)


@contextlib.contextmanager
def filled_from_the_start(disk, leave, what, total):
    fill(disk, leave)
    yield lambda n: None


def can_mount(folder):
    mount_disk(folder, 1 << 20)
    return True


def build_twice(build, size, fullest, leave):
    "Build on a disk that others fill, then with room: what stopped the first, the shards it left, those of the second, and what that made."
    mount_disk(build.work, size)
    core.FULLEST = fullest
    try:
        told = build.run(partial(filled_after_a_shard, build.work, leave)).key
    except PillSnapError as e:
        told = str(e)
    left = stamps(build.folder)
    (build.work / "filler").unlink()
    build.run()
    return told, left, stamps(build.folder), contents(build.folder)


def build_with_more_and_more_room(build, size):
    "Build one shard and the table, each with no room, with a page, with two, until it is enough: the errors, what came of it, what comes of it at once."
    mount_disk(build.work, size)
    core.FULLEST, data.SHARD, told, room = 2.0, 128, [], count()
    while not (build.folder / "cache.json").exists():
        before = stamps(build.folder)
        try:
            build.run(partial(filled_from_the_start, build.work, next(room) * 4096))
        except PillSnapError as e:
            told.append(str(e))
        (build.work / "filler").unlink()
        room = room if stamps(build.folder) == before else count()
    return told, contents(build.folder), contents(replace(build, work=build.work / "lone").run().folder)


class TestFullDisk:
    @pytest.fixture
    def disks(self, begin, tmp_path):
        try:
            assert begin(can_mount, tmp_path / "try").answer()
        except (OSError, AttributeError) as e:
            pytest.skip(f"a small disk cannot be mounted here: {e}")

    @pytest.mark.parametrize("kind", ["raw", "jpeg"])
    def test_too_little_room_is_refused_before_anything_is_written(self, plan_build, kind, monkeypatch):
        build = plan_build(kind=kind)
        monkeypatch.setattr(core, "FULLEST", 1e-9)
        with pytest.raises(PillSnapError, match="the cache of pills needs 0.00 GB and .* has 0.00 GB left"):
            build.run()
        assert [path.name for path in build.work.iterdir()] == ["locks"]

    @pytest.mark.parametrize("fullest, leave, error", [(0.85, 400_000, "the cache writes no further: .* long work stops at 85%"), (2.0, 0, "no space left for .*/000")], ids=["past 85 percent", "no room at all"])
    def test_a_disk_that_fills_up_meanwhile_keeps_what_was_built(self, disks, begin, plan_build, lone, fullest, leave, error):
        told, left, after, made = begin(build_twice, plan_build(), 4_000_000, fullest, leave).answer()
        assert re.search(error, told) and 0 < len(left) < SHARDS
        assert made == lone["jpeg"] and left.items() <= after.items()

    def test_whichever_file_finds_no_room_the_error_says_so(self, disks, begin, plan_build):
        told, made, whole = begin(build_with_more_and_more_room, plan_build(workers=0, side=16), 4_000_000).answer()
        assert len(told) > 5 and all("no space left for" in text for text in told) and made == whole


class TestPhotos:
    @pytest.mark.parametrize("form", [{"zips": "images"}, {"zips": "all", "names": "korean", "nfd": True, "cp949": True}], ids=["photos", "all, as shipped"])
    def test_photos_in_zips_give_the_same_bytes(self, tmp_path, plan_build, lone, form):
        synthesise(tmp_path / "tree", replace(SMALL, **form))
        build = replace(plan_build(), root=tmp_path / "tree", pills=tabulate(tmp_path / "tree"))
        assert (build.pills.photo == plan_build().pills.photo).all() and build.pills.image.str.contains(".zip/").all()
        made = contents(build.run().folder)
        assert made.pop("cache.json") and made.items() < lone["jpeg"].items() and len(made) == len(lone["jpeg"]) - 1

    def test_broken_photos_are_listed_and_the_others_kept(self, plan_own, plan_build):
        build, good = plan_own(), plan_build("good").run()
        tray = build.pills.index[build.pills.kind == "combination"][0]
        for row, content in ((0, b""), (20, None), (33, b"no photo at all"), (tray, photo_of(build, tray).read_bytes()[:2000])):
            photo_of(build, row).unlink()
            if content is not None:
                photo_of(build, row).write_bytes(content)
        broken = set(build.pills.index[build.pills.photo.isin(build.pills.photo[[0, 20, 33, tray]])])
        cache = build.run()
        assert set(cache.errors) == broken > {0, 20, 33, tray} and all(photo_of(build, row).name in text for row, text in cache.errors.items())
        assert all((cache.data(row) == good.data(row)).all() for row in build.pills.index if row not in broken)

    @pytest.mark.parametrize("kind", ["raw", "jpeg"])
    def test_a_training_refuses_broken_photos_or_skips_and_names_them(self, plan, environ, tree, tmp_path, monkeypatch, kind):
        from pillsnap.train import classifier_pills, fit, prepare_run  # here, because no builder needs what takes seconds to load

        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        root = Path(shutil.copytree(tree, tmp_path / "copy"))
        index = build_index([root])
        here = replace(plan(f"images=40 epochs=1 cache={kind}"), roots=[root])
        manifest = make_manifest(index, here.stage)
        broken = [classifier_pills(manifest, split).image[0] for split in ("train", "val")]
        for name in broken:
            (root / name).write_bytes((root / name).read_bytes()[:1000])
        with pytest.raises(PillSnapError, match=f"2 of .* cannot be read, .*{Path(broken[0]).name}.* skip_unreadable=true"):
            fit(prepare_run(here, manifest, index))
        run = prepare_run(replace(here, stage=replace(here.stage, skip_unreadable=True)), manifest, index)
        assert fit(run)["skipped_files"] == 2 and {e["file"] for e in read_events(run, "skipped")} == set(broken)


def same(batch, other):
    "Say whether two batches hold the same crops, labels and rows in one order."
    return torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1]) and batch[2:] == other[2:]


def put_together(shares):
    "Make the batch of which several ranks have their shares."
    ranks, size = len(shares), sum(len(share[2]) for share in shares)
    crops, labels, rows = torch.empty(size, *shares[0][0].shape[1:], dtype=torch.uint8), torch.empty(size, dtype=torch.long), [0] * size
    for rank, share in enumerate(shares):
        crops[rank::ranks], labels[rank::ranks], rows[rank::ranks] = share[:3]
    return crops, labels, rows, []


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
class TestOrder:
    @pytest.fixture
    def load(self, plan_build, kind):
        "Load an epoch's batches."
        build = plan_build(kind=kind, workers=0)
        dataset, order = PillDataset(build.pills, build.run(), Preprocess(size=32, margin=0.1), augment=1.0, seed=7, epoch=3), epoch_order(len(build.pills), 7, 3)
        return lambda **more: list(batches(dataset, order, 12, **more))

    @pytest.mark.parametrize("loader", ["threads", "processes"])
    def test_rows_and_crops_are_the_same_for_any_number_of_workers(self, load, loader):
        alone = load()
        assert sum((batch[2] for batch in alone), []) == epoch_order(78, 7, 3).tolist() and all(len(batch[0]) for batch in alone)
        for workers in (0, 1, 2, 4):
            assert all(same(*pair) for pair in zip(alone, load(workers=workers, loader=loader), strict=True))

    def test_ranks_together_load_what_one_does(self, load):
        for ranks in (1, 2, 3):
            shares = zip(*(load(rank=rank, ranks=ranks, workers=rank, loader="processes") for rank in range(ranks)), strict=True)
            assert all(same(*pair) for pair in zip(load(), map(put_together, shares), strict=True))
