"""A training that is killed goes on as if it had not been: at random moments, also while it saves, to the same bits. PILLSNAP_KILLS=100 kills more often.

Trainings run in processes forked from a server that has imported everything, so that a kill costs no import.
"""
import multiprocessing
import os
import random
import shutil
import signal
from datetime import datetime
from itertools import count

import pytest
import torch
from conftest import KILLS
from safetensors.torch import load_file

from pillsnap.checkpoints import previous_of, read_checkpoint
from pillsnap.core import Parameters, get_stage, load_settings
from pillsnap.disk import read_json, write_json
from pillsnap.index import ensure_index
from pillsnap.manifest import ensure_manifest
from pillsnap.runs import read_events, run_state
from pillsnap.train import fit, prepare_run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pillsnap.train"])
FIELDS = {"epochs": 30, "ema": 200, "metric": 0.2, "accumulate": 2, "clip": 1.0, "erase": 0.2, "keep_top": 2, "checkpoint_minutes": 0.001, "tensorboard": False}


def copy_run(run, folder, **fields):
    "Copy a run that has not begun, with other fields."
    copied = shutil.copytree(run, folder)
    record = read_json(copied / "run.json")
    write_json(copied / "run.json", record | {"stage": record["stage"] | FIELDS | fields})
    return copied


def train(run):
    "Train a run, in a session of its own."
    os.setsid()
    os.environ["PILLSNAP_WORK"] = str(run.parent / "work")
    torch.set_num_threads(1)
    fit(run)


def start(run, work=train):
    process = SERVER.Process(target=work, args=(run,))
    process.start()
    return process


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tree):
    "A run that has not begun."
    folder = tmp_path_factory.mktemp("prepared")
    settings = load_settings({"PILLSNAP_WORK": str(folder / "work"), "PILLSNAP_MANIFESTS": str(folder / "manifests"), "PILLSNAP_DEVICE": "cpu"})
    stage = get_stage(0, "name=tiny images=80 classes=4 batch=16 size=32 workers=0 strategy=classifier backgrounds=0")
    plan = Parameters(stage, [tree], settings, {"run": "", "resume": "none"})
    index = ensure_index([tree], settings)
    return prepare_run(plan, ensure_manifest(plan, index), index)


def weights(run):
    state, _ = read_checkpoint(run / "last.pt", "cpu")
    return state["model"] | {f"average.{k}": v for k, v in state["average"].items()} | {f"best.{k}": v for k, v in load_file(run / "best.safetensors").items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, prepared):
    "A run that was never stopped."
    run = copy_run(prepared, tmp_path_factory.mktemp("straight") / "run")
    process = start(run)
    process.join()
    assert process.exitcode == 0
    return run


def seconds_of(run):
    "How long a whole run took, its preparation included."
    begun, ended = (datetime.fromisoformat(read_events(run, event)[-1]["time"]) for event in ("preparing", "end"))
    return (ended - begun).total_seconds()


def kill(process):
    "Kill a training with all its workers; one that has no session of its own yet has none."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def kill_until_done(run, chance, seconds, most):
    "Train a run, killing it at random moments, and count the kills."
    kills = 0
    while run_state(run) != "end":
        process = start(run)
        process.join(chance.uniform(0.05, 0.6) * seconds if kills < most else None)
        if process.is_alive():
            kill(process)
            kills += 1
            if (run / "last.pt").exists():
                read_checkpoint(run / "last.pt", "cpu")  # there is always one that can be read
    return kills


def test_a_killed_training_goes_on_to_the_same_bits(straight, prepared, tmp_path):
    chance, kills, wanted, seconds, numbers = random.Random(3), 0, weights(straight), seconds_of(straight), count()
    while kills < KILLS:
        run = copy_run(prepared, tmp_path / f"run-{next(numbers)}")
        kills += kill_until_done(run, chance, seconds, KILLS - kills)
        found = weights(run)
        assert found.keys() == wanted.keys() and [k for k in wanted if not torch.equal(found[k], wanted[k])] == []
        assert not list(run.glob(".*.part")) and previous_of(run / "last.pt").exists()
        assert sorted(p.name for p in (run / "top").iterdir()) == sorted(p.name for p in (straight / "top").iterdir())


def test_a_stop_loses_no_step(straight, prepared, tmp_path):
    run = copy_run(prepared, tmp_path / "run", checkpoint_minutes=60)
    process = start(run, stop_after_a_while)
    process.join()
    state, _ = read_checkpoint(run / "last.pt", "cpu")
    assert process.exitcode == 128 + signal.SIGTERM and run_state(run) == "stopped" and state["step"] > 0
    process = start(run)
    process.join()
    assert read_events(run, "start")[-1]["from_step"] == state["step"]
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(straight).values(), strict=True))


def stop_after_a_while(run):
    "Train as the command does, and get a SIGTERM at the twentieth step."
    import sys

    from pillsnap import train as module

    os.environ["PILLSNAP_WORK"] = str(run.parent / "work")
    torch.set_num_threads(1)
    steps, usual = [], module.Watch.__call__

    def count(watch, *args):
        steps.append(args)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(watch, *args)

    module.Watch.__call__ = count
    sys.exit(module.main([str(run)]))


def test_the_time_cap_ends_with_weights_and_a_report(prepared, tmp_path):
    run = copy_run(prepared, tmp_path / "run", epochs=1000, cap=2 / 3600)
    process = start(run)
    process.join()
    assert run_state(run) == "end" and (run / "best.safetensors").exists()
    assert "because of cap" in read_events(run, "note")[-1]["message"] and len(read_events(run, "epoch")) < 1000
