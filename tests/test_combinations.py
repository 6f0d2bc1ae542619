"""Trays from labels to answers: each test fails when a mistake is made again that once switched the mode off.

The mistakes: one label of four kept, a tray labelled by its first drug, drugs of held-out trays trained on, start weights kept as the best, boxes of one photo
given to another, crops from the resized copy or from normalised pixels. And: what order the two models train in, or a stop, must not change a weight.
"""
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pillsnap.train as train
from pillsnap.boxes import letterbox
from pillsnap.classifier import load_classifier
from pillsnap.core import Parameters, PillSnapError, get_stage, load_settings
from pillsnap.detector import build_network, hash_weights, load_detector, read_detector, save_detector
from pillsnap.disk import read_json
from pillsnap.evaluate import evaluate_run
from pillsnap.identify import identify
from pillsnap.index import build_index
from pillsnap.judge import trusting
from pillsnap.manifest import make_manifest
from pillsnap.pipeline import list_trays, open_pipeline, unseen_drugs
from pillsnap.preprocess import Preprocess
from pillsnap.runs import read_events, read_metrics, run_state
from pillsnap.train import fit, held_out_drugs, main, open_folder, prepare_run, write_detector_set
from pillsnap.trees import SynthSpec, synthesise

FIELDS = ("name=tiny images=200 classes=10 tray_share=0.4 allow_short=true epochs=2 batch=16 size=32 workers=0 tensorboard=false "
          "detector_size=64 detector_epochs=2 detector_batch=8 composed=1 backgrounds=0.5")


@pytest.fixture(scope="module")
def tray_root(tmp_path_factory):
    "Ten drugs, 24 views each, 16 trays; read only."
    root = tmp_path_factory.mktemp("trays") / "tree"
    synthesise(root, SynthSpec(drugs=10, views=24, trays=16, width=128, seed=2))
    return root


@pytest.fixture(scope="module")
def tray_index(tray_root):
    return build_index([tray_root])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def trays_plan(work, tray_root, monkeypatch):
    "Make the parameters of a tiny stage with trays; banks and masks are shared by the tests."
    folders = {f"PILLSNAP_{name.upper()}": str(work / name) for name in ("work", "reports", "manifests")} | {"PILLSNAP_DATA_ROOT": "", "PILLSNAP_DEVICE": "cpu"}
    for name, folder in folders.items():
        monkeypatch.setenv(name, folder)

    def make(overrides="", **given):
        return Parameters(get_stage(0, f"{FIELDS} {overrides}"), [tray_root], load_settings(), {"run": "", "resume": "none"} | given)
    return make


@pytest.fixture
def start(trays_plan, tray_index):
    "Prepare a run."
    def prepare(overrides="", **given):
        plan = trays_plan(overrides, **given)
        return prepare_run(plan, make_manifest(tray_index, plan.stage), tray_index)
    return prepare


@pytest.fixture(scope="module")
def straight(work):
    "The run that trained both models one after the other, made by the first test that needs it."
    return {}


def sequential(straight, start):
    if not straight:
        straight["run"] = start("strategy=sequential", run="sequential")
        fit(straight["run"])
    return straight["run"]


