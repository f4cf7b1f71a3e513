"""A plain data folder of phantoms: PNG images and metadata.csv."""

import csv
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import phantom  # noqa: E402


def write_phantoms(root: Path, train: int, val: int, size: int = 128) -> Path:
    """Writes images that are not there yet; the table comes last, so a stopped call is repeated."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image = phantom(split, i, size)
            rows.append([f"{split}-{i}.png", image.report, split])
            Image.fromarray(image.image).save(root / rows[-1][0])
    with open(root / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([["image", "report", "split"], *rows])
    return root
