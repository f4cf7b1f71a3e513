"""The bug zoo: ten patients, each UniX with one bug. Find it from what the run shows.

    python tests/exercises/zoo.py OUT                  all ten, and two healthy runs beside them
    python tests/exercises/zoo.py OUT --only 3         the healthy run and patient-03, for a try
    python tests/exercises/zoo.py OUT --answers        which patient has which bug, and why it shows

OUT/patient-03 has curves.png, log.jsonl, drawn.png and read.png (sheets: images from captions of
the validation set, reports of its images) and metrics.json; OUT/ward.csv has the metrics of all.
`healthy-reads` is what the patients of stage 1 are compared with, `healthy-draws` what those of
stage 2 are. Metrics are taken by healthy code: findings are read by the shipped weights' reader.
"""

import argparse
import contextlib
import csv
import gc
import io
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHIPPED = ROOT / "assets" / "tiny"
STEPS = {1: 200, 2: 300}            # of the runs, by stage
IMAGES = 512                        # that stage 2 learns from
SHOWN = 32                          # images and reports that the metrics look at
HEALTHY = {1: "healthy-reads", 2: "healthy-draws"}


class Patient(NamedTuple):
    """A bug: what is changed, and what a run of it shows."""
    name: str
    stage: int              # 1: it reads, 2: it draws
    patches: tuple          # of (file, old text, new text); each applies exactly once
    test: str               # goes red under the patches: of tests/, or a check of an exercise
    sees: str               # from real runs
    flags: dict = {}        # options of train.py that make it ill, where no patch does
    trains: bool = True     # False: the bug does not touch training, so the healthy weights do


PATIENTS = (
    Patient(
        "the sampler adds v", 2,
        (("diffusion", "x = x - v * (t - after).item()", "x = x + v * (t - after).item()"),),
        "e03.check_straight",
        "The curves are the healthy ones to the last digit, so training is well. Every image is "
        "a carpet of black and white worms, twice as rough as a chest (23, not 10), and no "
        "caption changes it: each step walks away from the image.", trains=False),
    Patient(
        "labels are not shifted", 1,
        (("unix", "labels = [[NO_LOSS] * (len(p) + 2) + [*r, self.config.eos, NO_LOSS]",
          "labels = [[NO_LOSS] * (len(p) + 2) + [NO_LOSS, *r, self.config.eos]"),),
        "e12.check_sequence",
        "The loss of its log falls to 0.0006, too good to be true. Measured by healthy code it "
        "is 14.5 a token, and reports repeat one word to the end (\"FINDINGSFINDINGSFINDINGS\"), "
        "F1 0: it has learned to copy the token that it sees."),
    Patient(
        "training images are mirrored at random", 1,
        (("data", "    return Phantom(paint(scene, findings, size), findings, report,",
          "    image = paint(scene, findings, size)\n"
          "    if split == \"train\" and index % 2 == 0:\n"
          "        image = image[:, ::-1].copy()\n"
          "    return Phantom(image, findings, report,"),),
        "test_phantom.py::test_phantoms_look_as_they_always_did",
        "Reports are fluent, and their findings as right as the healthy ones (F1 .89 both), "
        "but the side is right in 59 of 100, hardly more than a coin toss. The loss stays a "
        "little higher (.25, not .22), by the words left and right."),
    Patient(
        "weights are averaged with .9999 from the first step on", 2,
        (("train", "decay = min(self.stage.ours.ema, self.step / (self.step + 9))",
          "decay = 0.9999"),),
        "e15.check_average",
        "The loss is the healthy one to the last digit, yet images are gray squares of fragments, "
        "half as rough again as a chest (15, not 10): 300 steps at .9999 leave 97% of the average "
        "at the beginning, where the last projection is 0. What is drawn is not what was trained."),
    Patient(
        "latents are not scaled on their way in", 2,
        (("diffusion", "return self.scale * (z - self.latent_mean)", "return z"),),
        "test_diffusion.py::test_vae_shapes_units_and_sampling",
        "The loss is higher at every tenth of t, by a third near the image to two thirds near "
        "noise, while REPA's is healthy: the latents are 1.3 times as large as they should be. "
        "Images are harder (contrast 70, not 66), for the way out divides by the scale all the "
        "same."),
    Patient(
        "nine captions of ten are dropped, not one", 2,
        (("train", "torch.rand(b, generator=rng) < CAPTION_DROPOUT",
          "torch.rand(b, generator=rng) > CAPTION_DROPOUT"),),
        "test_train.py::test_captions_are_dropped_one_time_in_ten_and_times_are_logit_normal",
        "Images look well and the loss is healthy, but most chests are normal whatever was "
        "asked for: F1 by the shipped reader .19, not .37. Kernel distance cannot tell. "
        "Captions are hardly ever seen, so they are hardly learned."),
    Patient(
        "is_causal with a cache", 1,
        (("joint_attn", "mask if ragged else None))", "None, causal=True))"),),
        "e11.check_one_sample",
        "Training is the healthy one to the last digit, the loss of true reports too (.21). What "
        "it writes begins like a report and then repeats one word (\"There There There\"), F1 0: "
        "each new token sees only the first row of the cache.", trains=False),
    Patient(
        "--train both --mix 0:1", 2, (), "test_train.py::test_both_branches_learn_with_train_both",
        "Images are about as good as the healthy ones (F1 by the shipped reader .42 and .37) and "
        "the flow loss is lower, but it cannot read any more: 6.8 a token, worse than ln V = "
        "6.5, F1 .20, by its own reader .16 for its images. Nothing was left to teach reading, and "
        "all weights moved (Table 5).",
        {"train": "both", "mix": "0:1"}),
    Patient(
        "pixels wrap instead of being clamped", 2,
        (("diffusion", "((pixels / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)",
          "((pixels / 2 + 0.5) * 255).to(torch.int32).to(torch.uint8)"),),
        "test_diffusion.py::test_to_uint8_truncates",
        "All metrics are healthy. White specks stand in the black corners and borders of most "
        "images: a pixel just below 0 became 255. Only looking finds it.",
        trains=False),
    Patient(
        "the tower is not told where a token is", 2,
        (("unix", "self.positions[position_ids]", "self.positions[0 * position_ids]"),),
        "test_parity.py::test_every_covered_array_agrees",
        "Pieces of a chest, each sharp, lie in the wrong places: a patchwork of spine, lung and "
        "shoulder. The loss is healthy near the image and far too high near noise (.97, not .31, "
        "in the last tenth): there only the position tells what belongs in a token. All have one "
        "RoPE id."),
)


