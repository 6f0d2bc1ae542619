"""Each test fails when a mistake of earlier work on this data is made again.

The mistakes: labels of a tray overwritten, trays taken for singles, splits by photo, class maps made twice, unreadable photos replaced, mirrored
imprints, random weights behind a warning, class limits ignored, unsorted walks, absolute paths, crops from the wrong pixels, lossy resume.
"""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pillsnap import evaluate
from pillsnap.aihub import pill_source, read_photo
from pillsnap.classifier import build_classifier, load_classifier, save_classifier
from pillsnap.core import STAGES, PillSnapError, get_stage
from pillsnap.data import Photos, PillDataset, make_augmentation
from pillsnap.drugs import registry_row, split_edi
from pillsnap.files import Source
from pillsnap.index import build_index
from pillsnap.inspection import inspect, inspect_photo
from pillsnap.manifest import byte_leaks, csv_bytes, group_leaks, make_manifest, pose_leaks, prove_no_leak
from pillsnap.preprocess import Preprocess, cut_square
from pillsnap.runs import read_events
from pillsnap.train import classifier_pills, fit, make_job, open_folder, prepare_run, standard_error


@pytest.fixture(scope="session")
def index(tree):
    return build_index([tree])


@pytest.fixture
def manifest(index, plan):
    return make_manifest(index, plan().stage)


@pytest.fixture(scope="session")
def seen(index):
    return inspect(index.tables, index.roots)


def trays(tables):
    return tables.images[tables.images.kind == "combination"]


class TestTrays:
    def test_a_tray_keeps_every_pill(self, seen):
        "Labels of one tray share a stem: reading them into one slot keeps the last of four."
        assert len(trays(seen))
        for tray in trays(seen).itertuples():
            pills = seen.pills[seen.pills.row == tray.Index]
            assert sorted(pills.k_code) == sorted(tray.codes.split())
            assert len(pills.drop_duplicates(list("xywh"))) == len(tray.codes.split())  # each its own box

    def test_a_tray_is_not_a_single_of_its_first_drug(self, index, manifest):
        assert set(trays(index.tables).n_codes) <= {3, 4}
        tray_pills = manifest.pills[manifest.pills.kind == "combination"]
        assert (tray_pills.label == tray_pills.k_code.map(manifest.classes.index)).all()
        first = tray_pills.image.str.extract(r"/(K-\d{6})-")[0]
        assert (tray_pills.k_code != first).mean() > 0.5
        for split in ("train", "val"):
            assert set(classifier_pills(manifest, split).kind) == {"single"}

    def test_an_incomplete_tray_is_listed_and_left_out(self, tree, tmp_path, plan):
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        gone = next((root / "data/train/labels/combination").rglob("*.json"))
        gone.unlink()
        found = build_index([root])
        assert list(found.tables.problems.what) == ["incomplete tray"]
        assert gone.stem not in set(make_manifest(found, replace(plan().stage, images=60)).pills.photo)

    def test_a_tray_with_a_bad_box_is_incomplete(self, tree, tmp_path, plan):
        "All label files are there, and one box is outside the photo: found by reading, listed, left out."
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        path = next((root / "data/train/labels/combination").rglob("*.json"))
        label = json.loads(path.read_text("utf-8"))
        label["annotations"][0]["bbox"][0] += 6000
        path.write_text(json.dumps(label), "utf-8")
        found = build_index([root])
        assert found.tables.images.usable.all()
        seen = inspect(found.tables, [root])
        assert sorted(seen.problems.what) == ["box", "incomplete tray"] and seen.images.photo[~seen.images.usable].tolist() == [path.stem]
        manifest = make_manifest(found, replace(plan().stage, images=60, tray_share=1.0, allow_short=True))
        assert path.stem not in set(manifest.pills.photo) and (manifest.pills.kind == "combination").any()

    def test_the_identity_is_the_mapping_code(self, tree, tmp_path):
        "Re-packaged sets carry a category id per file; it must not become the class."
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        for path in root.rglob("*.json"):
            label = json.loads(path.read_text("utf-8"))
            label["annotations"][0]["category_id"] = 7
            label["categories"] = [{"id": 7, "name": "anything"}]
            path.write_text(json.dumps(label), "utf-8")
        assert set(inspect(build_index([root]).tables, [root]).pills.k_code) == {"K-900001", "K-900002", "K-900003", "K-900004"}


