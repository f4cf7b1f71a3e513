"""Uses a trained UniX: reads films, draws films, and scores both (the paper's two tables).

    python sample.py report chest.png [more.png ...]
    python sample.py generate "Large right pleural effusion. Heart size is normal." --out effusion.png
    python sample.py evaluate
"""

import argparse
import csv
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np


def parse(argv=None) -> argparse.Namespace:
    """The command line; argparse prints help and mistakes (exit code 2)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str):
        p = commands.add_parser(name, help=text, description=text,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--weights", help="weights folder (default: the newest under runs/)")
        p.add_argument("--device", default=None, help="cpu, cuda or mps (default: the best found)")
        p.add_argument("--seed", type=int, default=0, help="seed of noise and sampling")
        return p

    def flow(p):
        p.add_argument("--points", type=int, default=50, help="times on the path; one step less")
        p.add_argument("--guidance", type=float, default=None,
                       help="guidance scale (default: what the weights folder says)")
        p.add_argument("--shift", type=float, default=3.0, help="time shift towards noise")
        p.add_argument("--size", type=int, default=None, help="pixels a side (default: as trained)")
    p = command("report", "write the report of each film")
    p.add_argument("images", nargs="+", help="image files")
    p.add_argument("--prompt", default=None, help="instruction (default: the one used in training)")
    p.add_argument("--max-tokens", type=int, default=500, help="longest report")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy, always the same")
    p.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling: probability kept")
    p = command("generate", "draw the film of each text")
    p.add_argument("texts", nargs="+", help="what the film shows")
    p.add_argument("--out", default="film.png", help="PNG to write; a sheet for more than one film")
    p.add_argument("--count", type=int, default=1, help="films a text, each from other noise")
    flow(p)
    p = command("evaluate", "score reports and films on held-out data: the paper's two tables")
    p.add_argument("--data", default="phantom", help="phantom or a data folder")
    p.add_argument("--split", default="val", choices=("val", "test"), help="which films")
    p.add_argument("--samples", type=int, default=500, help="how many films and captions")
    p.add_argument("--out", default=None, help="folder for the results (default: WEIGHTS/evaluation)")
    p.add_argument("--features", default=None, help="RAD-DINO folder (default: our image encoder)")
    flow(p)
    return parser.parse_args(argv)


ARGS = parse() if __name__ == "__main__" else None       # --help answers before torch is imported

import torch                                              # noqa: E402
from tqdm import tqdm                                     # noqa: E402

from ar import resize                                     # noqa: E402
from data import (CLASSES, UserError, atomic, heart_width, label_report, locate,  # noqa: E402
                  open_data, read_image, save_film, sheet, square, vae_pixels, vit_pixels)
from diffusion import to_uint8                            # noqa: E402
from unix import INSTRUCTIONS, UniX, load_rad_dino        # noqa: E402


# ---- images: sets of features, (n, d) and (m, d) arrays (the paper: RAD-DINO CLS features) -------
def as_features(real, fake, least):
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (n, d) and (m, d), got {real.shape} and {fake.shape}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"needs at least {least} samples a set, got {len(real)} and {len(fake)}")
    return real, fake


def frechet_distance(real, fake):
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) -> float.

    With X the centred samples over sqrt(n - 1), S = X^T X, and tr (S1 S2)^(1/2) is the sum of the
    singular values of X1 X2^T; no matrix root is taken, so n < d is exact too. X's QR factor
    stands in for X (Q cancels), so nothing larger than (d, d) is decomposed.
    """
    real, fake = as_features(real, fake, least=2)
    if min(len(real), len(fake)) <= real.shape[1]:
        warnings.warn("Frechet distance is biased upwards with no more samples than dimensions; "
                      "compare only runs with equal numbers of samples", stacklevel=2)
    means = [x.mean(0) for x in (real, fake)]
    factors = [np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r")
               for x, mean in zip((real, fake), means)]
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = sum((r * r).sum() for r in factors)
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * cross)


def kernel_distance(real, fake):
    """Kernel distance -> float: unbiased squared MMD with the kernel (x.y / d + 1)^3 of Binkowski
    et al. 2018, over all samples (no random subsets, so it is deterministic)."""
    real, fake = as_features(real, fake, least=2)
    d, n, m = real.shape[1], len(real), len(fake)

    def kernel_sum(a, b):
        return sum(((rows @ b.T / d + 1) ** 3).sum() for rows in chunks(a))

    def kernel_of_self(a):                      # the unbiased estimate leaves these pairs out
        return (((a * a).sum(1) / d + 1) ** 3).sum()

    within_real = (kernel_sum(real, real) - kernel_of_self(real)) / (n * (n - 1))
    within_fake = (kernel_sum(fake, fake) - kernel_of_self(fake)) / (m * (m - 1))
    return float(within_real + within_fake - 2 * kernel_sum(real, fake) / (n * m))


