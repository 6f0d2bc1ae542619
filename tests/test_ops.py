"""Keeping the machine tidy: a disk that fills while a training runs, a run that fails and says why, what is old and goes, secrets that stay out of files, logs that begin anew."""
import os
import shutil
import signal
import sys
import threading
import time

import pytest

from pillsnap import core
from pillsnap.disk import read_json
from pillsnap.failures import explain_run
from pillsnap.index import build_index
from pillsnap.manifest import make_manifest
from pillsnap.runs import HIDDEN, MOST_LOG, append_event, read_events, run_state
from pillsnap.train import follow, launch, main, prepare_run


@pytest.fixture
def make_run(plan, tree):
    "Make a run on the shared tree."
    def make(overrides):
        here, index = plan(overrides), build_index([tree])
        return prepare_run(here, make_manifest(index, here.stage), index)
    return make


def wait_for(check, seconds=90):
    end = time.time() + seconds
    while time.time() < end:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing after {seconds} s")


def test_a_disk_that_fills_stops_a_training_cleanly(make_run, monkeypatch):
    "Past the limit in the middle of a training: it writes a checkpoint, says what to do, and goes on from there once there is room."
    run = make_run("epochs=400")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    filler = threading.Thread(target=lambda: (wait_for(lambda: read_events(run, "epoch")), monkeypatch.setattr(core, "FULLEST", 1e-9)))
    filler.start()
    try:
        status = main([str(run)])
    finally:
        filler.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert status == 1 and run_state(run) == "stopped" and (run / "last.pt").exists()
    told = read_events(run, "stopped")[-1]["message"]
    assert explain_run(run).cause == "the disk is full"
    assert "the training writes no further" in told and "`pillsnap clean` says what can go" in told and f"--resume {run}" in told
    assert main([str(run)]) == 1 and len(read_events(run, "start")) == 1  # still full: it does not even begin
    done = read_events(run, "epoch")[-1]["epoch"]
    monkeypatch.setattr(core, "FULLEST", 0.999)
    again = launch(run)
    try:
        start = wait_for(lambda: [e for e in read_events(run, "start") if e["pid"] == again.process.pid])
        assert start[-1]["from_epoch"] == done
    finally:
        again.process.kill()
        again.process.wait()


def test_a_remedy_that_changes_no_weight_goes_on(plan, tree):
    "Fewer workers go with a run; another batch needs a new one, and `auto` says that it began one."
    index, here = build_index([tree]), plan("epochs=2")
    manifest = make_manifest(index, here.stage)
    run = prepare_run(here, manifest, index)
    assert prepare_run(plan("epochs=2 workers=1 checkpoint_minutes=3", resume=str(run)), manifest, index) == run
    assert (stage := read_json(run / "run.json")["stage"])["workers"] == 1 and stage["checkpoint_minutes"] == 3
    with pytest.raises(core.PillSnapError, match="does not fit: batch: 16 there, 8 here"):
        prepare_run(plan("epochs=2 batch=8", resume=str(run)), manifest, index)
    other = prepare_run(plan("epochs=2 batch=8", resume="auto"), manifest, index)
    assert other != run and f"{run.name}, the newest that is not complete, does not fit: batch" in read_events(other, "note")[0]["message"]


def test_a_killed_run_is_explained_on_one_screen(make_run, pillsnap):
    run = make_run("epochs=500")
    launched = launch(run)
    wait_for(lambda: read_events(run, "epoch"))
    launched.process.kill()
    with pytest.raises(core.PillSnapError, match="status -9"):
        follow(launched)
    screen = pillsnap("progress", run.name).stdout.splitlines()
    assert len(screen) < 30 and any("signal 9 (kill)" in line for line in screen) and any(line.startswith("go on     pillsnap run train") for line in screen)
    assert any(line.startswith("cause ") for line in screen) and any("epoch" in line and "val_top1" in line for line in screen)
    assert "did you mean" in pillsnap("progress", f"{run.name}x").stderr


