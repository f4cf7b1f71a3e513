"""Uses a trained UniX: reads X-rays, generates them, shows its attention, scores itself.

    python sample.py report chest.png [more.png ...]
    python sample.py generate "Large right pleural effusion." --out effusion.png
    python sample.py look "Large right pleural effusion."     which word steered which part
    python sample.py look chest.png                           where it looked for which word
    python sample.py evaluate                                 the paper's two tables

A mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import csv
import json
import os
import re
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny"   # weights of the repository
SAMPLING = {"seed", "points", "guidance", "eta", "shift", "size"}   # flags of generated images


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"sample.py: {' '.join(message.split())}; see --help\n")


def number(kind: type, least: float, most: float):
    """For argparse: reads an int or a float from least to most."""
    def number(text: str):
        if least <= kind(text) <= most:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{kind(text)} is not from {least:,} to {most:,}")
    return number


def parse(argv=None) -> argparse.Namespace:
    """The command line. argparse prints help and mistakes (exit code 2)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str):
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("--weights", help="weights folder (default: the newest under runs/, else assets/tiny)")
        add("--device", help="cpu, cuda or mps (default: the best found)")
        add("--seed", type=number(int, 0, 2**31), help="of noise and sampling (default: 0)")
        add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: what pays")
        if name != "report":
            add("--points", type=number(int, 2, 10_000), help="times on the path (default: 50)")
            add("--guidance", type=number(float, 1, 100), help="1: none (default: as trained)")
            add("--eta", type=number(float, 0, 1), help="fresh noise, 0 to 1 (default: as trained)")
            add("--shift", type=number(float, 0.001, 1000), help="time shift (default: 3)")
            add("--size", type=number(int, 1, 2**15), help="pixels a side (default: as trained)")
        if name in ("generate", "evaluate"):
            add("--best-of", type=number(int, 1, 1000), metavar="N",
                help="keep the best of N images of a text: the model's own reader chooses it")
        return add
    add = command("report", "write the report of each image")
    add("images", nargs="+", help="image files")
    add("--prompt", help="instruction (default: the first of training's 4)")
    add("--max-tokens", type=number(int, 1, 100_000), default=500, help="longest report (500)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="0: the likeliest word (0)")
    add("--top-p", type=number(float, 0.001, 1), help="nucleus to sample from (default: 1, all)")
    add = command("generate", "generate the image of each text")
    add("texts", nargs="+", help="what the image shows")
    add("--out", default="image.png", help="PNG, a sheet if there are several; or a folder")
    add("--count", type=number(int, 1, 10_000), default=1, help="images of each text (1)")
    add = command("look", "show what the image of a text, or the report of an image, attends to")
    add("what", help="a text, or an image file")
    add("--layer", type=number(int, 1, 1000), help="1 is the first (default: the mean of all)")
    add("--out", default="look.png", help="PNG to write (%(default)s)")
    add = command("evaluate", "score reports and images on held-out data: the paper's two tables")
    add("--data", default="phantom", help="phantom (default) or a data folder")
    add("--split", default="val", choices=("val", "test"), help="which images (%(default)s)")
    add("--samples", type=number(int, 1, 2**31), default=500, help="images and captions (500)")
    add("--out", help="folder for the results (default: evaluation, in WEIGHTS or runs)")
    add("--features", help="RAD-DINO folder (default: our image encoder)")
    add("--judge", metavar="WEIGHTS", help="a second reader of the generated images")
    args = parser.parse_args(argv)
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: Parser):
    """Refuses flags that change nothing. Sets args.given, the names of the flags that were given,
    and args.reads: the command reads images and generates none."""
    args.given = {name for name, value in vars(args).items() if value is not None}
    args.reads = args.command == "report" or args.command == "look" and bool(re.search(
        r"\.(png|jpe?g|tiff?|bmp|gif|webp|dcm)$", args.what, re.I) or os.path.isfile(args.what))
    idle, where = set(), ""
    if args.command == "report" and not args.temperature:
        idle, where = {"seed", "top_p"}, "at temperature 0"
    elif args.command == "look" and args.reads:
        idle, where = SAMPLING, "where an image is read"
    elif vars(args).get("points") == 2:
        idle, where = {"eta", "shift"}, "in a single step"
    for name in sorted(args.given & idle):
        parser.error(f"--{name.replace('_', '-')} changes nothing {where}; leave it out")
    args.seed = args.seed or 0


