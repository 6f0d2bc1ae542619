"""After a stage, from the command line: the decision as an exit status and a file, the way on for a person who decides otherwise, suspects that a manifest leaves out, a final test that is read once, the bundle that serves, and its release."""
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import pandas as pd
import pytest

from conftest import PROJECT
from pillsnap.core import PillSnapError
from pillsnap.disk import read_json
from pillsnap.runs import read_events

FIELDS = "images=60 classes=4 epochs=2 size=32 batch=16 workers=0 strategy=classifier backgrounds=0 tray_share=0"


@pytest.fixture(scope="module")
def done(tmp_path_factory, tree):
    "A small stage 0 with data of its own, trained and evaluated: its gate is out of reach."
    folder = tmp_path_factory.mktemp("advice")
    env = os.environ | {"PILLSNAP_WORK": str(folder / "work"), "PILLSNAP_REPORTS": str(folder / "reports"), "PILLSNAP_MANIFESTS": str(folder / "manifests"), "PILLSNAP_DATA_ROOT": "", "PILLSNAP_DEVICE": "cpu"}

    def call(*words):
        return subprocess.run([sys.executable, "-c", "from pillsnap.cli import main; main()", *words], env=env, capture_output=True, text=True, cwd=PROJECT, timeout=300)

    given = ["--data-root", str(tree), "--overrides", f"name=tiny gates=test_top1:0.99 {FIELDS}"]
    for notebook in ("manifest", "train"):
        assert call("run", notebook, *given).returncode == 0
    return folder, call, given, call("run", "evaluate", "--exit-code", *given[2:])


def test_a_failed_gate_is_an_exit_status_a_box_a_file_and_a_badge(done):
    folder, _, _, ended = done
    record = read_json(folder / "reports/stage_0-tiny/stage_0-tiny_evaluation.json")
    assert ended.returncode == 20 and "STOP (confidence" in ended.stdout and record["recommendations"] == "STOP"
    assert {"stage", "timestamp", "dataset_info", "mandatory_checks", "performance_metrics", "recommendations", "confidence", "reasons", "options", "next_stage_config"} <= record.keys()
    assert '<span class="badge failed">STOP</span>' in (folder / "reports/stage_0-tiny/05_evaluate.html").read_text("utf-8")
    run = next((folder / "work/runs/stage_0-tiny").iterdir())
    assert read_events(run, "advice")[-1]["decision"] == "STOP" and (run / "stage_0-tiny_evaluation.json").exists()


def test_progress_tells_the_history_and_next_goes_on_with_a_warning(done):
    "Stage 0 itself was never run here, so that is what comes next."
    _, call, _, _ = done
    told = call("progress")
    assert told.returncode == 0 and "stage_0-tiny" in told.stdout and "1 STOP" in told.stdout and "pillsnap run manifest --stage 0" in told.stdout


def test_next_warns_where_a_gate_failed_and_goes_on(done, tmp_path):
    "The run of the other name is put where stage 0's own runs lie: --next then begins stage 1, which ends with the reason that it cannot."
    folder, call, _, _ = done
    runs = folder / "work/runs"
    (runs / "stage_0").mkdir()
    run = next((runs / "stage_0-tiny").iterdir())
    (runs / "stage_0" / run.name).symlink_to(run)
    record = read_json(run / "run.json")
    (run / "run.json").write_text((run / "run.json").read_text("utf-8").replace('"name": "tiny"', '"name": ""'), "utf-8")
    try:
        ended = call("progress", "--next")
    finally:
        (runs / "stage_0" / run.name).unlink()
        (runs / "stage_0").rmdir()
        (run / "run.json").write_text((run / "run.json").read_text("utf-8").replace('"name": ""', '"name": "tiny"', 1), "utf-8")
    assert read_json(run / "run.json") == record
    assert "of stage 0 is STOP" in ended.stdout and ended.returncode != 0
    assert "$ pillsnap run manifest --stage 1" in ended.stderr and "stage 1 needs data" in ended.stderr


def test_suspects_that_a_person_marks_are_left_out_and_counted(done, tree):
    folder, call, given, _ = done
    assert call("run", "labels", *given[2:]).returncode == 0
    path = folder / "reports/stage_0-tiny/suspects.csv"
    listed = pd.read_csv(path)
    photo = listed.photo[0]
    listed.assign(exclude=listed.photo == photo).to_csv(path, index=False)
    cleaned = [*given[:3], f"{given[3]} exclude={path}"]
    assert call("run", "manifest", *cleaned).returncode == 0
    report, pills = read_json(folder / "manifests/stage_0-tiny/report.json"), pd.read_csv(folder / "manifests/stage_0-tiny/pills.csv")
    assert report["defects"]["excluded"] == 1 and photo not in set(pills.photo) and report["images"] == 60
    path.write_text("photo\nx\n", "utf-8")
    refused = call("run", "manifest", *cleaned)
    assert refused.returncode == 1 and "has no column exclude" in refused.stderr


