"""Uses a trained UniX: reads images, draws images, and scores both (the paper's two tables).

    python sample.py report chest.png [more.png ...]
    python sample.py generate "Large right pleural effusion." --out effusion.png
    python sample.py evaluate

Mistakes are one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import csv
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"sample.py: {message}; see --help\n")


def number(kind: type, least: float, most: float = 2**31):
    """For argparse: reads an int or a float from least to most."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} from {least} to {most}")
        return value
    return read


def parse(argv=None) -> argparse.Namespace:
    """The command line; argparse prints help and mistakes (exit code 2)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str, draws=True):
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("--weights", help="weights folder (default: the newest under runs/)")
        add("--device", help="cpu, cuda or mps (default: the best found)")
        add("--seed", type=number(int, 0), default=0, help="of noise and sampling (%(default)s)")
        if draws:
            add("--points", type=number(int, 2), default=50, help="times on the path (%(default)s)")
            add("--guidance", type=number(float, 0), help="guidance scale (default: as trained)")
            add("--eta", type=number(float, 0, 1), help="noise drawn anew in each step, 0 to 1 "
                "(default: as trained)")
            add("--shift", type=number(float, 0.001), default=3.0, help="time shift (%(default)s)")
            add("--size", type=number(int, 1), help="pixels a side (default: as trained)")
        return add

    add = command("report", "write the report of each image", draws=False)
    add("images", nargs="+", help="image files")
    add("--prompt", help="instruction (default: the one used in training)")
    add("--max-tokens", type=number(int, 1), default=500, help="longest report (%(default)s)")
    add("--temperature", type=number(float, 0), default=0.0, help="0 (default): the likeliest word")
    add("--top-p", type=number(float, 0.001, 1), default=1.0, help="nucleus kept (%(default)s)")
    add = command("generate", "draw the image of each text")
    add("texts", nargs="+", help="what the image shows")
    add("--out", default="image.png", help="PNG to write, a sheet of several images (%(default)s)")
    add("--count", type=number(int, 1), default=1, help="images of each text (%(default)s)")
    add = command("evaluate", "score reports and images on held-out data: the paper's two tables")
    add("--data", default="phantom", help="phantom (default) or a data folder")
    add("--split", default="val", choices=("val", "test"), help="which images (%(default)s)")
    add("--samples", type=number(int, 1), default=500, help="images and captions (%(default)s)")
    add("--out", help="folder for the results (default: WEIGHTS/evaluation)")
    add("--features", help="RAD-DINO folder (default: our image encoder)")
    return parser.parse_args(argv)


ARGS = parse() if __name__ == "__main__" else None        # --help answers before torch is imported

import torch                                              # noqa: E402
from tqdm import tqdm                                     # noqa: E402

from data import (CLASSES, UserError, atomic, heart_width, label_report, locate,  # noqa: E402
                  open_data, read_image, save_image, sheet, square)
from ar import vit_pixels                                 # noqa: E402
from diffusion import to_uint8, vae_pixels                            # noqa: E402
from unix import INSTRUCTIONS, UniX, load_rad_dino        # noqa: E402


# ---- images: sets of features, (n, d) and (m, d) arrays (the paper: RAD-DINO CLS features) -------
def as_features(real, fake, least):
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) < least:
        raise ValueError(f"features {real.shape}, {fake.shape}: not two sets of {least} samples")
    return real, fake


def frechet_distance(real, fake):
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) -> float.

    With X the centred samples over sqrt(n - 1), S = X^T X, and tr (S1 S2)^(1/2) is the sum of the
    singular values of X1 X2^T, also where n < d; X's QR factor will do for X (Q cancels)."""
    real, fake = as_features(real, fake, least=2)
    if min(len(real), len(fake)) <= real.shape[1]:
        warnings.warn("Frechet distance is biased upwards with no more samples than dimensions; "
                      "compare only runs with equal numbers of samples", stacklevel=2)
    factors = [np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (real, fake)]
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = sum((r * r).sum() for r in factors)
    return float(((real.mean(0) - fake.mean(0)) ** 2).sum() + traces - 2 * cross)


