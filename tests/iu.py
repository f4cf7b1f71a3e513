"""Scores the labeler and the cleaner on Open-i reports, whose experts' MeSH terms are the truth.

    python tests/iu.py indiana_reports.csv [--examples 10]

The labeler was tuned on the half of the reports whose md5(uid) is even; the other half is reported.
"""

import argparse
import csv
import hashlib
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import clean_checked, clean_report, label_report  # noqa: E402

MESH = {    # class -> the experts' terms that mean it
    "Cardiomegaly": {"cardiomegaly"}, "Pleural Effusion": {"pleural effusion"},
    "Pneumothorax": {"pneumothorax", "hydropneumothorax"},
    "Edema": {"pulmonary edema", "pulmonary congestion"}, "Atelectasis": {"pulmonary atelectasis"},
    "Consolidation": {"consolidation", "airspace disease", "infiltrate"},
    "Lung Lesion": {"nodule", "mass"}, "Fracture": {"fractures, bone"},
    "Support Devices": {"catheters, indwelling", "implanted medical device", "tube, inserted",
                        "medical device", "stents"},
    "Pneumonia": {"pneumonia"}}


def f1(hit: int, missed: int, extra: int) -> float:
    return 2 * hit / max(1, 2 * hit + missed + extra)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("csv", help="indiana_reports.csv")
    parser.add_argument("--examples", type=int, default=0,
                        help="print reports before and after cleaning")
    args = parser.parse_args()
    hits, wrong, normals, kept, total, shown = Counter(), Counter(), Counter(), 0, 0, 0
    for row in csv.DictReader(open(args.csv, encoding="utf-8-sig")):
        parts = (("FINDINGS", row["findings"]), ("IMPRESSION", row["impression"]))
        text = " ".join(f"{name}: {part}" for name, part in parts if part)
        if not text:
            continue
        total += 1
        kept += clean_checked(text)[1]
        if shown < args.examples and "XXXX" in text:
            shown += 1
            print(f"{shown}. {text}\n   -> {clean_report(text)}\n")
        if hashlib.md5(row["uid"].encode()).digest()[-1] % 2 == 0:
            continue
        found = {c for c, value in label_report(text).items() if value == 1}
        terms = {t.strip().lower() for t in row["Problems"].split(";")}
        if "normal" in terms:
            normals[not found & MESH.keys()] += 1
        for c, names in MESH.items():
            kind = {(True, True): "hit", (True, False): "missed", (False, True): "extra"}.get(
                (bool(terms & names), c in found))
            if kind:
                hits[c, kind] += 1
                wrong[c, kind] += kind != "hit"
    print(f"{'held-out half':20}{'F1':>6}{'hit':>6}{'missed':>8}{'extra':>7}")
    for c in MESH:
        h, m, e = (hits[c, k] for k in ("hit", "missed", "extra"))
        print(f"{c:20}{f1(h, m, e):6.3f}{h:6}{m:8}{e:7}")
    micro = f1(*(sum(hits[c, k] for c in MESH) for k in ("hit", "missed", "extra")))
    print(f"micro-F1 {micro:.3f}; "
          f"normal images without a finding {normals[True]} of {normals.total()}")
    print("commonest disagreements: "
          + ", ".join(f"{c} {kind} {n}" for (c, kind), n in wrong.most_common(10)))
    print(f"cleaning: labels agree before and after on {kept} of {total} reports "
          f"({kept / total:.1%})")


if __name__ == "__main__":
    main()
