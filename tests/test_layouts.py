"""Data folders of every layout, broken and hostile input, and batches that never differ."""
import csv
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data as data_module
from ar import vit_pixels
from conftest import unix_only
from data import (UserError, batches, clean_folder, label_report, load_chunks, open_data, phantom,
                  phantom_scene, read_data, read_image, sheet, square)
from diffusion import vae_pixels

ROOT = Path(__file__).resolve().parent.parent

HEART = "FINDINGS: Large heart. IMPRESSION: Cardiomegaly."


def save_grey(path, value=100, shape=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def table(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def plain(root, n=6):
    """A plain folder of n images in the train split; image k is all grey of value k."""
    for k in range(n):
        save_grey(root / f"{k}.png", k % 256)
    table(root / "metadata.csv", ["image", "report", "split"],
          *([f"{k}.png", f"FINDINGS: Nodule of {k} mm.", "train"] for k in range(n)))
    return root


def counts(data):
    return {reason: count for reason, (count, _) in data.dropped.items()}


# ---- images ------------------------------------------------------------------------------------
RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))


def saved(path, image, **options):
    image.save(path, **options)
    return read_image(path).astype(int)


def test_deep_images_use_the_whole_range(tmp_path):
    """A 12-bit image in a 16-bit file came out black where its high byte was taken."""
    for name, pixels in {
            "16.png": RAMP.astype(np.uint16) * 257, "12.png": RAMP.astype(np.uint16) * 16,
            "16.tif": RAMP.astype(np.uint16) * 257, "be.tif": (RAMP * 257.).astype(">u2"),
            "32.tif": RAMP.astype(np.int32) * 9 - 1000, "float.tif": RAMP.astype(np.float32) / 7,
            "nan.tif": np.where(RAMP == 0, np.nan, RAMP).astype(np.float32)}.items():
        assert abs(saved(tmp_path / name, Image.fromarray(pixels)) - RAMP).max() <= 1, name
    flat = saved(tmp_path / "flat.png", Image.fromarray(np.full((4, 4), 900, np.uint16)))
    assert (flat == 0).all()
    none = saved(tmp_path / "none.tif", Image.fromarray(np.full((4, 4), np.nan, np.float32)))
    assert (none == 0).all()


def test_every_mode_gives_the_same_picture(tmp_path):
    ramp = Image.fromarray(RAMP)
    for mode, suffix in (("L", "png"), ("RGB", "png"), ("CMYK", "tif"), ("RGBA", "png"),
                         ("LA", "png"), ("P", "png"), ("YCbCr", "jpg"), ("CMYK", "jpg"),
                         ("L", "gif"), ("L", "bmp"), ("L", "webp")):
        got = saved(tmp_path / f"{mode}.{suffix}", ramp.convert(mode))
        assert abs(got - RAMP).max() <= (3 if suffix in ("jpg", "webp") else 1), mode
    assert set(saved(tmp_path / "1.png", ramp.convert("1")).ravel()) == {0, 255}


def test_palette_is_not_read_as_grey_levels(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 10, 10, 200, 200, 200, 255, 255, 255])
    assert saved(tmp_path / "p.png", image).tolist() == [[10, 200, 255]]
    assert saved(tmp_path / "t.png", image, transparency=1).tolist() == [[10, 0, 255]]


def test_transparent_parts_become_black(tmp_path):
    rgba = np.full((1, 3, 4), 200, np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    got = saved(tmp_path / "a.png", Image.fromarray(rgba))[0]
    assert got[0] == 0 and abs(got[1] - 100) <= 1 and got[2] == 200


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_exif_rotation_is_undone(tmp_path, mode):
    pixels = np.array([[0, 50], [100, 150], [200, 250]], np.uint8)
    turned = np.ascontiguousarray(np.rot90(pixels))  # orientation 6: turn clockwise to see it
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(turned if mode == "L" else turned.astype(np.uint16) * 257)
    got = saved(tmp_path / "r.png", image, exif=exif)
    want = pixels if mode == "L" else (pixels - 0.) * 255 / 250
    assert abs(got - want).max() <= 1


def tiff(pixels, photometric, order="<", compression=1):
    """An uncompressed or deflated TIFF of uint8 or uint16, grey or colour."""
    h, w, *c = pixels.shape
    bits, c = pixels.dtype.itemsize * 8, c[0] if c else 1
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data = data if compression == 1 else zlib.compress(data)
    tags = [(256, 4, w), (257, 4, h), (258, 3, bits), (259, 3, compression), (262, 3, photometric),
            (273, 4, 8), (277, 3, c), (278, 4, h), (279, 4, len(data))]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data) + 8)
    rows = b""
    for tag, kind, value in tags:
        if tag == 258 and c > 1:
            rows += struct.pack(order + "HHII", 258, 3, c, 8 + len(data))
        else:
            rows += struct.pack(order + "HHI" + ("HH" if kind == 3 else "I"), tag, kind, 1,
                                *((value, 0) if kind == 3 else (value,)))
    return head + data + struct.pack(order + "4H", *[bits] * 4) + struct.pack(
        order + "H", len(tags)) + rows + bytes(4)


def png(pixels, *chunks):
    """A PNG of uint8 or uint16 (h, w) or (h, w, channels), its metadata before the pixels."""
    h, w, *c = pixels.shape
    kind, depth = {(): 0, (2,): 4, (3,): 2, (4,): 6}[tuple(c)], pixels.dtype.itemsize * 8
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    body = [(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, kind, 0, 0, 0)), *chunks,
            (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in body)


def grey_of(path, content):
    path.write_bytes(content)
    return read_image(path).astype(int)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [1, 8])
def test_tiffs_whose_0_is_white(tmp_path, order, compression):
    """Of 16 bits they came out as negatives."""
    for pixels in (RAMP, RAMP.astype(np.uint16) * 257, RAMP.astype(np.uint16) * 16):
        for photometric, want in ((0, 255 - RAMP), (1, RAMP)):
            got = grey_of(tmp_path / "a.tif", tiff(pixels, photometric, order, compression))
            assert abs(got - want).max() <= 1, (pixels.dtype, photometric)