def kernel_distance(real, fake):
    """Kernel distance -> float: unbiased squared MMD with the kernel (x.y / d + 1)^3 of Binkowski
    et al. 2018, over all samples (no random subsets, so it is deterministic)."""
    real, fake = as_features(real, fake, least=2)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):                              # the mean over pairs of two different samples
        pairs = kernel(a, a)
        return (pairs.sum() - np.trace(pairs)) / (len(a) * (len(a) - 1))
    return float(within(real) + within(fake) - 2 * kernel(real, fake).mean())


def distances(a, b):
    """Euclidean distances, (n, d), (m, d) -> (n, m); those of equal rows are exactly 0."""
    scale = (a * a).sum(1)[:, None] + (b * b).sum(1)
    squared = scale - 2 * a @ b.T
    return np.sqrt(np.where(squared < 1e-13 * scale, 0, squared))


def prdc(real, fake, k=5):
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020) -> dict.
    Each sample has a ball that reaches to its k-th nearest neighbour in its own set."""
    real, fake = as_features(real, fake, least=k + 1)
    real_radius, fake_radius = (                # the k-th from 0, because 0 is the sample itself
        np.partition(distances(x, x), k)[:, k] for x in (real, fake))
    across = distances(real, fake)
    inside = (across < real_radius[:, None]).sum(0)         # real balls around each fake sample
    found = {"precision": (inside > 0).mean(), "recall": (across < fake_radius).any(1).mean(),
             "density": inside.mean() / k, "coverage": (across.min(1) < real_radius).mean()}
    return {name: float(value) for name, value in found.items()}


def psnr(a, b, peak=1.0):
    """Peak signal-to-noise ratio in dB of two arrays of one shape; inf when they are equal."""
    error = ((np.asarray(a, np.float64) - b) ** 2).mean()
    return float(10 * np.log10(peak ** 2 / error)) if error else math.inf


# ---- reports -------------------------------------------------------------------------------------
def check_lengths(a, b):
    if len(a) != len(b) or not len(a):
        raise ValueError(f"needs two lists of one length, at least 1; got {len(a)} and {len(b)}")


def ngram_counts(refs, hyps):
    """Counts of each pair of texts (n, 10): n-grams in both (1 to 4), in hyp; words of ref, hyp."""
    check_lengths(refs, hyps)
    rows = []
    for texts in zip(refs, hyps):
        ref, hyp = (text.lower().split() for text in texts)
        in_ref, in_hyp = ([Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]
                          for words in (ref, hyp))
        matched = [(a & b).total() for a, b in zip(in_ref, in_hyp)]
        total = [max(1, b.total()) for b in in_hyp]     # as NLTK, for hypotheses below n words
        rows.append([*matched, *total, len(ref), len(hyp)])
    return np.array(rows)


def bleu_of(counts):
    """Rows of ngram_counts -> BLEU-1 to BLEU-4 of the corpus, a list of 4 floats."""
    matched, total, (ref_words, hyp_words) = np.split(counts.sum(0), (4, 8))
    with np.errstate(divide="ignore"):                  # none matched: log 0, a score of 0
        log_precision = np.cumsum(np.log(matched / total)) / np.arange(1, 5)
    return np.exp(log_precision + min(0.0, 1 - ref_words / max(1, hyp_words))).tolist()


def bleu(refs, hyps):
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002) of lower-case words -> list of 4 floats."""
    return bleu_of(ngram_counts(refs, hyps))