def chunks(rows, size=512):
    return (rows[i:i + size] for i in range(0, len(rows), size))


def distances(a, b):
    """Euclidean distances, (n, d), (m, d) -> blocks of rows (c, m): memory is c m, not n m."""
    b_squared = (b * b).sum(1)
    for rows in chunks(a):
        scale = (rows * rows).sum(1)[:, None] + b_squared
        squared = scale - 2 * rows @ b.T
        yield np.sqrt(np.where(squared < 1e-13 * scale, 0, squared))    # equal rows: exactly 0


def prdc(real, fake, k=5):
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020) -> dict.

    Each sample has a ball that reaches to its k-th nearest neighbour in its own set. ValueError
    when a set has no more than k samples.
    """
    real, fake = as_features(real, fake, least=k + 1)
    real_radius, fake_radius = (                # the k-th from 0, because 0 is the sample itself
        np.concatenate([np.partition(block, k)[:, k] for block in distances(x, x)])
        for x in (real, fake))
    inside, recalled, nearest = np.zeros(len(fake)), [], []
    for block, radius in zip(distances(real, fake), chunks(real_radius)):
        inside += (block < radius[:, None]).sum(0)      # real balls around each fake sample
        recalled.append((block < fake_radius).any(1))
        nearest.append(block.min(1) < radius)
    return {"precision": float((inside > 0).mean()),
            "recall": float(np.concatenate(recalled).mean()),
            "density": float(inside.mean() / k),
            "coverage": float(np.concatenate(nearest).mean())}


def psnr(a, b, peak=1.0):
    """Peak signal-to-noise ratio in dB of two arrays of one shape; inf when they are equal."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"images differ in shape: {a.shape} and {b.shape}")
    error = ((a - b) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(peak ** 2 / error))


# ---- reports -------------------------------------------------------------------------------------
def check_lengths(a, b):
    if len(a) != len(b) or not len(a):
        raise ValueError(f"needs two lists of one length, at least 1; got {len(a)} and {len(b)}")


