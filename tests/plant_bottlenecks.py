"""Plant a bottleneck in a small training, one after the other, and let the doctor say what it finds.

    .venv/bin/python tests/plant_bottlenecks.py          # prints the doctor's page for each

Each plant makes the code that trains really slow in one place: reads that wait, one worker, a recipe of heavy filters, batches of two, a model that waits.
`tests/test_doctor.py` checks the verdicts.
"""
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pillsnap.core  # first: it tells the threads of torch not to spin  # isort: skip
import albumentations as A
import torch
from torch import nn

import pillsnap.data
import pillsnap.doctor
from pillsnap.cli import show_diagnosis
from pillsnap.core import Parameters, get_stage, load_settings
from pillsnap.doctor import Diagnosis, examine
from pillsnap.files import Source

FIELDS = "strategy=classifier backgrounds=0 size=32 batch=64 workers=2"


@contextmanager
def slow_disk() -> Iterator[None]:
    "Let every read of a file take 80 ms longer."
    fetch = Source.fetch

    def wait(source: Source) -> bytes:
        time.sleep(0.08)
        return fetch(source)

    with mock.patch.object(Source, "fetch", wait):
        yield


@contextmanager
def heavy_recipe() -> Iterator[None]:
    "Add wide filters to the augmentation."
    usual = pillsnap.data.make_augmentation
    heavy = [A.Resize(640, 640), A.ElasticTransform(p=1), A.MedianBlur((31, 31), p=1), A.Resize(32, 32)]
    with mock.patch.object(pillsnap.data, "make_augmentation", lambda strength: A.Compose([*usual(strength).transforms, *heavy])):
        yield


class Waiting(nn.Module):
    "A model that takes 20 ms longer for each image."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, xb: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02 * len(xb))
        return self.model(xb)


@contextmanager
def slow_device() -> Iterator[None]:
    "Let the model wait."
    build = pillsnap.doctor.build_classifier
    with mock.patch.object(pillsnap.doctor, "build_classifier", lambda stage, classes: Waiting(build(stage, classes))):
        yield


@dataclass(frozen=True)
class Plant:
    "What is planted, and what the doctor has to find."
    fields: str
    link: str
    says: str  # in its reason or its remedy
    plants: tuple = ()


PLANTS = {
    "nothing slow but the device": Plant("cache=raw augment=0.5", "compute", ""),
    "a slow disk": Plant("cache=off", "disk", "faster disk", (slow_disk,)),
    "a slow disk, with a cache": Plant("cache=raw", "compute", "", (slow_disk,)),
    "one worker": Plant("cache=off workers=1", "decode", "workers=-1"),
    "a heavy recipe": Plant("cache=raw", "augmentation", "lower augment", (heavy_recipe,)),
    "a small batch": Plant("cache=raw augment=0 batch=2", "compute", "too small"),
    "a slow device": Plant("cache=raw augment=0", "compute", "faster device", (slow_device,)),
}


def diagnose(name: str, limit_s: float = 1.0) -> Diagnosis:
    "Plant a bottleneck and examine."
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = load_settings({"PILLSNAP_WORK": f"{folder}/work", "PILLSNAP_MANIFESTS": f"{folder}/manifests", "PILLSNAP_DEVICE": "cpu"})
        for plant in PLANTS[name].plants:
            stack.enter_context(plant())
        return examine(Parameters(get_stage(0, f"{FIELDS} {PLANTS[name].fields}"), [], replace(settings, work=Path(folder) / "work"), {}), limit_s)


def main() -> None:
    "Print the doctor's page for every plant."
    for name, plant in PLANTS.items():
        print(f"\n##### {name}: {plant.fields}\n", flush=True)
        show_diagnosis(diagnose(name), get_stage(0, f"{FIELDS} {plant.fields}"))


if __name__ == "__main__":
    main()