class TestSplit:
    def test_a_split_by_photo_is_refused(self, index, plan, manifest):
        "Neighbouring frames on both sides: what `no equal path` calls no leak."
        images = manifest.pills.drop_duplicates("image").assign(codes=lambda t: t.group.str.extract(r"(K-\d{6})")[0], digest=range(1, manifest.pills.image.nunique() + 1))
        prove_no_leak(images)
        by_photo = images.assign(split=np.random.default_rng(0).choice(["train", "val", "test"], len(images), p=[0.7, 0.15, 0.15]))
        assert len(group_leaks(by_photo)) and len(pose_leaks(by_photo))
        with pytest.raises(PillSnapError, match="the split leaks"):
            prove_no_leak(by_photo)

    def test_views_of_one_tray_stay_together(self, manifest):
        rows = manifest.pills[manifest.pills.kind == "combination"]
        assert (rows.groupby("group").split.nunique() == 1).all() and (rows.groupby("group").image.nunique() == 3).all()

    def test_no_training_frame_within_a_step_of_a_test_frame(self, manifest):
        singles = manifest.pills[manifest.pills.kind == "single"]
        train, test = (singles[singles.split == s] for s in ("train", "test"))
        gap = np.abs(train.longitude.to_numpy()[:, None] - test.longitude.to_numpy()[None])
        assert np.minimum(gap, 360 - gap).min() >= 40
        assert not set(train.light) & set(test.light)

    def test_equal_bytes_on_two_sides_are_found(self, tmp_path):
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "a.png")
        shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
        digests = [inspect_photo(Source(tmp_path, name))[-1] for name in ("a.png", "b.png")]
        images = pd.DataFrame({"photo": ["a", "b"], "digest": digests, "split": ["train", "test"]})
        assert len(byte_leaks(images)) == 2
        assert len(byte_leaks(images.assign(split="train"))) == 0
        with pytest.raises(PillSnapError, match="were not read"):
            byte_leaks(images.assign(digest=0))

    def test_a_copy_under_another_name_is_left_out_and_listed(self, tree, tmp_path, plan, manifest):
        singles = manifest.pills[manifest.pills.kind == "single"]
        train, test = (singles[singles.split == split].iloc[0] for split in ("train", "test"))
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        shutil.copy(root / train.image, root / test.image)
        again = make_manifest(build_index([root]), plan().stage)
        assert len({train.photo, test.photo} & set(again.pills.photo)) == 1 and again.report["defects"] == {"double": 1}
        assert again.pills.photo.nunique() == manifest.pills.photo.nunique()

    def test_copies_of_one_photo_stay_together(self, tmp_path, plan):
        (tmp_path / "images/train").mkdir(parents=True)
        (tmp_path / "labels/train").mkdir(parents=True)
        (tmp_path / "data.yaml").write_text("names: [advil, midol]\n")
        for n in range(40):
            for copy in "abc":
                Image.fromarray(np.random.default_rng([n, ord(copy)]).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"images/train/IMG_{n}.rf.{copy}.jpg")
                (tmp_path / f"labels/train/IMG_{n}.rf.{copy}.txt").write_text(f"{n % 2} 0.5 0.5 0.5 0.5")
        stage = replace(plan().stage, split="photo", images=120, classes=2)
        rows = make_manifest(build_index([tmp_path]), stage).pills
        assert (rows[rows.split != "frame"].groupby("photo").split.nunique() == 1).all() and rows.split.nunique() == 4