ARGS = parse() if __name__ == "__main__" else None        # --help answers before torch is imported

import torch                                              # noqa: E402
from PIL import Image, ImageFilter                        # noqa: E402
from tqdm import tqdm                                     # noqa: E402

import joint_attn                                         # noqa: E402
from data import (CLASSES, Dropped, UserError, atomic, impression, label_report,  # noqa: E402
                  locate, open_data, plain_streams, read_image, save_image, sheet, square, table)
from diffusion import shift_time, to_uint8, vae_pixels    # noqa: E402
from unix import INSTRUCTIONS, UniX, load_rad_dino, use_bf16  # noqa: E402


# ---- images: sets of features, (n, d) and (m, d) arrays (the paper: RAD-DINO CLS features) -------
def as_features(real, fake, least):
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) < least:
        raise ValueError(f"features {real.shape}, {fake.shape}: not two sets of {least} samples")
    return real, fake


def frechet_distance(real, fake):
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) -> float.

    With X the centred samples over sqrt(n - 1), S = X^T X, and tr (S1 S2)^(1/2) is the sum of the
    singular values of X1 X2^T, also where n < d; the R of its QR replaces X (Q cancels)."""
    real, fake = as_features(real, fake, least=2)
    if min(len(real), len(fake)) <= real.shape[1]:
        warnings.warn("Frechet distance is biased upwards with no more samples than dimensions; "
                      "compare only runs with equal numbers of samples", stacklevel=2)
    a, b = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (real, fake))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    between = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    return float(between + (a * a).sum() + (b * b).sum() - 2 * cross)


def kernel_distance(real, fake):
    """Kernel distance -> float: unbiased squared MMD with the kernel (x.y / d + 1)^3 of Binkowski
    et al. 2018, over all samples (no random subsets, so it is deterministic)."""
    real, fake = as_features(real, fake, least=2)
    within, across = [], ((real @ fake.T / real.shape[1] + 1) ** 3).mean()
    for x in (real, fake):                      # the mean over pairs of two different samples
        pairs = (x @ x.T / x.shape[1] + 1) ** 3
        within.append((pairs.sum() - np.trace(pairs)) / (len(x) * (len(x) - 1)))
    return float(sum(within) - 2 * across)


def prdc(real, fake, k=5):
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020) -> dict.
    Each sample has a ball that reaches to its k-th nearest neighbour in its own set."""
    real, fake = (torch.from_numpy(x) for x in as_features(real, fake, least=k + 1))
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")       # exact
    real_radius, fake_radius = (        # of the k-th neighbour: the first is the sample itself
        distances(x, x).kthvalue(k + 1).values.numpy() for x in (real, fake))
    across = distances(real, fake).numpy()
    inside = (across < real_radius[:, None]).sum(0)         # real balls around each fake sample
    return {"precision": float((inside > 0).mean()), "density": float(inside.mean() / k),
            "recall": float((across < fake_radius).any(1).mean()),
            "coverage": float((across.min(1) < real_radius).mean())}


def heart_width(image):
    """Measure the cardiothoracic ratio of a frontal image, uint8 (size, size), at 256 px. Outwards
    from the midline, the first dark pixel of a row is the border of the heart; it counts where it
    stands upright just above the diaphragm. If none is seen, a normal heart's is taken."""
    x = Image.fromarray(image).resize((256, 256), Image.BICUBIC).filter(ImageFilter.BoxBlur(3))
    x, heart, chest = np.asarray(x, np.float32), 0, 0
    middle = np.median(x[110:192, 118:138])
    for half, normal, most in ((x[:, 127::-1], .28, .55), (x[:, 128:], .62, .93)):
        wall = 61 + np.diff(half[70:150, 60:120].mean(0)).argmax()  # the steepest rise
        rows, air = half[110:192], np.percentile(half[60:192, 12:wall], 10)
        level = (np.median(rows[:, :10], 1) + rows[:, 12:wall].min(1)) / 2
        dark = rows < np.minimum(level, (air + middle) / 2 + 6)[:, None]
        dark[:, wall - 4:] = True
        border = dark.argmax(1)
        upright = np.abs(border[8:] - border[:-8]) < 5
        seen = border[4:-4][upright & (border[4:-4] < most * wall) & (border[30] < wall - 4)]
        heart += np.median(seen[-6:]) if len(seen) else normal * wall
        chest += wall
    return float(heart / chest)