def test_a_depth_that_is_not_known_is_named(tmp_path):
    """Colour of 16 bits: 12-bit values (and 8-bit ones) came out black."""
    deep = RAMP.astype(np.uint16)[..., None] * 16
    colour, pair = np.repeat(deep, 3, 2), np.repeat(deep, 2, 2)
    for name, content in {
            "rgb.png": png(colour), "rgba.png": png(np.concatenate([colour, deep], 2)),
            "la.png": png(pair), "little.tif": tiff(colour, 2, "<"),
            "big.tif": tiff(colour, 2, ">"), "deflated.tif": tiff(colour, 2, "<", 8)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*16 bits a channel") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_broken_metadata_cost_no_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = (b"eXIf", exif.tobytes()[6:])
    icc = (b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20)))
    broken = {"exif": (b"eXIf", b"garbage" * 9), "icc": icc, "phys": (b"pHYs", b"\0\1"),
              "gamma": (b"gAMA", b""), "text": (b"zTXt", b"a\0\0garbage"), "time": (b"tIME", b""),
              "chrm": (b"cHRM", b"\0"), "iccp": (b"iCCP", b""), "srgb": (b"sRGB", b""),
              "itxt": (b"iTXt", b"a"), "actl": (b"acTL", b"")}
    for name, chunk in broken.items():
        assert (grey_of(tmp_path / f"{name}.png", png(RAMP, chunk)) == RAMP).all(), name
        if name != "exif":
            got = grey_of(tmp_path / f"{name}.png", png(RAMP, turned, chunk))
            assert (got == RAMP[:, ::-1]).all(), name
    wrong_sum = png(RAMP, (b"tEXt", b"a\0b")).replace(b"a\0b", b"a\0c")
    assert (grey_of(tmp_path / "sum.png", wrong_sum) == RAMP).all()
    with pytest.raises(UserError):  # but the pixels' own sums count
        grey_of(tmp_path / "cut.png", png(RAMP, icc)[:-30])


def test_a_jpeg_or_webp_with_garbage_exif_is_read(tmp_path):
    for name in ("a.jpg", "a.webp"):
        Image.fromarray(RAMP).save(tmp_path / name, exif=b"Exif\0\0garbage garbage" * 3)
        assert abs(read_image(tmp_path / name).astype(int) - RAMP).max() <= 4, name


@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_orientations(tmp_path, turn):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        want = np.array(ImageOps.exif_transpose(image))
    assert (read_image(tmp_path / "a.png") == want).all()


def test_a_dicom_file_gets_the_command_that_converts_it(tmp_path):
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(99))
    with pytest.raises(UserError, match="a.dcm is a DICOM file; convert it.*dcmj2pnm") as error:
        read_image(tmp_path / "a.dcm")
    assert "\n" not in str(error.value)


def test_jpeg_may_be_decoded_smaller_but_never_too_small(tmp_path):
    pixels = np.tile(np.linspace(0, 255, 1000).astype(np.uint8), (800, 1))
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    small, full = read_image(tmp_path / "a.jpg", at_least=200), read_image(tmp_path / "a.jpg")
    assert full.shape == (800, 1000) and small.shape == (200, 250)
    assert abs(square(small, 64).astype(int) - square(full, 64)).max() <= 4


def test_bad_images_name_the_file(tmp_path):
    save_grey(tmp_path / "good.png", shape=(300, 300))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "chunk.png").write_bytes(whole[:40] + b"\xff" * 8 + whole[48:])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("<html>not found</html>")
    bomb = bytearray(whole)  # a header of 60,000 x 60,000 with a right checksum
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name in ("cut.png", "chunk.png", "empty.png", "text.png", "bomb.png", "gone.png", "."):
        with pytest.raises(UserError) as error:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert "empty" in pytest.raises(UserError, read_image, tmp_path / "empty.png").value.args[0]
    assert "pixels" in pytest.raises(UserError, read_image, tmp_path / "bomb.png").value.args[0]


def test_square_keeps_the_aspect_ratio():
    got = square(np.full((100, 50), 200, np.uint8), 64)
    assert got.shape == (64, 64) and got.dtype == np.uint8
    assert (got[:, 16:48] == 200).all() and not got[:, :16].any() and not got[:, 48:].any()
    assert square(np.full((1, 3000), 9, np.uint8), 8)[3:5].any(0).all()
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    assert abs(square(checks, 32).astype(int) - 127).max() < 40  # antialiased, not picked


def test_pixels_for_the_networks():
    images = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    vit, vae = vit_pixels(images), vae_pixels(images)
    assert vit.shape == vae.shape == (1, 3, 1, 2) and vae[0, 2, 0].tolist() == [-1, 1]
    assert torch.allclose(vit[0, 1, 0], torch.tensor([-.555895, 1 - .555895]) / .336385)


# ---- layouts -----------------------------------------------------------------------------------
def mimic(root):
    rows, views = [], []
    for k, (split, view) in enumerate((("train", "PA"), ("train", "LATERAL"), ("validate", "AP"),
                                       ("test", "AP"), ("train", ""))):
        subject, study, dicom = f"1000003{k}", f"5041426{k}", f"d{k}"
        folder = root / "files/p10" / f"p{subject}"
        save_grey(folder / f"s{study}" / f"{dicom}.jpg", 40 * k)
        text = root / "mimic-cxr-reports/files/p10" / f"p{subject}" / f"s{study}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"EXAM: CHEST\n FINDINGS:  Nodule of {k} mm.\n\n IMPRESSION: ___ Fine.\n")
        rows.append((dicom, study, subject, split))
        views.append((dicom, view, "x"))
    table(root / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "study_id", "subject_id", "split"),
          *rows)
    table(root / "mimic-cxr-2.0.0-metadata.csv", ("dicom_id", "ViewPosition", "Rows"), *views)
    return root