class TestManifest:
    def test_counts_are_exact(self, manifest):
        assert manifest.pills.image.nunique() == 80 and len(manifest.classes) == 4

    def test_the_class_limit_holds(self, index, plan):
        "A list of 4,020 drugs for 1,000 asked for."
        manifest = make_manifest(index, plan("classes=2 images=60").stage)
        assert len(manifest.classes) == 2 == manifest.pills[manifest.pills.label >= 0].k_code.nunique()
        assert set(manifest.pills[manifest.pills.kind == "single"].k_code) == set(manifest.classes)

    @pytest.mark.parametrize("fields", ["classes=5", "images=5000"])
    def test_what_the_data_cannot_give_is_an_error(self, index, plan, fields):
        with pytest.raises(PillSnapError, match="allow_short"):
            make_manifest(index, plan(fields).stage)
        assert make_manifest(index, plan(fields + " allow_short=true").stage).report["short"]

    def test_the_order_of_the_disk_does_not_matter(self, index, tree, plan, monkeypatch):
        scandir = os.scandir

        class Reversed(list):
            __enter__, __exit__ = (lambda self: self), (lambda self, *a: None)
        monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(scandir(path), key=lambda e: e.name, reverse=True)))
        again, first = make_manifest(build_index([tree]), plan().stage), make_manifest(index, plan().stage)
        assert csv_bytes(again.pills) == csv_bytes(first.pills) and again.hash == first.hash

    def test_no_path_of_one_computer(self, index, manifest, tree, tmp_path, plan):
        assert not manifest.pills.image.str.startswith("/").any() and str(tree) not in json.dumps(manifest.report)
        shutil.copytree(tree, tmp_path / "elsewhere")
        assert make_manifest(build_index([tmp_path / "elsewhere"]), plan().stage).hash == manifest.hash

    def test_one_class_map_for_every_split(self, manifest):
        pairs = manifest.pills[manifest.pills.label >= 0][["k_code", "label"]].drop_duplicates()
        assert len(pairs) == len(manifest.classes) == manifest.pills[manifest.pills.label >= 0].k_code.nunique()


class TestPixels:
    def test_an_unreadable_photo_is_never_replaced(self, tree, tmp_path, manifest):
        rows = manifest.pills.head(2).assign(label=0)
        (tmp_path / rows.image[0]).parent.mkdir(parents=True)
        (tmp_path / rows.image[0]).write_bytes((tree / rows.image[0]).read_bytes()[:2000])
        pre = Preprocess(32, 0.1)
        with pytest.raises(PillSnapError, match=Path(rows.image[0]).name):
            PillDataset(rows, Photos(rows, [tmp_path]), pre)[0]
        assert PillDataset(rows, Photos(rows, [tmp_path]), pre, skip_unreadable=True)[0][0] is None

    @pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
    def test_imprints_are_never_mirrored(self, strength):
        "Three coloured dots go round one way; mirrored, they go round the other."
        picture = np.full((96, 96, 3), 40, np.uint8)
        for (y, x), channel in zip([(25, 48), (66, 28), (66, 68)], range(3)):
            picture[y - 9 : y + 9, x - 9 : x + 9, channel] = 255
        augment = make_augmentation(strength)

        @np.errstate(invalid="ignore")
        def turn(im):  # sign of the area of red, green, blue
            weights = [np.clip(im[..., c].astype(float) - im.astype(float).mean(-1) - 30, 0, None) for c in range(3)]
            (ax, ay), (bx, by), (cx, cy) = [((w * np.arange(96)[None]).sum() / w.sum(), (w * np.arange(96)[:, None]).sum() / w.sum()) for w in weights]
            return np.sign((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))

        seen = []
        for seed in range(100):
            augment.set_random_seed(seed)
            seen.append(turn(augment(image=picture)["image"]))
        assert turn(picture[:, ::-1]) == -turn(picture)
        whole = [x for x in seen if not np.isnan(x)]  # a dot can fall into one of the holes
        assert len(whole) > 80 and set(whole) == {turn(picture)}

    def test_the_box_is_used_and_the_aspect_kept(self, manifest, tree):
        "A whole frame squashed to a square makes every oblong pill shorter."
        row = manifest.pills.iloc[0]
        photo = read_photo(pill_source(row, [tree]))
        crop = Preprocess(64, 0.0).cut(photo, row[list("xywh")])
        side = round(max(row.w, row.h))
        left, top = round(row.x + row.w / 2 - side / 2), round(row.y + row.h / 2 - side / 2)
        assert np.abs(crop.mean((0, 1)) - photo[top : top + side, left : left + side].mean((0, 1))).max() < 3

    def test_crops_come_from_the_original_pixels(self):
        "Cut from a copy resized for the network, fine print is gone."
        photo = np.zeros((1280, 976, 3), np.uint8)
        photo[::2] = 255  # lines one pixel wide
        crop = cut_square(photo, (300, 400, 64, 64), 0.0, 64)
        assert crop[::2].mean() == 255 and crop[1::2].mean() == 0

    def test_normalised_pixels_are_refused(self):
        with pytest.raises(ValueError, match="uint8"):
            cut_square(np.zeros((64, 64, 3), np.float32), (0, 0, 10, 10), 0, 32)


