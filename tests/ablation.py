"""The paper's claims in miniature, by flags: a small Table 5, and rows the paper does not have.

    python tests/ablation.py                    the default: 3 seeds, two jobs of one thread
    python tests/ablation.py --seeds 1 --steps 4 --reading-steps 4 --images 64 --samples 8   a try

One autoencoder (stage 0) for all; a seed's rows all start from the same reader (stage 1). Each row
is a stage 2 at 64 px that generates 16 images a step, for the same number of steps (rows of one
batch size: the same images, from the same noise); what a row reads comes on top. Images are judged
alike in all rows: the seed's stage-1 reader reads them back and gives the features of FD. `reports`
is a row's own reader on true images. What is done is kept in --out and is not run again; a stopped
command resumes when repeated.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

ROWS = {        # name -> batch (16 images are drawn, the others read), flags, Table 5: F1 and FD
    "ours: reader frozen": (16, "", "53.2", "62.1"),
    "both 1:1": (32, "--train both --mix 1:1", "43.7", "65.7"),
    "both 1:2": (24, "--train both --mix 1:2", "42.9", "76.1"),
    "both 1:4": (20, "--train both --mix 1:4", "44.9", "76.1"),
    "both 0:1": (16, "--train both --mix 0:1", "13.9", "74.8"),
    "both 1:1, all layers shared": (32, "--train both --mix 1:1 --share-layers 3", "-", "-"),
    "both 1:1, first layer shared": (32, "--train both --mix 1:1 --share-layers 1", "-", "-"),
    "no context": (16, "--no-context", "-", "-"),
    "no alignment": (16, "--repa-weight 0", "-", "-"),
}
FIGURES = {"reports": True, "round trip": True, "FD": False, "flow": False}     # more is better?


class Claim(NamedTuple):
    """`better` is better than `worse` by `figure`."""
    better: str
    worse: str
    figure: str
    paper: str          # what the paper found


OURS, SHARED = "ours: reader frozen", "both 1:1, all layers shared"
UNSAID = "argued, not measured"
CLAIMS = [
    *(Claim(OURS, f"both {mix}", "reports", f"53.2 against {f1}")
      for mix, f1 in (("1:1", 43.7), ("1:2", 42.9), ("1:4", 44.9), ("0:1", 13.9))),
    *(Claim(OURS, f"both {mix}", "FD", f"62.1 against {fd}")
      for mix, fd in (("1:1", 65.7), ("1:2", 76.1), ("1:4", 76.1), ("0:1", 74.8))),
    Claim("both 1:1", "both 0:1", "reports", "43.7 against 13.9"),
    Claim("both 1:1", "both 1:4", "FD", "65.7 against 76.1"),
    *(Claim(better, SHARED, figure, UNSAID) for better in (OURS, "both 1:1")
      for figure in ("reports", "round trip", "FD")),
    *(Claim(OURS, "both 1:1, first layer shared", figure, UNSAID)
      for figure in ("reports", "round trip", "FD")),
    *(Claim(OURS, "no context", figure, UNSAID) for figure in ("round trip", "flow")),
    *(Claim(OURS, "no alignment", figure, "used, not measured")
      for figure in ("round trip", "FD", "flow")),
]


# ---------------------------------------------------------------- figures


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (one seed: nan)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(better: list[float], worse: list[float], more: bool) -> tuple[float, float, str]:
    """Mean advantage of one row over another, its standard error, and what that says. A seed's
    rows have one starting point, so differences are taken seed by seed."""
    mean, sd = spread([(b - w) * (1 if more else -1) for b, w in zip(better, worse)])
    error = sd / math.sqrt(len(better))
    if math.isnan(error):
        return mean, error, "one seed cannot tell"
    if abs(mean) <= 2 * error or not mean:
        return mean, error, "NOT REPRODUCED: within two standard errors"
    return mean, error, "reproduced" if mean > 0 else "NOT REPRODUCED: the opposite"


def table(found: dict[str, list[dict]]) -> str:
    """Markdown of {row: [figures of each seed]}, and a line for each claim."""
    def cell(row, figure):
        mean, sd = spread([x[figure] for x in found[row]])
        return f"{mean:.3f}" + ("" if math.isnan(sd) else f" ± {sd:.3f}")
    lines = ["| row | Table 5: F1, FD | reports micro-F1-14 | round trip micro-F1-14 | FD "
             "| flow loss |", "|---|---|---|---|---|---|"]
    lines += [f"| {row} | {', '.join(ROWS[row][2:])} | "
              + " | ".join(cell(row, figure) for figure in FIGURES) + " |" for row in found]
    lines += ["", "| better than | by | the paper | here: advantage ± standard error | |",
              "|---|---|---|---|---|"]
    for claim in CLAIMS:
        better, worse = ([x[claim.figure] for x in found[row]] for row in claim[:2])
        mean, error, said = verdict(better, worse, FIGURES[claim.figure])
        lines.append(f"| {claim.better} > {claim.worse} | {claim.figure} | {claim.paper} | "
                     f"{mean:.3f} ± {error:.3f} | {said} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- runs


def call(folder: Path, *words):
    """Runs a program of the repository on one thread; its bars and messages go to folder/said.txt.
    A mistake ends everything with its last line."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "said.txt", "a") as f:
        code = subprocess.run([sys.executable, *map(str, words)], stdout=f, stderr=f, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        last = (folder / "said.txt").read_text().strip().splitlines()[-1]
        raise SystemExit(f"{' '.join(map(str, words))}\nended with exit code {code}: {last}")


def judge(row: Path, reader: Path, data: Path) -> dict[str, float]:
    """Figures of a finished row. The stage-1 reader judges what the row has drawn."""
    import numpy as np
    import torch

    import sample
    from ar import vit_pixels
    from data import open_data, read_image
    from unix import UniX
    model = UniX.load(reader)
    with open(row / "evaluation" / "generated-reports.csv", newline="", encoding="utf-8") as f:
        asked = {line["index"]: line["Ground Truth"] for line in csv.DictReader(f)}
    folder = row / "evaluation" / "images" / "reports"
    drawn = np.stack([read_image(folder / f"{i}.png") for i in asked])
    held_out = open_data(str(data), "val", drawn.shape[1])
    real = np.stack([held_out[int(i)]["image"] for i in asked])
    written = []
    for some in sample.chunks(drawn, 32):
        pixels = model.vit.prepare(torch.from_numpy(some))
        written += model.report(pixels, max_new=200)
    labels = [sample.label_table(texts) == 1 for texts in ([*asked.values()], written)]
    metrics = json.loads((row / "evaluation" / "metrics.json").read_text())
    log = [json.loads(line) for line in (row / "log.jsonl").read_text().splitlines()]
    log = [line for line in log if line["step"] > 0.8 * log[-1]["step"]]
    warnings.filterwarnings("ignore", "Frechet distance is biased")     # alike in all rows
    return {"reports": metrics["understanding"]["micro F1-14"][0],
            "round trip": float(sample.f1_scores(*labels)["micro"]),
            "FD": float(sample.frechet_distance(sample.features(model.vit, real),
                                                sample.features(model.vit, drawn))),
            "flow": statistics.mean(line["flow"] for line in log)}


def run_row(args, name: str, seed: int) -> dict[str, float]:
    """Trains, evaluates and judges a row, or finds it done."""
    out, reader = args.out / f"{list(ROWS).index(name)}-seed{seed}", args.out / f"reader{seed}"
    batch, flags = ROWS[name][:2]
    train = ["train.py", "--stage", 2, "--data", args.data, "--weights", reader, "--vae",
             args.out / "autoencoder" / "vae" / "model.safetensors", "--steps", args.steps,
             "--batch-size", batch, "--seed", seed, *flags.split(), "--sheet-every", 10**9]
    score = ["sample.py", "evaluate", "--data", args.data, "--samples", args.samples, "--points",
             args.points, "--seed", seed, "--size", 64, "--device", "cpu", "--weights"]
    how, file = " ".join(map(str, train + score)), out / "figures.json"
    if file.exists() and json.loads(file.read_text())["how"] == how:
        return json.loads(file.read_text())["figures"]
    begin = time.monotonic()
    first = args.out / f"0-seed{seed}"
    if (first / "figures.json").exists() and not out.exists():      # the same images, seen alike
        out.mkdir()
        for cache in first.glob("latents-*"):
            shutil.copy(cache, out)
    call(out, *train, "--out", out)
    call(out, *score, out, "--out", out / "evaluation")
    figures = judge(out, reader, args.data)
    file.write_text(json.dumps({"how": how, "figures": figures}))
    print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
          + f" ({time.monotonic() - begin:.0f} s)", flush=True)
    return figures