def same_weights(one, other):
    "Compare best and last weights of both models, bit for bit."
    a, b = (load_classifier(run / "best.safetensors")[0].state_dict() for run in (one, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name in ("last.pt", "detector/last.pt"):
        a, b = (torch.load(run / name, weights_only=True)["model"] for run in (one, other))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert read_detector(one / "detector/best.safetensors")[1]["weights"] == read_detector(other / "detector/best.safetensors")[1]["weights"]


class TestWhatItLearnsFrom:
    def test_every_pill_of_a_tray_is_a_box(self, start):
        "Where the last label wins, or the first code names the tray, one line of four is left."
        folder = write_detector_set(open_folder(start()))
        photos = pd.read_csv(folder / "photos.csv", dtype={"name": "str"})
        real = photos[photos.kind == "combination"]
        assert len(real) > 10 and set(real.split) == {"train", "val"}
        for photo in real.itertuples():
            lines = (folder / f"labels/{photo.split}/{photo.name}.txt").read_text().splitlines()
            assert len(lines) == photo.photo.partition("_")[0].count("-") and len(set(lines)) == len(lines)

    def test_held_out_drugs_lie_on_no_composed_tray(self, start, tmp_path):
        opened = open_folder(start())
        held = held_out_drugs(opened)
        train.compose_trays(opened, 30, tmp_path / "laid")
        laid = pd.read_parquet(tmp_path / "laid/pills.parquet")
        trays = opened.manifest.pills[opened.manifest.pills.kind == "combination"]
        assert held >= set(unseen_drugs(opened.manifest)) and held and not held & set(laid.k_code) and not held & set(trays.k_code[trays.split == "train"])
        assert set(opened.bank().table.k_code) & held, "the bank has them: leaving them out is what keeps them away"

    def test_incomplete_trays_train_only_masked(self, tray_root, tmp_path, trays_plan):
        "Left out they are counted; masked, what has no label is painted over, and validation stays complete."
        root = tmp_path / "copy"
        shutil.copytree(tray_root, root)
        plan = trays_plan("composed=0")
        complete = make_manifest(build_index([root]), plan.stage).pills
        victim = complete[(complete.kind == "combination") & (complete.split == "train")].iloc[0]
        label = next(root.glob(f"data/train/labels/combination/*/*/{victim.k_code}/{victim.photo}.json"))
        label.unlink()
        index = build_index([root])
        for incomplete, boxes in (("leave out", None), ("mask", victim.photo.partition("_")[0].count("-") - 1)):
            here = replace(plan, roots=[root], stage=replace(plan.stage, incomplete=incomplete))
            run = prepare_run(here, make_manifest(index, here.stage), index)
            folder = write_detector_set(open_folder(run))
            photos = pd.read_csv(folder / "photos.csv", dtype={"name": "str"})
            found = photos[photos.photo == victim.photo]
            assert read_json(run / "run.json")["incomplete_trays"] == 1 and len(found) == (boxes is not None)
        assert found.pills.iloc[0] == boxes and found.masked.iloc[0] and found.split.iloc[0] == "train" and not photos.masked[photos.split == "val"].any()
        shown, whole = (np.asarray(Image.open(p).convert("RGB"), float) for p in (folder / f"images/train/{found['name'].iloc[0]}.jpg", root / victim.image))
        k = max(shown.shape) / max(whole.shape)
        x, y, w, h = (round(v * k) for v in victim[list("xywh")])
        hidden = shown[y + h // 4 : y + 3 * h // 4, x + w // 4 : x + 3 * w // 4]
        assert hidden.std((0, 1)).max() < 8, "the pill without a label is still to be seen"

    def test_composed_pictures_only_train(self, start):
        folder = write_detector_set(open_folder(start()))
        photos = pd.read_csv(folder / "photos.csv")
        assert set(photos.split[photos.kind == "composed"]) == {"train"} and (photos.kind == "composed").sum() == ((photos.kind == "combination") & (photos.split == "train")).sum()

    def test_a_folder_without_trays_is_told_what_to_do(self, trays_plan, tray_index):
        plan = trays_plan("tray_share=0 images=100")
        run = prepare_run(plan, make_manifest(tray_index, plan.stage), tray_index)
        with pytest.raises(PillSnapError, match="strategy=classifier"):
            fit(run)


class TestStrategy:
    def test_by_turns_gives_the_same_weights(self, straight, start):
        "Both models see the same steps in the same order; kept apart, not a bit may differ."
        run = start("strategy=interleaved interleave_ratio=1", run="interleaved")
        fit(run)
        order = [e["event"] for e in read_events(run) if e["event"] in ("epoch", "detector_epoch")]
        assert order == ["detector_epoch", "epoch", "detector_epoch", "epoch"]
        same_weights(sequential(straight, start), run)
        one, other = read_metrics(straight["run"]), read_metrics(run)
        assert all(one[k] == other[k] for k in ("classifier_steps", "detector_steps", "val_top1", "val_map50"))

    @pytest.mark.parametrize("strategy", ["sequential", "interleaved"])
    def test_a_stop_in_the_detector_costs_nothing(self, strategy, straight, start, monkeypatch):
        "Stopped after the first step of the detector's second epoch, and taken up again."
        run = start(f"strategy={strategy}", run=f"stopped-{strategy}")
        plain = train.train_detector

        def stop_in_second(stage, folder, home, device, on_step, on_epoch):
            def step(number, steps):
                if len(read_events(run, "detector_epoch")) == 1:
                    train.Stop.signal = signal.SIGTERM
                on_step(number, steps)
            return plain(stage, folder, home, device, step, on_epoch)
        monkeypatch.setattr(train, "train_detector", stop_in_second)
        with pytest.raises(train.Stop):
            fit(run)
        train.Stop.signal = 0
        monkeypatch.setattr(train, "train_detector", plain)
        fit(run)
        assert run_state(run) == "end" and len(read_events(run, "detector_start")) == 2
        same_weights(sequential(straight, start), run)

    def test_too_little_memory_is_said_before_the_start(self, start, monkeypatch):
        run = start("strategy=interleaved", run="memory")
        monkeypatch.setattr(train, "free_memory", lambda device: 0.001)
        with pytest.raises(PillSnapError, match="take strategy=sequential"):
            fit(run)
        assert not read_events(run, "epoch") and not read_events(run, "detector_start")

    def test_one_model_alone(self, start, trays_plan):
        run = start("strategy=detector detector_epochs=1", run="alone")
        fit(run)
        assert not (run / "best.safetensors").exists() and (run / "detector/best.safetensors").exists() and "val_map50" in read_metrics(run) and "val_top1" not in read_metrics(run)
        with pytest.raises(PillSnapError, match="strategy=sequential"):
            evaluate_run(run, trays_plan())


class TestDetectorWeights:
    def test_what_is_kept_was_trained_and_is_what_is_evaluated(self, straight, start):
        run = sequential(straight, start)
        begun, ended, meta = read_events(run, "detector_start")[0], read_events(run, "detector_end")[-1], read_detector(run / "detector/best.safetensors")[1]
        assert begun["start_weights"] == hash_weights(build_network("yolo11n", get_stage(0).seed).state_dict()) != meta["weights"] == ended["weights"]
        assert hash_weights(load_detector(run / "detector/best.safetensors").network.state_dict()) == meta["weights"]

    def test_start_weights_are_never_kept(self, tmp_path):
        network = build_network("yolo11n", 3)
        with pytest.raises(PillSnapError, match="nothing was learned"):
            save_detector(tmp_path / "best.safetensors", network, hash_weights(network.state_dict()), model="yolo11n", size=64)
        assert not any(tmp_path.iterdir())


class TestIdentify:
    classes, pre = ["K-000001", "K-000002"], Preprocess(32, 0.0)

    @staticmethod
    def classify(crops):
        "Red is the first drug, blue the second."
        red = crops[..., 0].mean((1, 2)) > crops[..., 2].mean((1, 2))
        return np.column_stack([red, ~red]) * 9.0, np.zeros((len(crops), 1))

    @staticmethod
    def paint(*pills):
        "Paint squares of 40 px: (x, y, is red)."
        photo = np.full((200, 300, 3), 128, np.uint8)
        for x, y, red in pills:
            photo[y : y + 40, x : x + 40] = (250, 0, 0) if red else (0, 0, 250)
        return photo

    @staticmethod
    def detect(photos):
        "Find what is not grey."
        found = []
        for photo in photos:
            spots = {(x, y) for y in range(0, 200, 20) for x in range(0, 300, 20) if abs(int(photo[y + 9, x + 9, 0]) - 128) > 50}
            corners = sorted((x, y) for x, y in spots if (x - 20, y) not in spots and (x, y - 20) not in spots)
            found.append(np.array([[x, y, 40, 40, 0.9 - i / 100] for i, (x, y) in enumerate(corners)], float).reshape(-1, 5))
        return found

    def test_each_photo_keeps_its_own_pills(self):
        "Answers taken by number of detection, or shifted by a photo that dropped out, change places."
        photos = [self.paint((20, 20, True), (100, 60, False)), self.paint(), b"broken", self.paint((200, 100, False)), self.paint((20, 20, False), (100, 60, True), (200, 100, True))]
        answers, _ = identify(photos, "combination", self.detect, self.classify, trusting(self.classes), self.pre)
        one, two = self.classes
        assert [a.k_codes for a in answers] == [[one, two], [], [], [two], [two, one, one]] and [bool(a.error) for a in answers] == [False, False, True, False, False]

    def test_crops_are_the_photos_own_pixels(self):
        "A print of one pixel survives in the original and in no smaller copy."
        photo, seen = np.full((1200, 1600, 3), 128, np.uint8), []
        photo[600:664, 800:864] = np.where(np.arange(64)[None, :, None] % 2, 255, 0)
        identify([photo], "combination", lambda photos: [np.array([[800, 600, 64, 64, 0.9]])], lambda crops: (seen.append(crops), (np.tile([9.0, 0.0], (len(crops), 1)), np.zeros((len(crops), 1))))[1], trusting(self.classes), replace(self.pre, size=64))
        assert seen[0].dtype == np.uint8 and (seen[0][0] == photo[600:664, 800:864]).all() and letterbox(photo, 640)[0].std() < 40

    def test_normalised_pixels_are_refused(self):
        [answer], _ = identify([self.paint((20, 20, True)) / 255.0], "combination", self.detect, self.classify, trusting(self.classes), self.pre)
        assert "uint8" in answer.error and not len(answer.boxes)


def test_trays_are_evaluated_as_they_are_served(straight, start, trays_plan):
    "The evaluation's answers are those of `identify` over the run's own files, one by one."
    run = sequential(straight, start)
    result = evaluate_run(run, trays_plan())
    opened = open_folder(run)
    pipeline = open_pipeline(run, opened.manifest.classes, "cpu")
    trays = list_trays(opened.manifest, opened.roots)
    assert trays and result.metrics["pipeline_photos"] == len(trays) and {"det_map50", "det_map50_95", "det_precision", "det_recall"} <= set(result.metrics)
    for tray, answer in zip(trays, result.outcome.answers):
        [served], _ = identify([tray.load()], "combination", pipeline.detect, pipeline.classify, pipeline.judge, pipeline.pre)
        assert np.allclose(served.boxes, answer.boxes, atol=0.01) and served.k_codes == answer.k_codes


def test_a_signal_while_data_is_prepared_stops_at_once(start, monkeypatch):
    "Masks, cut-outs and trays take minutes on real data; what they make is whole or not there."
    run = start("strategy=detector", run="preparing")
    monkeypatch.setattr(train, "write_yolo_set", lambda *given, **more: signal.raise_signal(signal.SIGTERM))
    try:
        assert main([str(run)]) == 128 + signal.SIGTERM and run_state(run) == "stopped" and not read_events(run, "start")
    finally:
        train.Stop.signal = 0


def test_photos_without_pills_are_negatives(tmp_path, trays_plan):
    "They train and validate the detector, with an empty label, under their own names."
    for number in range(24):
        photo, label = (tmp_path / f"set/{kind}/{number:04d}{ending}" for kind, ending in (("images", ".png"), ("labels", ".txt")))
        for path in (photo, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number * 9, 90, 90)).save(photo)
        label.write_text("" if number % 2 else "0 0.5 0.5 0.4 0.4\n1 0.2 0.2 0.2 0.2\n")
    (tmp_path / "set/data.yaml").write_text("names: {0: advil, 1: midol}\n")
    index = build_index([tmp_path / "set"])
    plan = replace(trays_plan(), stage=get_stage(0, "name=empty split=photo images=20 classes=2 allow_short=true composed=0 detector_size=64 strategy=detector"), roots=[tmp_path / "set"])
    folder = write_detector_set(open_folder(prepare_run(plan, make_manifest(index, plan.stage), index)))
    photos = pd.read_csv(folder / "photos.csv", dtype={"name": "str", "photo": "str"})
    empty = photos[photos.pills == 0]
    assert len(empty) > 4 and set(empty.split) == {"train", "val"} and empty.photo.str.fullmatch("00[0-9]{2}").all()
    assert all((folder / f"labels/{e.split}/{e.name}.txt").read_text() == "" for e in empty.itertuples(index=False))


def test_a_training_process_reports_a_missing_tray_photo(start, tray_root, tmp_path, trays_plan):
    "An unreadable tray stops the training with its name; skip_unreadable leaves it out and counts it."
    root = tmp_path / "copy"
    shutil.copytree(tray_root, root)
    index = build_index([root])
    plan = replace(trays_plan("strategy=detector detector_epochs=1 composed=0"), roots=[root])
    manifest = make_manifest(index, plan.stage)
    run = prepare_run(plan, manifest, index)
    train_pills = manifest.pills[manifest.pills.split == "train"]
    victim, single = (train_pills[train_pills.kind == kind].iloc[0] for kind in ("combination", "single"))
    for pill in (victim, single):
        (root / pill.image).write_bytes(b"cut off")
    assert main([str(run)]) == 1 and victim.image in read_events(run, "failed")[-1]["error"]
    again = prepare_run(replace(plan, stage=replace(plan.stage, skip_unreadable=True, strategy="sequential", composed=1.0, epochs=1, cache="off")), manifest, index)
    assert main([str(again)]) == 0 and read_metrics(again)["detector_skipped_files"] == 1 == read_metrics(again)["skipped_files"]