def test_mimic(tmp_path):
    splits = read_data(str(mimic(tmp_path)), 16)
    assert {name: [item.id for item in data.items] for name, data in splits.items()} == {
        "train": ["s50414260"], "val": ["s50414262"], "test": ["s50414263"]}
    data = open_data(str(tmp_path), "val", 16)
    assert data.layout == "MIMIC-CXR-JPG" and len(data) == 1
    sample = data[0]
    raw = "FINDINGS: Nodule of 2 mm. IMPRESSION: ___ Fine."
    assert sample["report"] == sample["caption"] == raw and data.text(0) == (raw, False)
    clean_folder(str(tmp_path))
    cleaned = open_data(str(tmp_path), "val", 16)
    assert cleaned.text(0) == ("FINDINGS: Nodule of 2 mm. IMPRESSION: Fine.", True)
    assert cleaned.fingerprint() != data.fingerprint()
    assert abs(int(sample["image"][8, 8]) - 80) <= 1
    assert counts(data) == {"images not frontal (AP, PA), skipped": 2}


def test_mimic_reports_beside_the_images(tmp_path):
    (mimic(tmp_path) / "mimic-cxr-reports/files/p10").rename(tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.txt"):
        file.rename(tmp_path / "files/p10" / file.relative_to(tmp_path / "moved"))
    report = open_data(str(tmp_path), "train", 16)[0]["report"]
    assert report.startswith("FINDINGS: Nodule of 0 mm.")


def test_mimic_without_reports_says_so(tmp_path):
    (mimic(tmp_path) / "mimic-cxr-reports").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="reports missing or empty"):
        open_data(str(tmp_path), "train", 16)[0]


def test_iu(tmp_path):
    table(tmp_path / "indiana_reports.csv",
          ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings",
           "impression"),
          *((k, "", "", "", "", "", f"Nodule of {k} mm.", "Fine." * (k % 2)) for k in range(30)),
          (3, "", "", "", "", "", "again", ""), (98, "", "", "", "", "", "", ""),
          (99, "", "", "", "", "", "no image", ""))
    table(tmp_path / "indiana_projections.csv", ("uid", "filename", "projection"),
          *((k, f"{k}.png", "Frontal") for k in (*range(30), 98, 1000)), (3, "3l.png", "Lateral"))
    splits = read_data(str(tmp_path), 16)
    items = {item.id: item for data in splits.values() for item in data.items}
    assert len(items) == 30 and all(splits.values())
    assert items["3"].report == "FINDINGS: Nodule of 3 mm. IMPRESSION: Fine."
    assert items["4"].report == "FINDINGS: Nodule of 4 mm."
    assert counts(splits["val"]) == {
        "images not frontal, skipped": 1, "images without a report, skipped": 1,
        "reports repeated, skipped": 1, "reports without a frontal image, skipped": 1,
        "empty reports, skipped": 1}
    with pytest.raises(UserError, match=r"missing; the first is expected at .*images/"):
        open_data(str(tmp_path), "train", 16)
    for k in range(30):
        save_grey(tmp_path / "images/images_normalized" / f"{k}.png", k)
    data = open_data(str(tmp_path), "train", 16)
    assert data[0]["report"].startswith(f"FINDINGS: Nodule of {data[0]['image'][8, 8]} mm.")


def nih(root, folder="images", official=False):
    names = [f"{k // 2:08d}_{k % 2:03d}.png" for k in range(40)]
    for k, name in enumerate(names):
        save_grey(root / folder.format(k % 2 + 1) / name, k)
    table(root / "Data_Entry_2017_v2020.csv",
          ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position"),
          *((name, ("No Finding", "Edema|Mass")[k % 2], 0, k // 2, "PA")
            for k, name in enumerate(names)))
    if official:
        (root / "test_list.txt").write_text("\n".join(names[:10]))
    return root


@pytest.mark.parametrize("folder", ["images", "images_00{}/images"])
def test_nih(tmp_path, folder):
    splits = read_data(str(nih(tmp_path, folder)), 16)
    patients = [{item.id[:8] for item in data.items} for data in splits.values()]
    assert all(patients) and sum(map(len, patients)) == 20  # no patient in two splits
    data = open_data(str(tmp_path), "train", 16)
    reports = {data[i]["image"][8, 8] % 2: data[i]["report"] for i in range(len(data))}
    stated = [{c for c, v in label_report(reports[k]).items() if v == 1} for k in (0, 1)]
    assert stated == [{"No Finding"}, {"Edema", "Lung Lesion"}]
    assert [data[i]["report"] for i in range(5)] == [data[i]["report"] for i in range(5)]


def test_nih_official_test_list(tmp_path):
    splits = read_data(str(nih(tmp_path, official=True)), 16)
    assert len(splits["test"]) == 10 and splits["train"] and splits["val"]
    assert not {i.id[:8] for i in splits["train"].items} & {i.id[:8] for i in splits["val"].items}


def test_nih_unknown_label_is_counted(tmp_path):
    save_grey(tmp_path / "images/a.png")
    table(tmp_path / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "Patient ID"),
          ("a.png", "Edema", 1), ("b.png", "Edema|Gout", 2))
    assert counts(read_data(str(tmp_path), 16)["train"]) == {
        "images with an unknown label, skipped": 1}


