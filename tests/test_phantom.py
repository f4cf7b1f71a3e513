"""Phantoms: deterministic, labelled as painted, on the right side, and truly reported."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import (CHOICES, CLASSES, HEART, NIH, Finding, heart_ratio, label_report, locate, paint,
                  phantom, phantom_scene, sample_findings, sample_scene, write_report)
from sample import heart_width

WORDS = {  # how a reader recognises a class in a sentence
    "Enlarged Cardiomediastinum": "mediastinum|cardiomediastinal", "Cardiomegaly":
    "cardiomegaly|heart|cardiomediastinal", "Lung Opacity": "opacity", "Lung Lesion": "nodule|mass",
    "Edema": "edema", "Consolidation": "consolidation", "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis", "Pneumothorax": "pneumothorax", "Pleural Effusion": "effusion",
    "Pleural Other": "pleural thickening", "Fracture": "fracture|osseous",
    "Support Devices": "tube|catheter|pacemaker|support device"}
DENIAL = re.compile(r"\b(no|not|normal|unremarkable)\b")
LUNG = {"Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}


def scene(seed):
    return sample_scene(np.random.default_rng(seed))


def read(report):
    """(stated, denied): the classes that the sentences of a report name."""
    stated, denied = set(), set()
    for text in re.split(r"(?<=\.) ", report.replace("FINDINGS: ", "").replace("IMPRESSION: ", "")):
        names = {k for k, words in WORDS.items() if re.search(rf"\b({words})", text.lower())}
        if text == "The lungs are clear.":
            names = LUNG
        (denied if DENIAL.search(text.lower()) or names == LUNG else stated).update(names)
    return stated, denied


def test_same_arguments_same_image_and_no_global_randomness():
    np.random.seed(3)
    first, state = phantom("train", 5, 64), np.random.get_state()[1].copy()
    again = phantom("train", 5, 64)
    assert (first.image == again.image).all() and first[1:] == again[1:]
    assert first.image.dtype == np.uint8 and first.image.shape == (64, 64)
    assert (np.random.get_state()[1] == state).all()


def test_splits_and_indices_never_share_an_image():
    images = {phantom(split, i, 64).image.tobytes()
              for split in ("train", "val") for i in range(99)}
    assert len(images) == 198


@pytest.mark.parametrize("small,large", [(64, 128), (96, 192), (64, 256)])
def test_an_image_is_the_same_at_every_size(small, large):
    for i in range(12):
        a, b = phantom("val", i, small), phantom("val", i, large)
        b_small = b.image.reshape(small, large // small, small, large // small).mean((1, 3))
        assert np.corrcoef(a.image.ravel(), b_small.ravel())[0, 1] > .97, i
        assert a[1:] == b[1:]


def test_how_often_each_finding_occurs():
    sets = [sample_findings(np.random.default_rng(i)) for i in range(4000)]
    count = Counter(f.name for findings in sets for f in findings)
    assert set(count) == set(CLASSES) - {"No Finding", "Pneumonia"} == set(CHOICES)
    for name, n in count.items():
        assert .10 < n / len(sets) < .18, (name, n / len(sets))
    assert .20 < sum(not findings for findings in sets) / len(sets) < .25
    assert max(map(len, sets)) == 4
    assert all(len({f.name for f in findings}) == len(findings) for findings in sets)
    sides = Counter(f.side for findings in sets for f in findings)
    assert .9 < sides["left"] / sides["right"] < 1.1


SIDED = [Finding("Pleural Effusion", "", "mild"), Finding("Pleural Effusion", "", "severe"),
         Finding("Pneumothorax", "", "mild"), Finding("Consolidation", place="mid"),
         Finding("Lung Opacity", place="upper"),
         Finding("Lung Lesion", place="lower", kind="nodule"),
         Finding("Lung Lesion", place="mid", kind="mass"), Finding("Fracture", place="mid"),
         Finding("Atelectasis", place="lower"), Finding("Pleural Other", place="apical"),
         Finding("Pleural Other", place="lateral"), Finding("Support Devices", kind="chest tube")]


@pytest.mark.parametrize("finding", SIDED, ids=lambda f: "-".join(x for x in f if x))
def test_a_finding_is_on_the_side_it_says_and_bold_at_64_px(finding):
    """The patient's left is on the viewer's right."""
    for seed in range(8):
        plain = paint(scene(seed), (), 64).astype(int)
        for side in ("left", "right"):
            change = np.abs(paint(scene(seed), (finding._replace(side=side),), 64) - plain)
            halves = change[:, :32].sum(), change[:, 32:].sum()
            assert halves[side == "left"] > .9 * sum(halves), (seed, side)
            assert (change > 25).sum() >= 9, (seed, side)


def test_fluid_brightens_and_air_darkens():
    for seed in range(8):
        plain = paint(scene(seed), (), 64).astype(int)
        fluid = paint(scene(seed), (Finding("Pleural Effusion", "right", "moderate"),), 64) - plain
        assert fluid[36:46, 12:24].mean() > 25 and abs(fluid[:, 40:]).max() == 0
        air = paint(scene(seed), (Finding("Pneumothorax", "right", "severe"),), 64) - plain
        assert air[14:30, 10:20].mean() < -4


@pytest.mark.parametrize("name,grades", [("Pleural Effusion", ("mild", "moderate", "severe")),
                                         ("Pneumothorax", ("mild", "moderate", "severe")),
                                         ("Edema", ("mild", "severe"))])
def test_a_worse_finding_changes_more_of_the_image(name, grades):
    for seed in range(8):
        plain = paint(scene(seed), (), 64).astype(int)
        images = [paint(scene(seed), (Finding(name, "left", grade),), 64) for grade in grades]
        change = [np.abs(p - plain).sum() for p in images]
        assert change == sorted(change) and change[0] > 0


def test_heart_grows_with_severity():
    for seed in range(10):
        grades = [(), *((Finding("Cardiomegaly", severity=s),) for s in HEART)]
        true = [heart_ratio(scene(seed), g) for g in grades]
        seen = [heart_width(paint(scene(seed), g, 64)) for g in grades]
        assert all(a + .03 < b for a, b in zip(true, true[1:]))
        assert all(a < b for a, b in zip(seen, seen[1:])), (seed, seen)


@pytest.mark.parametrize("size", [64, 128])
def test_heart_width_follows_the_true_ratio(size):
    images = [phantom("val", i, size) for i in range(300)]
    seen = np.array([heart_width(p.image) for p in images])
    true = np.array([p.heart_ratio for p in images])
    assert np.isfinite(seen).all() and np.corrcoef(seen, true)[0, 1] > .9
    assert np.isfinite([heart_width(np.full((64, 64), v, np.uint8)) for v in (0, 128, 255)]).all()


def test_reports_state_what_is_drawn_and_deny_only_what_is_not():
    mentioned, texts = set(), set()
    for i in range(2000):
        rng = np.random.default_rng((5, i))
        findings = sample_findings(rng)
        report = write_report(findings, rng)
        stated, denied = read(report)
        assert stated == {f.name for f in findings}, (report, findings)
        assert not stated & denied, report
        assert 6 <= len(report.split()) <= 80, report
        assert re.fullmatch(r"FINDINGS: \S.*\. IMPRESSION: \S.*\.", report) and "  " not in report
        for f in findings:
            if f.side:
                assert f.side in report.lower()
        mentioned |= stated
        texts.add(report)
    assert mentioned == set(CLASSES) - {"No Finding", "Pneumonia"} and len(texts) > 1600


def test_nih_labels_read_well_without_details():
    assert len(NIH) == 14
    for name, finding in NIH.items():
        for seed in range(20):
            report = write_report((finding,), np.random.default_rng(seed))
            stated, denied = read(report)
            assert stated == {finding.name} & set(WORDS), report
            assert finding.name not in denied and "  " not in report and "the ." not in report
            assert not re.search("left|right|mild|severe|small|large", report), report


def test_reports_are_read_as_drawn():
    """The labeler and the side reader must not be what limits a score on phantoms."""
    for i in range(1000):
        _, findings, report = phantom_scene("train", i)
        drawn = {f.name for f in findings} or {"No Finding"}
        drawn |= {"No Finding"} if drawn == {"Support Devices"} else set()
        assert {c for c, v in label_report(report).items() if v == 1} == drawn, report
        places = locate(report)
        for f in findings:
            sides = {"left", "right"} if f.side == "bilateral" else {f.side}
            if f.name in ("Pleural Effusion", "Pneumothorax"):
                assert places[f.name] == {"sides": sides, "severity": f.severity}, report
            elif f.name == "Lung Opacity":
                assert places[f.name]["sides"] == sides, report


# ---- golden: phantoms and reports never change -------------------------------------------------
GOLDEN = Path(__file__).parent / "golden/phantoms"
KNOWN = json.loads((GOLDEN / "reports.json").read_text())


@pytest.mark.parametrize("size", [64, 96, 128])
def test_phantoms_look_as_they_always_did(size):
    """Within one grey level: what was trained on one version is used with the next."""
    sheet = np.array(Image.open(GOLDEN / f"{size}.png")).astype(int)
    for row, split in enumerate(("train", "val", "test")):
        for column, index in enumerate(KNOWN[split]["indices"]):
            image = phantom(split, index, size).image
            at = np.s_[row * size:(row + 1) * size, column * size:(column + 1) * size]
            assert abs(sheet[at] - image).max() <= 1, (split, index)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_phantoms_say_what_they_always_said(split):
    known, made = KNOWN[split], [phantom_scene(split, i) for i in range(1000)]
    reports = [report for _, _, report in made]
    assert reports[:25] == known["reports"]
    digest = hashlib.sha256("\n".join(reports).encode()).hexdigest()
    assert digest == known["sha256 of 1000 reports"]
    assert [[list(f) for f in findings] for _, findings, _ in made[:25]] == known["findings"]
    ratios = [phantom(split, i, 64).heart_ratio for i in known["indices"]]
    assert ratios == pytest.approx(known["heart_ratio"], abs=1e-5)


def test_reports_written_for_nih_labels_are_what_they_always_were():
    for labels, report in KNOWN["nih"].items():
        found = [NIH[label] for label in labels.split("|") if label in NIH]
        assert write_report(found, np.random.default_rng([*labels.encode()])) == report