class TestWeights:
    def test_no_random_weights_behind_a_warning(self):
        "With no hub and no file, a pretrained model cannot be had: that is an error with the remedy."
        with pytest.raises(PillSnapError, match="weights=FILE"):
            build_classifier(get_stage(0, "pretrained=true model=test_efficientnet.r160_in1k"), 4)

    @pytest.mark.parametrize("tag", ["tf_efficientnetv2_l_in21k_ft_in1k", "efficientnetv2_l", "tf_efficientnetv2_s.in22k"])
    def test_a_wrong_tag_is_an_error(self, tag):
        with pytest.raises(PillSnapError, match="tf_efficientnetv2|efficientnetv2"):
            build_classifier(replace(STAGES["1"], model=tag), 4)

    def test_the_class_map_travels_with_the_weights(self, tmp_path):
        save_classifier(tmp_path / "w.safetensors", build_classifier(STAGES["0"], 2), ["K-000001", "K-000002"], Preprocess(96, 0.1), STAGES["0"])
        assert load_classifier(tmp_path / "w.safetensors")[1]["classes"] == ["K-000001", "K-000002"]
        with pytest.raises(PillSnapError, match="another order"):
            load_classifier(tmp_path / "w.safetensors", ["K-000002", "K-000001"])


class TestRuns:
    def test_resume_is_exact(self, plan, manifest, index):
        "A resume that drops optimiser, schedule or best score, or starts over, ends elsewhere."
        straight = prepare_run(plan("epochs=3", run="straight"), manifest, index)
        fit(straight)
        stopped = prepare_run(plan("epochs=3", run="stopped"), manifest, index)

        import pillsnap.train as train
        keep = train.keep

        def keep_then_die(job, scores):
            keep(job, scores)
            raise KeyboardInterrupt
        train.keep = keep_then_die
        try:
            with pytest.raises(KeyboardInterrupt):
                fit(stopped)
        finally:
            train.keep = keep
        job = make_job(open_folder(stopped))
        assert job.training.best["val_macro_f1"] == read_events(stopped, "epoch")[0]["val_macro_f1"]
        fit(stopped)
        assert [e["from_epoch"] for e in read_events(stopped, "start")] == [0, 1]
        for name in ("last.pt", "best.safetensors"):
            a, b = (torch.load(run / name, weights_only=True)["model"] if name == "last.pt" else load_classifier(run / name)[0].state_dict() for run in (straight, stopped))
            assert all(torch.equal(a[k], b[k]) for k in a), name
        scores = [[{k: v for k, v in e.items() if k.startswith(("val_", "train_", "lr"))} for e in read_events(run, "epoch")] for run in (straight, stopped)]
        assert scores[0] == scores[1]

    def test_resume_refuses_another_stage(self, plan, manifest, index):
        run = prepare_run(plan(run="first"), manifest, index)
        with pytest.raises(PillSnapError, match="lr: 0.002 there, 0.001 here"):
            prepare_run(plan("lr=1e-3", resume=str(run)), manifest, index)
        assert prepare_run(plan(resume="auto"), manifest, index) == run

    def test_evaluation_uses_the_trained_weights(self, plan, manifest, index):
        "An evaluator on random logits gives the same figure whatever the weights are."
        here = plan("epochs=8 images=150")
        run = prepare_run(here, make_manifest(index, here.stage), index)
        fit(run)
        evaluated = evaluate.open_run(run, here)
        pills = classifier_pills(evaluated.manifest, "train")
        trained = evaluated.predict(pills).scores["top1"]
        torch.manual_seed(1)
        for module in evaluated.model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert trained > evaluated.predict(pills).scores["top1"] + 0.2

    def test_weights_change_and_the_best_are_kept(self, plan, manifest, index):
        run = prepare_run(plan(), manifest, index)
        start = make_job(open_folder(run)).training.model.state_dict()
        fit(run)
        trained, meta = load_classifier(run / "best.safetensors")
        assert any(not torch.equal(start[k], v) for k, v in trained.state_dict().items())
        epochs = read_events(run, "epoch")
        near = [e["epoch"] for i, e in enumerate(epochs, 1) if e["val_macro_f1"] >= (peak := max(x["val_macro_f1"] for x in epochs[:i])) - standard_error(peak, meta_pills(run))]
        assert meta["epoch"] == near[-1] and standard_error(1.0, 90) < 0.02 < standard_error(0.5, 90)


