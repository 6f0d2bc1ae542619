"""Does a model know what it does not know, and can it learn new drugs from a few photos? 250 drawn drugs in families that differ by shade or imprint, 200 of them trained.

    .venv/bin/python tests/benchmark_unknowns.py [--epochs 40] [--arms plain metric] [--overrides "model=… size=…"]

Printed are, for each arm: the accuracy on the known drugs; each score's AUROC and false accepts on unknown drugs where 95 % of the known test pills are accepted; and, with those drugs enrolled from 1, 3 and 5 photos, how many
of their test pills are named, beside a model that was trained on all 250. Half of the 50 unknown drugs choose the score that ships, and are left out of everything else. Results are kept in work/unknowns; a run that is stopped goes on there.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from pillsnap.core import Parameters, Stage, get_stage, list_runs, load_settings, read_json, run_state

import numpy as np
import pandas as pd

from pillsnap.predictions import manifest_strangers, open_run, with_judge
from pillsnap.aihub import photo_sources, read_photo
from pillsnap.calibration import coverage_at, coverage_curve
from pillsnap.index import ensure_index
from pillsnap.inspection import inspect
from pillsnap.judge import Hint, enrol_drug, weigh
from pillsnap.manifest import ensure_manifest
from pillsnap.scores import share
from pillsnap.train import classifier_pills, fit, prepare_run
from pillsnap.trees import SynthSpec, ensure_synthetic
from pillsnap.trust import pair_sides, side_metrics
from pillsnap.unknowns import SCORES, auroc, false_accepts, see

DATA = SynthSpec(drugs=250, views=96, trays=0, width=200)
KNOWN = 200
FIELDS = "tray_share=0 strategy=classifier tensorboard=false backgrounds=0 hard=0 batch=64 allow_short=true"
ARMS = {"plain": "", "metric": "metric=0.2"}


def train_once(name, classes, overrides, settings, root):
    "Train a run, go on with a stopped one, or take the complete one."
    plan = Parameters(get_stage(0, f"name={name} classes={classes} images={30 * classes} {FIELDS} {overrides}"), [root], settings, {"resume": "auto", "overrides": ""})
    done = [run for run in list_runs(settings, plan.key) if run_state(run) == "end"]
    if done:
        return done[-1], plan
    index = ensure_index([root], settings)
    fit(run := prepare_run(plan, ensure_manifest(plan, index), index))
    return run, plan


def read_pills(evaluated, pills):
    "Let a model see pills; the rows are those that it saw."
    found = evaluated.see(pills)
    return found.logits, found.features, pills.iloc[found.rows].reset_index(drop=True)


def interval(right, pills):
    value, (low, high) = share(right, np.ones(len(right)), pills.k_code)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def measure_unknown(evaluated, test, strange):
    "Compare the scores on the same pills."
    judge = evaluated.judge
    seen = [see(logits, features, judge.gallery) for logits, features, _ in (test, strange)]
    rows = []
    for name, of in SCORES.items():
        known, unknown = (of(part, judge.residual) for part in seen)
        by_drug = [auroc(known, unknown[strange[2].k_code == drug]) for drug in strange[2].k_code.unique()]
        rows.append({"score": name + (" (ships)" if name == judge.method else ""), "AUROC": round(auroc(known, unknown), 3), "AUROC of the worst drug": round(min(by_drug), 3), "false accepts at 95 %": round(false_accepts(known, unknown), 3)})
    return pd.DataFrame(rows).set_index("score")


def measure_enrolment(evaluated, test, whole, settings_of_new):
    "Enrol the new drugs from some of their training photos, and name their test pills."
    pool, new_test = settings_of_new
    logits, features, pills = test
    before = [v.top[0][0] for v in evaluated.judge(logits, features)] == pills.k_code
    rows = {"trained on all": {"new drugs": interval(whole[0], whole[2]), "known drugs": interval(whole[1], whole[3]), "lost": ""}} if whole else {}
    for photos in (1, 3, 5):
        judge = evaluated.judge
        for drug, own in pool[2].groupby("k_code"):
            some = own.index[np.unique(np.linspace(0, len(own) - 1, photos).astype(int))]
            judge = enrol_drug(judge, drug, pool[1][some], [f"{drug} {i}" for i in some])
        named = [v.top[0][0] for v in judge(new_test[0], new_test[1])] == new_test[2].k_code
        after = [v.top[0][0] for v in judge(logits, features)] == pills.k_code
        rows[f"enrolled from {photos}"] = {"new drugs": interval(named, new_test[2]), "known drugs": interval(after, pills), "lost": f"{100 * (before.mean() - after.mean()):.2f} points"}
    return pd.DataFrame(rows).T


def measure_sides(evaluated, test):
    "Compare one photo of a pill with photos of both sides."
    logits, features, pills = test
    reading, labels = evaluated.judge.read(logits, features), pills.label.to_numpy()
    found = side_metrics(reading, labels, *pair_sides(pills), pills.k_code)
    return f"{found['side_pairs']} pills from both sides: one photo {found['one_side_top1']:.3f}, two {found['two_sides_top1']:.3f}; {(1 - found['two_sides_top1']) / max(1e-9, 1 - found['one_side_top1']):.2f} of the error" if found else "no pill was photographed from both sides"


def say(drug, wrong=""):
    "What a caller could say of a drug; `wrong`: a field of which something else is said."
    said = {"shape": drug["shape"], "colour": str(drug["colour1"])}
    others = {"shape": ("원형", "장방형"), "colour": ("하양", "노랑")}  # that other drugs have
    return Hint(**said | ({wrong: next(x for x in others[wrong] if x != said[wrong])} if wrong else {}))


def measure_hints(evaluated, test, strange, registry):
    "Name pills with shape and colour as the caller's hints, right and with one of them wrong."
    judge, rows = evaluated.judge, {}
    for name, make in {"no hint": lambda drug: Hint(), "shape and colour": say, "and the imprint of one side": lambda drug: replace(say(drug), imprint=str(drug["print_front"])), "the colour is wrong": lambda drug: say(drug, "colour"),
                       "the shape is wrong": lambda drug: say(drug, "shape")}.items():
        right, taken = [], []
        for (logits, features, pills), answers in ((test, right), (strange, taken)):
            reading = judge.read(logits, features)
            for i, k_code in enumerate(pills.k_code):
                [verdict] = judge.decide(weigh(reading.take([i]), make(registry.loc[k_code]), registry))
                answers.append(verdict.top[0][0] == k_code if answers is right else verdict.known)
        rows[name] = {"known drugs named": interval(np.array(right), test[2]), "unknown drugs accepted": interval(np.array(taken), strange[2])}
    return pd.DataFrame(rows).T


def measure_photos(evaluated, folder, test):
    "Show pills of real phone photos, none of which is a drawn drug."
    index = ensure_index([folder], load_settings())
    rows = np.arange(len(index.tables.images))
    seen = inspect(index.tables, index.roots, rows, store=index.store)
    crops = []
    for row, own in seen.pills.groupby("row"):
        photo = read_photo(photo_sources(index.tables.images.iloc[[row]], index.roots)[0])
        crops += [evaluated.pre.cut(photo, box) for box in own[list("xywh")].to_numpy(float)]
    real, known = evaluated.judge.read(*evaluated.classify(np.stack(crops))), evaluated.judge.read(*test[:2])
    return f"{len(crops)} pills of real phone photos: AUROC {auroc(known.score, real.score):.3f}, {(real.score >= evaluated.judge.threshold).mean():.3f} accepted"


def measure_run(run):
    "Measure a run of a photo set whose class list leaves drugs out: they are unknown, and are then enrolled from their training photos."
    record = read_json(run / "run.json")
    evaluated = with_judge(open_run(run, Parameters(Stage(**record["stage"]), [], load_settings(), {})))
    pills = evaluated.manifest.pills
    strange, pool = (read_pills(evaluated, pills[(pills.label < 0) & (pills.split == split) & (pills.kind == "photo")].reset_index(drop=True)) for split in ("test", "train"))
    test = read_pills(evaluated, classifier_pills(evaluated.manifest, "test"))
    print(markdown(measure_unknown(evaluated, test, strange)), "\nchosen on validation:", evaluated.chosen, "\n")
    confidence, right = np.exp(evaluated.judge.read(*test[:2]).log_p), test[2].label.to_numpy()
    print(f"share of the known drugs' pills answered at 5 % error: {coverage_at(coverage_curve(confidence.max(1), confidence.argmax(1) == right), 0.05):.3f} of {len(right)}\n")
    print(markdown(measure_enrolment(evaluated, test, None, (pool, strange))))


def markdown(table):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [("", *table.columns), ["---"] * (1 + len(table.columns)), *table.itertuples()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--overrides", default="", help="fields of the stage, for all runs")
    parser.add_argument("--suffix", default="", help="of the runs' names, for other overrides")
    parser.add_argument("--photos", type=Path, help="folder with labelled photos of other pills, as unknown ones")
    parser.add_argument("--run", type=Path, help="measure this run of a photo set instead, which leaves drugs out of its class list")
    given = parser.parse_args()
    if given.run:
        return measure_run(given.run)
    settings = load_settings()
    root = ensure_synthetic(settings, DATA)
    settings = replace(settings, work=settings.work / "unknowns", manifests=settings.work / "unknowns/manifests")
    for arm in given.arms:
        fields = f"epochs={given.epochs} {ARMS[arm]} {given.overrides}"
        (known_run, plan), (whole_run, whole_plan) = (train_once(f"{arm}{classes}{given.suffix}", classes, fields, settings, root) for classes in (KNOWN, DATA.drugs))
        evaluated, whole = with_judge(open_run(known_run, plan)), with_judge(open_run(whole_run, whole_plan))
        pills = {split: classifier_pills(whole.manifest, split) for split in ("train", "test")}
        spent = set(manifest_strangers(evaluated, "val").k_code)  # the score was chosen on them
        new = ~pills["test"].k_code.isin(spent.union(evaluated.manifest.classes))
        test, strange = read_pills(evaluated, classifier_pills(evaluated.manifest, "test")), read_pills(evaluated, pills["test"][new].reset_index(drop=True))
        pool = read_pills(evaluated, pills["train"][~pills["train"].k_code.isin(spent.union(evaluated.manifest.classes))].reset_index(drop=True))
        answered = whole.predict(pills["test"]).pills
        answered = answered[~answered.k_code.isin(spent)].reset_index(drop=True)
        on_new = ~answered.k_code.isin(evaluated.manifest.classes)
        named = [v.top[0][0] for v in evaluated.judge(test[0], test[1])] == test[2].k_code
        print(f"\n### {arm}: {known_run.name}, {len(evaluated.manifest.classes)} known drugs, {strange[2].k_code.nunique()} unknown; known top-1 {interval(named, test[2])}\n")
        print(markdown(measure_unknown(evaluated, test, strange)), flush=True)
        print("\nchosen on validation:", evaluated.chosen, "\n")
        whole_right = answered.right.to_numpy()
        print(measure_sides(evaluated, test), "\n")
        index = ensure_index([root], settings)
        registry = inspect(index.tables, index.roots, np.flatnonzero(index.tables.images.codes.astype(object).isin(whole.manifest.classes))[:: 24], store=index.store).drugs
        if given.photos:
            print(measure_photos(evaluated, given.photos, test), "\n")
        print(markdown(measure_hints(evaluated, test, strange, registry)), "\n", flush=True)
        print(markdown(measure_enrolment(evaluated, test, (whole_right[on_new], whole_right[~on_new], answered[on_new], answered[~on_new]), (pool, strange))), flush=True)


if __name__ == "__main__":
    main()
