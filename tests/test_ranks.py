"""Two processes under torchrun see the pills of one and end with its weights; a rank that is killed costs the work since the last checkpoint."""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from pillsnap.checkpoints import read_checkpoint
from pillsnap.disk import read_json, write_json
from pillsnap.index import ensure_index
from pillsnap.manifest import ensure_manifest
from pillsnap.runs import read_events, run_state
from pillsnap.train import prepare_run

SCRIPT = '''
import json, sys
import pillsnap.core
import torch
from torch import nn
from pathlib import Path
from pillsnap.core import get_stage
from pillsnap.data import Photos, PillDataset, batches, epoch_order
from pillsnap.disk import read_json
from pillsnap.engine import start_training, train_step
from pillsnap.manifest import load_manifest
from pillsnap.preprocess import Preprocess
from pillsnap.ranks import join_ranks

run, out = Path(sys.argv[1]), Path(sys.argv[2])
with join_ranks("cpu") as ranks:
    stage = get_stage(0, "epochs=2 warmup=0.5 clip=1 ema=30 accumulate=2")
    pills = load_manifest(run / "manifest").pills.query("split == 'train' and label >= 0").reset_index(drop=True)
    data = PillDataset(pills, Photos(pills, [Path(read_json(run / "run.json")["roots"][0])]), Preprocess(16, 0.1), augment=1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    training, seen = start_training(model, stage, len(pills), "cpu", 4, ranks), []
    for epoch in range(2):
        data.epoch = epoch
        for crops, yb, rows, _ in batches(data, epoch_order(len(data), 7, epoch), 7, drop_last=True, rank=ranks.rank, ranks=ranks.ranks):
            whole = round(ranks.sum(len(rows)))
            train_step(training, crops.permute(0, 3, 1, 2).double() / 255 - 0.5, yb, nn.CrossEntropyLoss(), whole)
            seen.append(sorted(row for part in ranks.gather(rows) for row in part))
    if ranks.chief:
        torch.save({"model": model.state_dict(), "average": training.average.module.state_dict()}, out)
        out.with_suffix(".json").write_text(json.dumps(seen))
'''


def torchrun(ranks, *words, **more):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *more.get("options", []), *map(str, words)]


@pytest.fixture
def prepared(plan):
    "A run that has not begun."
    asked = plan()
    index = ensure_index(asked.roots, asked.settings)
    return prepare_run(asked, ensure_manifest(asked, index), index)


def test_two_ranks_see_the_pills_of_one_and_get_its_weights(prepared, tmp_path, environ):
    (tmp_path / "script.py").write_text(SCRIPT)
    for ranks in (1, 2):
        words = [tmp_path / "script.py", prepared, tmp_path / f"{ranks}.pt"]
        subprocess.run(torchrun(2, *words) if ranks == 2 else [sys.executable, *map(str, words)], env=os.environ | environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert json.loads((tmp_path / "1.json").read_text()) == json.loads((tmp_path / "2.json").read_text())
    assert max(float((one[part][k] - two[part][k]).abs().max()) for part in one for k in one[part]) < 1e-12


def test_a_killed_rank_starts_again_from_the_last_checkpoint(prepared, environ):
    record = read_json(prepared / "run.json")
    write_json(prepared / "run.json", record | {"stage": record["stage"] | {"epochs": 60, "checkpoint_minutes": 0.001}})
    process = subprocess.Popen(torchrun(2, prepared, options=["--max-restarts", "3", "-m", "pillsnap.train"]), env=os.environ | environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    while process.poll() is None and len(read_events(prepared, "epoch")) < 5:
        time.sleep(0.05)
    others = [p for p in psutil.Process(process.pid).children(recursive=True) if "pillsnap.train" in " ".join(p.cmdline()) and p.pid != read_events(prepared, "start")[-1]["pid"]]
    os.kill(others[0].pid, signal.SIGKILL)
    assert process.wait(400) == 0 and run_state(prepared) == "end"
    starts = read_events(prepared, "start")
    assert len(starts) == 2 and starts[-1]["from_step"] > 0 and starts[-1]["ranks"] == 2
    assert read_checkpoint(prepared / "last.pt", "cpu")[0]["epoch"] == 60 and len({e["epoch"] for e in read_events(prepared, "epoch")}) == 60