def rouge_l(refs, hyps):
    """Mean ROUGE-L F1 (Lin 2004) -> float; words are lower-case runs of a-z and 0-9, no stemming.
    The longest common subsequence by one integer as a row of bits (Hyyro 2004): bit j is 0 where
    the length grows at reference word j."""
    check_lengths(refs, hyps)
    scores = []
    for ref, hyp in zip(refs, hyps):
        ref, hyp = (re.findall(r"[a-z0-9]+", text.lower()) for text in (ref, hyp))
        places = Counter()                              # word -> bits of its places in ref
        for j, word in enumerate(ref):
            places[word] += 1 << j
        row = full = (1 << len(ref)) - 1
        for word in hyp:
            match = row & places[word]
            row = ((row + match) | (row - match)) & full
        common = len(ref) - row.bit_count()
        scores.append(2 * common / (len(ref) + len(hyp)) if common else 0.0)
    return float(np.mean(scores))


def f1_scores(truth, predicted):
    """Binary arrays (n, c) -> {"micro": float, "macro": float, "per_class": (c,) array}.
    A class that neither array has counts as 0 in the macro mean (scikit-learn's default)."""
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise ValueError(f"needs two (n, c) arrays, got {truth.shape} and {predicted.shape}")
    hits, size = (truth & predicted).sum(0), truth.sum(0) + predicted.sum(0)
    per_class = 2 * hits / np.maximum(size, 1)
    return {"micro": float(2 * hits.sum() / max(1, size.sum())),
            "macro": float(per_class.mean()), "per_class": per_class}


def bootstrap(score, n, rounds=1000, seed=0, middle=None):
    """95% interval (low, high) of score(indices) -> float or list over resamples of n samples.
    `middle` moves the median there, for figures that repeated samples bias."""
    draw = np.random.default_rng(seed)
    values = np.array([score(draw.integers(n, size=n)) for _ in range(rounds)])
    if middle is not None:
        values = values + middle - np.median(values, axis=0)
    return tuple(np.percentile(values, (2.5, 97.5), axis=0))


def with_intervals(figures, n, rounds=200, move=False):
    """{name: [value, low, high]} of figures(indices) -> {name: float}: the values of all n samples
    and their bootstrap intervals, with `move` those around the values."""
    whole = figures(np.arange(n))
    middle = list(whole.values()) if move else None
    ends = bootstrap(lambda i: list(figures(i).values()), n, rounds, middle=middle)
    return {k: [float(x) for x in row] for k, *row in zip(whole, whole.values(), *ends)}


# ---- reading and drawing -------------------------------------------------------------------------
def chunks(rows, size):
    return (rows[i:i + size] for i in range(0, len(rows), size))