def test_the_final_test_is_read_once(done):
    folder, call, given, _ = done
    run = next((folder / "work/runs/stage_0-tiny").iterdir())
    key = read_json(run / "run.json")["manifest_hash"]
    wrong = call("run", "evaluate", *given[2:], "--final-test", "yes")
    assert wrong.returncode == 1 and "is not the hash of the run's manifest" in wrong.stderr
    assert call("run", "evaluate", *given[2:], "--final-test", key).returncode == 0
    again = call("run", "evaluate", *given[2:], "--final-test", key)
    assert again.returncode == 1 and "cannot be read again" in again.stderr
    assert len(read_json(folder / f"work/final/{key}.json")["readings"]) == 1


SERVE = """
import sys
from pathlib import Path
from pillsnap.bundle import open_bundle
bundle, photo = open_bundle(Path(sys.argv[1])), Path(sys.argv[2])
answers = bundle([photo, str(photo), photo.read_bytes()], "single")
assert len({tuple(answer.k_codes) for answer in answers}) == 1 and not any(answer.error for answer in answers)
loaded = {"torch", "timm", "ultralytics", "sklearn", "matplotlib", "albumentations"} & set(sys.modules)
assert not loaded, loaded
print(answers[0].k_codes[0])
"""


def test_a_bundle_serves_without_torch_and_is_checked_when_opened(done, tree, tmp_path):
    "Exported, identified from the command line and from Python; then one byte is changed, one file is missing, and nothing is answered."
    folder, call, given, _ = done
    assert call("run", "export", *given[2:]).returncode == 0
    bundle = (folder / "work/bundles/latest").resolve()
    photo = next(tree.rglob("*single*/*/*.png"))
    served = subprocess.run([sys.executable, "-c", SERVE, str(bundle), str(photo)], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert served.returncode == 0, served.stderr
    told = call("identify", str(photo), str(tmp_path / "none.png"), "--json")
    first, second = json.loads(told.stdout)
    assert told.returncode == 1 and first["pills"][0]["top"][0]["k_code"] == served.stdout.strip() and "cannot be read" in second["error"]
    assert first["pills"][0]["top"][0]["item_seq"] > 990_000_000 and first["bundle"] in bundle.name
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / "classifier.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "classifier.onnx").write_bytes(data)
    refused = call("identify", str(photo), "--bundle", str(copy))
    assert refused.returncode == 1 and "classifier.onnx was changed" in refused.stderr
    (copy / "judge.npz").unlink()
    (copy / "classifier.onnx").write_bytes((bundle / "classifier.onnx").read_bytes())
    assert "judge.npz is not there" in call("identify", str(photo), "--bundle", str(copy)).stderr


def test_a_network_that_answers_otherwise_is_not_published(done, monkeypatch):
    "The exported graph is given another offset: the comparison finds it, and `latest` stays what it was."
    from pillsnap import export
    from pillsnap.core import Parameters, Stage, load_settings

    folder, *_ = done
    run = next((folder / "work/runs/stage_0-tiny").iterdir())
    settings = load_settings({"PILLSNAP_WORK": str(folder / "work"), "PILLSNAP_DEVICE": "cpu"})
    before = os.readlink(folder / "work/bundles/latest"), sorted(path.name for path in (folder / "work/bundles").iterdir())
    make = export.PixelClassifier.__init__
    monkeypatch.setattr(export.PixelClassifier, "__init__", lambda self, model, pre: (make(self, model, pre), self.offset.add_(0.5))[0])
    with pytest.raises(PillSnapError, match="nothing was published: .*logit_mse"):
        export.export_run(run, Parameters(Stage(**read_json(run / "run.json")["stage"]), [], settings, {"level": "smoke"}))
    assert before == (os.readlink(folder / "work/bundles/latest"), sorted(path.name for path in (folder / "work/bundles").iterdir()))


def test_a_release_is_an_archive_that_serves(done, tree, tmp_path):
    "Packed and unpacked: what is in the archive answers from the command line, and its checksums hold."
    folder, call, given, _ = done
    bundle = (folder / "work/bundles/latest").resolve()
    made = call("release", "--out", str(tmp_path / "out"), "--allow-changes")
    assert made.returncode == 0 and "show photos of the data" in made.stderr, made.stderr
    [archive] = (tmp_path / "out").iterdir()
    assert str(archive) in made.stdout and archive.name.startswith(f"pillsnap-stage_0-tiny-{time.strftime('%Y%m', time.gmtime())}")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    unpacked = tmp_path / archive.stem
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=unpacked).returncode == 0
    assert {"05_evaluate.html", "06_export.html", "metrics.json"} <= {path.name for path in (unpacked / "reports").iterdir()} and str(tree) not in (unpacked / "settings/run.json").read_text("utf-8")
    told = call("identify", str(next(tree.rglob("*single*/*/*.png"))), "--bundle", str(unpacked / "bundle"), "--json")
    assert told.returncode == 0 and json.loads(told.stdout)[0]["bundle"] in bundle.name
    again = call("release", "--out", str(tmp_path / "out"), "--allow-changes")
    assert again.returncode == 1 and "is there already" in again.stderr
