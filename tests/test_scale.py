"The rules of sampling on a simulated index of the real shape: exact counts, nested stages, nothing moves, every class in every split."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pillsnap.core import STAGES, PillSnapError
from pillsnap.index import make_up_boxes, simulate_index
from pillsnap.manifest import assign_splits, make_manifest

TENTH = {"1": (500, 12), "2": (2_500, 30), "3": (10_000, 100), "4": (50_000, 390)}  # the stages at a tenth of their size


@pytest.fixture(scope="module")
def index():
    return simulate_index(drugs=452, tray_drugs=40, arrangements=500)


@pytest.fixture(scope="module")
def stages():
    with pytest.MonkeyPatch.context() as patch:
        for key, (images, classes) in TENTH.items():
            patch.setitem(STAGES, key, replace(STAGES[key], images=images, classes=classes))
        yield STAGES


@pytest.fixture(scope="module")
def manifests(index, stages):
    return {key: make_manifest(index, stages[key], make_up_boxes(index)) for key in TENTH}


def test_counts_are_exact(manifests):
    for key, (images, classes) in TENTH.items():
        pills = manifests[key].pills
        assert pills.photo.nunique() == images == manifests[key].report["images"]
        assert len(manifests[key].classes) == classes == pills[pills.label >= 0].k_code.nunique()
        assert not manifests[key].report["short"]


def test_every_class_is_in_every_split(manifests):
    for manifest in manifests.values():
        singles = manifest.pills[manifest.pills.kind == "single"]
        seen = singles.groupby(["k_code", "split"]).size().unstack(fill_value=0)
        assert len(seen) == len(manifest.classes) and (seen[["train", "val", "test"]] > 0).all(axis=None)


def test_a_stage_contains_the_one_before_on_the_same_side(manifests):
    for small, large in zip("123", "234"):
        before, after = (manifests[key].pills.drop_duplicates("photo").set_index("photo").split for key in (small, large))
        assert after.reindex(before.index).equals(before)
        assert set(manifests[small].classes) <= set(manifests[large].classes)


def test_tray_drugs_come_first_and_trays_stay_usable(manifests, index):
    trays = index.tables.images[(index.tables.images.kind == "combination") & index.tables.images.usable]
    with_singles = set(index.tables.images.codes[index.tables.images.kind == "single"].astype(str))
    tray_drugs = {code for text in trays.codes.unique() for code in text.split()} & with_singles
    assert tray_drugs <= set(manifests["3"].classes)
    for key, (images, _) in TENTH.items():
        taken = manifests[key].pills[manifests[key].pills.kind == "combination"]
        assert 0 < taken.photo.nunique() <= round(0.05 * images)
        assert (taken.groupby("photo").size() == taken.photo.drop_duplicates().str.count("-").set_axis(taken.photo.drop_duplicates())).all()  # no tray lacks a pill


def test_official_validation_is_never_used(manifests, index):
    images = index.tables.images
    validation = set(images.codes[images.part == "val"].astype(str))
    assert validation
    for manifest in manifests.values():
        assert not validation & set(manifest.classes) and (manifest.pills.part != "val").all()


def test_added_data_moves_nothing(index):
    grown = simulate_index(drugs=560, tray_drugs=40, arrangements=500)
    before, after = (assign_splits(x.tables.images, STAGES["1"]).set_index("photo").split.astype(str) for x in (index, grown))
    assert len(after) > len(before) and after.reindex(before.index).equals(before)


def test_a_drug_without_a_test_photo_is_left_out_and_named(index, stages):
    images = index.tables.images
    one = make_manifest(index, stages["1"], make_up_boxes(index)).classes[0]
    lost = (images.codes == one) & (assign_splits(images, stages["1"]).split == "test")
    poorer = replace(index, tables=replace(index.tables, images=images.assign(usable=images.usable & ~lost)))
    manifest = make_manifest(poorer, stages["1"], make_up_boxes(poorer))
    assert one in manifest.report["left_out"] and one not in manifest.classes and len(manifest.classes) == TENTH["1"][1]


def test_photos_found_bad_are_replaced_whatever_was_known_before(index, stages):
    "The sample depends on the data alone, not on what was read in earlier runs or larger stages."
    images = index.tables.images
    damaged = pd.util.hash_array(images.photo.astype(object).to_numpy()) % 20 == 0  # one in twenty
    damaged &= (images.kind == "single").to_numpy()

    def look(rows):
        seen = make_up_boxes(index)(rows)
        return replace(seen, images=seen.images.assign(usable=seen.images.usable & ~damaged[seen.images.index]))
    knowing = replace(index, tables=replace(index.tables, images=images.assign(usable=images.usable & ~damaged)))
    small, large = make_manifest(index, stages["1"], look), make_manifest(index, stages["2"], look)
    assert small.pills.photo.nunique() == TENTH["1"][0] and set(small.pills.photo) <= set(large.pills.photo)
    assert not set(images.photo[damaged]) & set(large.pills.photo)
    assert set(make_manifest(knowing, stages["1"], look).pills.photo) == set(small.pills.photo)


def test_too_few_photos_for_the_drugs_is_an_error(index, stages):
    with pytest.raises(PillSnapError, match="would lack a split"):
        make_manifest(index, replace(stages["1"], images=24, classes=12), make_up_boxes(index))


def test_the_order_of_rows_decides_nothing(index, stages):
    "The same photos listed the other way round give the same manifest."
    turned = index.tables.images.iloc[::-1].reset_index(drop=True)
    other = replace(index, tables=replace(index.tables, images=turned))
    first, again = (make_manifest(x, stages["1"], make_up_boxes(x)) for x in (index, other))
    assert np.array_equal(first.pills.photo, again.pills.photo) and first.classes == again.classes
