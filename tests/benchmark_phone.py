"""What do phones bring, was it foreseen, and what do a few phone photos change? Drawn studio photos, and drawn phone photos of the same drugs in other sessions by two unlike cameras.

    .venv/bin/python tests/benchmark_phone.py [--seeds 7 8 9] [--photos FOLDER]

For each set of drugs a model is trained on studio photos alone; its phone accuracy is forecast and then measured. A second one is trained on studio and phone photos, 3 to 7, of four sessions of the first camera, and measured on two other sessions and on the second camera.
FOLDER: real phone photos (Pushin-Pill), trained on one session, forecast from its validation photos, measured on the other sessions.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from pillsnap.core import Parameters, get_stage, list_runs, load_settings, run_state

import numpy as np
import pandas as pd

from pillsnap.forecast import bootstrap_both, forecast_phone
from pillsnap.index import ensure_index
from pillsnap.inspection import inspect
from pillsnap.manifest import ensure_manifest, tabulate_pills
from pillsnap.phones import PhoneSpec, ensure_phone_photos
from pillsnap.predictions import open_run, with_judge
from pillsnap.scores import share
from pillsnap.train import classifier_pills, fit, prepare_run
from pillsnap.trees import SMOKE, ensure_synthetic

SMALL = "strategy=classifier tensorboard=false hard=0"
NARROW = "model=test_efficientnet pretrained=false size=96 epochs=40 lr=2e-3 weight_decay=0.02 label_smoothing=0.05 framing=0.3 classes=12 images=820 train_session=S0[0-3]"


def train(stage, fields, roots, settings):
    "Train a run, or take the complete one."
    plan = Parameters(get_stage(stage, f"{fields} {SMALL}"), roots, settings, {"resume": "none"})
    index = ensure_index(roots, settings)
    manifest = ensure_manifest(plan, index, replace_old=True)
    done = [run for run in list_runs(settings, plan.key) if run_state(run) == "end"]
    if not done:
        fit(run := prepare_run(plan, manifest, index))
        done = [run]
    return with_judge(open_run(done[-1], plan))


def measure_photos(evaluated, root, settings):
    "Measure a model on all phone photos of a folder: top-1, its interval over sessions and drugs."
    index = ensure_index([root], settings)
    seen = inspect(index.tables, index.roots, np.arange(len(index.tables.images)), store=index.store)
    pills = tabulate_pills(seen.images.assign(split="phone", group=seen.images.photo), seen.pills, evaluated.manifest.classes)
    found = replace(evaluated, roots=[root]).predict(pills[pills.label >= 0].reset_index(drop=True)).pills
    sessions = found.photo.str[:3]
    right = found.pivot_table(index=sessions, columns="k_code", values="right", aggfunc=list)
    each = np.stack([np.concatenate([np.asarray(cell, float) for cell in row]) for row in right.to_numpy()])
    drugs = np.concatenate([[code] * len(cell) for code, cell in zip(right.columns, right.to_numpy()[0])])
    return found.right.mean(), bootstrap_both(each, drugs), found.known.mean()


def say(value, span):
    return f"{value:.3f} ({span[0]:.3f} to {span[1]:.3f})"


def drawn(seed, settings):
    "One set of drugs: forecast and truth of the studio's model, and the mixed model."
    studio = ensure_synthetic(settings, replace(SMOKE, seed=seed))
    phones = {camera: ensure_phone_photos(settings, PhoneSpec(photos=24, seed=seed, looks=seed, camera=camera)) for camera in ("first", "second")}
    alone = train(0, f"name=studio-{seed}", [studio], settings)
    test = classifier_pills(alone.manifest, "test")
    told = forecast_phone(alone, test, settings.work)
    rows = [{"drugs": seed, "trained on": "studio", "studio, unseen condition": f"{alone.predict(test).pills.right.mean():.3f}", "phone, forecast": say(told.top1, told.interval), **{f"{camera} camera": say(*measure_photos(alone, root, settings)[:2]) for camera, root in phones.items()}}]
    allowed = settings.work / f"drugs-{seed}.csv"
    allowed.parent.mkdir(parents=True, exist_ok=True)
    allowed.write_text("k_code\n" + "\n".join(alone.manifest.classes) + "\n")
    mixed = train("narrow", f"name=mixed-{seed} allow={allowed} {NARROW}", [studio, phones["first"]], settings)
    own = mixed.predict(classifier_pills(mixed.manifest, "test", ("photo",))).pills
    rows.append({"drugs": seed, "trained on": "studio and phone, 3 : 7", "studio, unseen condition": f"{mixed.predict(classifier_pills(mixed.manifest, 'test', ('single',))).pills.right.mean():.3f}", "phone, forecast": "",
                 "first camera": say(*share(own.right.to_numpy(float), np.ones(len(own)), own.k_code)) + f", two other sessions, {len(own)} photos", "second camera": say(*measure_photos(mixed, phones["second"], settings)[:2])})
    return rows


def real(folder, settings):
    "Real phone photos: the forecast from the training session, and the other sessions."
    found = train(0, "name=pushin split=session train_session=IMG_6[01] images=267 classes=17 epochs=40 gates=none", [folder], settings)
    told = forecast_phone(found, classifier_pills(found.manifest, "val"), settings.work)
    test = found.predict(classifier_pills(found.manifest, "test")).pills
    seen = test.k_code.unique()
    only = np.isin(told.drugs, seen)
    value, span = share(test.right.to_numpy(float), np.ones(len(test)), test.photo)
    print(f"\nreal photos, forecast from the training session: {say(told.top1, told.interval)}; of the {len(seen)} drugs that the other sessions show: {told.right[:, only].mean():.3f}; measured there, {len(test)} pills: {say(value, span)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[7, 8, 9])
    parser.add_argument("--photos", type=Path)
    given = parser.parse_args()
    settings = load_settings()
    settings = replace(settings, work=settings.work / "phone", manifests=settings.work / "phone/manifests")
    rows = []
    for seed in given.seeds:
        rows += drawn(seed, settings)
        table = pd.DataFrame(rows)
        print("\n".join(f"| {' | '.join(map(str, row))} |" for row in [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]), flush=True)
    if given.photos:
        real(given.photos, settings)


if __name__ == "__main__":
    main()
