"What a run says about its own answers: unknown drugs of the data's own, the judge that is stored, and new drugs that are enrolled."
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import PROJECT
from pillsnap.aihub import pill_source, read_photo
from pillsnap.bundle import check_sums, hash_file, open_bundle, write_sums
from pillsnap.core import PillSnapError
from pillsnap.disk import read_json, write_json
from pillsnap.evaluate import evaluate_run
from pillsnap.export import export_run
from pillsnap.identify import Extra, identify
from pillsnap.index import ensure_index
from pillsnap.judge import Hint, enrol_drug, load_judge
from pillsnap.manifest import ensure_manifest
from pillsnap.predictions import cut_pill, open_run, with_judge
from pillsnap.runs import read_metrics
from pillsnap.synthetic import make_looks
from pillsnap.train import classifier_pills, fit, prepare_run
from pillsnap.trees import SynthSpec, synthesise
from pillsnap.trust import pair_sides


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "A run of four drugs, in a tree with three more, two of them official Validation's."
    from pillsnap.core import Parameters, get_stage, load_settings

    folder = tmp_path_factory.mktemp("trust")
    synthesise(folder / "tree", SynthSpec(drugs=7, views=96, trays=0, width=128, val_drugs=2))
    settings = load_settings({"PILLSNAP_WORK": str(folder / "work"), "PILLSNAP_MANIFESTS": str(folder / "manifests"), "PILLSNAP_DEVICE": "cpu"})
    stage = get_stage(0, "name=trust images=120 classes=4 tray_share=0 epochs=8 size=64 batch=16 workers=0 strategy=classifier backgrounds=0 metric=0.2 tensorboard=false")
    plan = Parameters(stage, [folder / "tree"], settings, {"run": "", "resume": "none"})
    index = ensure_index(plan.roots, settings)
    fit(run := prepare_run(plan, ensure_manifest(plan, index), index))
    return run, plan, evaluate_run(run, plan)


def test_drugs_outside_the_class_list_are_measured_as_unknown(evaluated):
    run, _, result = evaluated
    unknown = pd.read_csv(run / "unknown.csv")
    trained = set(result.evaluated.manifest.classes)
    assert unknown.k_code.nunique() == 3 and not trained & set(unknown.k_code) and (unknown.groupby("k_code").size() == 5).all() and (unknown.label == -1).all()
    assert result.metrics["unknown_on"] == "drugs outside the class list" and result.metrics["unknown_pills"] == 15
    assert result.trust.unknown.loc["drugs outside the class list", "drugs"] == 3 and result.metrics["unknown_auroc"] > 0.3
    assert {"test_ece", "test_ece_raw", "set_holds", "coverage_at_5", "test_map", "test_gap", "damage_wrong_accepted"} <= set(read_metrics(run))


def test_what_is_fitted_does_not_see_the_test_pills(evaluated):
    "The gallery holds training pills only; thresholds are those of validation pills."
    run, plan, result = evaluated
    judge, opened = load_judge(run / "judge.npz"), open_run(run, plan)
    train = classifier_pills(result.evaluated.manifest, "train")
    assert {name.split(":")[1] for name in judge.gallery.pictures} <= set(train.image)
    seen = opened.see(classifier_pills(result.evaluated.manifest, "val"))
    accepted = judge.read(seen.logits, seen.features).score >= judge.threshold
    assert abs(accepted.mean() - 0.95) <= 0.02 + 1 / len(accepted)
    pills = result.evaluated.manifest.pills
    blind = replace(opened, manifest=replace(opened.manifest, pills=pills[pills.split != "test"].reset_index(drop=True)))
    (run / "judge.npz").rename(run / "kept.npz")
    again = with_judge(blind).judge
    (run / "kept.npz").replace(run / "judge.npz")
    fitted = result.evaluated.judge
    assert again.threshold == fitted.threshold and again.least == fitted.least and again.worth == fitted.worth and again.near == fitted.near
    assert (again.scaling.factor == fitted.scaling.factor).all() and (again.gallery.features == fitted.gallery.features).all()


def test_the_stored_judge_answers_as_the_evaluation_did(evaluated):
    run, plan, result = evaluated
    opened, judge = open_run(run, plan), load_judge(run / "judge.npz", result.evaluated.manifest.classes)
    pills = classifier_pills(result.evaluated.manifest, "test")
    photos = [pill_source(pill, plan.roots).read() for pill in pills.itertuples()]
    answers, _ = identify(photos, "single", None, opened.classify, judge, opened.pre, regions=pills[list("xywh")].to_numpy(float).tolist())
    assert [answer.k_codes[0] for answer in answers] == [judge.names[i] for i in result.test.pills.pred]
    agree = np.mean([answer.pills[0].known == known for answer, known in zip(answers, result.test.pills.known)])
    assert agree >= 0.95  # the gallery is stored in half precision


