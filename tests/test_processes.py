"Kills, signals and full disks: what is on the disk is whole, and the run goes on."
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from conftest import PROJECT
from pillsnap.core import PillSnapError
from pillsnap.disk import atomic_path, read_json, write_json
from pillsnap.index import build_index
from pillsnap.manifest import make_manifest
from pillsnap.runs import append_event, read_events, run_state
from pillsnap.train import follow, launch, prepare_run
from pillsnap.trees import SynthSpec, synthesise


@pytest.fixture
def run(plan, tree):
    index = build_index([tree])
    here = plan("epochs=500")
    return prepare_run(here, make_manifest(index, here.stage), index)


def wait_for_epoch(run, epoch, seconds=90):
    end = time.time() + seconds
    while time.time() < end:
        if any(e["epoch"] >= epoch for e in read_events(run, "epoch")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no epoch {epoch} after {seconds} s: {(run / 'train.log').read_text()}")


def test_sigterm_stops_after_a_step_and_the_run_can_go_on(run):
    launched = launch(run)
    wait_for_epoch(run, 1)
    launched.process.send_signal(signal.SIGTERM)
    with pytest.raises(PillSnapError, match=f"go on with pillsnap run train .*--resume {run}"):
        follow(launched)
    assert launched.process.wait() == 128 + signal.SIGTERM and run_state(run) == "stopped"
    done = read_events(run, "epoch")[-1]["epoch"]
    again = launch(run)
    wait_for_epoch(run, done + 1)
    assert read_events(run, "start")[-1]["from_epoch"] == done
    again.process.kill()
    again.process.wait()


def test_a_killed_run_is_reported_and_its_checkpoint_is_whole(run):
    launched = launch(run)
    wait_for_epoch(run, 2)
    launched.process.kill()
    with pytest.raises(PillSnapError, match="status -9"):
        follow(launched)
    assert run_state(run) == "unfinished"
    again = launch(run)
    wait_for_epoch(run, 3)
    assert read_events(run, "start")[-1]["from_epoch"] >= 2
    again.process.kill()
    again.process.wait()


def test_one_run_is_trained_by_one_process(run):
    first = launch(run)
    wait_for_epoch(run, 1)
    second = launch(run)
    assert second.process.wait(60) == 1 and "another process" in (run / "train.log").read_text()
    assert first.process.poll() is None
    first.process.kill()
    first.process.wait()


def test_a_failing_training_says_why(run, tree):
    record = read_json(run / "run.json")
    write_json(run / "run.json", record | {"roots": [str(tree / "nowhere")]})
    with pytest.raises(PillSnapError, match="mount the disk"):
        follow(launch(run))
    assert run_state(run) == "failed"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError), atomic_path(tmp_path / "a.json") as part:
            part.write_bytes(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert read_json(tmp_path / "a.json") == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_synth_leaves_nothing(tmp_path):
    code = f"from pathlib import Path; from pillsnap.trees import *; synthesise(Path({str(tmp_path / 'out')!r}), SynthSpec(drugs=12, views=300, trays=0))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT)
    time.sleep(3)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert synthesise(tmp_path / "out", SynthSpec(drugs=1, views=2, trays=0, width=96))["photos"] == 2


def test_events_survive_a_cut_off_line(tmp_path):
    append_event(tmp_path, "start", pid=1)
    with open(tmp_path / "events.jsonl", "a") as f:
        f.write('{"event": "epo')
    append_event(tmp_path, "end")
    assert [e["event"] for e in read_events(tmp_path)] == ["start", "end"]


def test_pillsnap_run_passes_signals_on_and_resumes(environ, tree, tmp_path):
    "A signal stops the training cleanly, the report of what was reached is written, and the command that the README gives goes on."
    fields = "name=tiny images=80 classes=4 epochs=500 size=32 batch=16 workers=0 tensorboard=false strategy=classifier backgrounds=0"
    run = tmp_path / "work/runs/stage_0-tiny/first"
    for number, more in ((signal.SIGTERM, ["--run", "first"]), (signal.SIGINT, ["--resume", "auto"])):
        words = ["run", "train", "--data-root", str(tree), "--overrides", fields, *more]
        done = len(read_events(run, "epoch"))
        process = subprocess.Popen([sys.executable, "-c", "from pillsnap.cli import main; main()", *words], env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PROJECT)
        wait_for_epoch(run, done + 2)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 1 and run_state(run) == "stopped" and f"epoch {done + 1:3}/500" in output and f"--resume {run}" in output
        assert f"stopped by signal {number}" in (tmp_path / "reports/stage_0-tiny/04_train.html").read_text("utf-8")
    assert read_events(run, "start")[-1]["from_epoch"] == done > 1


def test_progress_prints_the_command_that_goes_on(environ, tree, tmp_path):
    "A training that was killed is told as such, and what `pillsnap progress` prints goes on with it; TensorBoard is there meanwhile."
    words = ["run", "train", "--run", "first", "--data-root", str(tree), "--overrides", "name=tiny images=80 classes=4 epochs=12 size=32 batch=16 workers=0 strategy=classifier backgrounds=0"]
    call = [sys.executable, "-c", "from pillsnap.cli import main; main()"]
    run, env = tmp_path / "work/runs/stage_0-tiny/first", os.environ | environ
    process = subprocess.Popen([*call, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=PROJECT)
    wait_for_epoch(run, 2)
    os.kill(read_events(run, "launched")[-1]["pid"], signal.SIGKILL)
    process.communicate(timeout=60)
    told = subprocess.run([*call, "progress"], env=env, capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    assert "ended without a word" in told
    command = shlex.split(told.partition("to go on:\n")[2].splitlines()[0])
    assert command[0] == "pillsnap"
    process = subprocess.Popen([*call, *command[1:], "--tensorboard"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PROJECT)
    address = next(line for line in process.stdout if line.startswith("TensorBoard: ")).split()[1]
    served = fetch(address, seconds=60)
    assert process.communicate(timeout=120) and process.returncode == 0 and "<title>TensorBoard</title>" in served
    assert run_state(run) == "end" and read_events(run, "start")[-1]["from_step"] > 0
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)
    assert "to go on" not in subprocess.run([*call, "progress"], env=env, capture_output=True, text=True, check=True, cwd=PROJECT).stdout


def fetch(address, seconds):
    "Fetch a page from a server that is just starting."
    end = time.time() + seconds
    while True:
        try:
            return urllib.request.urlopen(address, timeout=5).read().decode()
        except OSError:
            if time.time() > end:
                raise
            time.sleep(0.2)
