"""The commands of sample.py: a user's mistakes are one line each; evaluate runs and goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ar import Tokenizer
from conftest import ROOT, small_config
from data import UserError, phantom_scene
from diffusion import VAE
from unix import SPECIAL, UniX


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights folder of a small model with random weights, a tokenizer and an autoencoder."""
    torch.manual_seed(0)
    texts = [phantom_scene("train", i)[2] for i in range(20)]
    tokenizer = Tokenizer.train(texts, 300, SPECIAL)
    config = small_config(vit_image=48, resolution=48, vocab=300, max_tokens=256, bos=0, eos=1,
                          boi=2, eoi=3)
    model = UniX(config, tokenizer, VAE(ch=32, mult=[1, 1, 1, 1], blocks=1, attn=[]))
    for p in model.lm.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    folder = tmp_path_factory.mktemp("weights")
    model.save(folder)
    return folder


@pytest.fixture
def image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 30), np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def call(weights, *words):
    args = sample.parse([str(w) for w in words] + ["--weights", str(weights), "--device", "cpu"])
    {"report": sample.report, "generate": sample.generate, "evaluate": sample.evaluate}[
        args.command](args)


@pytest.mark.parametrize("line, said", [
    ("evaluate --samples 0", "--samples: 0 is not"), ("evaluate --points 1", "--points: 1 is not"),
    ("evaluate --size 0", "--size"), ("evaluate --guidance nan", "--guidance"),
    ("evaluate --shift 0", "--shift"), ("evaluate --split all", "--split"),
    ("generate x --count 0", "--count"), ("generate x --points 2.5", "--points"),
    ("generate", "texts"), ("report", "images"), ("report a.png --max-tokens 0", "--max-tokens"),
    ("report a.png --temperature -1", "--temperature"), ("report a.png --top-p 0", "--top-p"),
    ("report a.png --top-p 1.1", "--top-p"), ("report a.png --seed x", "--seed"),
    ("draw", "command"), ("", "command")])
def test_wrong_options_are_one_line(line, said, capsys):
    with pytest.raises(SystemExit) as e:
        sample.parse(line.split())
    told = capsys.readouterr().err
    assert e.value.code == 2 and told.count("\n") == 1 and said in told


def test_images_that_are_none(weights, image, tmp_path):
    whole = open(image, "rb").read()
    for name, content in (("empty", b""), ("cut", whole[:200]), ("text", b"not an image")):
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.png"):
            call(weights, "report", image, tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="missing.png"):
        call(weights, "report", tmp_path / "missing.png")


def test_prompts_and_texts_that_do_not_fit(weights, image, tmp_path):
    for text, said in (("", "empty"), (" \n", "empty"), ("effusion " * 300, "shorten")):
        with pytest.raises(UserError, match=said):
            call(weights, "report", image, "--prompt", text)
        with pytest.raises(UserError, match=said):
            call(weights, "generate", "fine", text, "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_sizes_folders_and_devices(weights, image, tmp_path):
    (tmp_path / "file").write_text("")
    for words, said in (
            (("generate", "fine", "--size", 7), "multiple of 8 up to 64"),
            (("evaluate", "--size", 7, "--out", tmp_path / "e"), "multiple of 8"),
            (("generate", "fine", "--out", tmp_path / "none" / "a.png"), "cannot be written"),
            (("generate", "fine", "--out", tmp_path), "cannot be written"),
            (("evaluate", "--out", tmp_path / "file", "--samples", 2), "file"),
            (("evaluate", "--features", tmp_path), "model.safetensors"),
            (("evaluate", "--features", weights), "no DINOv2"),
            (("evaluate", "--data", tmp_path / "nowhere", "--out", tmp_path / "e"), "nowhere"),
            (("report", image, "--device", "abacus"), "abacus")):
        args = sample.parse([str(w) for w in words] + ["--weights", str(weights)])
        code, told = sample.run(args)
        assert code == 2 and said in told and "\n" not in told
    with pytest.raises(UserError, match="config.json"):
        call(tmp_path / "nowhere", "report", image)


def run(*words, **more):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, words)], text=True,
                          capture_output=True, **more)


@pytest.mark.parametrize("line, said", [
    ("report image.png --weights nowhere", "nowhere"), ("evaluate --samples 0", "--samples"),
    ("report image.png", "train.py --stage 1")])
def test_the_program_ends_with_2_and_one_line(tmp_path, line, said):
    done = run(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and said in done.stderr


def test_control_c_is_one_line(weights, tmp_path):
    with subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "evaluate", "--weights",
                           str(weights), "--out", str(tmp_path / "e"), "--samples", "5000"],
                          stderr=subprocess.PIPE, text=True) as program:
        while not (tmp_path / "e" / "origin.json").exists() and program.poll() is None:
            time.sleep(0.1)
        os.kill(program.pid, signal.SIGINT)
        told = program.communicate()[1]
    assert program.returncode == 130 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("sample.py: stopped")


def test_report_and_generate(weights, image, tmp_path, capsys):
    call(weights, "report", image, "--max-tokens", 5)
    once = capsys.readouterr().out
    call(weights, "report", image, image, "--max-tokens", 5)
    assert capsys.readouterr().out == f"{image}: {once}" * 2
    call(weights, "generate", "fine", "--out", tmp_path / "a.png", "--points", 3)
    assert Image.open(tmp_path / "a.png").size == (48, 48)
    call(weights, "generate", "fine", "--count", 2, "--out", tmp_path / "b.png", "--points", 3)
    assert Image.open(tmp_path / "b.png").width > 300


def test_evaluate_scores_everything_and_goes_on(weights, tmp_path, monkeypatch):
    out, how = tmp_path / "e", ("--samples", 6, "--points", 3)
    call(weights, "evaluate", "--out", out, *how)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("samples") == 6
    assert list(metrics) == [
        "understanding", "autoencoder", "generation, features: our image encoder, mean of patches",
        "round trip: generated images read back", "severity of the heart"]
    for name, table in metrics.items():
        assert table, name
        for figure, (value, low, high) in table.items():
            assert low <= high and np.isfinite([value, low, high]).all(), figure
    assert {f"{k} F1-{n}{u}" for k in ("micro", "macro") for n in (14, 5) for u in
            ("", ", uncertain as positive")} | {f"BLEU-{n}" for n in range(1, 5)} | {
                "ROUGE-L"} <= set(metrics["understanding"])
    with open(out / "predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["index"] for r in rows] == list("012345")
    assert [r["Ground Truth"] for r in rows] == [phantom_scene("val", i)[2] for i in range(6)]
    assert (out / "images.png").exists() and len(list((out / "images").iterdir())) == 6 + 60

    def never(*_, **__):
        raise AssertionError("computed again")
    table, kept = out / "predictions.csv", (out / "predictions.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(UniX, "generate", never)
        patch.setattr(UniX, "report", never)
        call(weights, "evaluate", "--out", out, *how)       # all is there
    table.write_bytes(kept[:-20])                           # killed while it wrote the last row
    with monkeypatch.context() as patch:
        patch.setattr(UniX, "generate", never)
        call(weights, "evaluate", "--out", out, *how)
    assert table.read_bytes() == kept
    assert json.loads((out / "metrics.json").read_text()) == {"samples": 6, **metrics}
    (out / "images" / "3.png").unlink()
    call(weights, "evaluate", "--out", out, *how, "--seed", 1)      # other images
    assert (out / "images" / "3.png").exists()