def patched(sources: dict[str, str], patches) -> dict[str, str]:
    """The seven files with patches applied. Raises ValueError unless each applies exactly once."""
    sources = dict(sources)
    for file, old, new in patches:
        count = sources[file].count(old)
        if count != 1:
            raise ValueError(f"a patch of {file}.py applies {count} times, not once: {old!r}")
        sources[file] = sources[file].replace(old, new)
    return sources


def order(seed: int) -> list[Patient]:
    """patient-01 is the first of these."""
    shuffled = list(PATIENTS)
    random.Random(seed).shuffle(shuffled)
    return shuffled


# ---------------------------------------------------------------- one run


def train_one(lib, stage: int, steps: int, flags: dict, weights: Path, out: Path, cache: Path):
    """Trains from the shipped weights into `out`. What stage 2 knows of its images is computed
    once, by the healthy run, and kept in `cache`."""
    for file in cache.glob("latents-*"):
        shutil.copy(file, out)
    more = {"images": IMAGES} if stage == 2 else {}
    options = lib.train.Options(stage=stage, weights=str(weights), out=str(out), steps=steps,
                                batch_size=16, sheet_every=10**6, save_every=10**6, **more,
                                **flags)
    assert not options.problem(), options.problem()
    nowhere = io.StringIO()                             # for sizes and progress
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        lib.train.run(options)
    gc.collect()                                        # Windows moves no file that is open


def use(lib, out: Path, scans, captions: list[str]) -> dict:
    """What the trained model, with its own code, writes and draws."""
    import numpy as np
    import torch
    model = lib.unix.UniX.load(out)
    images = torch.from_numpy(np.stack([s["image"] for s in scans]))
    reports = model.report(model.vit.prepare(images), max_new=100)
    drawn = model.generate(captions, 64, points=25)[:, 0]
    own = model.report(model.vit.prepare(drawn), max_new=100)
    return {"reports": reports, "drawn": drawn, "own": own}


# ---------------------------------------------------------------- metrics, by healthy code


def findings(lib, text: str) -> dict[str, set]:
    """{class found: its sides}."""
    return {c: place["sides"] for c, place in lib.data.locate(text).items()}


def agreement(lib, truth: list[str], written: list[str]) -> tuple[float, float]:
    """Micro F1 of the findings, and the share of those found in both whose one side is right."""
    both = either = right = sided = 0
    for a, b in zip(truth, written):
        a, b = findings(lib, a), findings(lib, b)
        both, either = both + len(a.keys() & b.keys()), either + len(a) + len(b)
        for c in a.keys() & b.keys():
            if len(a[c]) == len(b[c]) == 1:
                sided, right = sided + 1, right + (a[c] == b[c])
    return 2 * both / max(either, 1), right / sided if sided else float("nan")


