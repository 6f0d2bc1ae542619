"""A real limit of memory, which the system sets: the search finds it, and a training that meets it in mid-run goes on in parts.

On a CPU the limit is one of address space. It is met as a GPU's is: an allocation fails, and torch raises an error. oneDNN keeps memory for each
size of batch it has seen, and glibc's heap gets holes: a search would meet both, on a GPU it meets neither, so here both are switched off.
"""
import json
import os
import subprocess
import sys

import pytest

from conftest import PROJECT

SCRIPT = """
import json, resource, sys
import pillsnap.core
import psutil, torch
from pillsnap.classifier import build_classifier
from pillsnap.core import get_stage
from pillsnap.engine import is_memory_error, largest_batch, start_training, take_step, train_step

torch.set_num_threads(1)
what, pills = sys.argv[1], int(sys.argv[2])
stage, loss = get_stage(0, "size=96 epochs=1 warmup=0"), torch.nn.CrossEntropyLoss()

def begin():
    torch.manual_seed(0)
    training = start_training(build_classifier(stage, 12), stage, 1000, "cpu", 12)
    training.model.train()
    return training

def some(pills):
    return torch.rand(pills, 3, 96, 96, generator=torch.Generator().manual_seed(1)), torch.arange(pills) % 12

take_step(begin(), *some(2), loss)  # what is loaded at the first step is not what is asked for
held = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (held + 1_000_000_000,) * 2)
if what == "search":
    print(json.dumps(largest_batch(stage, 12, "cpu")))
elif what == "fits":
    def fits(pills):
        try:
            take_step(begin(), *some(pills), loss)
            return True
        except Exception as e:
            if not is_memory_error(e):
                raise
            return False
    print(json.dumps([fits(pills), fits(int(pills / 0.9) + 1)]))
else:
    training = begin()
    losses = [train_step(training, *some(pills), loss) for _ in range(3)]
    print(json.dumps({"losses": losses, "parts": training.parts, "halved": training.halved, "step": training.step, "notes": training.notes}))
"""


def limited(what, pills=0):
    "Run the script with a gigabyte beyond what its start holds."
    done = subprocess.run([sys.executable, "-c", SCRIPT, what, str(pills)], cwd=PROJECT, env=os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return limited("search")


def test_the_search_finds_nine_tenths_of_the_true_limit(found):
    assert 20 < found < 4096 and limited("fits", found) == [True, False]


def test_a_batch_that_does_not_fit_goes_through_in_parts(found):
    eased = limited("train", int(1.7 * found))
    assert eased["step"] == 3 and eased["parts"] == 2 and eased["halved"] == 0 and len(eased["notes"]) == 1 and "out of memory" in eased["notes"][0]
    assert eased["losses"][-1] < eased["losses"][0]


@pytest.mark.slow
def test_a_batch_far_too_large_is_halved_as_well(found):
    eased = limited("train", 6 * found)
    assert eased["parts"] == 4 and eased["halved"] >= 1 and eased["step"] >= 6