def test_an_enrolled_drug_is_found(evaluated):
    run, plan, result = evaluated
    unknown = pd.read_csv(run / "unknown.csv")
    own = unknown[unknown.k_code == unknown.k_code.iloc[0]]
    opened, judge = open_run(run, plan), load_judge(run / "judge.npz")
    crops = np.stack([cut_pill(opened, pill) for pill in own.itertuples()])
    wider = enrol_drug(judge, own.k_code.iloc[0], opened.classify(crops[:3])[1], own.image.tolist()[:3])
    verdicts = wider(*opened.classify(crops[:3]))
    assert all(v.evidence[0][0] == own.k_code.iloc[0] and v.evidence[0][2] > 0.99 for v in verdicts)  # the enrolled photos themselves
    assert wider.names[-1] == own.k_code.iloc[0] and len(wider.read(*opened.classify(crops)).log_p[0]) == 5


def test_a_judge_of_other_drugs_is_refused(evaluated):
    run, _, result = evaluated
    with pytest.raises(PillSnapError, match="evaluate the run again"):
        load_judge(run / "judge.npz", [*result.evaluated.manifest.classes, "K-999999"])


def test_answering_needs_no_torch():
    code = "import sys, pillsnap.identify; heavy = {'torch', 'timm', 'ultralytics', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    "A barely trained run whose imprints are read, by a reader that has learned a tenth of what it should, and its bundle."
    from pillsnap import forecast, predictions
    from pillsnap.core import Parameters, get_stage, load_settings
    from pillsnap.reader import ReaderSpec, ensure_reader

    folder = tmp_path_factory.mktemp("reading")
    synthesise(folder / "tree", SynthSpec(drugs=8, views=96, trays=0, width=256, val_drugs=1))
    settings = load_settings({"PILLSNAP_WORK": str(folder / "work"), "PILLSNAP_MANIFESTS": str(folder / "manifests"), "PILLSNAP_REPORTS": str(folder / "reports"), "PILLSNAP_DEVICE": "cpu"})
    stage = get_stage(0, "name=reads images=90 classes=6 tray_share=0 epochs=4 batch=16 workers=0 strategy=classifier backgrounds=0 tensorboard=false imprints=true allow_short=true")
    plan = Parameters(stage, [folder / "tree"], settings, {"run": "", "resume": "none", "level": "smoke"})
    index = ensure_index(plan.roots, settings)
    fit(run := prepare_run(plan, ensure_manifest(plan, index), index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "ensure_reader", lambda settings: ensure_reader(settings, ReaderSpec(drugs=150, windows=70_000)))
        patch.setattr(predictions, "MOST_DAMAGED", 6)  # reading takes time
        patch.setattr(forecast, "MOST_PILLS", 6)
        result = evaluate_run(run, plan)
    return run, plan, result, export_run(run, plan)


def test_letters_that_are_read_make_answers_better(reading):
    run, _, result, _ = reading
    judge, told = result.evaluated.judge, read_metrics(run)["judge"]["imprints"]
    assert told["read"] and told["with"] < told["without"] and judge.imprints.naming > 0.1 and len(judge.imprints.sides) == 6
    without = with_judge(replace(result.evaluated, run=copy_run(run, "without"), stage=replace(result.evaluated.stage, imprints=False)))
    assert without.judge.imprints is None and without.spell is None and not (without.run / "reader.onnx").exists()
    pills = classifier_pills(result.evaluated.manifest, "test")
    assert result.test.scores["loss"] < without.predict(pills).scores["loss"]


def copy_run(run, name):
    return Path(shutil.copytree(run, run.with_name(name)))


def test_a_bundle_reads_as_the_evaluation_did(reading):
    run, plan, result, exported = reading
    bundle = open_bundle(exported.bundle)
    assert "reader.onnx" in check_sums(exported.bundle) and bundle.pipeline.judge.imprints.reader == hash_file(run / "reader.onnx")
    pills = classifier_pills(result.evaluated.manifest, "test")
    photos, boxes = [pill_source(pill, plan.roots).read() for pill in pills.itertuples()], pills[list("xywh")].to_numpy(float).tolist()
    answers = bundle(photos, regions=boxes)
    assert [answer.k_codes[0] for answer in answers] == [bundle.pipeline.judge.names[i] for i in result.test.pills.pred]
    assert [answer.pills[0].letters for answer in answers] == result.test.reading.letters.tolist() and any(answer.pills[0].letters for answer in answers)


def test_an_enrolled_drug_brings_its_imprint(reading):
    "The right letters make a new drug likelier than wrong ones do, or none."
    run, plan, result, exported = reading
    pipeline, pills = open_bundle(exported.bundle).pipeline, pd.read_csv(run / "unknown.csv")
    k_code = pills.k_code.iloc[0]
    own, drugs = pills[pills.k_code == k_code], make_looks(8, 7)
    right = next(look for look in drugs if look.k_code == k_code).imprint
    photos, boxes = [pill_source(pill, plan.roots).read() for pill in own.itertuples()], own[list("xywh")].to_numpy(float).tolist()
    given = {"right": dict(zip(("print_front", "print_back"), right)), "wrong": {"print_front": "QQQQ", "print_back": "분할선"}, "none": None}
    wider = {name: pipeline.enrol(k_code, photos[:2], boxes[:2], imprints=imprints) for name, imprints in given.items()}
    assert wider["wrong"].judge.imprints.sides[-1] == ("QQQQ", "") and wider["none"].judge.imprints.sides[-1] == (None,)
    chance = {name: np.mean([dict(answer.pills[0].top).get(k_code, 0.0) for answer in one(photos, regions=boxes, top=7)]) for name, one in wider.items()}
    assert chance["right"] > chance["none"] > chance["wrong"]


def test_letters_go_with_a_back_a_list_and_a_hint(reading):
    "What a caller adds joins what was read: two photos tell more than one, a list without the drug lets fewer of its pills pass as known, a hint counts and excludes nothing."
    run, plan, result, exported = reading
    bundle, pills = open_bundle(exported.bundle), classifier_pills(result.evaluated.manifest, "test")
    photos, boxes = [read_photo(pill_source(pill, plan.roots)) for pill in pills.itertuples()], pills[list("xywh")].to_numpy(float)
    fronts, backs = pair_sides(pills)
    sides = [photos[i][y : y + h, x : x + w] for i, (x, y, w, h) in zip(backs, boxes[backs].astype(int))]

    def ask(**given):
        return [answer.pills[0] for answer in bundle([photos[i] for i in fronts], regions=boxes[fronts].tolist(), top=6, extras=[Extra(**{name: values[i] for name, values in given.items()}) for i in range(len(fronts))])]

    truth, drugs = pills.k_code.iloc[fronts].tolist(), sorted(pills.k_code.unique())
    others = [drugs[drugs.index(drug) - 1] for drug in truth]
    chance = lambda pills, drugs: np.array([dict(pill.top).get(drug, 0.0) for pill, drug in zip(pills, drugs)])
    one, two, back = ask(), ask(back=sides), [answer.pills[0] for answer in bundle(sides)]
    assert [pill.letters for pill in two] == ["|".join(filter(None, (a.letters, b.letters))) for a, b in zip(one, back)] and any("|" in pill.letters for pill in two)
    assert chance(two, truth).mean() > max(chance(one, truth).mean(), chance(back, truth).mean())
    among, without = ask(allowed=[[a, b] for a, b in zip(truth, others)]), ask(allowed=[[b] for b in others])
    assert (chance(among, truth) >= chance(one, truth)).all() and [pill.top[0][0] for pill in without] == others
    assert sum(pill.known for pill in without) < sum(pill.known for pill in among)
    prints = pd.read_csv(run / "drugs.csv", index_col="k_code").print_front
    right, wrong = (ask(hint=[Hint(imprint=prints[drug]) for drug in said]) for said in (truth, others))
    assert chance(right, truth).mean() > chance(one, truth).mean() > chance(wrong, truth).mean() > 0
    assert [pill.letters for pill in right] == [pill.letters for pill in one]


def test_a_judge_without_its_reader_does_not_answer(reading, tmp_path):
    run, plan, result, exported = reading
    for name, harm, said in (("gone", lambda path: path.unlink(), "reader.onnx is not there, and the judge beside it reads imprints"),
                             ("other", lambda path: path.write_bytes((exported.bundle / "classifier.onnx").read_bytes()), "not the reader that the judge beside it was fitted to")):
        shutil.copytree(exported.bundle, copy := tmp_path / name)
        harm(copy / "reader.onnx")
        write_sums(copy)
        with pytest.raises(PillSnapError, match=said):
            open_bundle(copy)
    with pytest.raises(ValueError, match="reads imprints"):
        identify([np.zeros((200, 200, 3), np.uint8)], "single", None, open_run(run, replace(plan, given={})).classify, result.evaluated.judge, result.evaluated.pre)


def test_an_evaluation_reads_as_the_one_before_did_unless_it_is_told(reading):
    run, plan, _, _ = reading
    copy = copy_run(run, "again")
    write_json(copy / "run.json", (record := read_json(copy / "run.json")) | {"stage": record["stage"] | {"imprints": False}})
    asked = lambda given: open_run(copy, replace(plan, stage=replace(plan.stage, imprints=False), given={"overrides": given})).stage.imprints
    assert asked("") and not asked("imprints=false")


def test_photos_whose_registry_has_no_imprint_cannot_be_read(reading):
    run, plan, result, _ = reading
    bare = copy_run(run, "bare")
    drugs = pd.read_csv(bare / "drugs.csv").assign(print_front="", print_back="")
    drugs.to_csv(bare / "drugs.csv", index=False)
    with pytest.raises(PillSnapError, match="no imprint of any of the 6 drugs"):
        with_judge(replace(result.evaluated, run=bare))
