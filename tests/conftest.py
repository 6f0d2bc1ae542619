"Shared fixtures: one small generated tree, and settings that write into a folder of the test's own."
import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
from pathlib import Path

import pytest

from pillsnap.core import Parameters, data_roots, get_stage, load_settings
from pillsnap.trees import SynthSpec, synthesise

os.environ["TEST_KILLS"] = os.environ.pop("PILLSNAP_KILLS", os.environ.get("TEST_KILLS", "5"))  # settings refuse names they do not know; pytest's workers read it again
KILLS = int(os.environ["TEST_KILLS"])  # how often tests of kills kill
PROJECT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than ten seconds; run with -m slow")
    config.addinivalue_line("markers", "alone: what it measures, other tests beside it would disturb")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    "Four drugs, 60 views each, five trays; read only."
    root = tmp_path_factory.mktemp("data") / "tree"
    synthesise(root, SynthSpec(drugs=4, views=60, trays=5, width=128))
    return root


@pytest.fixture
def environ(tmp_path):
    "Variables under which nothing of the person's own is touched."
    return {"PILLSNAP_WORK": str(tmp_path / "work"), "PILLSNAP_REPORTS": str(tmp_path / "reports"), "PILLSNAP_MANIFESTS": str(tmp_path / "manifests"),
            "PILLSNAP_DATA_ROOT": "", "PILLSNAP_DEVICE": "cpu"}


@pytest.fixture
def settings(environ):
    return load_settings(environ)


@pytest.fixture
def plan(settings, tree):
    "Make the parameters of a tiny stage on the shared tree."
    def make(overrides="", **given):
        stage = get_stage(0, f"name=tiny images=80 classes=4 epochs=2 batch=16 size=32 workers=0 tensorboard=false strategy=classifier backgrounds=0 {overrides}")
        return Parameters(stage, data_roots(stage, str(tree), settings), settings, {"run": "", "resume": "none"} | given)
    return make


@pytest.fixture
def pillsnap(environ):
    "Run the command line as a person does."
    def run(*words, **more):
        return subprocess.run([sys.executable, "-c", "from pillsnap.cli import main; main()", *map(str, words)], env=os.environ | environ | more, capture_output=True, text=True, cwd=PROJECT, timeout=300)
    return run
