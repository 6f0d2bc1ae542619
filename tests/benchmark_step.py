"""How fast the classifier trains: our step on data that lie on the device, the same step fed from the cache, and a plain loop, side by side in one run.

    python tests/benchmark_step.py                   on a GPU: the models of stages 1, 2 and 3 at full size; on a CPU: small forms of them
    python tests/benchmark_step.py --rounds 5 --seconds 20 --stages 3 --overrides "model=tf_efficientnetv2_s.in21k_ft_in1k"

Then, for each stage, the largest batch, the memory at the peak, and how long the stage will take on this machine by these steps (as `pillsnap doctor`
says it). No weights are fetched: they start at random, which costs the same time. The pills are drawn; their photos are as large as the real ones.
"""
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pillsnap.core import STAGES, Parameters, get_stage, load_settings, pick_device

import numpy as np
import timm
import torch

from pillsnap.classifier import to_input
from pillsnap.data import epoch_order, stage_batches
from pillsnap.doctor import PHOTO, examine, wait_for
from pillsnap.engine import largest_batch, learn
from pillsnap.index import ensure_index
from pillsnap.manifest import ensure_manifest
from pillsnap.methods import make_loss
from pillsnap.train import make_job, open_folder, prepare_run
from pillsnap.trees import SynthSpec, synthesise

SMALL = {"1": "size=96 batch=8 precision=fp32", "2": "size=128 batch=8 precision=fp32", "3": "size=96 batch=4 precision=fp32 model=tf_efficientnetv2_m.in21k_ft_in1k"}
DATA = "name=bench images=420 classes=12 tray_share=0 allow_short=true pretrained=false strategy=classifier tensorboard=false resize=none"


def make_run(number, more, root, settings):
    "Make a run of a stage on the drawn pills, ready to train."
    plan = Parameters(replace(get_stage(number, f"{DATA} {more}"), base=""), [root], settings, {})
    index = ensure_index([root], settings)
    return make_job(open_folder(prepare_run(plan, ensure_manifest(plan, index), index)))


def count(work, seconds, device):
    "Do work, which says how many images it did, for so long; the first call is not counted."
    work()
    wait_for(device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += work()
        wait_for(device)
    return done / (time.perf_counter() - start)


def make_rounds(job):
    "Make the three things that are timed."
    stage, training, device = job.stage, job.training, job.training.device
    loss = make_loss(stage, job.train.labels, len(job.manifest.classes), device)
    crops = torch.randint(0, 255, (stage.batch, stage.size, stage.size, 3), dtype=torch.uint8).to(device)
    labels = torch.arange(stage.batch, device=device) % len(job.manifest.classes)
    plain = timm.create_model(stage.model, num_classes=len(job.manifest.classes)).to(device).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    order = np.concatenate([epoch_order(len(job.train), 7, epoch) for epoch in range(2000)])
    loading = iter(stage_batches(job.train, order, stage.batch, stage))

    def resident():
        learn(training, crops, labels, job.pre, loss)
        return len(crops)

    def cached():
        batch, yb, *_ = next(loading)
        learn(training, batch, yb, job.pre, loss)
        return len(batch)

    def plainly():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(to_input(crops, job.pre).contiguous()), labels).backward()
        optimizer.step()
        return len(crops)

    return {"resident": resident, "cached": cached, "plain": plainly}, loading


def measure(job, rounds, seconds):  # images per second of each, by rounds
    "Time the three by turns."
    works, loading = make_rounds(job)
    try:
        return {name: rates for name, rates in zip(works, np.array([[count(work, seconds, job.training.device) for work in works.values()] for _ in range(rounds)]).T)}
    finally:
        loading.close()


def row(number, job, rates):
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    shares = rates["cached"] / rates["resident"]
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if job.training.device.startswith("cuda") else "–"
    return (f"| {number}: {job.stage.model.partition('.')[0]}, {job.stage.size} px, batch {job.stage.batch} | {middle['resident']:,.1f} | {middle['cached']:,.1f} | {np.median(shares):.0%} ({shares.min():.0%} to {shares.max():.0%}) | "
            f"{middle['plain']:,.1f} | {middle['resident'] / middle['plain']:.2f} | {peak} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["1", "2", "3"], choices=list(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0, help="of one measurement; default: 10, on a CPU 4")
    parser.add_argument("--overrides", default="", help="fields of the stages")
    given = parser.parse_args()
    device = pick_device(load_settings().device)
    gpu = device.startswith("cuda")
    print(f"{torch.cuda.get_device_name() if gpu else f'CPU, {torch.get_num_threads()} threads, small forms of the models'}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        settings = load_settings({"PILLSNAP_WORK": f"{scratch}/work", "PILLSNAP_MANIFESTS": f"{scratch}/manifests"})
        synthesise(root := Path(scratch) / "data", SynthSpec(drugs=12, views=36, trays=0, width=PHOTO[1] if gpu else 320))
        print("| stage | resident, images/s | from the cache | of resident | plain eager fp32 | resident is … times plain | memory at the peak |", "|---|---|---|---|---|---|---|", sep="\n")
        limits = []
        for number in given.stages:
            more = f"{'' if gpu else SMALL.get(number, '')} {given.overrides}"
            job = make_run(number, more, root, settings)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            print(row(number, job, measure(job, given.rounds, given.seconds or (10 if gpu else 4))), flush=True)
            job.training.free()
            if gpu:
                limits.append(f"stage {number}: {largest_batch(job.stage, STAGES[number].classes, device)} pills fit in {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB")
        print(*limits, sep="\n", end="\n\n")
        for number in given.stages if gpu else ():
            found = examine(Parameters(get_stage(number, f"pretrained=false {given.overrides}"), [], settings, {}))
            print(f"stage {number}, {found.sample}\n{found.outlook.round(2).to_string()}\n")


if __name__ == "__main__":
    main()