def measure(lib, judge, out: Path, scans, truth: list[str], captions: list[str], made: dict):
    """Healthy code looks at what a patient made and at its weights -> metrics."""
    import numpy as np
    import torch
    model, real = lib.unix.UniX.load(out), torch.from_numpy(np.stack([s["image"] for s in scans]))
    with torch.no_grad():
        prompt = model.ids(lib.unix.INSTRUCTIONS[0])
        total, count = model.understanding_loss(
            model.vit.prepare(real), [prompt] * len(truth), [model.ids(t) for t in truth])
        a, b = (judge.vit.summary(x).numpy() for x in (real, made["drawn"]))
    f1, side = agreement(lib, truth, made["reports"])
    read = judge.report(judge.vit.prepare(made["drawn"]), max_new=100)
    trip, trip_side = agreement(lib, captions, read)
    own, _ = agreement(lib, captions, made["own"])
    x = made["drawn"].float()
    distance = lib.sample.kernel_distance(a, b)
    return {
        "reports: loss a token": float(total / count), "reports: F1": f1,
        "reports: side right": side,
        "reports: words": sum(len(t.split()) for t in made["reports"]) / len(truth),
        "images: brightness": float(x.mean()), "images: contrast": float(x.std((1, 2)).mean()),
        "images: roughness": float(x.diff(dim=2).abs().mean()),
        "images: kernel distance": distance, "images: F1, shipped reader": trip,
        "images: side right": trip_side, "images: F1, own reader": own}


def examine(healthy, judge, patient: Patient | None, stage: int, name: str, args, cache: Path,
            clean: dict) -> dict:
    """Trains, uses and measures one patient (None: a healthy run) -> metrics."""
    import course
    folder, begin, used = args.out / name, time.perf_counter(), time.process_time()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scans = [healthy.data.open_data("phantom", "val", 96)[i] for i in range(SHOWN)]
    truth = [s["report"] for s in scans]
    captions = [healthy.data.impression(t) for t in truth]
    lib = course.load(patched(clean, patient.patches if patient else ()), keep=True)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        if patient and not patient.trains:
            shutil.copytree(cache / f"stage{stage}", out, dirs_exist_ok=True)
        else:
            train_one(lib, stage, args.steps or STEPS[stage], patient.flags if patient else {},
                      args.weights, out, cache)
        if patient is None:
            for file in out.glob("latents-*"):
                shutil.move(file, cache)
            shutil.copytree(out, cache / f"stage{stage}")
        made = use(lib, out, scans, captions)
        course.load(clean, keep=True)
        metrics = measure(healthy, judge, out, scans, truth, captions, made)
        for file in ("curves.png", "log.jsonl"):
            shutil.copy(out / file, folder)
    healthy.data.sheet(list(made["drawn"][:16].numpy()), captions[:16], 8, folder / "drawn.png")
    texts = [f"WRITTEN {a}\nTRUE {b}" for a, b in zip(made["reports"], truth)]
    healthy.data.sheet([s["image"] for s in scans[:8]], texts[:8], 4, folder / "read.png")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(f"{name}: {time.perf_counter() - begin:.0f} s, {time.process_time() - used:.0f} s of CPU",
          flush=True)
    return metrics


def write_ward(out: Path):
    """One table of all metrics.json that lie there."""
    rows = {p.parent.name: json.loads(p.read_text()) for p in sorted(out.glob("*/metrics.json"))}
    with open(out / "ward.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["", *rows])
        for key in next(iter(rows.values())):
            writer.writerow([key, *(f"{r[key]:.3f}" for r in rows.values())])


def answers(seed: int) -> str:
    return "\n".join(f"patient-{i:02d}  stage {p.stage}: {p.name}\n            {p.sees}\n"
                     for i, p in enumerate(order(seed), 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--only", type=int, nargs="+", metavar="K", help="these patients alone")
    parser.add_argument("--steps", type=int, help=f"of each run (default: by stage, {STEPS})")
    parser.add_argument("--seed", type=int, default=1, help="of the patients' order (%(default)s)")
    parser.add_argument("--answers", action="store_true", help="print which patient has which bug")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="folder to start from")
    args = parser.parse_args()
    if args.answers:
        return print(answers(args.seed))
    chosen = args.only or range(1, len(PATIENTS) + 1)
    if not all(1 <= k <= len(PATIENTS) for k in chosen):
        parser.error(f"--only: there are patients 1 to {len(PATIENTS)}")
    sys.path.insert(0, str(HERE))
    import course
    args.weights = args.weights.resolve()
    clean, ward = course.clean_sources(), order(args.seed)
    healthy = course.load(clean, keep=True)
    judge = healthy.unix.UniX.load(args.weights)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for stage in sorted({ward[k - 1].stage for k in chosen}):
            examine(healthy, judge, None, stage, HEALTHY[stage], args, Path(cache), clean)
        for k in chosen:
            patient = ward[k - 1]
            examine(healthy, judge, patient, patient.stage, f"patient-{k:02d}", args, Path(cache),
                    clean)
            write_ward(args.out)
    write_ward(args.out)


if __name__ == "__main__":
    main()