def prepare(args) -> list:
    """The calls that all rows need: the autoencoder, and a reader a seed."""
    jobs = [(args.out / "autoencoder", "--stage", 0, "--steps", args.vae_steps, "--sheet-every",
             10**9)]
    for seed in range(args.seeds):
        jobs.append((args.out / f"reader{seed}", "--stage", 1, "--steps", args.reading_steps,
                     "--seed", seed, "--sheet-every", 10**9))
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    for name, default, text in (
            ("seeds", 3, "of everything but the autoencoder"), ("steps", 400, "of a row"),
            ("reading-steps", 800, "of stage 1"), ("vae-steps", 700, "of stage 0"),
            ("images", 2048, "that the rows learn from"), ("samples", 256, "images that are judged"),
            ("points", 12, "of the sampler"), ("jobs", 2, "at a time, one thread each")):
        parser.add_argument("--" + name, type=int, default=default,
                            help=f"{text} (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"),
                        help="folder of all runs (default: %(default)s)")
    args = parser.parse_args()
    args.out = args.out.resolve()

    import torch

    from phantoms import write_phantoms     # puts the repository on the path
    torch.set_num_threads(1)
    args.data = args.out / f"images{args.images}-{args.samples}"
    if not (args.data / "metadata.csv").exists():
        write_phantoms(args.data, args.images, args.samples)
    todo = [(name, seed) for seed in range(args.seeds) for name in ROWS]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda job: call(job[0], "train.py", *job[1:], "--out", job[0]),
                          prepare(args)):
            pass
        print(f"the autoencoder and {args.seeds} readers are there", flush=True)
        figures = list(pool.map(lambda job: run_row(args, *job), todo))
    found = {name: [f for f, (n, _) in zip(figures, todo) if n == name] for name in ROWS}
    print("\n" + table(found))
    (args.out / "table.md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
