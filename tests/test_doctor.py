"""The doctor names the bottleneck that was planted, and the command prints it."""
import pytest
from plant_bottlenecks import PLANTS, diagnose
from typer.testing import CliRunner

from pillsnap.cli import app


@pytest.mark.parametrize("name", [name for name, plant in PLANTS.items() if plant.says])
def test_it_finds_what_was_planted(name):
    "A quick look first; where other work on the machine disturbed it, a longer one."
    found = diagnose(name, 0.3)
    if found.limit.link != PLANTS[name].link or PLANTS[name].says not in found.limit.why + found.limit.remedy:
        found = diagnose(name, 1.5)
    assert found.limit.link == PLANTS[name].link, found.rates
    assert PLANTS[name].says in found.limit.why + found.limit.remedy
    assert found.limit.rate < found.limit.next


def test_a_slow_disk_limits_the_building_of_the_cache():
    assert diagnose("a slow disk, with a cache", 0.3).once.link == "disk"


def test_the_command_says_what_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("PILLSNAP_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("PILLSNAP_MANIFESTS", str(tmp_path / "manifests"))
    told = CliRunner().invoke(app, ["doctor", "--overrides", "strategy=classifier backgrounds=0 size=32"])
    assert told.exit_code == 0 and "An epoch is limited by" in told.output and "this stage takes about" in told.output, told.output