def test_chexgenbench(tmp_path):
    path = "p10/p100000{0:02}/s5{0}/{0}.jpg"
    for split, ks in (("TRAIN", range(30)), ("TEST", (30, 31))):
        table(tmp_path / f"LLAVARAD_ANNOTATIONS_{split}.csv", ("id", "path", "annotated_prompt"),
              *((k, path.format(k), f"Prompt {k}.") for k in ks))
        for k in ks:
            save_grey(tmp_path / "files" / path.format(k), k)
    splits = read_data(str(tmp_path), 16, "image")
    assert len(splits["test"]) == 2 and splits["val"] and len(splits["train"]) > 20
    sample = open_data(str(tmp_path), "test", 16, "image")[1]
    assert sample["caption"] == "Prompt 31." and splits["test"].layout == "CheXGenBench"
    mimic(tmp_path)  # in MIMIC's folder the task decides
    assert read_data(str(tmp_path), 16, "image")["test"].layout == "CheXGenBench"
    assert read_data(str(tmp_path), 16, "report")["test"].layout == "MIMIC-CXR-JPG"


def test_a_single_table_of_prompts(tmp_path):
    save_grey(tmp_path / "a.png")
    table(tmp_path / "prompts.csv", ("image", "annotated_prompt", "split"),
          ("a.png", "Prompt.", "test"))
    for source in (tmp_path, tmp_path / "prompts.csv"):
        assert open_data(str(source), "test", 16, "image")[0]["caption"] == "Prompt."


def test_an_id_of_two_reports_is_not_cleaned(tmp_path):
    """The number of a patient, for example: all images would get the last report."""
    table(tmp_path / "metadata.csv", ("image", "report", "id"), ("a.png", HEART, "7"),
          ("b.png", HEART, "7"), ("c.png", "No effusion.", "8"))
    clean_folder(str(tmp_path))
    table(tmp_path / "metadata.csv", ("image", "report", "id"), ("a.png", HEART, "7"),
          ("b.png", "No effusion.", "7"))
    with pytest.raises(UserError, match="id 7 has two reports"):
        clean_folder(str(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_plain(tmp_path, kind):
    rows = [("a/b.png", HEART, "train", "Draw this."), ("c.png", HEART, "validation", ""),
            ("d.png", HEART, "test", " \t")]       # it used to stop training: "the text is empty"
    columns = ("image", "report", "split", "caption")
    if kind == "jsonl":
        lines = (json.dumps({k: v for k, v in zip(columns, row) if v}) for row in reversed(rows))
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    elif kind == "jsonl.gz":
        lines = (json.dumps(dict(zip(columns, row))) for row in rows)
        (tmp_path / "metadata.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        table(tmp_path / f"metadata.{kind}", columns, *rows)
    for row in rows:
        save_grey(tmp_path / row[0])
    train, val, test = (open_data(str(tmp_path), k, 16)[0] for k in ("train", "val", "test"))
    assert (train["report"], train["caption"]) == (HEART, "Draw this.")
    assert (val["report"], val["caption"]) == (test["report"], test["caption"]) == (HEART, HEART)


def test_plain_without_splits_is_split_by_hash(tmp_path):
    table(tmp_path / "metadata.csv", ("image", "report"),
          *((f"{k}.png", HEART) for k in range(999)))
    sizes = {name: len(data) for name, data in read_data(str(tmp_path), 16).items()}
    assert sum(sizes.values()) == 999 and 60 < sizes["val"] < 140 and 60 < sizes["test"] < 140


def test_cleaned_reports_override(tmp_path):
    plain(tmp_path)
    (tmp_path / "cleaned.jsonl").write_text(
        '{"id": "2.png", "report": "FINDINGS: By hand."}\n{"id": "99.png", "report": "x"}\n')
    data = open_data(str(tmp_path), "train", 16)
    assert data[1]["report"] == "FINDINGS: Nodule of 1 mm."
    assert data[2]["report"] == "FINDINGS: By hand."
    assert counts(data) == {"lines of cleaned.jsonl of unknown id, unused": 1}
    (tmp_path / "cleaned.jsonl").write_text('{"id": "2.png", "report": "ok"}\n{"id": "3.')
    with pytest.raises(UserError, match="cleaned.jsonl.*row 2"):
        open_data(str(tmp_path), "train", 16)


HARM = "Dr. ___ was notified of the pneumothorax by telephone"  # its label goes with the sentence


def test_cleaning_comes_before_training(tmp_path, capsys):
    """--clean writes what loading reads; loading itself changes no word, and says so once."""
    plain(tmp_path, 4)
    text = (tmp_path / "metadata.csv").read_text()
    text = text.replace("Nodule of 1 mm", HARM).replace("Nodule of 2", "Unchanged nodule of 2")
    (tmp_path / "metadata.csv").write_text(text)
    for _ in range(2):
        data = open_data(str(tmp_path), "train", 16)
    assert data.text(2) == ("FINDINGS: Unchanged nodule of 2 mm.", False)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "4 of 4 reports" in said
    assert f"python data.py {tmp_path} --clean" in said
    clean_folder(str(tmp_path))
    assert "4 reports, 0 by answers; 1 kept as they were" in capsys.readouterr().out
    data = open_data(str(tmp_path), "train", 16)
    assert [data.text(i) for i in range(4)] == [
        ("FINDINGS: Nodule of 0 mm.", True), (f"FINDINGS: {HARM}.", True),
        ("FINDINGS: Nodule of 2 mm.", True), ("FINDINGS: Nodule of 3 mm.", True)]
    assert capsys.readouterr().err == ""
    clean_folder(str(tmp_path))  # again: from the reports as found, not from its own file
    assert "1 kept as they were" in capsys.readouterr().out


def test_a_models_answers_are_checked(tmp_path, capsys):
    plain(tmp_path, 4)
    answers = [("0.png", "FINDINGS: A nodule."), ("1.png", "FINDINGS: No nodule."),
               ("2.png", "Findings: nodule\nImpression: nodule"), ("9.png", "x")]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"id": name, "report": text}) for name, text in answers))
    clean_folder(str(tmp_path), tmp_path / "a.jsonl")
    said = capsys.readouterr().out
    assert "4 reports, 3 by answers; 1 kept" in said and "1.png; 1 answers of unknown" in said
    data = open_data(str(tmp_path), "train", 16)
    assert [data.text(i)[0] for i in range(4)] == [
        "FINDINGS: A nodule.", "FINDINGS: Nodule of 1 mm.", "FINDINGS: nodule IMPRESSION: nodule",
        "FINDINGS: Nodule of 3 mm."]