def test_a_command_that_fails_says_why(pillsnap, tree, tmp_path):
    "A photo that cannot be read ends a training; the terminal names the file, the cause and the remedy, and the report has none of this computer's secrets."
    data = tmp_path / "very-secret-folder"
    shutil.copytree(tree, data)
    given = ["--data-root", data, "--overrides", "name=tiny images=80 classes=4 epochs=2 size=32 batch=16 workers=0 tensorboard=false strategy=classifier backgrounds=0"]
    assert pillsnap("run", "manifest", *given).returncode == 0
    for photo in data.rglob("*.png"):
        size, stamp = photo.stat().st_size, photo.stat().st_mtime_ns
        photo.write_bytes(photo.read_bytes()[: size // 2].ljust(size, b"\0"))
        os.utime(photo, ns=(stamp, stamp))
    ended = pillsnap("run", "train", *given, HF_TOKEN="very-secret-folder")
    assert ended.returncode == 1 and "cause     a file cannot be read" in ended.stderr and "skip_unreadable=true" in ended.stderr and ".png" in ended.stderr
    run = next((tmp_path / "work/runs/stage_0-tiny").iterdir())
    assert explain_run(run).cause == "a file cannot be read" and "memory" in explain_run(run).facts[-1]
    reports = tmp_path / "reports/stage_0-tiny"
    for written in (run / "events.jsonl", run / "train.log", reports / "04_train.ipynb", reports / "04_train.html"):
        assert "very-secret-folder" not in written.read_text("utf-8"), written
    assert HIDDEN in (run / "events.jsonl").read_text("utf-8") and HIDDEN in (reports / "04_train.html").read_text("utf-8")


def test_a_key_that_a_command_prints_is_not_kept(pillsnap, tmp_path):
    "In two pieces, as a terminal may get it."
    code = "import os, sys, time; k = os.environ['PILL_API_KEY']; sys.stdout.write('key ' + k[:7]); sys.stdout.flush(); time.sleep(0.5); print(k[7:], 'end')"
    ended = pillsnap("watch", "--port", "0", "--", sys.executable, "-c", code, PILL_API_KEY="abcdefghijklmnop")
    assert ended.returncode == 0 and "abcdefghijklmnop" in ended.stdout  # the person's own terminal shows what is printed
    log = next((tmp_path / "work/terminal").glob("*.log")).read_text("utf-8")
    assert "end" in log and "abcdefg" not in log and "hijklmnop" not in log


def test_clean_says_then_does(make_run, pillsnap):
    "A complete run of last month: its log is packed and still shown, its checkpoints go, its best weights answer as before."
    from pillsnap.monitor import Follower, run_log

    run = make_run("epochs=1")
    follow(launched := launch(run))
    launched.process.wait()
    best, log = (run / "best.safetensors").read_bytes(), (run / "train.log").read_bytes()
    old = time.time() - 30 * 86400
    for path in run.rglob("*"):
        os.utime(path, (old, old))
    told = pillsnap("clean")
    assert told.returncode == 0 and "nothing was changed" in told.stdout and (run / "last.pt").exists() and str(run / "train.log") in told.stdout
    done = pillsnap("clean", "--yes")
    assert done.returncode == 0 and "freed" in done.stdout and not (run / "last.pt").exists() and not (run / "train.log").exists()
    assert (run / "best.safetensors").read_bytes() == best and Follower(run_log(run)).read()[0] == log and run_state(run) == "end"
    assert "nothing is old enough" in pillsnap("clean", "--yes").stdout


def test_a_training_log_that_grows_too_long_begins_anew(make_run, monkeypatch):
    "The process writes to the new one itself; what was there is kept once."
    run = make_run("epochs=400")
    (run / "train.log").write_bytes(b"w" * (MOST_LOG + 1))
    launched = launch(run)
    try:
        wait_for(lambda: (run / "train.log.1").exists() and b"epoch" in (run / "train.log").read_bytes())
        assert (run / "train.log").stat().st_size < 100_000 and (run / "train.log.1").read_bytes().startswith(b"www")
    finally:
        launched.process.kill()
        launched.process.wait()


def test_events_hold_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    append_event(tmp_path, "note", message="sent with 0123456789abcdef")
    assert "0123456789abcdef" not in (tmp_path / "events.jsonl").read_text() and HIDDEN in read_events(tmp_path)[0]["message"]