# ---- reports -------------------------------------------------------------------------------------
def check_lengths(a, b):
    if len(a) != len(b) or not len(a):
        raise ValueError(f"needs two lists of one length, at least 1; got {len(a)} and {len(b)}")


@lru_cache(1 << 16)
def ngram_counts(ref: str, hyp: str) -> list[int]:
    """10 counts: n-grams of 1 to 4 words in both texts, those in hyp; words of ref, of hyp."""
    ref, hyp = (text.lower().split() for text in (ref, hyp))
    in_ref, in_hyp = ([Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]
                      for words in (ref, hyp))
    total = [max(1, b.total()) for b in in_hyp]         # as NLTK, for hypotheses below n words
    return [*((a & b).total() for a, b in zip(in_ref, in_hyp)), *total, len(ref), len(hyp)]


def bleu(refs, hyps):
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002) of lower-case words -> list of 4 floats."""
    check_lengths(refs, hyps)
    counts = np.sum([*map(ngram_counts, refs, hyps)], axis=0)
    matched, total, (ref_words, hyp_words) = np.split(counts, (4, 8))
    with np.errstate(divide="ignore"):                  # none matched: log 0, a score of 0
        log_precision = np.cumsum(np.log(matched / total)) / np.arange(1, 5)
    return np.exp(log_precision + min(0.0, 1 - ref_words / max(1, hyp_words))).tolist()


def rouge_l(refs, hyps):
    """Mean ROUGE-L F1 (Lin 2004) -> float; words are lower-case runs of a-z, 0-9, not stemmed."""
    check_lengths(refs, hyps)
    scores = []
    for texts in zip(refs, hyps):
        ref, hyp = (re.findall(r"[a-z0-9]+", text.lower()) for text in texts)
        row = [0] * (len(hyp) + 1)      # row[j]: longest common subsequence with hyp's first j
        for word in ref:
            above, row = row, [0]
            for j, other in enumerate(hyp):
                row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
        scores.append(2 * row[-1] / max(1, len(ref) + len(hyp)))
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


def with_intervals(figures, n, rounds=200, centred=False):
    """{name: [value, low, high]} of figures(indices) -> {name: float}: the values of all n samples
    and their 95% bootstrap intervals. `centred` moves the median of the resamples to the value, for
    figures that repeated samples bias."""
    rng, whole = np.random.default_rng(0), figures(np.arange(n))
    values = [[*figures(rng.integers(n, size=n)).values()] for _ in range(rounds)]
    low, middle, high = np.percentile(values, (2.5, 50, 97.5), axis=0)
    move = np.array([*whole.values()]) - middle if centred else 0
    rows = zip(whole.values(), low + move, high + move)
    return {name: [float(x) for x in row] for name, row in zip(whole, rows)}


# ---- the model that was asked for ----------------------------------------------------------------
def note(text: str):
    print(f"sample.py: {text}", file=sys.stderr)


def chunks(rows, size: int):
    return (rows[i:i + size] for i in range(0, len(rows), size))


def open_model(args) -> UniX:
    """The model asked for; args.weights becomes its folder. Raises UserError."""
    if args.weights is None:
        runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda p: p.stat().st_mtime)
        args.weights = runs[-1].parent if runs else SHIPPED
        if not runs and not SHIPPED.exists():
            raise UserError("no weights under runs/; run train.py --stage 1 or give --weights")
        note(f"weights {args.weights} ({'the newest run' if runs else 'of the repository'})")
    try:
        device = args.device or torch.accelerator.current_accelerator(check_available=True)
        device = torch.empty(1, device=device).device       # no accelerator, None: the CPU
    except (RuntimeError, AssertionError):      # torch's answer to a device that is not there
        raise UserError(f"--device {args.device} is not to be had here; try cpu") from None
    model = UniX.load(args.weights, device)
    if args.reads and model.config.taught_on == "phantom":
        note("these weights know phantoms alone: what they write of a real X-ray means nothing")
    if use_bf16(args.precision, device, model):
        bf16 = torch.autocast(device.type, torch.bfloat16)
        for name in ("report", "read_captions", "velocity"):    # the autoencoder stays fp32
            setattr(model, name, bf16(getattr(model, name)))
    return model


def settings(args, model: UniX) -> dict:
    """How images are sampled: as asked, else as trained. Raises UserError if they cannot be."""
    config, size = model.config, args.size or model.config.resolution
    model.latent_rows(size)
    if not model.llm2vae.weight.any():          # zero until stage 2
        raise UserError(f"{args.weights} cannot generate yet; run train.py --stage 2, or give "
                        "--weights that can")
    if config.no_context and args.guidance is not None:
        raise UserError("--guidance changes nothing: these weights ignore text; leave it out")
    how = {"points": args.points or 50, "scale": args.guidance or config.guidance, "shift":
           args.shift or 3.0, "eta": config.eta if args.eta is None else args.eta}
    args.used = f"weights {args.weights}, {size} px, guidance {how['scale']:g}, " \
        f"{how['points']} points, shift {how['shift']:g}, eta {how['eta']:g}"
    return how


def read(model: UniX, images: np.ndarray, *how) -> list[str]:
    """Reports of uint8 images (n, h, w). `how`: prompt, longest, temperature, top_p, seed."""
    how = how or (INSTRUCTIONS[0], min(500, model.config.max_tokens))
    return [text for some in torch.from_numpy(images).split(32)
            for text in model.report(model.vit.prepare(some.to(model.device)), *how)]


def best_of(count: int, asked: list[str], written: list[str]) -> np.ndarray:
    """Indices: of every `count` images the one whose report agrees most with its text (the first of
    equals), by F1 of findings, sides and severities (dual self-reward, arXiv 2506.07963)."""
    a, b = label_table(asked) == 1, label_table(written) == 1
    score = f1_scores(a.T, b.T)["per_class"]            # here an image takes the place of a class
    for kind in ("sides", "severity"):
        known, _, right = agree(asked, written, kind, CLASSES).T
        score = score + np.where(known, right / np.maximum(1, known), 1)
    return score.reshape(-1, count).argmax(1) + np.arange(0, len(score), count)


# ---- commands ------------------------------------------------------------------------------------
def report(args):
    """Prints the report of each image."""
    model = open_model(args)
    images = np.stack([square(read_image(p), model.config.vit_image) for p in args.images])
    how = (INSTRUCTIONS[0] if args.prompt is None else args.prompt, args.max_tokens,
           args.temperature, args.top_p or 1.0, args.seed)
    texts = (text for some in chunks(images, 8) for text in read(model, some, *how))
    for path, text in zip(args.images, texts):
        print(f"{path}: {text}" if len(images) > 1 else text)


def generate(args):
    """Writes the image of each text: one PNG, a sheet, or files in a folder."""
    out, count = Path(args.out), args.best_of or 1
    folder = out.is_dir() or args.out.endswith(("/", os.sep))
    if folder:
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out if folder else out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written; name a file in a folder that is there")
    model = open_model(args)
    how = settings(args, model)
    texts = [text for text in args.texts for _ in range(args.count * count)]
    seeds = range(args.seed, args.seed + len(texts))
    images = np.concatenate([
        model.generate(texts[n:n + 8], args.size, seeds[n:n + 8], **how)[:, 0].cpu().numpy()
        for n in tqdm(range(0, len(texts), 8), desc="images", disable=len(texts) <= 8)])
    if count > 1:
        best = best_of(count, texts, read(model, images))
        images, texts, seeds = images[best], [texts[i] for i in best], [seeds[i] for i in best]
        args.used += f", best of {count}"
    if folder:
        for image, text, seed in zip(images, texts, seeds):
            name = "-".join(re.findall("[a-z0-9]+", text.lower()))[:60] or "image"
            save_image(image, out / f"{name}-seed{seed}.png")
    elif len(images) == 1:
        save_image(images[0], out)
    else:
        sheet(images, texts, min(len(images), max(args.count, 4)), out)
    print(f"wrote {out}: {args.used}, seed {', '.join(map(str, seeds))}")


def look(args):
    """Writes maps of the attention (Eq. 5) over the image, a row of one scale for each word."""
    model = open_model(args)
    if (args.layer or 1) > (depth := len(model.lm.tower.layers)):
        raise UserError(f"--layer {args.layer}: these weights have {depth} layers")
    if args.reads:
        image, model.cut_texts = square(read_image(args.what), model.config.vit_image), True
        ids, maps = report_maps(model, image)
        cells, captions, times = [image], [args.what], [""]
        print(model.tokenizer.decode(ids))
    else:
        how, ids = settings(args, model), model.ids(args.what)
        if model.config.no_context:
            raise UserError("there is nothing to look at: these weights ignore text")
        latents, maps = caption_maps(model, ids, args.size, args.seed, **how)
        steps = sorted({round(s) for s in np.linspace(0, len(latents) - 1, 8)})
        path, maps = shift_time(torch.linspace(1, 0, how["points"]), how["shift"]), maps[steps]
        with torch.no_grad():
            cells = [*to_uint8(model.vae.decode(latents[steps]))[:, 0].cpu().numpy()]
        captions, image = [f"image at t = {path[s + 1]:.2f}" for s in steps], cells[-1]
        times = [f" at t = {path[s]:.2f}" for s in steps]
        print(f"{args.used}, seed {args.seed}")
    maps = maps[:, args.layer - 1] if args.layer else maps.mean(1)
    for word, at in words(model.tokenizer, ids):
        heat = maps[..., at].mean(-1)
        cells += [overlay(image, one / heat.max()) for one in heat]
        captions += [f"{word}{when}\nfull red: {heat.max():.1%}" for when in times]
    sheet(cells, captions, 6 if args.reads else len(times), Path(args.out))
    print(f"wrote {args.out}")


# ---- attention weights, which the fused attention never holds ------------------------------------
WORDS = re.compile(r"\b(?!(?:the|an?|is|are|has|seen|of|in|on|at|to|and|or|with|it|there|this|size"
                   r"|findings|impression|lungs?)\b)[^\W\d_][\w-]*", re.I)    # that `look` shows


def attention(q, k, mask=None, causal=False):
    """softmax(q k^T / sqrt(d)) of Eq. 5, arguments as in `attend` -> (b, h, l, m)."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / q.shape[-1] ** 0.5
    mask = torch.ones_like(scores, dtype=torch.bool).tril() if causal else mask
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