def bleu(refs, hyps):
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002), one reference each, lower case, split on
    white space, no smoothing -> list of 4 floats."""
    check_lengths(refs, hyps)
    refs, hyps = ([text.lower().split() for text in texts] for texts in (refs, hyps))
    ref_words, hyp_words = (sum(map(len, texts)) for texts in (refs, hyps))
    log_precision, scores = 0.0, []
    for n in range(1, 5):
        matched = total = 0
        for ref, hyp in zip(refs, hyps):
            counts = [Counter(zip(*(words[i:] for i in range(n)))) for words in (ref, hyp)]
            matched += (counts[0] & counts[1]).total()
            total += max(1, counts[1].total())          # as NLTK, for hypotheses below n words
        log_precision += np.log(matched / total) if matched else -np.inf
        brevity = min(0.0, 1 - ref_words / max(1, hyp_words))
        scores.append(float(np.exp(log_precision / n + brevity)))
    return scores


def rouge_l(refs, hyps):
    """Mean ROUGE-L F1 (Lin 2004) -> float; words are lower-case runs of a-z and 0-9, no stemming.

    The longest common subsequence is found with one integer as a row of bits (Hyyro 2004): bit j
    is 0 where the length grows at reference word j, so a hypothesis word costs three operations.
    """
    check_lengths(refs, hyps)
    scores = []
    for ref, hyp in zip(refs, hyps):
        ref, hyp = (re.findall(r"[a-z0-9]+", text.lower()) for text in (ref, hyp))
        places = Counter()                              # word -> bits of its places in ref
        for j, word in enumerate(ref):
            places[word] += 1 << j
        full = (1 << len(ref)) - 1
        row = full
        for word in hyp:
            match = row & places[word]
            row = ((row + match) | (row - match)) & full
        common = len(ref) - row.bit_count()
        scores.append(2 * common / (len(ref) + len(hyp)) if common else 0.0)
    return float(np.mean(scores))


def f1_scores(truth, predicted):
    """Binary arrays (n, c) -> {"micro": float, "macro": float, "per_class": (c,) array}.

    A class that neither array has counts as 0 in the macro mean (scikit-learn's zero_division=0).
    """
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise ValueError(f"needs two (n, c) arrays, got {truth.shape} and {predicted.shape}")
    hits, size = (truth & predicted).sum(0), truth.sum(0) + predicted.sum(0)
    per_class = 2 * hits / np.maximum(size, 1)
    return {"micro": float(2 * hits.sum() / max(1, size.sum())),
            "macro": float(per_class.mean()), "per_class": per_class}


def bootstrap(score, n, rounds=1000, seed=0):
    """95% interval (low, high) of score(indices) -> float over resamples of n samples."""
    draw = np.random.default_rng(seed)
    values = [score(draw.integers(n, size=n)) for _ in range(rounds)]
    return tuple(float(v) for v in np.percentile(values, (2.5, 97.5)))


# ---------------------------------------------------------------- reading and drawing


def load(args) -> UniX:
    """The model that the command line asks for. Raises UserError."""
    folder = args.weights
    if folder is None:
        runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UserError("no weights under runs/; make some with: python train.py --stage 1 "
                            "(or name a folder with --weights)")
        folder = args.weights = runs[-1].parent
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return UniX.load(folder, args.device or best)


def flow_options(args, model: UniX) -> dict:
    if args.points < 2:
        raise UserError("--points must be at least 2")
    scale = model.config.guidance if args.guidance is None else args.guidance
    return {"points": args.points, "scale": scale, "shift": args.shift}


def report(args):
    """Prints the report of each film."""
    model = load(args)
    films = [square(read_image(p), model.config.vit_image) for p in args.images]
    prompt = args.prompt if args.prompt is not None else INSTRUCTIONS[0]
    for at in range(0, len(films), 8):
        pixels = vit_pixels(torch.from_numpy(np.stack(films[at:at + 8])).to(model.device))
        written = model.report(pixels, prompt, args.max_tokens, args.temperature, args.top_p, args.seed)
        for path, text in zip(args.images[at:at + 8], written):
            print(f"{path}: {text}" if len(films) > 1 else text)


def generate(args):
    """Writes the film of each text; a sheet when there are several."""
    model = load(args)
    how, texts = flow_options(args, model), [t for t in args.texts for _ in range(args.count)]
    films = []
    for at in tqdm(range(0, len(texts), 8), desc="drawing", disable=len(texts) <= 8):
        some = texts[at:at + 8]
        seeds = [args.seed + at + i for i in range(len(some))]
        films.extend(model.generate(some, args.size, seeds, **how)[:, 0].cpu().numpy())
    if len(films) == 1:
        save_film(films[0], args.out)
    else:
        sheet(films, texts, min(len(films), max(args.count, 4)), args.out)
    print(f"wrote {args.out}")


# ---------------------------------------------------------------- evaluation: the paper's two tables

FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
SIDED = ("Pleural Effusion", "Pneumothorax", "Lung Opacity")
HEARTS = ("Heart size is normal.", "The heart is mildly enlarged.", "The heart is severely enlarged.")


class Results:
    """The folder of an evaluation: what is there already is not computed again, unless it came
    from other weights, films or settings."""

    def __init__(self, args, model: UniX, data):
        weights = Path(args.weights) / "model.safetensors"
        self.out = Path(args.out or Path(args.weights) / "evaluation")
        self.films, self.table = self.out / "films", self.out / "predictions.csv"
        origin = {"weights": [str(weights.resolve()), weights.stat().st_mtime], "data": data.fingerprint(),
                  **{k: getattr(args, k) for k in ("points", "guidance", "shift", "size", "seed")}}
        about = self.out / "origin.json"
        self.films.mkdir(parents=True, exist_ok=True)
        if not about.exists() or json.loads(about.read_text()) != origin:
            for old in [*self.films.glob("*.png"), self.table]:
                old.unlink(missing_ok=True)
            about.write_text(json.dumps(origin))

    def written(self) -> dict[int, tuple[str, str]]:
        """Index -> report written, report of the data."""
        if not self.table.exists():
            return {}
        with open(self.table, newline="") as f:
            return {int(r["index"]): (r["Report Impression"], r["Ground Truth"]) for r in csv.DictReader(f)}

    def add(self, rows: list[tuple]):
        new = not self.table.exists()
        with open(self.table, "a", newline="") as f:
            csv.writer(f).writerows([("index", "Report Impression", "Ground Truth")] * new + rows)


def read_films(model: UniX, films: np.ndarray, size=32) -> list[str]:
    """uint8 films (n, h, w) -> the reports that the understanding branch writes."""
    found = []
    for at in range(0, len(films), size):
        pixels = vit_pixels(resize(torch.from_numpy(films[at:at + size]).to(model.device),
                                   model.config.vit_image))
        found += model.report(pixels, max_new=min(200, model.config.max_tokens))
    return found


def label_table(reports: list[str], uncertain: int) -> np.ndarray:
    """(n, 14) flags of the findings in reports; -1 (uncertain) counts as `uncertain`, 0 or 1."""
    found = [label_report(r) for r in reports]
    return np.array([[(uncertain if f.get(c) == -1 else f.get(c, 0)) for c in CLASSES] for f in found])


def with_interval(score, n: int) -> list[float]:
    """[value, low, high]: a figure of all n samples and its 95% bootstrap interval."""
    return [score(np.arange(n)), *bootstrap(score, n, 200)]


def report_scores(truth: list[str], written: list[str]) -> dict[str, list[float]]:
    """Table 2: F1 of findings (uncertain as negative and as positive), words, sides, severities."""
    five, found = [CLASSES.index(c) for c in FIVE], {}
    for name, uncertain in (("", 0), (", uncertain as positive", 1)):
        a, b = label_table(truth, uncertain), label_table(written, uncertain)
        for kind in ("micro", "macro"):
            for count, columns in ((14, slice(None)), (5, five)):
                found[f"{kind} F1-{count}{name}"] = with_interval(
                    lambda i: f1_scores(a[i][:, columns], b[i][:, columns])[kind], len(a))
    pick = lambda rows, i: [rows[k] for k in i]                             # noqa: E731
    for n in range(4):
        found[f"BLEU-{n + 1}"] = [bleu(truth, written)[n]]
    found["BLEU-4"] = with_interval(lambda i: bleu(pick(truth, i), pick(written, i))[3], len(truth))
    found["ROUGE-L"] = [rouge_l(truth, written)]
    places = [(locate(a), locate(b)) for a, b in zip(truth, written)]
    for kind, classes in (("sides", SIDED), ("severity", CLASSES)):
        right = [a[c][kind] == b[c][kind] for a, b in places for c in classes
                 if c in a and c in b and a[c][kind]]
        found[f"{kind} right"] = [float(np.mean(right)) if right else float("nan")]
    return found


def film_scores(real: np.ndarray, fake: np.ndarray) -> dict[str, list[float]]:
    """Table 3 on image features (n, d): FD, KD, precision, recall, density, coverage."""
    n = len(real)

    def both(score):
        return with_interval(lambda i: score(real[i], fake[i]), n)
    found = {"FD": both(frechet_distance), "KD": both(kernel_distance)}
    if n > 5:
        found |= {k: [v] for k, v in prdc(real, fake).items()}
    return found


@torch.no_grad()
def features(encoder, films: np.ndarray) -> np.ndarray:
    """uint8 films (n, h, w) -> (n, d), float64."""
    parts = [encoder.summary(torch.from_numpy(films[at:at + 32]).to(encoder.pos_embed.device))
             for at in range(0, len(films), 32)]
    return torch.cat(parts).double().cpu().numpy()


def draw_missing(args, model: UniX, results: Results, captions: dict[int, str]) -> np.ndarray:
    """Draws the captions whose film is not in the folder yet -> all films, uint8 (n, h, w)."""
    missing = [i for i in captions if not (results.films / f"{i}.png").exists()]
    how = flow_options(args, model)
    for at in tqdm(range(0, len(missing), 16), desc="drawing", unit="batch"):
        some = missing[at:at + 16]
        films = model.generate([captions[i] for i in some], args.size, [args.seed + i for i in some], **how)
        for i, film in zip(some, films[:, 0].cpu().numpy()):
            save_film(film, results.films / f"{i}.png")
    return np.stack([read_image(results.films / f"{i}.png") for i in captions])


def heart_triples(args, model: UniX, count=20) -> list[float]:
    """Share of noise seeds whose heart widens from normal to mildly to severely enlarged."""
    how, seeds = flow_options(args, model), range(1000, 1000 + count)
    widths = []
    for text in tqdm(HEARTS, desc="hearts"):
        films = model.generate([text] * count, args.size, list(seeds), **how)[:, 0].cpu().numpy()
        widths.append([heart_width(f) for f in films])
    rises = (np.diff(widths, axis=0) > 0).all(0)
    return with_interval(lambda i: float(rises[i].mean()), count)


@torch.no_grad()
def reconstruction(model: UniX, films: np.ndarray) -> float:
    """PSNR in dB of films (n, h, w) through the autoencoder and back; mean over films."""
    back = [to_uint8(model.vae.decode(model.vae.latents(model.vae.moments(
        vae_pixels(torch.from_numpy(films[at:at + 16]).to(model.device))))))[:, 0].cpu().numpy()
        for at in range(0, len(films), 16)]
    return float(np.mean([psnr(a, b, 255) for a, b in zip(films, np.concatenate(back))]))


def evaluate(args):
    """Both tables on held-out films; prints them and writes metrics.json, predictions.csv, a sheet."""
    model = load(args)
    draws = model.vae is not None and bool(model.llm2vae.weight.any())     # has stage 2 been run?
    size = args.size or (model.config.resolution if draws else model.config.vit_image)
    data = open_data(args.data, args.split, max(size, model.config.vit_image))
    results = Results(args, model, data)
    n = min(args.samples, len(data))
    films = [data[i] for i in tqdm(range(n), desc="films")]
    films = list({f["index"]: f for f in films}.values())
    real = np.stack([f["image"] for f in films])
    done = results.written()
    todo = [k for k, f in enumerate(films) if f["index"] not in done]
    for at in tqdm(range(0, len(todo), 32), desc="reading", unit="batch"):
        some = todo[at:at + 32]
        results.add([(films[k]["index"], w, films[k]["report"]) for k, w in
                     zip(some, read_films(model, real[some]))])
    done = results.written()
    written, truth = zip(*(done[f["index"]] for f in films))
    metrics = {"understanding": report_scores(list(truth), list(written))}
    if model.vae is not None:
        metrics["autoencoder"] = {f"PSNR at {s} px": [reconstruction(model, np.stack(
            [square(f, s) for f in real[:100]]))] for s in (size // 2, size)}
    if draws:
        metrics |= evaluate_drawing(args, model, results, films, real, list(written))
    for name, table in metrics.items():
        print(f"\n{name} ({len(films)} films of {args.data}, {args.split} split)")
        for k, (value, *interval) in table.items():
            print(f"  {k:42}{value:9.3f}" + ("  [{:.3f}, {:.3f}]".format(*interval) if interval else ""))
    with atomic(results.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps({"samples": len(films), **metrics}, indent=1))
    print(f"\nwrote {results.out}: metrics.json, predictions.csv" + ", films, films.png" * draws)


def evaluate_drawing(args, model: UniX, results: Results, films: list, real, written: list) -> dict:
    """Table 3 and the round trip: is what a film was drawn from read back from it?"""
    captions = {f["index"]: f["caption"] for f in films}
    fake = draw_missing(args, model, results, captions)
    encoder = load_rad_dino(args.features).to(model.device) if args.features else model.vit
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        scores = film_scores(features(encoder, real), features(encoder, fake))
    if notes:
        print(f"note: {notes[0].message}")
    prompts = [f["caption"] for f in films]
    back = read_films(model, fake)
    trip, ceiling = report_scores(prompts, back), report_scores(prompts, written)
    a, b = label_table(prompts, 0), label_table(back, 0)
    by_class = f1_scores(a, b)["per_class"]
    kind = "RAD-DINO, class token" if args.features else "our image encoder, mean of patches"
    found = {f"generation, features: {kind}": scores, "round trip: generated films read back": {
        **{k: trip[k] for k in ("micro F1-14", "macro F1-14", "sides right", "severity right")},
        "micro F1-14 of the true films (ceiling)": ceiling["micro F1-14"],
        **{f"F1 {c} ({int(a[:, j].sum())})": [float(by_class[j])] for j, c in enumerate(CLASSES)
           if a[:, j].any()}}}
    if args.data == "phantom":
        found["severity of the heart"] = {"normal < mild < severe, share of seeds": heart_triples(args, model)}
    rows = [x for k in range(min(8, len(films))) for x in (real[k], fake[k])]
    texts = [t for k in range(min(8, len(films))) for t in (f"REAL {prompts[k]}", f"DRAWN, read as: {back[k]}")]
    sheet(rows, texts, 4, results.out / "films.png")
    return found


if __name__ == "__main__":
    try:
        {"report": report, "generate": generate, "evaluate": evaluate}[ARGS.command](ARGS)
    except UserError as e:
        sys.exit(print(f"sample.py: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