def test_what_needs_no_cleaning_is_not_cleaned(tmp_path, capsys):
    (tmp_path / "n").mkdir()
    for source in ("phantom", str(nih(tmp_path / "n"))):
        assert open_data(source, "train", 16).text(0)[1]
        with pytest.raises(UserError, match="no written reports"):
            clean_folder(source)
    table(tmp_path / "prompts.csv", ("image", "annotated_prompt", "split"),
          ("a.png", "Unchanged heart.", "test"))
    save_grey(tmp_path / "a.png")
    data = open_data(str(tmp_path / "prompts.csv"), "test", 16, "image")
    assert data.text(0) == ("Unchanged heart.", True) and capsys.readouterr().err == ""


def test_phantom():
    train, test = (open_data("phantom", split, 64) for split in ("train", "test"))
    assert train.layout == "phantom" and len(test) == 512
    assert train[5]["image"].shape == (64, 64) and train[5]["report"].startswith("FINDINGS")
    assert (train[5]["image"] == train[5]["image"]).all()
    assert (train[5]["image"] != test[5]["image"]).any()
    with pytest.raises(IndexError):
        test[512]


# ---- bad tables and folders --------------------------------------------------------------------
def test_missing_column_is_named(tmp_path):
    table(tmp_path / "metadata.csv", ("image", "text"), ("a.png", HEART))
    with pytest.raises(UserError, match=r"metadata.csv has no column 'report.*image, text"):
        open_data(str(tmp_path), "train", 16)
    table(tmp_path / "Data_Entry_2017.csv", ("Image Index", "Patient ID"), ("a.png", 1))
    with pytest.raises(UserError, match="Data_Entry_2017.csv has no column 'finding labels'"):
        open_data(str(tmp_path), "train", 16)


def test_windows_text_is_read(tmp_path):
    save_grey(tmp_path / "sub/a.png")
    (tmp_path / "metadata.csv").write_bytes(
        b"\xef\xbb\xbfimage,report,split\r\nsub\\a.png,FINDINGS: \x00Cl\xe9ar.\r\n\r\n"
        b"cut.png\r\n".replace(b"Cl\xe9ar.", b"Cl\xe9ar.,train"))
    data = open_data(str(tmp_path), "train", 16)
    assert data[0]["report"] == "FINDINGS: Cl\u00e9ar."
    assert counts(data) == {"rows of metadata.csv cut short, skipped": 1}


def test_paths_out_of_the_folder_are_never_read(tmp_path):
    save_grey(tmp_path / "secret.png")
    root = plain(tmp_path / "data", 2)
    with open(root / "metadata.csv", "a") as file:
        for path in ("../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png",
                     "..\\secret.png", ".."):
            file.write(f"{path},FINDINGS: Secret.,train\n")
    data = open_data(str(root), "train", 16)
    assert len(data) == 2 and counts(data) == {"paths out of the data folder, skipped": 5}
    table(root / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "Patient ID"),
          ("../../secret.png", "Edema", 1))
    (root / "metadata.csv").unlink()
    with pytest.raises(UserError, match="no train split: 1 of 1 paths out"):
        open_data(str(root), "train", 16)


def test_rows_left_out_are_counted_by_reason(tmp_path):
    root = plain(tmp_path, 3)
    with open(root / "metadata.csv", "a") as file:
        file.write("0.png,again,train\n2b.png, ,train\n,FINDINGS: x.,train\n1c.png,y,holdout\n")
    data = open_data(str(root), "train", 16)
    assert data.dropped.lines() == [
        "1 of 7 images listed before, skipped: first 0.png train",
        "1 of 7 empty reports, skipped: first 2b.png train",
        "1 of 7 rows without an image, skipped: first  train",
        "1 of 7 rows of an unknown split, skipped: first 1c.png holdout"]
    assert data[0]["report"] == "FINDINGS: Nodule of 0 mm."


