"""Images and reports in, batches out (ours).

An image is grey, uint8 (h, w). A report is `FINDINGS: ... IMPRESSION: ...`, or one of both. Sides
are the patient's: the patient's left is on the viewer's right. The order: images, data folders,
batches; then the synthetic data set; then labels and cleaning of reports.
"""

import argparse
import atexit
import codecs
import collections
import contextlib
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import time
import tomllib
import warnings
import zlib
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, TiffImagePlugin, UnidentifiedImageError

CLASSES = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity",
           "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
           "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices")
ASSETS = Path(__file__).resolve().parent / "assets"
WINDOWS = os.name == "nt"  # it replaces no file that is mapped, or open in another program


class UserError(Exception):
    """A user's mistake: one line that says what is wrong and what to do."""


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, which takes its name once it is whole and on disk.
    UserError if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        for wait in (.1, .3, 1, 2) if WINDOWS else ():  # a scanner or a viewer has it open
            with contextlib.suppress(PermissionError):
                os.replace(temporary, path)
                return
            time.sleep(wait)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def plain_streams():
    """Print what the console cannot encode as \\xe9, not as a traceback. Programs call it first."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------- images
warnings.filterwarnings("ignore", module="PIL")  # on odd metadata, and what read_image refuses
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")  # no EPS: that would start Ghostscript
PNG, BITS, PHOTOMETRIC = b"\x89PNG\r\n\x1a\n", 258, 262  # how a PNG begins; tags of TIFF
for key, how in [*TiffImagePlugin.OPEN_INFO.items()]:  # PIL lacks deep ones whose 0 is white
    if key[1] == 1 and how[0][0] in "IF":
        TiffImagePlugin.OPEN_INFO.setdefault((key[0], 0, *key[2:]), how)


def read_image(path, at_least=0):
    """File -> uint8 (h, w) grey, upright as its EXIF says. UserError if it is no readable image.

    Grey deeper than 8 bits: the lowest value becomes black and the highest white. What is
    transparent becomes black. `at_least`: a JPEG may be decoded smaller, with no side shorter.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; give the path of an image")
    content = b"?"
    try:
        content = Path(path).read_bytes()
        return decode_image(without_metadata(content), at_least)
    except Exception as error:  # PIL raises a dozen kinds for broken files
        if content[128:132] == b"DICM":
            raise UserError(f"{path} is a DICOM file; convert it to PNG first, for example with "
                            f"DCMTK: dcmj2pnm --write-16-bit-png {path} IMAGE.png") from None
        problem = ("it is empty" if not content else "its format is not known" if isinstance(
            error, UnidentifiedImageError) else " ".join(str(error).split()))
        raise UserError(f"{path} is no readable image ({problem}); give a whole PNG, JPEG or TIFF "
                        f"of at most {Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None


def without_metadata(content):
    """The bytes of an image, for a PNG those of its pixels: broken metadata must not cost them."""
    if not content.startswith(PNG):
        return content
    kept, at = [PNG], len(PNG)
    while at < len(content):
        name, end = content[at + 4:at + 8], at + 12 + int.from_bytes(content[at:at + 4], "big")
        whole = zlib.crc32(content[at + 4:end - 4]).to_bytes(4, "big") == content[end - 4:end]
        if name[:1].isupper() or name in (b"tRNS", b"eXIf") and whole:  # upper case: pixels need it
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def decode_image(content, at_least):
    """The bytes of a file -> uint8 (h, w). Many kinds of exception if they are broken."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        if at_least:
            image.draft("L", (at_least, at_least))
        tags = dict(getattr(image, "tag_v2", {}))
        deep = ";16" in str(image.tile) or max(tags.get(BITS, (8,))) > 8
        image.load()
        with contextlib.suppress(Exception):  # garbage EXIF: the pixels are whole all the same
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # I;16, I, F; PIL inverts 0 = white in 8 bits only
            x = np.asarray(image, np.float64) * (-1 if tags.get(PHOTOMETRIC) == 0 else 1)
            known = x[np.isfinite(x)] if np.isfinite(x).any() else np.zeros(1)
            x = (x - known.min()) * (255 / max(np.ptp(known), 1e-30))
            return np.where(np.isfinite(x), x, 0).round().astype(np.uint8)
        if deep:
            raise ValueError(f"16 bits a channel of {image.mode}; save it with 8, or as grey")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return np.array(image.convert("L"))


def square(image, size):
    """uint8 (h, w) -> (size, size): scaled with antialiasing, centred, padded with black."""
    h, w = (max(1, round(side * size / max(image.shape))) for side in image.shape)
    top, left = (size - h) // 2, (size - w) // 2
    padded = np.zeros((size, size), np.uint8)  # after scaling: a long thin image costs no memory
    scaled = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC, reducing_gap=3)
    padded[top:top + h, left:left + w] = scaled
    return padded


# ---------------------------------------------------------------- data folders
codecs.register_error("windows", lambda error: (     # of Windows tables that are no UTF-8
    error.object[error.start:error.end].decode("cp1252", "replace"), error.end))


class Dropped(dict):
    """Reason -> [count, first example]: nothing is left out without a word."""
    rows = 0  # how many were read

    def add(self, reason, example):
        self.setdefault(reason, [0, str(example)])[0] += 1

    def lines(self):
        return [f"{count:,} of {self.rows:,} {reason}: first {example}"
                for reason, (count, example) in self.items()]


def table(path, columns, dropped):
    """Yield the wanted columns of a .csv, .csv.gz or .jsonl file, a list a row: of "a|b" the first
    that it has; "a?" may be absent and is then "". UserError if it is unreadable or lacks one."""
    at, keys, opener = 0, [], gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="windows", newline="") as file:
            lines = (line.replace("\0", "") for line in file)
            rows = csv.DictReader(lines, restval="\0")
            if ".jsonl" in path.suffixes:
                rows = ({**json.loads(line, parse_constant=lambda nan: None)} for line in lines
                        if line.strip())
            for at, row in enumerate(rows, 1):
                keys = keys or [find_column(path, column, row) for column in columns]
                values = ["" if isinstance(row.get(key), (type(None), list, dict)) else
                          str(row[key]) for key in keys]
                if "\0" in values:
                    dropped.add(f"rows of {path.name} cut short, skipped", values[0])
                else:  # without lone surrogates
                    yield [value.encode(errors="replace").decode() for value in values]
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error, csv.Error) as e:
        raise UserError(f"{path} cannot be read (row {at + 1}: {e}); fix it or copy it again"
                        ) from None
    if not at:
        raise UserError(f"{path} has no rows; fill it or remove it")


def find_column(path, column, names):
    """The name that a row has for a wanted column."""
    known, wanted = {str(name).strip().lower(): name for name in names}, column.rstrip("?")
    found = [known[name] for name in wanted.split("|") if name in known]
    if not found and column == wanted:
        raise UserError(f"{path} has no column '{column}', only {', '.join(known)[:200]}; add it")
    return found[0] if found else wanted.split("|")[0]  # a later line of .jsonl may have it


def hash_split(key, test=None):
    """80/10/10 by a hash of `key`, or 90/10/0 where `test` says if it is of a given test set."""
    tenth = hashlib.sha256(key.encode()).digest()[0] % 10
    return "test" if (tenth == 9 if test is None else test) else "val" if tenth == 8 else "train"


def listing(folder):
    """The set of names in a folder; none if it is no folder or may not be read."""
    with contextlib.suppress(OSError):
        return set(os.listdir(folder))
    return set()


class Item(NamedTuple):
    """An image. The images of one study share `id`, the name of their report."""
    id: str
    path: str          # below the data folder
    report: str
    caption: str = ""  # what to generate it from, if that is not the report
    kind: str = "raw"  # of the report: "raw", "clean", a "file" (MIMIC), or "labels" (NIH)


def mimic_rows(root, dropped, splits, views):
    """Yield (split, Item, why it is left out or "") for every image; the other layouts as well."""
    views = dict(table(views[0], ("dicom_id", "viewposition"), dropped))
    columns = ("dicom_id", "study_id", "subject_id", "split")
    for name, study, subject, split in table(splits[0], columns, dropped):
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        why = "" if views.get(name) in ("AP", "PA") else "images not frontal (AP, PA)"
        yield split, Item(f"s{study}", f"{folder}/{name}.jpg", f"{folder}.txt", "", "file"), why


def iu_rows(root, dropped, reports, projections):
    texts, folders = {}, ("images/images_normalized", "images_normalized", "images")
    folder = next((f for f in folders if listing(root / f)), "images")
    for uid, *parts in table(reports[0], ("uid", "findings", "impression"), dropped):
        if uid in texts:
            yield "", Item(uid, "", ""), "reports repeated"
        texts.setdefault(uid, join_sections(dict(zip(("FINDINGS", "IMPRESSION"), parts))))
    unused = set(texts)
    for uid, name, view in table(projections[0], ("uid", "filename", "projection"), dropped):
        why = "images not frontal" if view != "Frontal" else "" if uid in texts else (
            "images without a report")
        unused -= set() if why else {uid}
        yield hash_split(uid), Item(uid, f"{folder}/{name}", texts.get(uid, "")), why
    for uid in sorted(unused):
        yield "", Item(uid, "", ""), "reports without a frontal image"


def nih_rows(root, dropped, entries):
    folders = ("images", *(f"{p.name}/images" for p in root.glob("images_*")))
    where = {name: folder for folder in folders for name in listing(root / folder)}
    official, known = root / "test_list.txt", {*NIH, "No Finding"}
    tests = set(official.read_text("latin-1").split()) if official.exists() else None
    columns = ("image index", "finding labels", "patient id")
    for name, labels, patient in table(entries[-1], columns, dropped):
        why = "" if known.issuperset(labels.split("|")) else "images with an unknown label"
        split = hash_split(patient, None if tests is None else name in tests)
        path = f"{where.get(name, 'images')}/{name}"
        yield split, Item(name, path, sys.intern(labels), "", "labels"), why


def listed_rows(root, dropped, files):
    """metadata.csv / .jsonl, or CheXGenBench's tables of training and of test prompts."""
    columns = ("image|path|image_path|img_path|filename", "report|annotated_prompt",
               "caption|annotated_prompt?", "split?", "id?")
    for file in files:
        named = re.search(r"(?<![a-z])(train|test)(?![a-z])", file.name.lower())
        for path, report, caption, split, name in table(file, columns, dropped):
            path = re.sub(r"^(?=p\d\d/)", "files/", path.replace("\\", "/"))  # inside MIMIC
            patient = re.search(r"p\d{8}", path) or [path]
            split = split or hash_split(patient[0], named and named[0] == "test")
            kind = "clean" if caption == report else "raw"  # CheXGenBench's prompts are clean
            yield split, Item(name or path, path, report, caption, kind), ""


LAYOUTS = {  # name: its rows(root, dropped, files of each pattern), and the patterns of its tables
    "MIMIC-CXR-JPG": (mimic_rows, "mimic-cxr-2.?.?-split.csv", "mimic-cxr-2.?.?-metadata.csv"),
    "IU / Open-i": (iu_rows, "indiana_reports.csv", "indiana_projections.csv"),
    "NIH ChestX-ray14": (nih_rows, "Data_Entry_2017.csv|Data_Entry_2017_v????.csv"),
    "CheXGenBench": (listed_rows, "LLAVARAD_ANNOTATIONS_*.csv"),
    "plain folder": (listed_rows, "metadata.csv"),
    "plain JSON folder": (listed_rows, "metadata.jsonl"),
    "table of prompts": (listed_rows, "*.csv")}
ENDLESS = 1 << 40
SPLITS = {"tra": "train", "val": "val", "dev": "val", "tes": "test"}  # validate, testing, ...
LEAVES = re.compile(r"^/|^\w:|(^|/)\.\.(/|$)")  # a path that leaves its folder
RAW = ("raw", "file")  # kinds of reports that can be cleaned
say_once = lru_cache(None)(lambda text: print(text, file=sys.stderr))


def find_layout(source, task):
    """-> name of the layout, its folder, and the files of each of its patterns. UserError."""
    root, names = Path(source), listing(source)
    if root.is_file():
        root, names = root.parent, {root.name}
    names = sorted(n for n in names if n[0] not in ".~#"  # no editor's files; none twice, packed
                   and not (n.endswith(".gz") and n.removesuffix(".gz") in names))
    for layout in sorted(LAYOUTS, key=lambda name: task == "image" and name != "CheXGenBench"):
        tables = [[root / n for n in names for p in pattern.split("|")
                   if fnmatch(n.removesuffix(".gz"), p)] for pattern in LAYOUTS[layout][1:]]
        if all(tables):
            return layout, root, tables
    wanted = "; ".join(f"{name} ({', '.join(pats)})" for name, (_, *pats) in LAYOUTS.items())
    problem = "holds no known layout" if os.path.exists(source) else "does not exist"
    raise UserError(f"{source} {problem}; give 'phantom' or a folder of one of: {wanted}")


def read_data(source, size, task="report", raw=False):
    """'phantom' or a data folder (or one table of it) -> {"train", "val", "test": Dataset}; looks
    at no image. Where CheXGenBench's prompts lie in another layout's folder, the task "image" takes
    these. Reports are those of cleaned.jsonl where it has them, unless `raw`.
    UserError if the folder or a table is missing, unknown or broken."""
    dropped, cleaned, seen = Dropped(), {}, set()
    if source == "phantom":
        sizes = {"train": ENDLESS, "val": 512, "test": 512}
        return {k: Dataset(Path(), source, k, range(n), size, dropped) for k, n in sizes.items()}
    layout, root, tables = find_layout(source, task)
    if not raw and (root / "cleaned.jsonl").exists():
        cleaned = dict(table(root / "cleaned.jsonl", ("id", "report"), dropped))
    splits, unused = {"train": [], "val": [], "test": []}, set(cleaned)
    for name, item, why in LAYOUTS[layout][0](root, dropped, *tables):
        split = SPLITS.get(name.strip().lower()[:3])
        if item.kind in RAW and item.id in cleaned and not why:
            unused.discard(item.id)
            item = item._replace(report=cleaned[item.id], kind="clean")
        why = why or (
            "rows of an unknown split" if not split else
            "rows without an image" if not item.path else
            "paths out of the data folder" if LEAVES.search(item.path) else
            "images listed before" if item.path in seen else
            "empty reports" if not item.report.strip() else "")
        if why:
            dropped.add(f"{why}, skipped", f"{item.path or item.id} {name}")
        else:
            seen.add(item.path)
            splits[split].append(item)
    dropped.rows = len(seen) + sum(count for count, _ in dropped.values())
    for name in sorted(unused):
        dropped.add("lines of cleaned.jsonl of unknown id, unused", name)
    return {k: Dataset(root, layout, k, v, size, dropped) for k, v in splits.items()}


def open_data(source, split, size, task="report"):
    """-> the Dataset of a split of 'phantom' or of a data folder, its images known to be there.
    Says on stderr if reports are not cleaned yet."""
    data = read_data(source, size, task)[split]
    data.drop_missing()
    if raw := data.layout != "phantom" and sum(item.kind in RAW for item in data.items):
        say_once(f"{raw:,} of {len(data):,} reports of the {split} split are not cleaned; clean "
                 f"them before training: python data.py {data.root} --clean")
    return data


# ---------------------------------------------------------------- batches
UNREADABLE, EMPTY = "images unreadable, skipped", "reports missing or empty, skipped"
CHUNK, PATIENCE = 8, 15  # samples a task of a loader process; seconds to wait for one


class Dataset:
    """The images and reports of a split, opened when they are asked for: ds[i] is
    {"image": uint8 (size, size), "report", "caption", "index", "notes"}. A broken image or an empty
    report is replaced by the next good item (whose index is given), and `dropped` counts it.
    UserError if over 5% of the images are missing or, of 20 or more decoded, unreadable."""

    def __init__(self, root, layout, split, items, size, dropped):
        self.root, self.layout, self.split, self.items, self.size = root, layout, split, items, size
        self.dropped, self.seen, self.unreadable, self.of = dropped, set(), 0, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        sample = self.fetch(range(len(self))[index])
        self.account([sample], len(self))
        return sample

    def fingerprint(self):
        """A name for caches: changes with the layout, the split, the size and any item."""
        known = repr((self.layout, self.split, self.size, self.items))
        return hashlib.sha256(known.encode(errors="backslashreplace")).hexdigest()[:16]

    def drop_missing(self):
        """Leave out and count the items whose image is not there; lists every folder once."""
        if not self.items:
            why = "; ".join(self.dropped.lines()) or "its table has no rows of it"
            raise UserError(f"{self.root} ({self.layout}) has no {self.split} split: {why}")
        if self.layout == "phantom":
            return
        folders = {os.path.dirname(item.path) for item in self.items}
        there = {(folder, name) for folder in folders for name in listing(self.root / folder)}
        missing = [item.path for item in self.items if os.path.split(item.path) not in there]
        if len(missing) > .05 * len(self):
            raise UserError(f"{len(missing):,} of {len(self):,} images of the {self.split} split "
                            f"are missing; the first is expected at {self.root / missing[0]}")
        for path in missing:
            self.dropped.add("images missing, skipped", path)
        self.items = [item for item in self.items if os.path.split(item.path) in there]

    def raw(self, i):
        """The i-th report as it was found: "" if its file is missing."""
        item = self.items[i]
        for folder in ("mimic-cxr-reports", "") if item.kind == "file" else ():
            with contextlib.suppress(OSError):
                return (self.root / folder / item.report).read_text("utf-8", "windows")
        return "" if item.kind == "file" else item.report

    def text(self, i):
        """-> the i-th report in the form FINDINGS: ... IMPRESSION: ..., and whether it is clean."""
        if self.layout == "phantom":
            return phantom_scene(self.split, i)[2], True
        item = self.items[i]
        if item.kind == "labels":  # NIH has no reports: one is written, always the same
            found = [NIH[label] for label in item.report.split("|") if label in NIH]
            return write_report(found, np.random.default_rng([*item.id.encode()])), True
        clean = item.kind == "clean"
        return item.report if clean else join_sections(split_sections(self.raw(i))), clean

    def fetch(self, index):
        """ds[index]; "notes": the index, its path, and what is wrong with it or "". UserError if 20
        items in a row are broken, or 5% of all."""
        if self.layout == "phantom":
            image, _, report, _ = phantom(self.split, index, self.size)
            return {"image": image, "report": report, "caption": report, "index": index,
                    "notes": (index, "", "")}
        n, notes = len(self), ()
        for i in range(index, index + min(n, max(20, n // 20 + 1))):  # all broken: over 5%
            item, (report, _), image = self.items[i % n], self.text(i % n), None
            with contextlib.suppress(UserError):
                image = square(read_image(self.root / item.path, 2 * self.size), self.size)
            wrong = EMPTY if not report else UNREADABLE if image is None else ""
            notes = notes or (index, item.path, wrong)
            if not wrong:
                return {"image": image, "report": report, "index": i % n, "notes": notes,
                        "caption": item.caption.strip() or report}
        raise UserError(f"too much of {self.root} is broken, {notes[2].split(',')[0]}: {notes[1]} "
                        f"and the {i - index} after it; fix or remove them")

    def account(self, samples, of=400):
        """Count what is new in the samples' notes. UserError if over 5% is broken: of all that were
        seen, or of the largest `of` yet. Samples in order give len(self), as broken images often
        lie together; at random, 400, as a few early ones must not stop a good run."""
        self.of = max(self.of, of)
        for i, path, wrong in (sample["notes"] for sample in samples):
            if wrong and i not in self.seen:
                if wrong not in self.dropped:
                    print(f"{path}: {wrong}; from here on only counted", file=sys.stderr)
                self.dropped.add(wrong, path)
                self.unreadable += wrong == UNREADABLE
            self.seen.add(i)
        enough = max(len(self.seen), min(len(self), self.of))
        if len(self.seen) >= 20 and self.unreadable > .05 * enough:
            raise UserError(f"too much of {self.root} is broken; fix or remove it: "
                            + "; ".join(self.dropped.lines()))


def batches(dataset, batch_size, seed, start_step=0, workers=0, rank=0, world=1):
    """Endless batches {"image": uint8 (b, size, size), "report", "caption": [str], "index": (b,)},
    or whatever the data set's samples hold. The k-th depends on (seed, k) alone, so start_step
    resumes, and `workers` changes nothing. Rank r gets its b = about batch_size / world rows of it.
    UserError if too much is broken, or if a loader process is killed or stalls."""
    first, last = (batch_size * (rank + i) // world for i in (0, 1))
    b, n = last - first, len(dataset)
    if batch_size < world:
        raise UserError(f"a batch of {batch_size} is too small for {world} processes")
    order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(n))

    def chunks():
        for start in itertools.count(start_step * batch_size + first, batch_size):
            at = range(start, start + b)
            rows = [*at] if n == ENDLESS else [int(order(i // n)[i % n]) for i in at]
            yield from (rows[i:i + CHUNK] for i in range(0, b, CHUNK))

    import torch  # here: a first look does without
    parts = -(-b // CHUNK)
    with contextlib.closing(load_chunks(dataset, chunks(), workers, 2 * parts)) as loaded:
        while True:
            samples = [*itertools.chain(*itertools.islice(loaded, parts))]
            dataset.account(samples)
            rows = {key: [s[key] for s in samples] for key in samples[0] if key != "notes"}
            yield {key: row if isinstance(row[0], str) else torch.as_tensor(np.stack(row))
                   for key, row in rows.items()}


def load_chunks(dataset, chunks, workers, ahead):
    """Yield the samples of each chunk of indices. The k-th comes from loader process k % workers;
    each has up to `ahead` chunks waiting. UserError if one is killed or gives nothing for PATIENCE
    seconds."""
    if not workers:
        yield from ([dataset.fetch(i) for i in rows] for rows in chunks)
        return
    crew, chunks, sent = [], iter(chunks), 0
    ahead, masks = min(ahead, 64), hasattr(signal, "pthread_sigmask")  # 64 fit into a pipe
    try:
        if masks:  # these never reach a loader process: the program decides when it ends
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        for _ in range(workers):
            pipe, its_end = multiprocessing.Pipe()
            args = (dataset, its_end, pipe)
            process = multiprocessing.Process(target=serve, args=args, daemon=True)
            process.start()
            its_end.close()
            crew.append((process, pipe))
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        atexit.register(kill_workers)
        for k in itertools.count():
            _, pipe = crew[k % workers]
            patience = PATIENCE if k >= workers else 8 * PATIENCE  # they have to import first
            try:
                for rows in itertools.islice(chunks, k + workers * ahead - sent):
                    crew[sent % workers][1].send(rows)
                    sent += 1
                if k == sent:
                    return
                if not pipe.poll(patience):
                    raise UserError(f"the loader processes gave nothing for {patience} s (a disk "
                                    "that hangs?); run the command again, or with --workers 0")
                samples = pipe.recv()
            except (EOFError, OSError):
                raise UserError("a loader process was killed (out of memory?); run the command "
                                "again, with fewer --workers") from None
            if isinstance(samples, Exception):
                raise samples
            yield samples
    finally:
        for process, _ in crew:
            process.kill()


def serve(dataset, pipe, other_end):
    """A loader process: chunks of indices in, samples out, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows has no masks
    other_end.close()  # only then does it notice that the program has ended
    with contextlib.suppress(EOFError, OSError):
        while True:
            rows = pipe.recv()
            try:
                pipe.send([dataset.fetch(i) for i in rows])
            except Exception as error:
                pipe.send(error)


def kill_workers():
    """Kill all processes that this one started through multiprocessing, also those that hang."""
    for process in multiprocessing.active_children():
        process.kill()


# ---------------------------------------------------------------- phantoms: what can be found
# For the paper you need not read on: this makes the synthetic data set; then reports are cleaned.
PHANTOMS = tomllib.loads((ASSETS / "phantoms.toml").read_text("utf-8"))
CHOICES, ANATOMY, GRADE = PHANTOMS["choices"], PHANTOMS["anatomy"], PHANTOMS["grades"]
HEART = GRADE["Cardiomegaly"]
SIDES, GRADES = ("left", "right"), ("mild", "moderate", "severe")


class Finding(NamedTuple):
    """One finding; "": not known or not applicable."""
    name: str           # one of CLASSES, or an extra of NIH such as "Emphysema"
    side: str = ""      # the patient's "left", "right" or "bilateral"
    severity: str = ""  # "mild", "moderate", "severe"
    place: str = ""     # "upper", "mid", "lower"; "apical", "lateral"
    kind: str = ""      # "nodule", "mass"; the device

    def rank(self):
        """Its position in CLASSES; behind all of them for what is none of the 14."""
        return (*CLASSES, self.name).index(self.name)


NIH = {label: Finding(**fields) for label, fields in PHANTOMS["nih"].items()}
# heart_ratio: the width of the heart over the inner width of the chest
Phantom = collections.namedtuple("Phantom", "image findings report heart_ratio")


def phantom(split, index, size):
    """The Phantom number `index` of "train", "val" or "test", a pure function of its arguments."""
    scene, findings, report = phantom_scene(split, index)
    return Phantom(paint(scene, findings, size), findings, report, heart_ratio(scene, findings))


def phantom_scene(split, index):
    """-> scene, findings, report of an image, without painting it."""
    rng = np.random.default_rng((("train", "val", "test").index(split), index))
    scene, findings = sample_scene(rng), sample_findings(rng)
    return scene, findings, write_report(findings, rng)


def sample_scene(rng):
    """A dict: the quantities in ANATOMY, and "jitter", 14 x 4 uniforms, a row for each class."""
    low, high = np.array(list(ANATOMY.values())).T
    scene = dict(zip(ANATOMY, (low + (high - low) * rng.random(len(low))).tolist()))
    return {**scene, "jitter": rng.random((len(CLASSES), 4)).tolist()}


def sample_findings(rng):
    """A tuple: empty for 23% of images, else one to four findings that do not hide each other."""
    wanted = np.searchsorted((.23, .45, .73, .90), rng.random())
    waits = rng.exponential(size=len(CHOICES)) / [PHANTOMS["weights"][k] for k in CHOICES]
    found, taken = [], set()
    for _, name in sorted(zip(waits, CHOICES)):
        if len(found) == wanted:
            break
        chosen = zip(CHOICES[name].items(), rng.random(3).tolist())
        f = Finding(name, **{field: of[int(u * len(of))] for (field, of), u in chosen})
        keys = f.name, f"{f.severity} {f.name}", f.place, f.kind
        zones = {(side, zone) for side in ((f.side,) if f.side in SIDES else SIDES)
                 for zone in " ".join(PHANTOMS["needs"].get(key, "") for key in keys).split()}
        if not taken & zones:
            found.append(f._replace(side="") if f.kind == "endotracheal tube" else f)
            taken |= zones
    return tuple(found)


def heart_ratio(scene, findings):
    """The cardiothoracic ratio that paint() gives to a scene with these findings."""
    grade = {f.name: f.severity for f in findings}.get("Cardiomegaly")
    return HEART[grade] + .35 * (scene["ratio"] - .45) if grade else scene["ratio"]


# ---------------------------------------------------------------- phantoms: painting
def paint(scene, findings, size):
    """The image, uint8 (size, size), of a scene with findings; alike at every size from 64 px."""
    chest = Chest(scene, size)
    chest.thorax(findings)
    for f in sorted(findings, key=Finding.rank):
        chest.finding(f)
    image = chest.image + (chest.vessels + .012 * chest.fine) * chest.lung
    image += scene["grain"] * chest.grain + scene["offset"]
    image = (image * (1.15 * scene["gain"])).clip(0, 1)
    image += scene["gamma"] * image * (1 - image)
    return (image * 255).astype(np.uint8)


@lru_cache(8)
def noise(size):
    """Grain, coarse and fine mottle: a seamless tile each, (size, size)."""
    tiles = []
    for waves in (size // 2, 6, 20):  # an image; the mottles are the same at every size
        rng, spectrum = np.random.default_rng(waves), np.zeros((size, size // 2 + 1), complex)
        values = rng.standard_normal((2 * waves, waves + 1, 2)) @ (1, 1j)
        spectrum[np.arange(-waves, waves)[:, None], np.arange(waves + 1)] = values
        spectrum[0, 0] = 0
        tile = np.fft.irfft2(spectrum, (size, size))
        tiles.append((tile / tile.std()).astype(np.float32))
    return tiles


@lru_cache(8)
def vessel_trees(size):
    """(6, size, size): hila and branching vessels of an average chest."""
    chest = Chest({k: (low + high) / 2 for k, (low, high) in ANATOMY.items()}, size)
    trees, rng = np.zeros((6, size, size), np.float32), np.random.default_rng(1)

    def grow(x, y, angle, length, thick, depth):
        end = x + length * np.cos(angle), y + length * np.sin(angle)
        chest.stroke(((x, y), end), thick, .4 + .2 * depth)
        for turn in rng.uniform(.15, .6, 2) * (-1, 1):
            if depth:
                grow(*end, angle + turn, length * rng.uniform(.7, .95), .7 * thick, depth - 1)

    for chest.image in trees:
        for side, y in ((1, .42), (-1, .47)):
            for angle in np.linspace(-1.35, 1.5, 7) + rng.uniform(-.15, .15, 7):
                start = side * rng.uniform(.18, .28), y + .11 * np.sin(angle)
                grow(*start, angle if side > 0 else np.pi - angle, rng.uniform(.1, .2), .014, 3)
            chest.image += .4 * chest.blob(side * .24, y, .15, .16)
    return trees


def ramp(depth, soft):
    """An edge: 0 where `depth` is below -soft / 2, 1 above soft / 2, straight between."""
    return (depth * (1 / soft) + .5).clip(0, 1)


def arch(x, y, wall=1., top=0.):
    """Depth inside the outline of the lungs: 0 on the side walls and over the apices, at most 1."""
    across = np.abs(x) - .42
    across = np.maximum(across * (1 / (wall - .42)), across * (-1 / .42))
    return 1 - np.sqrt(across * across + (np.maximum(.75 - y, 0) / (.75 - top)) ** 2)


class Chest:
    """An image while it is painted, in chest coordinates: x = 0 on the midline and +-1 on the side
    walls, the patient's left being +x; y = 0 at the apices and 1 at the domes of the diaphragm."""

    def __init__(self, scene, size):
        self.s, self.size, self.wide, self.high = scene, size, scene["width"], scene["height"]
        self.soft = max(scene["blur"], 1.1 / size)  # width of an edge
        at = (np.arange(size, dtype=np.float32) + .5) / size
        self.y = (at[:, None] - scene["top"]) / self.high  # (size, 1)
        self.x = (at - scene["middle"] - (at[:, None] - .5) * scene["tilt"]) / self.wide
        self.image = np.zeros((size, size), np.float32)  # densities: 0 air, about 1 metal

    def blob(self, x, y, rx, ry, peak=1., rough=0.):
        """An ellipse: `peak` in its middle, 0 on its edge, `rough` added, cut to 0 ... 1."""
        r2 = ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2
        return (peak - peak * r2 + rough).clip(0, 1)

    def stroke(self, points, thick, value):
        """Lighten a polyline to `value`; `thick` is in image widths."""
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            dx, dy = (x1 - x0) * self.wide, (y1 - y0) * self.high
            reach = (thick + self.soft) / self.high
            ends = min(y0, y1) - reach, max(y0, y1) + reach
            rows = slice(*np.searchsorted(self.y[:, 0], ends))  # all others stay as they are
            px, py = (self.x[rows] - x0) * self.wide, (self.y[rows] - y0) * self.high
            along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clip(0, 1)
            away = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)
            cover = ((thick / self.soft + 1) / 2 - away / self.soft).clip(0, thick / self.soft)
            self.image[rows] = np.maximum(self.image[rows], value * cover.clip(0, 1))

    def fill(self, mask, value):
        """Raise the density towards `value`, and hide the vessels."""
        self.image += mask * np.maximum(value - self.image, 0)
        self.vessels *= 1 - mask

    def heart(self, findings):
        """The mask of heart and mediastinum, (size, size)."""
        s, x, y, more = self.s, self.x, self.y, 2 * heart_ratio(self.s, findings) - .9
        stalk = s["stalk"] + .19 * any(f.name == "Enlarged Cardiomediastinum" for f in findings)
        down = ((y - .46 + .2 * more) / .52).clip(0, 1)  # from the heart's base to its apex
        knob = s["knob"] * np.maximum(1 - ((y - .29) / .1) ** 2, 0) * (1 - down)
        right = .28 + .4 * more
        left = stalk + (.9 + more - right - stalk) * np.sin(np.pi / 2 * down) ** 1.4 + knob
        right = stalk + (right - stalk) * np.sin(np.pi / 2 * np.minimum(1.7 * down, 1)) ** 1.4
        sink, x, soft = 1 - 3 * np.maximum(y - 1, 0) ** 2, x - s["turn"], 1.5 * self.soft
        left, right = (left * sink - x) * self.wide, (right * sink + x) * self.wide
        return ramp(left, soft) * ramp(right, soft)

    def thorax(self, findings):
        """Paint the chest itself, and keep the masks that the findings need."""
        s, x, y, soft, wide, ax = self.s, self.x, self.y, self.soft, self.wide, np.abs(self.x)
        self.depth = arch(x, y)
        self.inside = ramp(self.depth * (.58 * wide), soft)
        rise = {f.side: .13 for f in findings if f.name == "Atelectasis"}
        self.dome = {1: 1 + s["left_dome"] - rise.get("left", 0), -1: 1 - rise.get("right", 0)}
        bow = ax - .5
        dome = np.where(x > 0, *np.float32([self.dome[1], self.dome[-1]]))
        below = ramp((y - dome - bow * bow * (.52 + .55 * bow)) * self.high, 1.3 * soft)
        heart = self.heart(findings)
        self.lung = self.inside * (1 - below) * (1 - heart)
        skin = np.interp(y, (-.3, -.12, 0, .12, .5, 1, 1.8), (.42, .46, .8, 1.42, 1.36, 1.24, 1.2))
        self.image = ramp((skin.astype(np.float32) - ax) * wide, .08) * (.50 - .06 * ax)
        self.image += np.maximum(heart * (.12 - .1 * (x - .1) ** 2),
                                 below * ((1.15 - ax) * 5).clip(0, 1) * .13)
        self.image -= self.lung * .36
        self.bones(ax)
        self.image -= .10 * ramp((.05 - ax) * wide, soft) * ramp(.34 - y, .05)  # the trachea
        for side in (-1, 1):
            self.image += .1 * self.blob(side * 1.32, .15, .24, .17, 2)  # shoulders
            self.image += s["breasts"] * self.blob(side * .55, .88, .46, .3, 2)
        self.image += s["bubble"] * self.blob(.5, self.dome[1] + .17, .28, .1, 2)  # in the stomach
        shift = round((s["top"] - .1275) * self.size), round((s["middle"] - .5) * self.size)
        tree = vessel_trees(self.size)[int(s["tree"])]
        self.vessels = s["vessels"] * np.roll(tree, shift, (0, 1))
        roll = -int(s["roll_y"] * self.size), -int(s["roll_x"] * self.size)
        self.grain, self.coarse, self.fine = (np.roll(t, roll, (0, 1)) for t in noise(self.size))

    def bones(self, ax):
        """Add the back ribs, the fainter front ribs, the chest wall, collar bones and spine."""
        s, y, soft, high = self.s, self.y, self.soft, self.high
        ribs = np.zeros_like(ax)
        for curve, ink in ((.42 * (ax - .35) ** 2, 1.), (-.38 * ax, .4)):
            turns = (y - curve) * (1 / s["rib_gap"]) + s["rib_phase"]
            away = np.abs(turns - np.floor(turns) - .5)
            ribs += ink * s["ribs"] * ramp(.18 - away, soft / s["rib_gap"] / high)
        self.image += ribs * ramp(self.depth + .05, .1) * (1 - .7 * ramp(y - 1.15, .3))
        self.image += .08 * ramp(1.3 - y, .1) * (1 - np.abs(self.depth + .04) * 22).clip(0, 1)
        bar = np.abs(y - .155 + (.21 - .10 * ax) * ax) * high
        self.image += .13 * ramp(.012 - bar, soft) * ramp(1.08 - ax, .1) * ramp(ax - .1, .1)
        disc = np.abs(y * 7 - np.floor(y * 7) - .5)
        self.image += ramp((.13 - ax) * self.wide, soft) * (.01 + .09 * disc)

    def finding(self, f):
        """Paint a finding; those of the heart and the mediastinum are in heart()."""
        s, x, y, soft, wide, high = self.s, self.x, self.y, self.soft, self.wide, self.high
        j, sign = s["jitter"][CLASSES.index(f.name)], 1 if f.side == "left" else -1
        half, grade = x * sign > 0, GRADE.get(f.name, {}).get(f.severity)
        out, down = PHANTOMS["zones"].get(f.place, (0, 0))
        spot = sign * (out + .1 * j[0]), down + .08 * j[1]
        match f.name:
            case "Lung Opacity":
                mask = self.blob(*spot, .42 + .1 * j[2], .20 + .05 * j[3], 1.5) * self.lung
                self.image += mask * (.12 + .07 * self.fine.clip(-1.5, 1.5))
            case "Consolidation":
                rough = .3 * self.coarse + .08 * self.fine
                mask = self.blob(*spot, .46 + .12 * j[2], .21 + .05 * j[3], 1.1, rough)
                mask = mask.clip(0, .9) * self.lung
                self.image -= 1.2 * mask * self.vessels  # air bronchograms
                self.fill(mask, .58)
            case "Lung Lesion":
                r, bumps = (.087 + .03 * j[2], .05) if f.kind == "mass" else (.038 + .008 * j[2], 0)
                away = np.hypot((x - spot[0]) * wide, (y - spot[1]) * high)
                self.fill(ramp(.83 * r - away + r * bumps * self.coarse, soft), .58)
            case "Edema":
                self.vessels *= 1 + .9 * grade
                for side in (-1, 1):
                    haze = grade * self.blob(side * .42, .56, .62, .46, 1.3)
                    self.image += haze * (.25 + .05 * self.coarse) * self.lung
                    for row in np.linspace(.68, .9, 5):  # Kerley lines
                        self.stroke(((side * .82, row), (side * .97, row)), .006, .3 + .3 * grade)
            case "Atelectasis":  # thorax() has raised the dome
                for k in range(1 + (j[1] > .5)):
                    row = self.dome[sign] - .08 - .04 * j[0] - .09 * k
                    ends = (sign * (.38 + .1 * j[2]), row), (sign * .9, row + .05 - .03 * k)
                    self.stroke(ends, .018, .56)
            case "Pneumothorax":
                gap = grade * (.95 + .1 * j[0])
                edge = arch(x, y, 1 - gap, .55 * gap) * (.5 * wide)
                air = self.lung * half * ramp(-edge, soft)
                line = self.lung * half * (1 - np.abs(edge) / max(.010, .8 * soft)).clip(0, 1)
                self.vessels *= 1 - air
                self.image += .22 * line - .09 * air
            case "Pleural Effusion":  # grade: the level of the fluid
                climb = .8 * np.maximum(np.abs(x) - .4, 0) ** 2 - .04 * (j[0] - .5)
                mask = ramp((y - grade + climb) * high, 2 * soft) * self.inside
                self.fill(mask if f.side == "bilateral" else mask * half, .66)
            case "Pleural Other":
                y0, y1 = (-.2, .2) if f.place == "apical" else (.34 + .06 * j[0], .76 + .08 * j[1])
                deep = (.18 + .06 * j[2]) * (1 + .12 * self.coarse) - self.depth
                mask = ramp(deep * (.5 * wide), soft) * self.inside * half
                self.fill(mask * (np.minimum(y - y0, y1 - y) * 14).clip(0, .9), .62)
            case "Fracture":  # two ends of one rib, a step apart, and callus
                gap, phase, step = s["rib_gap"], s["rib_phase"], .065 if j[2] > .5 else -.065
                rib = (round((spot[1] - .078) / gap + phase - .5) + .5 - phase) * gap
                for ends, shift in (((.46, .60, .74), 0), ((.74, .86, .97), step)):
                    self.stroke([(sign * at, rib + .42 * (at - .35) ** 2 + shift) for at in ends],
                                .026, .66)
                self.image += .2 * self.blob(sign * .74, rib + .064 + step / 2, .07, .06, 1.5)
            case "Support Devices":
                for thick, *course in PHANTOMS["devices"][f.kind]:
                    self.stroke([(sign * u if u > .15 else u, v) for u, v in course], thick, 1.05)


# ---------------------------------------------------------------- phantoms: reports
def sentence(f, phrase, frame):
    """A finding in words; the slots of what is not known vanish."""
    slots = f._asdict() | {"kind": f.kind or PHANTOMS["kinds"].get(f.name)}
    slots |= {slot: words.get(f.severity, "") for slot, words in PHANTOMS["degrees"].items()}
    slots |= {slot: f.side and text.format(**slots) for slot, text in PHANTOMS["places"].items()}
    text = " ".join(phrase.format(**slots).split())
    text = text.replace("effusion", "effusions") if f.side == "bilateral" else text
    many = re.search("effusions|changes", text)
    text = text.removeprefix("a ") if many or frame == "{it}." else text
    text = re.sub(r"\ba(?= [aeiou])", "an", text)
    if not text.endswith("."):
        text = frame.format(it=text, **{"is": "are" if many else "is"})
    return text[0].upper() + text[1:]


def write_report(findings, rng):
    """"FINDINGS: ... IMPRESSION: ...": all the findings, and some denials of what is not there.
    What is there comes first, in the order of CLASSES: a reader that writes the likeliest next word
    would else always begin with a denial. rng: a numpy Generator. About 10 to 55 words."""
    def pick(options):
        return options[rng.integers(len(options))]

    lines, summary, known, frames = [], [], {f.name for f in findings}, PHANTOMS["frames"]
    for f in sorted(findings, key=Finding.rank):
        short, *_ = said = PHANTOMS["say"][f.name]
        plain = len(findings) > 2 or not (f.side or f.severity or f.place)
        lines.append(sentence(f, short if plain else pick(said), pick(frames["present"])))
        summary.append(sentence(f, short, "{it}."))
    summary = " ".join(summary) or pick(frames["normal"])
    for text, denied in PHANTOMS["deny"].items():
        if known.isdisjoint(denied) and rng.random() < .2 or not lines:
            lines.append(text)
            known.update(denied)
    return f"FINDINGS: {' '.join(lines)} IMPRESSION: {summary}"


def impression(caption):
    """The last section of a caption, its impression, without a header: short prompts are learned
    from it (ours). It sums up what is found, so that what is not named is not there."""
    sections = [*filter(None, map(str.strip, re.split("FINDINGS: |IMPRESSION: ", caption)))]
    return sections[-1] if sections else caption


# ---------------------------------------------------------------- reports: the file of phrases
PHRASES = ASSETS / "phrases.toml"
KEYS = {  # of its tables
    "mentions": CLASSES[1:], "normals": CLASSES, "sides": SIDES, "severity": GRADES,
    "cues": ("negation", "uncertainty", "no_cue", "report"), "behind": ("negation", "uncertainty"),
    "patterns": "new_clause joint removed title item sentence_end header".split(),
    "headers": ("FINDINGS", "IMPRESSION", "BODY", "SKIP"), "prompts": ("clean", "judge"),
    "spelling": ("FINDINGS", "IMPRESSION", "SKIP"), "other_headers": ("earlier", "organs", "image")}


@lru_cache
def phrases(path=PHRASES):
    """-> {table: {key: the regex of its phrases}} of a TOML file; of a rule (regex, replacement or
    None). UserError with file and key where the file is broken."""
    parts, key = {}, "as a whole"

    def regex(row, flags=0):
        row = row if isinstance(row, str) else rf"(?<!\w)(?:{'|'.join(row)})(?!\w)"
        row = re.sub(r"\s*\n\s*", "", row)
        return re.compile(re.sub(r"\{([A-Z]+)\}", lambda m: parts[m[1]], row), flags)

    try:
        tables = tomllib.loads(path.read_text("utf-8"))
        for key, row in tables["parts"].items():
            parts[key] = regex(row).pattern
        key = "headers"
        parts["HEADERS"] = regex([*itertools.chain(*tables[key].values())]).pattern
        for key, keys in KEYS.items():
            table, rows = key, tables[key]
            if set(rows) - set(keys) or table != "normals" and set(keys) - set(rows):
                raise ValueError(f"its keys must be {', '.join(keys)}")
            for name, row in rows.items():
                key = f"{table}.{name}"
                pattern = regex(row)  # also of those that are no regex: a check
                rows[name] = row if table in ("prompts", "spelling") else pattern
        for name, rule in tables["rules"].items():
            key, new = f"rules.{name}", rule.get("replace")
            tables["rules"][name] = pattern, _ = regex(rule["find"], re.I), new
            pattern.sub(new or "", "")  # is the replacement one?
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        lacks = "not there: " if isinstance(error, KeyError) else ""
        raise UserError(f"{path}, {key}: {lacks}{error}; correct it") from None
    return tables


# ---------------------------------------------------------------- labels: reading a report
def split_sentences(text):
    """Sentences and list items; cut at 600 characters: time stays linear in the text's length."""
    known = phrases()["patterns"]
    for item in known["item"].split(text):
        for sentence in known["sentence_end"].split(item):
            yield from re.findall(r".{1,600}(?:\s|$)|.{600}", " ".join(sentence.split()))


@lru_cache(1 << 16)
def read_sentence(sentence):
    """One lower-case sentence -> tuple of (class, 1 | 0 | -1, sides, severity), one a mention. Side
    and severity are between the joints (comma, and, or, with) next to the mention; one that
    names no side takes the sides of its sentence."""
    known, kinds = phrases(), ("negation", "uncertainty")
    new_clause, joint = known["patterns"]["new_clause"], known["patterns"]["joint"]

    def sides(phrase):
        return frozenset(side for side, pattern in known["sides"].items() if pattern.search(phrase))

    sentence = re.sub(r"\s[-–—*]+\s", " ; ", sentence.replace(":", " : "))
    sentence = known["cues"]["no_cue"].sub(" ", re.sub(r"[-_\s\0]+", " ", sentence))
    cuts, found = [0, *(m.start() for m in new_clause.finditer(sentence)), len(sentence)], []
    for clause in (sentence[a:b] for a, b in zip(cuts, cuts[1:])):
        found += [(c, 0, frozenset(), "") for c, p in known["normals"].items() if p.search(clause)]
        mentions = [(c, m) for c, p in known["mentions"].items() for m in p.finditer(clause)]
        first = {cue: known["cues"][cue].search(clause) if mentions else None for cue in kinds}
        starts = sorted({m.start() for _, m in mentions})
        joints = [(joint.search(clause, a, b), b) for a, b in zip(starts, starts[1:])]
        edges = [0, *(joint.start() if joint else b for joint, b in joints), len(clause)]
        for c, m in mentions:
            negated, unsure = (first[cue] and first[cue].start() < m.start()
                               or known["behind"][cue].match(clause, m.end()) for cue in kinds)
            value = 0 if negated or " not " in m[0] else -1 if unsure else 1
            i = starts.index(m.start())
            phrase = clause[edges[i]:edges[i + 1]]
            midline = c in ("Cardiomegaly", "Enlarged Cardiomediastinum")
            grade = ["", *(k for k, p in known["severity"].items() if p.search(phrase))][-1]
            found.append((c, value, sides(phrase) or sides("" if midline else sentence), grade))
    return tuple(found)


def find_mentions(text):
    """Yield (class, 1 | 0 | -1, sides, severity) of every mention in a report."""
    for sentence in split_sentences("\n\n".join(split_sections(text).values()).lower()):
        yield from read_sentence(sentence)


def label_report(text):
    """Report -> {class: 1 positive | 0 negative | -1 uncertain}; classes not mentioned are absent.
    As the CheXpert labeler does (Irvin et al. 2019), a cue of negation or uncertainty in its clause
    changes a mention; over a report positive wins, then uncertain. "No Finding" is 1 when no class
    but Support Devices is positive or uncertain, and the text reads like a report. Unlike CheXpert,
    "infiltrate" and "airspace disease" count as Consolidation too (ours)."""
    labels = {}
    for c, value, _, _ in find_mentions(text):
        labels[c] = max(labels.get(c, 0), value, key=(0, -1, 1).index)
    found = any(v for c, v in labels.items() if c != "Support Devices")
    words = " ".join(split_sections(text).values()).lower()
    if not found and (labels or phrases()["cues"]["report"].search(words)):
        labels["No Finding"] = 1
    return labels


def locate(text):
    """Report -> {positive class: {"sides": subset of {"left", "right"}, "severity": "" | "mild"
    | "moderate" | "severe"}}; of several mentions all sides and the greatest severity."""
    order, places = ["", *GRADES], {}
    for c, value, sides, severity in find_mentions(text):
        if value == 1:
            place = places.setdefault(c, {"sides": set(), "severity": ""})
            place["sides"] |= sides
            place["severity"] = max(place["severity"], severity, key=order.index)
    return places


# ---------------------------------------------------------------- cleaning
def section_of(header, section):
    """The section that a match of the header pattern begins after `section`; None: no header."""
    known, words = phrases(), header["name"] or header["other"]
    name, capitals = words.lower(), words.isupper()
    if header["name"]:
        if header["inline"] and not (capitals and header[0].endswith(":")):
            return None  # "the following findings:" in a sentence
        return next(key for key, names in known["headers"].items() if names.fullmatch(name))
    for spelt, words in known["spelling"].items():
        if difflib.get_close_matches(name, words, 1, .8):
            return spelt
    has = {kind for kind, words in known["other_headers"].items() if words.search(name)}
    finding = any(mention.search(name) for mention in known["mentions"].values())
    if header["colon"] != ":":
        return None
    if "earlier" in has and not finding:
        return "SKIP"
    if capitals and "image" in has:
        return "BODY"
    unknown = capitals and not finding and "organs" not in has
    return "SKIP" if unknown and section in ("BODY", "SKIP") else None


def split_sections(text):
    """Report -> {"FINDINGS": ..., "IMPRESSION": ...}, only those that it has. Headers come in any
    order and case, with a colon or alone on a line. Without a FINDINGS header the findings are what
    is under none: before the first, after "FINAL REPORT" or "CHEST, PA AND LATERAL:", or after
    a blank line. What an unknown header announces before the findings is left out."""
    text = re.sub(r"[^\S\n]+", " ", text)
    sections = {"FINDINGS": "", "IMPRESSION": "", "BODY": ""}
    section, start = "BODY", 0
    for m in [*phrases()["patterns"]["header"].finditer(text), None]:
        following = section_of(m, section) if m else "BODY"
        if not following:
            continue
        chunk = text[start:m.start() if m else len(text)]
        if section == "SKIP":
            section, chunk = "BODY", "".join(re.split(r"\n\s*\n", chunk, maxsplit=1)[1:])
        sections[section] += "\n\n" + chunk
        section, start = following, m and m.end("colon" if m["other"] else 0)
    body = sections.pop("BODY")
    sections["FINDINGS"] = sections["FINDINGS"] if sections["FINDINGS"].strip() else body
    return {k: v.strip() for k, v in sections.items() if v.strip()}


def join_sections(sections):
    return " ".join(f"{k}: {' '.join(v.split())}" for k, v in sections.items() if v.strip())


@lru_cache(1 << 16)
def clean_sentence(sentence):
    """One sentence without what its image cannot show; "" where nothing is left."""
    for pattern, new in phrases()["rules"].values():
        if new is None and pattern.search(sentence):
            return ""
        sentence = sentence if new is None else pattern.sub(new, sentence)
    return sentence[0].upper() + sentence[1:] + "."


def clean_report(text):
    """Report -> "FINDINGS: ... IMPRESSION: ..." as the paper trains on, "" where nothing is left.
    The rules of PHRASES replace the paper's language model, whose prompts are unpublished (ours).
    They name what goes; change becomes present state ("increased effusion" -> "effusion")."""
    known, cleaned = phrases()["patterns"], {}
    for name, section in split_sections(text).items():
        section = known["removed"].sub(" ___ ", section)
        section = known["title"].sub(lambda m: m[1].replace(".", ""), section)
        cleaned[name] = " ".join(filter(None, map(clean_sentence, split_sentences(section))))
    return join_sections(cleaned)


def clean_checked(text, answer=None):
    """Report, and perhaps a model's answer -> (cleaned report, True), or (its sections as they
    were, False) where a label changed."""
    cleaned = clean_report(text) if answer is None else join_sections(split_sections(answer))
    same = label_report(cleaned) == label_report(text)
    return cleaned if same else join_sections(split_sections(text)), same


def raw_reports(source):
    """-> the path of cleaned.jsonl, {id: report as found}. UserError if there is none to clean."""
    splits = read_data(source, size=256, raw=True)
    reports = {}
    for d in splits.values():
        for i, item in enumerate(d.items if d.layout != "phantom" else ()):
            if item.kind in RAW and reports.setdefault(item.id, text := d.raw(i)) != text:
                raise UserError(f"{source}: id {item.id} has two reports; rename that column")
    if not reports:
        raise UserError(f"{source} has no written reports to clean")
    return splits["train"].root / "cleaned.jsonl", reports


def write_json(path, records, indent=None):
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, indent=indent) + "\n" for record in records)


def clean_folder(source, answers=None):
    """Write cleaned.jsonl, {"id", "report"} a line: each report by the rules or, where `answers`
    (.jsonl, {"id", "report"}) has one, by a model. Where labels would change, it stays as is."""
    path, reports = raw_reports(source)
    answers = dict(table(Path(answers), ("id", "report"), Dropped())) if answers else {}
    cleaned = {name: clean_checked(raw, answers.get(name)) for name, raw in reports.items()}
    write_json(path, ({"id": name, "report": text} for name, (text, _) in cleaned.items()))
    kept = [name for name, (_, same) in cleaned.items() if not same]
    print(f"{path}: {len(cleaned):,} reports, {len(answers.keys() & cleaned):,} by answers; "
          f"{len(kept):,} kept as they were, where labels would change: {', '.join(kept[:3])}; "
          f"{len(answers.keys() - cleaned):,} answers of unknown id")


def export_prompts(source, path):
    """Write {"id", "clean", "judge"} a report: prompts for a language model that cleans."""
    clean, judge = (phrases()["prompts"][key] for key in ("clean", "judge"))
    write_json(path, ({
        "id": name, "clean": clean.replace("{report}", raw),
        "judge": judge.replace("{cleaned}", clean_checked(raw)[0]).replace("{report}", raw)}
        for name, raw in raw_reports(source)[1].items()))


# ---------------------------------------------------------------- a first look
def save_image(image, path):
    """Write an image, uint8 (h, w) or (h, w, 3), as PNG, whole or not at all."""
    with atomic(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")


def sheet(images, captions, columns, path):
    """Write a PNG of images, uint8 (h, w) or (h, w, 3) of any size, each over its caption."""
    images = [ImageOps.scale(image, max(1, round(192 / max(image.size))), Image.Resampling.NEAREST)
              for image in map(Image.fromarray, map(np.asarray, images))]
    width, gap = max(192, *(image.width for image in images)), 8
    texts = ["\n".join(textwrap.fill(line, width // 7) for line in caption.split("\n"))
             for caption in captions]
    height = max(i.height + 17 * (t.count("\n") + 1) for i, t in zip(images, texts)) + 2 * gap
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    page = Image.new("RGB", ((width + gap) * columns + gap, height * rows + gap), "white")
    for i, (image, text) in enumerate(zip(images, texts)):
        x, y = gap + (width + gap) * (i % columns), gap + height * (i // columns)
        page.paste(image, (x, y))
        ImageDraw.Draw(page).text((x, y + image.height + 4), text.encode(errors="replace").decode(),
                                  "black", ImageFont.load_default(13))
    save_image(np.asarray(page), path)


def first_look(source, out):
    """Print what a data folder holds and what was left out; write a sheet of eight images."""
    splits = read_data(source, size=256)
    sizes = (f"{k} {f'{len(d):,}' if len(d) < ENDLESS else 'endless'}" for k, d in splits.items())
    print(f"{source}: {splits['train'].layout}. Images: {', '.join(sizes)}")
    data = next((d for d in splits.values() if len(d)), splits["train"])
    texts = [data.text(i) for i in range(0, len(data), -(-len(data) // 2000) or 1)]
    print(f"{len(texts):,} reports, {sum(not clean for _, clean in texts):,} of them not cleaned "
          f"(--clean)\n{'':28}positive uncertain negative")
    labels = [label_report(text) for text, _ in texts]
    for name in CLASSES:
        count = collections.Counter(label.get(name) for label in labels)
        print(f"{name:28}{count[1]:8}{count[-1]:10}{count[0]:9}")
    try:
        data.drop_missing()
    except UserError as error:  # reports without images are worth a look too
        if not len(data):
            raise
        print(f"{error}. No sheet written")
    else:
        samples = [data[i] for i in range(min(8, len(data)))]
        sheet([s["image"] for s in samples], [s["report"] for s in samples], 4, out)
        print(f"{out}: images of the {data.split} split")
    for line in data.dropped.lines():
        print(f"left out: {line}")


def main():
    parser = argparse.ArgumentParser(description="A first look at a data folder, or its cleaning.")
    parser.add_argument("source", nargs="?", default="phantom", metavar="DIR",
                        help="phantom (default), a data folder, or one of its tables")
    parser.add_argument("--out", default="sheet.png", help="PNG to write (%(default)s)")
    parser.add_argument("--clean", action="store_true", help="write DIR/cleaned.jsonl for training")
    parser.add_argument("--export-prompts", metavar="FILE", help="prompts for a cleaning model")
    parser.add_argument("--answers", metavar="FILE", help='clean by its answers, {"id", "report"}')
    args = parser.parse_args()
    plain_streams()
    try:
        if args.clean or args.answers:
            clean_folder(args.source, args.answers)
        if args.export_prompts:
            export_prompts(args.source, args.export_prompts)
        first_look(args.source, args.out)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