@contextmanager
def recorded():
    """Yields a list. Until the end of the block, each attention of the towers adds its weights
    (l, m): the first sample's, the mean over heads. The model still uses the fused attention."""
    fused, weights = joint_attn.attend, []

    def attend(q, k, v, mask=None, causal=False):
        weights.append(attention(q, k, mask, causal)[0].mean(0).float())
        return fused(q, k, v, mask, causal)
    joint_attn.attend = attend
    try:
        yield weights
    finally:
        joint_attn.attend = fused


def words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words of a text that say something, in order, each with the positions of its tokens."""
    ends = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
    return [(m[0].lower(), [i for i, (start, end) in enumerate(zip(ends, ends[1:]))
                            if start < m.end() and end > m.start()])
            for m in WORDS.finditer(tokenizer.decode(ids))]


@torch.no_grad()
def caption_maps(model: UniX, ids: list[int], size, seed: int, **how):
    """Generates an image of a text -> the latents after each step (s, c, h, w), and how much each
    latent token attends to each token of the text (s, layers, rows, columns, l)."""
    side, latents, maps = model.latent_rows(size), [], []
    with recorded() as weights:
        for x in model.sample_latents([ids], side, side, [seed], **how):
            step = torch.stack(weights[-len(model.lm.tower.layers):])
            maps.append(step[:, 2:, 1:1 + len(ids)].cpu())  # rows: no markers; columns: no BOS
            latents.append(x)
            weights.clear()
    return torch.cat(latents), torch.stack(maps).unflatten(2, model.grid(side, side))


@torch.no_grad()
def report_maps(model: UniX, image: np.ndarray):
    """Writes the report of a uint8 image -> its token ids, and how much each of them attends to
    each patch (1, layers, rows, columns, l)."""
    written, = read(model, image[None])
    if not written.strip():
        raise UserError("these weights write nothing about this image; train stage 1 for longer")
    ids = model.ids(written)
    start = [*model.wrap(model.ids(INSTRUCTIONS[0])), model.config.bos]
    block = model.embed_image(model.vit.prepare(torch.from_numpy(image[None]).to(model.device)))
    with recorded() as weights:
        model.lm.read_text(*model.pad([start + ids]), block)
    weights = torch.stack(weights[::2]).cpu()               # [1::2]: the image block once more
    patches = weights[:, block.shape[1] + len(start):, 1:block.shape[1] - 1].mT
    return ids, patches.unflatten(1, (model.vit.image // model.vit.patch, -1))[None]


def overlay(image: np.ndarray, heat) -> np.ndarray:
    """A map (rows, columns) of values from 0 to 1 in red over a uint8 image -> (h, w, 3)."""
    heat = Image.fromarray(np.float32(heat)).resize(image.shape[::-1], Image.Resampling.BILINEAR)
    heat = np.asarray(heat)[..., None] * 0.7
    return (image[..., None] * (1 - heat) + heat * (255, 40, 0)).astype(np.uint8)


# ---- evaluation: the paper's two tables ----------------------------------------------------------
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
SIDED = ("Pleural Effusion", "Pneumothorax", "Lung Opacity")
HEARTS = "Heart size is normal.", "The heart is mildly enlarged.", "The heart is severely enlarged."


def label_table(reports: list[str]) -> np.ndarray:
    """(n, 14): 1 where a report has the finding, -1 where it may have it, else 0."""
    return np.array([[found.get(c, 0) for c in CLASSES] for found in map(label_report, reports)])


def agree(truth: list[str], written: list[str], kind: str, classes) -> np.ndarray:
    """Counts (n, 3) of findings: `kind` ("sides" or "severity") known; of these, written too; of
    these, `kind` right."""
    rows = []
    for a, b in zip(map(locate, truth), map(locate, written)):
        known = [c for c in classes if c in a and a[c][kind]]
        both = [c for c in known if c in b]
        rows.append((len(known), len(both), sum(a[c][kind] == b[c][kind] for c in both)))
    return np.array(rows)


def report_scores(truth: list[str], written: list[str]) -> dict[str, list[float]]:
    """Table 2, {name: [value, low, high]}: F1 of the findings, words, sides and severities."""
    a, b = label_table(truth), label_table(written)
    positive = a == 1, b == 1
    five = [CLASSES.index(c) for c in FIVE]
    pairs = {f"F1-{n}{name}": (x[:, columns], y[:, columns])
             for name, (x, y) in (("", positive), (", uncertain as positive", (a != 0, b != 0)))
             for n, columns in ((14, slice(None)), (5, five))}
    details = {"sides right": agree(truth, written, "sides", SIDED),
               "severity right": agree(truth, written, "severity", CLASSES)}
    rouge = np.array([rouge_l([x], [y]) for x, y in zip(truth, written)])

    def figures(i):
        scores = {name: f1_scores(x[i], y[i]) for name, (x, y) in pairs.items()}
        found = {f"{k} {name}": f1[k] for name, f1 in scores.items() for k in ("micro", "macro")}
        grams = bleu([truth[j] for j in i], [written[j] for j in i])
        found |= {f"BLEU-{n}": value for n, value in enumerate(grams, 1)}
        found |= {"ROUGE-L": rouge[i].mean()}
        found |= {name: counts[i, 2].sum() / max(1, counts[i, 1].sum())
                  for name, counts in details.items() if counts[:, 1].any()}
        each, known = scores["F1-14"]["per_class"], positive[0].sum(0)
        return found | {f"F1 {CLASSES[j]} ({known[j]})": each[j] for j in np.flatnonzero(known)}
    return with_intervals(figures, len(truth))


def image_scores(real: np.ndarray, fake: np.ndarray) -> dict[str, list[float]]:
    """Table 3 on image features (n, d), {name: [value, low, high]}, as far as n allows."""
    def figures(i):
        found = {"FD": frechet_distance(real[i], fake[i]), "KD": kernel_distance(real[i], fake[i])}
        return found | (prdc(real[i], fake[i]) if len(i) > 5 else {})
    found = with_intervals(figures, len(real), 20, centred=True) if len(real) > 1 else {}
    bounded = found.keys() & {"precision", "recall", "coverage"}     # centring may move them out
    return found | {k: np.clip(found[k], 0, 1).tolist() for k in bounded}


@torch.no_grad()
def features(encoder, images: np.ndarray) -> np.ndarray:
    """uint8 images (n, h, w) -> (n, d), float64."""
    parts = torch.from_numpy(images).to(encoder.pos_embed.device).split(32)
    return torch.cat([encoder.summary(some) for some in parts]).cpu().double().numpy()


@torch.no_grad()
def reconstruction(model: UniX, images: np.ndarray) -> dict[str, list[float]]:
    """PSNR in dB of uint8 images (n, s, s) through the autoencoder and back; mean over images."""
    each, vae = [], model.vae
    for some in torch.from_numpy(images).to(model.device).split(32):
        back = to_uint8(vae.decode(vae.latents(vae.moments(vae_pixels(some)))))[:, 0].cpu()
        each.append((some.cpu().double() - back).square().mean((1, 2)))     # MPS has no float64
    each = (10 * torch.log10(255 ** 2 / torch.cat(each))).numpy()
    name = f"PSNR at {images.shape[1]} px, {len(images)} images"
    return with_intervals(lambda i: {name: each[i].mean()}, len(each))


class Evaluation:
    """The folder of an evaluation. What is there is kept, unless weights or settings differ."""

    def __init__(self, args):
        model = self.model = open_model(args)
        self.args, self.size = args, args.size or model.config.resolution
        self.how, model.cut_texts = {}, True    # empty: these weights cannot generate yet
        if model.vae is not None and model.llm2vae.weight.any():
            self.how = settings(args, model)
        elif idle := sorted(args.given & (SAMPLING - {"size"} | {"judge", "best_of", "features"})):
            raise UserError(f"--{idle[0].replace('_', '-')} changes nothing, as {args.weights} "
                            "cannot generate yet; leave it out, or run train.py --stage 2")
        self.encoder = load_rad_dino(args.features).to(model.device) if args.features else model.vit
        self.judge = args.judge and open_model(argparse.Namespace(
            **vars(args) | {"weights": args.judge}))
        self.data = open_data(args.data, args.split, max(self.size, model.config.vit_image))
        home = Path(args.weights).resolve()
        self.out = Path(args.out or (Path("runs") if home == SHIPPED else home) / "evaluation")
        self.out.mkdir(parents=True, exist_ok=True)
        about, config = self.out / "origin.json", home / "config.json"
        origin = json.dumps([str(config), config.stat().st_mtime, self.data.fingerprint(),
                             args.size, args.seed, args.precision, self.how])
        if not about.exists() or about.read_text(errors="replace") != origin:
            for old in [*self.out.glob("images/*/*.png"), *self.out.glob("*.csv")]:
                old.unlink()
            with atomic(about) as temporary:
                temporary.write_text(origin)

    def reports(self, name: str, images: np.ndarray, truth: dict[str, str]) -> list[str]:
        """The model's reports of uint8 images (n, h, w); truth: index -> true report. They are kept
        in a table with the columns that CheXbert's tools read. What is there is used."""
        file, columns, done = self.out / name, ["index", "Report Impression", "Ground Truth"], {}
        if file.exists():
            rows = table(file, [name.lower() for name in columns], Dropped())
            done = {i: text for i, text, true in rows if truth.get(i) == true}
        missing = [(i, n) for n, i in enumerate(truth) if i not in done]
        for some in tqdm([*chunks(missing, 32)], desc=name, unit="batch"):
            indices, rows = zip(*some)
            done |= zip(indices, read(self.model, images[[*rows]]))
            with atomic(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
                csv.writer(f).writerows(
                    [columns, *([i, done[i], truth[i]] for i in truth if i in done)])
        return [done[i] for i in truth]

    def images(self, kind: str, wanted: dict[str, tuple[str, int]]) -> np.ndarray:
        """Images by name, each of a text and a seed -> uint8 (n, h, w). What is there is used."""
        files = {name: self.out / "images" / kind / f"{name}.png" for name in wanted}
        (self.out / "images" / kind).mkdir(parents=True, exist_ok=True)
        missing = [name for name, file in files.items() if not file.exists()]
        for some in tqdm([*chunks(missing, 16)], desc=f"images of {kind}", unit="batch"):
            texts, seeds = zip(*(wanted[name] for name in some))
            made = self.model.generate(texts, self.args.size, seeds, **self.how)[:, 0]
            for name, image in zip(some, made.cpu().numpy()):
                save_image(image, files[name])
        return np.stack([*map(read_image, files.values())])

    def round_trip(self, kind: str, prompts: dict[str, str], real: np.ndarray, written: list[str]):
        """Does the reader find in an image what its text says? Tables 3 and 4 for texts by index,
        and a sheet; `real`, `written`: the true images (n, h, w) and what is read from them."""
        count, asked, tables = self.args.best_of or 1, [*prompts.values()], {}
        wanted = {f"{i}-{k}" if k else i: (text, self.args.seed + int(i) + k * 1_000_000)
                  for i, text in prompts.items() for k in range(count)}
        texts, images = [text for text, _ in wanted.values()], self.images(kind, wanted)
        back = self.reports(f"generated-{kind}.csv", images, dict(zip(wanted, texts)))
        best = best_of(count, texts, back)
        images, back = images[best], [back[i] for i in best]
        if kind == "reports":
            which = "RAD-DINO, class token" if self.args.features else \
                "our image encoder, mean of patches"
            tables[f"generation, features: {which}"] = image_scores(
                features(self.encoder, real), features(self.encoder, images))
        readers = {"": back} | ({", second reader": read(self.judge, images)} if self.judge else {})
        scores = {k + name: v for name, reports in readers.items()
                  for k, v in report_scores(asked, reports).items()
                  if re.match("(micro|macro) F1-14$|sides|severity|F1 ", k)}
        scores["micro F1-14 of the true images (ceiling)"] = report_scores(
            asked, written)["micro F1-14"]
        cells = [image for pair in zip(real[:8], images) for image in pair]
        lines = [line for a, b in zip(asked, back[:8]) for line in (
            f"TRUE IMAGE\n{a}", f"GENERATED, AND READ AS\n{b}")]
        sheet([square(c, images.shape[1]) for c in cells], lines, 4, self.out / f"{kind}.png")
        return tables | {f"round trip of {kind}: generated images read back": scores}

    def hearts(self, count=20) -> dict[str, list[float]]:
        """Share of noise seeds whose heart widens from normal to mildly to severely enlarged."""
        wanted = {f"{level}-{seed}": (text, seed) for level, text in enumerate(HEARTS)
                  for seed in range(1000, 1000 + count)}
        widths = np.array([*map(heart_width, self.images("hearts", wanted))]).reshape(-1, count)
        rises, name = (np.diff(widths, axis=0) > 0).all(0), "normal < mild < severe, share of seeds"
        return with_intervals(lambda i: {name: rises[i].mean()}, count)


def evaluate(args):
    """Both tables on held-out images; prints them, writes metrics.json, reports and images."""
    run = Evaluation(args)
    vae, data = run.model.vae, run.data
    samples = [data[i] for i in tqdm(range(min(args.samples, len(data))), desc="true images")]
    samples = {str(s["index"]): s for s in samples}     # one that replaced a broken one counts once
    real = np.stack([s["image"] for s in samples.values()])
    truth = {i: s["report"] for i, s in samples.items()}
    written = run.reports("predictions.csv", real, truth)
    metrics = {"understanding": report_scores([*truth.values()], written)}
    if vae is not None:
        metrics["autoencoder"] = {}
        for side in (s for s in (run.size // 2, run.size) if s % vae.factor == 0):
            data.size = max(side, 64)                   # no phantom is smaller
            small = np.stack([square(data[int(i)]["image"], side) for i in [*samples][:100]])
            metrics["autoencoder"] |= reconstruction(run.model, small)
    if run.how:
        for kind, shorten in (("reports", str), ("impressions", impression)):
            prompts = {i: shorten(s["caption"]) for i, s in samples.items()}
            metrics |= run.round_trip(kind, prompts, real, written)
        if args.data == "phantom":
            metrics["severity of the heart"] = run.hearts()
    for line in data.dropped.lines():
        print(f"note: {line}")
    if (args.best_of or 1) > 1:
        print(f"note: the reader that chose the best of {args.best_of} images also scores them"
              + "; --judge WEIGHTS adds a second reader" * (not args.judge))
    for name, scores in metrics.items():
        print(f"\n{name} ({len(samples)} images of {args.data}, {args.split} split; 95% interval)")
        for k, (value, low, high) in scores.items():
            print(f"  {k:42}{value:9.3f}  [{low:.3f}, {high:.3f}]")
    with atomic(run.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps({"samples": len(samples), **metrics}, indent=1))
    print(f"\nwrote {run.out}: {', '.join(sorted(p.name for p in run.out.iterdir()))}")


COMMANDS = {"report": report, "generate": generate, "look": look, "evaluate": evaluate}


def run(args) -> tuple[int, str]:
    """Runs a command -> exit code and what to say once the progress bars have ended."""
    try:
        COMMANDS[args.command](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130, "stopped; an evaluation resumes when run again"
    except (UserError, OSError) as e:
        return 2, " ".join(str(e).split())
    except RuntimeError as e:
        if not re.search("(out of|allocate|enough) memory", str(e)):
            raise
        return 2, "the device has too little memory: try a smaller --size, or --device cpu"
    return 0, ""


if __name__ == "__main__":
    plain_streams()
    CODE, SAID = run(ARGS)
    if SAID:
        note(SAID)
    sys.exit(CODE)