def test_unknown_folders_list_the_layouts(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    save_grey(tmp_path / "a.png")
    (tmp_path / "none").mkdir()
    for source in (tmp_path, tmp_path / "none", tmp_path / "a.png", tmp_path / "gone"):
        with pytest.raises(UserError, match="MIMIC-CXR-JPG.*IU.*NIH.*CheXGenBench.*metadata"):
            open_data(str(source), "train", 16)


def test_hostile_json(tmp_path):
    save_grey(tmp_path / "a.png")
    good = '{"image": "a.png", "report": "FINDINGS: Cl\\ud800ar lungs.", "split": "train"}\n'
    long = json.dumps({"image": "x/" * 5000, "report": "y", "split": "val"})
    (tmp_path / "metadata.jsonl").write_text(good + long)
    assert open_data(str(tmp_path), "train", 16)[0]["report"] == "FINDINGS: Cl?ar lungs."
    with pytest.raises(UserError, match="1 of 1 images of the val split are missing"):
        open_data(str(tmp_path), "val", 16)
    for bad in ("[" * 99_999, "[1, 2]", "7", "{", '"image"'):
        (tmp_path / "metadata.jsonl").write_text(good + bad)
        with pytest.raises(UserError, match="metadata.jsonl cannot be read .row 2: "):
            open_data(str(tmp_path), "train", 16)


def test_what_is_no_text_is_no_report(tmp_path):
    """NaN of pandas, lists and objects were taken as the words of a report."""
    save_grey(tmp_path / "good.png")
    (tmp_path / "metadata.jsonl").write_text("".join(
        f'{{"image": "{name}.png", "report": {report}, "split": "train"}}\n'
        for name, report in {"good": '"FINDINGS: Clear."', "a": "NaN", "b": "null", "c": '["x"]',
                             "d": '{"x": 1}'}.items()))
    data = open_data(str(tmp_path), "train", 16)
    assert len(data) == 1 and counts(data) == {"empty reports, skipped": 4}


def test_broken_tables(tmp_path):
    for content in (b"", b"\x1f\x8b broken", b"PK\x03\x04\xff\xfe" * 99, b'image,report\na.png,"' +
                    b"x" * 200_000):
        (tmp_path / "metadata.csv").write_bytes(content)
        with pytest.raises(UserError, match="metadata.csv"):
            open_data(str(tmp_path), "train", 16)
    (tmp_path / "metadata.csv").unlink()
    for content in (gzip.compress(b"image,report\n" + b"a.png,x\n" * 9999)[:-20], b"not gzip"):
        (tmp_path / "metadata.csv.gz").write_bytes(content)
        with pytest.raises(UserError, match="metadata.csv.gz cannot be read"):
            open_data(str(tmp_path), "train", 16)
    (tmp_path / "metadata.csv.gz").unlink()
    (tmp_path / "metadata.csv").mkdir()
    with pytest.raises(UserError, match="metadata.csv cannot be read"):
        open_data(str(tmp_path), "train", 16)


@pytest.mark.parametrize("name", [
    "metadata.csv.bak", "metadata.csv~", "._metadata.csv", "metadata.csv.zip", "metadata.csv.gz",
    "#metadata.csv#", ".metadata.csv.swp", "~$metadata.csv", "metadata.csv.old",
    "metadata copy.csv"])
def test_backups_and_archives_beside_a_table_are_not_read(tmp_path, name):
    """Deleted rows came back from metadata.csv.bak."""
    root = plain(tmp_path, 4)
    save_grey(root / "deleted.png")
    with (gzip.open if name.endswith("gz") else open)(root / name, "wt") as file:
        file.write("image,report,split\ndeleted.png,FINDINGS: x.,train\n")
    assert [item.path for item in open_data(str(root), "train", 16).items] == [
        f"{k}.png" for k in range(4)]


@pytest.mark.parametrize("layout, copy", [
    ("mimic", "mimic-cxr-2.0.0-split.csv.bak"), ("mimic", "._mimic-cxr-2.0.0-metadata.csv"),
    ("mimic", "mimic-cxr-2.0.0-metadata.csv.zip"), ("nih", "Data_Entry_2017_v2020.csv.bak"),
    ("nih", "Data_Entry_2017_v2020.csv~"), ("nih", "Data_Entry_2017_v2020 copy.csv"),
    ("nih", "._Data_Entry_2017_v2020.csv"), ("prompts", "._prompts.csv"),
    ("prompts", "prompts.csv.zip"), ("prompts", "prompts.csv.bak")])
def test_what_is_beside_tables_of_other_layouts(tmp_path, layout, copy):
    if layout == "prompts":
        save_grey(tmp_path / "a.png")
        table(tmp_path / "prompts.csv", ("image", "annotated_prompt"), ("a.png", "Prompt."))
    else:
        {"mimic": mimic, "nih": nih}[layout](tmp_path)
    want = {split: data.items for split, data in read_data(str(tmp_path), 16).items()}
    (tmp_path / copy).write_bytes(b"\x00\x05\x16\x07 not a table")
    assert {split: data.items for split, data in read_data(str(tmp_path), 16).items()} == want


# ---- broken images -----------------------------------------------------------------------------
def test_few_missing_images_are_skipped_many_stop(tmp_path):
    root = plain(tmp_path, 40)
    (root / "7.png").unlink()
    data = open_data(str(root), "train", 16)
    assert len(data) == 39 and data.dropped.lines() == [
        "1 of 40 images missing, skipped: first 7.png"]
    (root / "8.png").unlink()
    (root / "9.png").unlink()
    with pytest.raises(UserError, match="3 of 40 images of the train split are missing.*7.png"):
        open_data(str(root), "train", 16)


def test_broken_image_is_replaced_by_the_next(tmp_path, capsys):
    root = plain(tmp_path, 40)
    (root / "39.png").write_text("broken")
    data = open_data(str(root), "train", 16)
    assert [(data[39]["index"], data[39]["report"]) for _ in range(2)] == [
        (0, "FINDINGS: Nodule of 0 mm.")] * 2
    assert counts(data) == {"images unreadable, skipped": 1}
    assert capsys.readouterr().err.count("39.png") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_over_five_percent_broken_stops(tmp_path, workers):
    root = plain(tmp_path, 40)
    for k in (4, 5, 20):
        (root / f"{k}.png").write_text("broken")
    steps = batches(open_data(str(root), "train", 16), 8, seed=0, workers=workers)
    with pytest.raises(UserError, match="3 of 40 images unreadable"):
        for _ in range(10):
            next(steps)


def test_everything_broken_stops_at_once(tmp_path):
    root = plain(tmp_path, 3)
    for file in root.glob("*.png"):
        file.write_text("broken")
    with pytest.raises(UserError, match="images unreadable: 1.png and the 2 after it"):
        open_data(str(root), "train", 16)[1]


def test_broken_images_that_lie_together(tmp_path):
    """3% in a row are few, in whatever order they are met; 6% are too many."""
    root = plain(tmp_path, 500)
    for k in range(2, 17):
        (root / f"{k}.png").write_text("broken")
    in_order, at_random = (open_data(str(root), "train", 16) for _ in range(2))
    assert [in_order[k]["index"] for k in range(100)] == [0, 1, *[17] * 15, *range(17, 100)]
    steps = batches(at_random, 50, seed=0)
    for _ in range(10):
        next(steps)
    assert counts(in_order) == counts(at_random) == {"images unreadable, skipped": 15}
    both = open_data(str(root), "train", 16)                # stage 0 of 400 and more, at 4.6%
    for k in range(17, 25):
        (root / f"{k}.png").write_text("broken")
    for k in range(100):
        both[k]
    next(batches(both, 50, seed=0))
    assert counts(both)["images unreadable, skipped"] >= 23
    for k in range(52, 67):
        (root / f"{k}.png").write_text("broken")
    in_order = open_data(str(root), "train", 16)
    with pytest.raises(UserError, match="26 of 500 images unreadable"):
        for k in range(100):
            in_order[k]


# ---- batches -----------------------------------------------------------------------------------
def first(data, n, **options):
    steps = batches(data, seed=3, **options)
    return [next(steps) for _ in range(n)]


def same(one, other):
    return all((a["image"] == b["image"]).all() and a["index"].tolist() == b["index"].tolist()
               and a["report"] == b["report"] and a["caption"] == b["caption"]
               for a, b in zip(one, other, strict=True))


@pytest.fixture(params=["phantom", "folder"])
def data(request, tmp_path):
    if request.param == "phantom":
        return open_data("phantom", "train", 64)
    root = plain(tmp_path, 30)
    (root / "11.png").write_text("broken")
    return open_data(str(root), "train", 16)


def test_workers_change_nothing(data):
    want = first(data, 12, batch_size=4)
    for workers in (1, 2):
        state = torch.get_rng_state()
        assert same(want, first(data, 12, batch_size=4, workers=workers))
        assert (torch.get_rng_state() == state).all()


def test_resuming_gives_the_same_batches(data):
    want = first(data, 20, batch_size=4)
    assert same(want[13:], first(data, 7, batch_size=4, start_step=13, workers=1))


def test_ranks_share_each_batch(data):
    for size in (6, 7):                             # 2 + 2 + 2, 2 + 2 + 3
        whole = first(data, 9, batch_size=size)
        ranks = [first(data, 9, batch_size=size, rank=r, world=3) for r in range(3)]
        for k, batch in enumerate(whole):
            assert torch.equal(batch["image"], torch.cat([rank[k]["image"] for rank in ranks]))
            assert batch["report"] == sum((rank[k]["report"] for rank in ranks), [])
    with pytest.raises(UserError):
        first(data, 1, batch_size=2, world=3)


def test_an_epoch_shows_every_item_once(tmp_path):
    data = open_data(str(plain(tmp_path, 30)), "train", 16)
    steps = first(data, 10, batch_size=6)
    seen = [torch.cat([b["index"] for b in steps[k:k + 5]]).tolist() for k in (0, 5)]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(30)) and seen[0] != seen[1]
    big = first(data, 1, batch_size=70)[0]
    assert big["image"].shape == (70, 16, 16) and big["image"].dtype == torch.uint8
    assert big["index"].tolist()[:60] == seen[0] + seen[1]