def meta_pills(run):
    "Count the pills that validated."
    return read_events(run, "start")[0]["val_pills"]


class TestRegistry:
    def test_a_missing_edi_code_stays_missing(self):
        assert registry_row({"dl_mapping_code": "K-000001", "di_edi_code": ""})["edi_codes"] == [] == split_edi(None)

    def test_class_names_do_not_become_k_codes(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "labels").mkdir()
        (tmp_path / "data.yaml").write_text("names: [advil]\n")
        Image.new("RGB", (20, 20)).save(tmp_path / "images/a.jpg")
        (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
        assert list(build_index([tmp_path]).tables.pills.k_code) == ["advil"]


class TestRealWorldFolders:
    def test_singles_alone_are_enough(self, tmp_path, plan):
        "Somebody who downloaded no combinations still gets a manifest."
        from pillsnap.trees import SynthSpec, synthesise
        synthesise(tmp_path / "tree", SynthSpec(drugs=3, views=40, trays=0, width=96))
        assert make_manifest(build_index([tmp_path / "tree"]), plan("images=60 classes=3").stage).pills.kind.unique().tolist() == ["single"]

    @pytest.mark.parametrize("layout", ["images/train", "train/images", "images"])
    def test_yolo_layouts(self, tmp_path, layout):
        photo, label = tmp_path / layout / "a.jpg", tmp_path / layout.replace("images", "labels") / "a.txt"
        photo.parent.mkdir(parents=True)
        label.parent.mkdir(parents=True)
        (tmp_path / "data.yaml").write_text("names: {0: advil, 1: midol}\n")
        Image.new("RGB", (20, 20)).save(photo)
        label.write_text("1 0.5 0.5 0.5 0.5")
        tables = build_index([tmp_path]).tables
        assert list(tables.pills.k_code) == ["midol"] and tables.problems.empty

    def test_a_damaged_test_photo_does_not_cost_the_training(self, tree, tmp_path, plan):
        "The photo is read first by the evaluation, after the whole training."
        root = tmp_path / "copy"
        shutil.copytree(tree, root)
        here = replace(plan(), roots=[root])
        index = build_index([root])
        run = prepare_run(here, make_manifest(index, here.stage), index)
        fit(run)
        row = classifier_pills(make_manifest(index, here.stage), "test").iloc[0]
        (root / row.image).write_bytes((root / row.image).read_bytes()[:900])
        with pytest.raises(PillSnapError, match="skip_unreadable=true"):
            evaluate.evaluate_run(run, here)
        again = replace(plan("skip_unreadable=true"), roots=[root], given={"overrides": "skip_unreadable=true"})
        metrics = evaluate.evaluate_run(run, again).metrics
        assert metrics["test_skipped_files"] == 1