def load(args) -> UniX:
    """The model asked for; args.weights becomes its folder. Raises UserError."""
    if args.weights is None:
        runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UserError("no weights under runs/; run train.py --stage 1 or give --weights")
        args.weights = runs[-1].parent
    device = args.device or ("cuda" if torch.cuda.is_available() else
                             "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):      # torch's answer to a device that is not there
        raise UserError(f"--device {device} is not to be had here; try cpu") from None
    return UniX.load(args.weights, device)


def report(args):
    """Prints the report of each image."""
    model = load(args)
    images = [square(read_image(p), model.config.vit_image) for p in args.images]
    prompt = INSTRUCTIONS[0] if args.prompt is None else args.prompt
    for paths, some in zip(chunks(args.images, 8), chunks(images, 8)):
        pixels = vit_pixels(torch.from_numpy(np.stack(some)).to(model.device))
        written = model.report(pixels, prompt, args.max_tokens, args.temperature, args.top_p,
                               args.seed)
        for path, text in zip(paths, written):
            print(f"{path}: {text}" if len(images) > 1 else text)


def generate(args):
    """Writes the image of each text; a sheet when there are several."""
    out = Path(args.out)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written; name a file in a folder that is there")
    model = load(args)
    images, texts = [], [t for t in args.texts for _ in range(args.count)]
    for some in tqdm([*chunks(texts, 8)], desc="drawing", disable=len(texts) <= 8):
        seeds = range(args.seed + len(images), args.seed + len(images) + len(some))
        drawn = model.generate(some, args.size, seeds, points=args.points, scale=args.guidance,
                               shift=args.shift, eta=args.eta)
        images.extend(drawn[:, 0].cpu().numpy())
    if len(images) == 1:
        save_image(images[0], out)
    else:
        sheet(images, texts, min(len(images), max(args.count, 4)), out)
    print(f"wrote {out}")


# ---- evaluation: the paper's two tables ----------------------------------------------------------
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
SIDED = ("Pleural Effusion", "Pneumothorax", "Lung Opacity")
HEARTS = ("Heart size is normal.", "The heart is mildly enlarged.",
          "The heart is severely enlarged.")


class Results:
    """The folder of an evaluation: what is there is kept, unless weights or settings differ."""

    def __init__(self, args, model: UniX, data):
        self.model, self.size = model, args.size
        self.how = {"points": args.points, "scale": args.guidance, "shift": args.shift,
                    "eta": args.eta}
        self.out = Path(args.out or Path(args.weights) / "evaluation")
        self.images = self.out / "images"
        about, model_file = self.out / "origin.json", Path(args.weights).resolve() / "config.json"
        origin = json.dumps([str(model_file), model_file.stat().st_mtime, data.fingerprint(),
                             args.size, args.seed, self.how])
        self.images.mkdir(parents=True, exist_ok=True)
        if not about.exists() or about.read_text() != origin:
            for old in [*self.images.glob("*.png"), *self.out.glob("*.csv")]:
                old.unlink()
            about.write_text(origin)

    def read(self, name: str, images: np.ndarray, truth: dict[str, str]) -> list[str]:
        """Reports that the model writes of uint8 images (n, h, w); truth: index -> true report.
        Kept in a table with the columns that CheXbert's tools read; rows there are used."""
        file, done = self.out / name, {}
        if file.exists():
            csv.field_size_limit(10**9)                 # reports may be long
            with open(file, newline="", encoding="utf-8") as f:
                done = {row["index"]: row["Report Impression"] for row in csv.DictReader(f)
                        if row["Ground Truth"] == truth.get(row["index"], "")}
        missing = [(k, i) for k, i in enumerate(truth) if i not in done]
        for some in tqdm([*chunks(missing, 32)], desc=f"reading for {name}", unit="batch"):
            rows, indices = zip(*some)
            pixels = self.model.vit.prepare(torch.from_numpy(images[[*rows]]).to(self.model.device))
            written = self.model.report(pixels, max_new=min(200, self.model.config.max_tokens))
            done |= dict(zip(indices, written))
            with atomic(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
                table = csv.writer(f)
                table.writerow(("index", "Report Impression", "Ground Truth"))
                table.writerows((i, done[i], truth[i]) for i in truth if i in done)
        return [done[i] for i in truth]

    def draw(self, wanted: dict[str, tuple[str, int]]) -> np.ndarray:
        """Images by name, each of a text and a seed, uint8 (n, h, w); draws those not there yet."""
        missing = [k for k in wanted if not (self.images / f"{k}.png").exists()]
        for some in tqdm([*chunks(missing, 16)], desc="drawing", unit="batch"):
            texts, seeds = zip(*(wanted[k] for k in some))
            images = self.model.generate(texts, self.size, seeds, **self.how)[:, 0]
            for k, image in zip(some, images.cpu().numpy()):
                save_image(image, self.images / f"{k}.png")
        return np.stack([read_image(self.images / f"{k}.png") for k in wanted])


def label_table(reports: list[str]) -> np.ndarray:
    """(n, 14): 1 where a report has the finding, -1 where it may have it, else 0."""
    return np.array([[found.get(c, 0) for c in CLASSES] for found in map(label_report, reports)])


def right_places(truth: list[str], written: list[str], kind: str, classes) -> np.ndarray:
    """(n, 2): findings of both reports whose "sides" or "severity" agrees, and is truly known."""
    rows = []
    for a, b in zip(map(locate, truth), map(locate, written)):
        right = [a[c][kind] == b[c][kind] for c in classes if c in a and c in b and a[c][kind]]
        rows.append((sum(right), len(right)))
    return np.array(rows)


def report_scores(truth: list[str], written: list[str]) -> dict[str, list[float]]:
    """Table 2, {name: [value, low, high]}: F1 of the findings, words, sides and severities."""
    a, b = label_table(truth), label_table(written)
    flags = {"": (a == 1, b == 1), ", uncertain as positive": (a != 0, b != 0)}
    columns = {14: slice(None), 5: [CLASSES.index(c) for c in FIVE]}
    grams = ngram_counts(truth, written)
    rouge = np.array([rouge_l([x], [y]) for x, y in zip(truth, written)])
    places = {"sides right": right_places(truth, written, "sides", SIDED),
              "severity right": right_places(truth, written, "severity", CLASSES)}

    def figures(i):
        found = {}
        for name, (x, y) in flags.items():
            for count, some in columns.items():
                score = f1_scores(x[i][:, some], y[i][:, some])
                found |= {f"{k} F1-{count}{name}": score[k] for k in ("micro", "macro")}
        found |= {f"BLEU-{n + 1}": value for n, value in enumerate(bleu_of(grams[i]))}
        found["ROUGE-L"] = rouge[i].mean()
        for name, counts in places.items():
            if counts[:, 1].any():
                found[name] = counts[i, 0].sum() / max(1, counts[i, 1].sum())
        return found
    return with_intervals(figures, len(truth))


def image_scores(real: np.ndarray, fake: np.ndarray) -> dict[str, list[float]]:
    """Table 3 on image features (n, d), {name: [value, low, high]}, as far as n allows."""
    def figures(i):
        found = {"FD": frechet_distance(real[i], fake[i]), "KD": kernel_distance(real[i], fake[i])}
        return found | (prdc(real[i], fake[i]) if len(i) > 5 else {})
    found = with_intervals(figures, len(real), rounds=20, move=True) if len(real) > 1 else {}
    for k in found.keys() & {"precision", "recall", "coverage"}:
        found[k] = np.clip(found[k], 0, 1).tolist()         # what moves may leave the range
    return found


@torch.no_grad()
def features(encoder, images: np.ndarray) -> np.ndarray:
    """uint8 images (n, h, w) -> (n, d), float64."""
    parts = [encoder.summary(torch.from_numpy(some).to(encoder.pos_embed.device))
             for some in chunks(images, 32)]
    return torch.cat(parts).double().cpu().numpy()


def heart_triples(results: Results, count=20) -> dict[str, list[float]]:
    """Share of noise seeds whose heart widens from normal to mildly to severely enlarged."""
    seeds, name = range(1000, 1000 + count), "normal < mild < severe, share of seeds"
    images = results.draw({f"heart-{level}-{seed}": (text, seed)
                          for level, text in enumerate(HEARTS) for seed in seeds})
    widths = np.array([heart_width(f) for f in images]).reshape(len(HEARTS), count)
    rises = (np.diff(widths, axis=0) > 0).all(0)
    return with_intervals(lambda i: {name: rises[i].mean()}, count)


@torch.no_grad()
def reconstruction(model: UniX, images: np.ndarray) -> dict[str, list[float]]:
    """PSNR in dB of uint8 images (n, s, s) through the autoencoder and back; mean over images."""
    each = []
    for some in chunks(images, 16):
        pixels = vae_pixels(torch.from_numpy(some).to(model.device))
        back = to_uint8(model.vae.decode(model.vae.latents(model.vae.moments(pixels))))[:, 0]
        each += [psnr(a, b, 255) for a, b in zip(some, back.cpu().numpy())]
    each, name = np.array(each), f"PSNR at {images.shape[1]} px, {len(images)} images"
    return with_intervals(lambda i: {name: each[i].mean()}, len(each))


def evaluate(args):
    """Both tables on held-out images; prints them, writes metrics.json, predictions.csv, images."""
    model = load(args)
    size = args.size or model.config.resolution
    if model.vae is not None:
        model.latent_rows(size)
    encoder = load_rad_dino(args.features).to(model.device) if args.features else model.vit
    data = open_data(args.data, args.split, max(size, model.config.vit_image))
    results = Results(args, model, data)
    images = [data[i] for i in tqdm(range(min(args.samples, len(data))), desc="images")]
    images = {str(f["index"]): f for f in images}         # one that stands in for another is one
    real = np.stack([f["image"] for f in images.values()])
    truth = {i: f["report"] for i, f in images.items()}
    written = results.read("predictions.csv", real, truth)
    metrics = {"understanding": report_scores(list(truth.values()), written)}
    if model.vae is not None:
        metrics["autoencoder"] = {}
        for side in (s for s in (size // 2, size) if s % model.vae.factor == 0):
            small = open_data(args.data, args.split, max(side, 64))
            small = np.stack([square(small[int(i)]["image"], side) for i in list(images)[:100]])
            metrics["autoencoder"] |= reconstruction(model, small)
        if model.llm2vae.weight.any():                  # stage 2 has been run
            captions = {i: f["caption"] for i, f in images.items()}
            metrics |= evaluate_drawing(args, results, encoder, captions, real, written)
    for line in data.dropped.lines():
        print(f"note: {line}")
    for name, table in metrics.items():
        print(f"\n{name} ({len(images)} images of {args.data}, {args.split} split; 95% interval)")
        for k, (value, low, high) in table.items():
            print(f"  {k:42}{value:9.3f}  [{low:.3f}, {high:.3f}]")
    with atomic(results.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps({"samples": len(images), **metrics}, indent=1))
    print(f"\nwrote {results.out}: {', '.join(sorted(p.name for p in results.out.iterdir()))}")


def evaluate_drawing(args, results: Results, encoder, captions: dict, real, written: list) -> dict:
    """Table 3 and the round trip: is what an image was drawn from read back from it?"""
    fake = results.draw({str(i): (text, args.seed + int(i)) for i, text in captions.items()})
    prompts, back = list(captions.values()), results.read("drawn.csv", fake, captions)
    kept = ("micro F1-14", "macro F1-14", "sides right", "severity right")
    trip = {k: v for k, v in report_scores(prompts, back).items() if k in kept}
    ceiling = report_scores(prompts, written)["micro F1-14"]
    trip["micro F1-14 of the true images (ceiling)"] = ceiling
    a, b = label_table(prompts) == 1, label_table(back) == 1

    def by_class(i):
        each = f1_scores(a[i], b[i])["per_class"]
        return {f"F1 {CLASSES[j]} ({a[:, j].sum()})": each[j] for j in np.flatnonzero(a.any(0))}
    trip |= with_intervals(by_class, len(a))
    kind = "RAD-DINO, class token" if args.features else "our image encoder, mean of patches"
    scores = image_scores(features(encoder, real), features(encoder, fake))
    found = {f"generation, features: {kind}": scores,
             "round trip: generated images read back": trip}
    if args.data == "phantom":
        found["severity of the heart"] = heart_triples(results)
    shown = [(image, text) for k in range(min(8, len(real))) for image, text in (
        (real[k], f"REAL {prompts[k]}"), (fake[k], f"DRAWN, read as: {back[k]}"))]
    sheet(*zip(*shown), 4, results.out / "images.png")
    return found


def run(args) -> tuple[int, str]:
    """Runs a command -> exit code and what to say once the progress bars have ended."""
    try:
        {"report": report, "generate": generate, "evaluate": evaluate}[args.command](args)
    except KeyboardInterrupt:
        return 130, "stopped; an evaluation goes on when run again"
    except (UserError, OSError) as e:
        return 2, " ".join(str(e).split())
    return 0, ""


if __name__ == "__main__":
    CODE, SAID = run(ARGS)
    if SAID:
        print("sample.py:", SAID, file=sys.stderr)
    sys.exit(CODE)