def test_fingerprint_tells_data_apart(tmp_path):
    root = plain(tmp_path, 6)
    names = {open_data(str(root), "train", size).fingerprint() for size in (16, 16, 32)}
    assert len(names) == 2
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace("of 3 mm", "x"))
    assert open_data(str(root), "train", 16).fingerprint() not in names
    assert open_data("phantom", "val", 16).fingerprint() != open_data(
        "phantom", "test", 16).fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_left_stays_left(workers):
    """A loader that mirrors an image teaches the wrong side. Left effusion: the viewer's right."""
    data = open_data("phantom", "train", 64)
    wanted = [i for i in range(200) for f in data_findings(i)
              if f.name == "Pleural Effusion" and f.severity == "severe" and f.side != "bilateral"]
    rows = {}
    for batch in first(data, 25, batch_size=8, workers=workers):
        rows |= dict(zip(batch["index"].tolist(), batch["image"].numpy()))
    assert len(wanted) >= 3
    for i in wanted:
        side = next(f.side for f in data_findings(i) if f.name == "Pleural Effusion")
        assert (rows[i] == phantom("train", i, 64).image).all()
        bases = rows[i][34:44].astype(int)
        assert (bases[:, 40:56].mean() > bases[:, 8:24].mean()) == (side == "left"), i


def data_findings(i):
    return phantom_scene("train", i)[1]


LOADER = """
import multiprocessing, os, signal, sys, time
import data

class Slow:
    def __len__(self): return 1000
    def fetch(self, index):
        time.sleep(float(sys.argv[3]) / data.CHUNK)
        return {"index": index}
    def account(self, samples): pass

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    data.PATIENCE = 3
    try:
        for k, batch in enumerate(data.batches(Slow(), 16, seed=0, workers=2)):
            if k == 0:
                print("started", *[p.pid for p in multiprocessing.active_children()], flush=True)
    except data.UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("method, sent, code, said", [
    ("fork", "SIGKILL", 2, "a loader process was killed"),
    ("fork", "SIGSTOP", 2, "gave nothing for 3 s"), ("spawn", "SIGINT", 130, "")])
@unix_only
def test_a_loader_process_that_dies_or_hangs_ends_the_run(tmp_path, method, sent, code, said):
    """The run used to hang for ever, and Ctrl-C to end in a traceback of a spawned process."""
    (tmp_path / "run.py").write_text(LOADER)
    command = [sys.executable, "run.py", method, "x", ".05"]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, start_new_session=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as run:
        word, *pids = run.stdout.readline().split()
        if sent == "SIGINT":
            os.killpg(run.pid, signal.SIGINT)
        else:
            os.kill(int(pids[0]), getattr(signal, sent))
        start = time.monotonic()
        error = run.communicate(timeout=30)[1]
    assert word == "started" and len(pids) == 2 and time.monotonic() - start < 20
    assert run.returncode == code, error
    assert error.count("\n") == bool(said) and said in error, error
    for pid in map(int, pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@unix_only
def test_slow_images_are_no_stall(tmp_path):
    """Longer than PATIENCE, 3 s, for a batch, shorter for its parts."""
    (tmp_path / "run.py").write_text(LOADER.replace("if k == 0:", "if k == 1: sys.exit(7)\n"
                                     "            if k == 0:").replace("Slow(), 16", "Slow(), 48"))
    done = subprocess.run([sys.executable, "run.py", "fork", "x", "1.1"], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_finite_list_of_chunks_ends(data, workers):
    found = [sample["index"] for samples in load_chunks(data, [[0, 1], [2], [3, 4]], workers, 2)
             for sample in samples]
    assert found == [0, 1, 2, 3, 4] and not list(load_chunks(data, [], workers, 2))


@unix_only
def test_loader_processes_end_with_a_killed_program(tmp_path):
    (tmp_path / "run.py").write_text(LOADER)
    with subprocess.Popen([sys.executable, "run.py", "fork", "x", ".05"], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as run:
        pids = [int(pid) for pid in run.stdout.readline().split()[1:]]
        run.kill()
    end = time.monotonic() + 20
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < end, alive
        time.sleep(.1)
    assert len(pids) == 2


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.filterwarnings("error")
def test_more_processes_than_cores_are_no_warning(data):
    assert same(first(data, 2, batch_size=4), first(data, 2, batch_size=4, workers=5))


def test_what_a_loader_process_raises_is_raised():
    class Broken:
        def __len__(self):
            return 10

        def fetch(self, index):
            raise RuntimeError("of its own")
    with pytest.raises(RuntimeError, match="of its own"):
        next(batches(Broken(), 2, seed=0, workers=1))


# ---- the first look ----------------------------------------------------------------------------
def look(*args, env=None):
    program = Path(__file__).parents[1] / "data.py"
    done = subprocess.run([sys.executable, program, *map(str, args)], text=True,
                          capture_output=True, env=env, errors="replace")
    assert "Traceback" not in done.stderr
    return done


def test_first_look(tmp_path):
    (tmp_path / "d").mkdir()
    root = plain(tmp_path / "d", 6)
    done = look(root, "--out", tmp_path / "sheet.png", "--export-prompts", tmp_path / "p.jsonl")
    assert done.returncode == 0 and "train 6, val 0, test 0" in done.stdout
    assert Image.open(tmp_path / "sheet.png").width == 4 * 264 + 8
    prompts = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [p["id"] for p in prompts] == [f"{k}.png" for k in range(6)]
    assert prompts[3]["clean"].endswith("FINDINGS: Nodule of 3 mm.")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "p.jsonl", "sheet.png"]


def test_names_that_the_console_cannot_encode(tmp_path):
    """The traceback came after the work was done."""
    root = tmp_path / "caf\udce9 \u5fc3"
    save_grey(root / "a.png")
    (root / "metadata.csv").write_text("image,report\na.png,FINDINGS: \u5fc3 nodule.\n", "utf-8")
    for encoding in ("ascii:strict", "utf-8:strict", "latin-1:strict"):
        done = look(root, "--out", tmp_path / "s.png", "--clean",
                    env=os.environ | {"PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and "caf\\udce9" in done.stdout, done.stderr
    (root / "metadata.csv").unlink()
    done = look(root, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "udce9" in done.stderr


def test_cleaning_as_a_command(tmp_path):
    root = plain(tmp_path / "d", 3)
    text = (root / "metadata.csv").read_text().replace("Nodule of 2", "Unchanged nodule of 2")
    (root / "metadata.csv").write_text(text)
    done = look(root, "--out", tmp_path / "s.png", "--clean")
    assert done.returncode == 0 and "3 reports, 0 by answers; 0 kept" in done.stdout
    assert "0 of them not cleaned" in done.stdout and not done.stderr
    assert open_data(str(root), "train", 16)[2]["report"] == "FINDINGS: Nodule of 2 mm."
    for args in (["--answers", "x.jsonl"], ["--clean", "--answers", tmp_path / "gone.jsonl"],
                 ["--out", tmp_path / "gone/s.png"]):
        done = look(root, *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_first_look_without_images_shows_the_text(tmp_path):
    root = plain(tmp_path, 6)
    for file in root.glob("*.png"):
        file.unlink()
    done = look(root, "--out", tmp_path / "sheet.png")
    assert done.returncode == 0 and "6 of 6 images" in done.stdout and "6 reports" in done.stdout
    assert not (tmp_path / "sheet.png").exists()


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    for args in (("--out", tmp_path / "s.png", tmp_path), ("--out", tmp_path / "s.png", "gone"),
                 ("--out", tmp_path / "gone/s.png"),
                 ("--out", tmp_path / "s.png", "--export-prompts", "x.jsonl")):
        done = look(*args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_sheet(tmp_path):
    images = [np.full((10, 10), 50, np.uint8), torch.full((300, 200, 3), 9, dtype=torch.uint8)]
    captions = ["", "one two\nthree " + "WWWWWWWWWWWW" * 9]
    sheet(images, captions, 2, tmp_path / "s.png")
    page = np.array(Image.open(tmp_path / "s.png"))
    assert (page[8:198, 8:198] == 50).all() and (page[8:308, 216:416] == 9).all()
    assert (page[320:, 216:] < 128).any() and (page[-8:] == 255).all()
    with pytest.raises(UserError, match="cannot be written"):
        sheet(images, captions, 2, tmp_path / "gone/s.png")


def test_on_windows_a_file_that_another_program_has_open(tmp_path, monkeypatch):
    """A scanner or a viewer lets go after a moment; until then os.replace is refused."""
    real, asked = os.replace, []

    def replace(a, b):
        asked.append(b)
        if len(asked) < 3:
            raise PermissionError(13, "in use")
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(data_module, "WINDOWS", True)
    with data_module.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole" and len(asked) == 3
    assert [*tmp_path.iterdir()] == [tmp_path / "a.txt"]
    monkeypatch.setattr(data_module, "WINDOWS", False)
    asked.clear()
    with pytest.raises(UserError, match="in use"), data_module.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("other")
