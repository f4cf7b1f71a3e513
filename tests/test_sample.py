"""The commands of sample.py: a user's mistakes are one line each; evaluate runs and resumes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import joint_attn
import sample
import side_probe
from ar import Tokenizer, vit_pixels
from conftest import ROOT, small_config, unix_only
from data import UserError, impression, phantom, phantom_scene
from diffusion import VAE
from phantoms import write_phantoms
from unix import INSTRUCTIONS, SPECIAL, Config, UniX

SHIPPED = sample.SHIPPED


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
    sample.COMMANDS[args.command](args)


@pytest.mark.parametrize("line, said", [
    ("evaluate --samples 0", "--samples: 0 is not"), ("evaluate --points 1", "--points: 1 is not"),
    ("evaluate --size 0", "--size"), ("evaluate --guidance nan", "--guidance"),
    ("evaluate --shift 0", "--shift"), ("evaluate --split all", "--split"),
    ("generate x --count 0", "--count"), ("generate x --points 2.5", "--points"),
    ("generate", "texts"), ("report", "images"), ("report a.png --max-tokens 0", "--max-tokens"),
    ("report a.png --temperature -1", "--temperature"), ("report a.png --top-p 0", "--top-p"),
    ("report a.png --top-p 1.1", "--top-p"), ("report a.png --seed x", "--seed"),
    ("draw", "command"), ("", "command"), ("report a.png --seed 3", "at temperature 0"),
    ("report a.png --top-p .5", "--top-p changes nothing"), ("look", "what"),
    ("look a.png --guidance 2", "--guidance changes nothing where an image is read"),
    ("look a.JPG --seed 2", "--seed"), ("look x --layer 0", "--layer: 0"),
    ("generate x --points 2 --eta 1", "--eta changes nothing in a single step"),
    ("generate x --guidance .5", "--guidance: 0.5 is not from 1"),
    ("generate x --guidance inf", "--guidance"), ("generate x --seed -1", "--seed: -1"),
    ("generate x --seed 99999999999999999999999", "--seed"), ("generate x --eta nan", "--eta"),
    ("generate x --best-of 0", "--best-of"), ("generate x --size 1e3", "--size"),
    ("generate x --precision fp16", "--precision")])
def test_wrong_options_are_one_line(line, said, capsys):
    with pytest.raises(SystemExit) as e:
        sample.parse(line.split())
    told = capsys.readouterr().err
    assert e.value.code == 2 and told.count("\n") == 1 and said in told


def test_flags_that_have_an_effect_are_taken():
    for line in ("report a.png --temperature 1 --seed 3 --top-p .5", "look x --seed 2 --size 64",
                 "generate x --points 3 --eta 1", "look a.png --layer 2"):
        sample.parse(line.split())


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
            (("generate", "fine", "--out", tmp_path / "file" / "b" / "a.png"), "cannot be written"),
            (("generate", "fine", "--out", f"{tmp_path}/file/"), "file"),
            (("look", "fine", "--layer", 4), "3 layers"),
            (("look", image, "--layer", 4), "3 layers"),
            (("look", "missing.png"), "missing.png is not a file"),
            (("look", "fine", "--size", 7), "multiple of 8"),
            (("evaluate", "--judge", tmp_path, "--out", tmp_path / "e"), "config.json"),
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
    ("generate fine --out none/a.png", "none/a.png cannot be written")])
def test_the_program_ends_with_2_and_one_line(tmp_path, line, said):
    done = run(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and said in done.stderr


@unix_only
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
    how = ("--points", 3, "--seed", 7)
    call(weights, "generate", "fine", "--out", tmp_path / "a.png", *how)
    assert Image.open(tmp_path / "a.png").size == (48, 48)
    assert capsys.readouterr().out == (
        f"wrote {tmp_path / 'a.png'}: weights {weights}, 48 px, guidance 2, 3 points, shift 3, "
        "eta 0, seed 7\n")
    call(weights, "generate", "fine", "--count", 2, "--out", tmp_path / "b.png", *how)
    assert Image.open(tmp_path / "b.png").width > 300
    call(weights, "generate", "Fine. Good!", "ã", "--count", 2, "--out", f"{tmp_path}/new/", *how)
    names = ["fine-good-seed7.png", "fine-good-seed8.png", "image-seed10.png", "image-seed9.png"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names
    one = UniX.load(weights).generate(["fine"], seeds=[7], points=3, shift=3.0)[0, 0].numpy()
    assert (np.array(Image.open(tmp_path / "a.png")) == one).all()
    last = np.array(Image.open(tmp_path / "new" / names[2]))
    texts = ["Fine. Good!", "Fine. Good!", "ã", "ã"]
    four = UniX.load(weights).generate(texts, seeds=[7, 8, 9, 10], points=3, shift=3.0)[:, 0].numpy()
    assert (last == four[3]).all()
    two = UniX.load(weights).generate(["ã"], seeds=[10], points=3, shift=3.0)[0, 0].numpy()
    assert abs(last.astype(int) - two).max() <= 1       # alone: a last bit may cost a grey level


def test_settings_are_as_asked_else_as_trained(weights):
    model = UniX.load(weights)
    model.config.guidance, model.config.eta = 2.5, 0.75

    def settings(*words):
        args = sample.parse(["look", "fine", "--weights", str(weights), *words])
        return sample.settings(args, model), args.used
    assert settings() == (
        {"points": 50, "scale": 2.5, "shift": 3.0, "eta": 0.75},
        f"weights {weights}, 48 px, guidance 2.5, 50 points, shift 3, eta 0.75")
    asked = ("--points", "9", "--guidance", "1", "--shift", "1", "--eta", "0", "--size", "32")
    assert settings(*asked) == ({"points": 9, "scale": 1.0, "shift": 1.0, "eta": 0.0},
                                f"weights {weights}, 32 px, guidance 1, 9 points, shift 1, eta 0")


def test_every_command_runs_in_bf16(weights, image, tmp_path):
    for words in (("report", image), ("generate", "fine", "--points", 3, "--out", tmp_path / "a.png"),
                  ("look", "fine", "--points", 3, "--out", tmp_path / "b.png"),
                  ("look", image, "--out", tmp_path / "c.png"),
                  ("evaluate", "--samples", 2, "--points", 3, "--out", tmp_path / "e")):
        call(weights, *words, "--precision", "bf16")


def test_generate_takes_a_size(weights, tmp_path):
    call(weights, "generate", "fine", "--size", 32, "--points", 3, "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (32, 32)


def test_a_report_is_sampled_as_asked(weights, image, capsys, monkeypatch):
    def written(*words):
        call(weights, "report", image, "--max-tokens", 20, *words)
        return capsys.readouterr().out
    warm = ("--temperature", 2)
    assert written() == written("--temperature", 0) != written(*warm) == written(*warm, "--seed", 0)
    assert written(*warm, "--seed", 1) != written(*warm)
    assert written(*warm, "--top-p", 0.001) == written()
    said = []
    monkeypatch.setattr(UniX, "report", lambda self, pixels, *how: said.append(how) or ["Fine."])
    assert written() == written("--prompt", "Why?") == "Fine.\n"
    assert said == [(INSTRUCTIONS[0], 20, 0, 1, 0), ("Why?", 20, 0, 1, 0)]


def test_best_of_keeps_what_is_read_back(weights, tmp_path, monkeypatch, capsys):
    """Four images of each text, of which the reader says these things."""
    said = iter(["Normal.", "Left effusion.", "Right effusion.", "Small right effusion.",
                 "Edema.", "Cardiomegaly.", "Severe cardiomegaly.", "Severe cardiomegaly."])
    monkeypatch.setattr(sample, "read", lambda model, images: [next(said) for _ in images])
    call(weights, "generate", "Small right effusion.", "Severe cardiomegaly.", "--best-of", 4,
         "--points", 3, "--out", f"{tmp_path}/best/")
    names = sorted(p.name for p in (tmp_path / "best").iterdir())
    assert names == ["severe-cardiomegaly-seed6.png", "small-right-effusion-seed3.png"]
    assert capsys.readouterr().out.endswith("best of 4, seed 3, 6\n")
    image = UniX.load(weights).generate(["Severe cardiomegaly."], seeds=[6], points=3)[0, 0].numpy()
    assert (np.array(Image.open(tmp_path / "best" / names[0])) == image).all()


@pytest.mark.parametrize("worse, better", [
    ("", "Small right effusion."), ("Edema.", "Small right effusion. Edema."),
    ("No effusion.", "Left effusion."), ("Left effusion.", "Right effusion."),
    ("Large right effusion.", "Small right effusion."),
    ("Small right effusion. Edema.", "Small right effusion."),
    ("Small bilateral effusions.", "Small right effusion.")])
def test_which_report_agrees_better(worse, better):
    asked = ["Small right effusion."] * 2
    assert sample.best_of(2, asked, [worse, better]).tolist() == [1]
    assert sample.best_of(2, asked, [better, worse]).tolist() == [0]
    assert sample.best_of(1, asked, [worse, better]).tolist() == [0, 1]
    assert sample.best_of(2, asked * 2, [better, better, worse, better]).tolist() == [0, 3]


def test_weights_are_the_newest_run_else_those_of_the_repository(
        weights, image, tmp_path, monkeypatch, capsys):
    def used():
        args = sample.parse(["report", image])
        sample.open_model(args)
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and str(args.weights) in told
        return str(args.weights), told
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "SHIPPED", tmp_path / "assets" / "tiny")
    with pytest.raises(UserError, match="train.py --stage 1"):
        used()
    shutil.copytree(weights, tmp_path / "assets" / "tiny")
    assert used()[0] == str(sample.SHIPPED) and "of the repository" in used()[1]
    for n, name in enumerate(("a", "c", "b")):
        shutil.copytree(weights, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "model.safetensors", (n + 1, n + 1))
    (tmp_path / "runs" / "d").mkdir()                       # not yet saved
    assert used()[0] == "runs/b" and "newest run" in used()[1]
    assert SHIPPED == ROOT / "assets" / "tiny"


@pytest.mark.parametrize("words, taught_on, times", [
    (("report", "a.png", "b.png"), "phantom", 1), (("look", "a.png"), "phantom", 1),
    (("report", "a.png"), "mimic", 0), (("look", "fine"), "phantom", 0),
    (("generate", "fine"), "phantom", 0), (("evaluate",), "phantom", 0)])
def test_weights_that_know_phantoms_alone_say_so(weights, monkeypatch, capsys, words, taught_on,
                                                 times):
    load = UniX.load

    def taught(*how):
        model = load(*how)
        model.config.taught_on = taught_on
        return model
    monkeypatch.setattr(UniX, "load", staticmethod(taught))
    sample.open_model(sample.parse([*words, "--weights", str(weights)]))
    told = capsys.readouterr().err
    assert told.count("\n") == told.count("real X-ray means nothing") == times


def test_weights_that_cannot_generate_say_so(weights, image, tmp_path, capsys):
    model = UniX.load(weights)
    torch.nn.init.zeros_(model.llm2vae.weight)
    model.save(tmp_path / "reader")
    out = ("--out", tmp_path / "e")
    for words in (("generate", "fine"), ("look", "fine")):
        with pytest.raises(UserError, match="cannot generate yet; run train.py --stage 2"):
            call(tmp_path / "reader", *words)
    for name in ("--points", "--guidance", "--eta", "--shift", "--seed", "--best-of", "--judge",
                 "--features"):
        with pytest.raises(UserError, match=f"{name} changes nothing"):
            call(tmp_path / "reader", "evaluate", name, 1 if name != "--points" else 9, *out)
    call(tmp_path / "reader", "evaluate", "--samples", 3, *out)
    assert list(json.loads((tmp_path / "e" / "metrics.json").read_text())) == [
        "samples", "understanding", "autoencoder"]
    model.config.no_context = True
    torch.nn.init.normal_(model.llm2vae.weight)
    model.save(tmp_path / "blind")
    with pytest.raises(UserError, match="--guidance changes nothing"):
        call(tmp_path / "blind", "generate", "fine", "--guidance", 2)
    with pytest.raises(UserError, match="nothing to look at: these weights ignore text"):
        call(tmp_path / "blind", "look", "fine")


def test_precision(weights, image, tmp_path, monkeypatch):
    """bf16 for large models where it is fast; never for `tiny`; the autoencoder stays fp32."""
    seen = {}
    for part, name in ((UniX, "report"), (UniX, "read_captions"), (UniX, "velocity"),
                       (VAE, "decode")):
        def watched(self, *args, name=name, real=getattr(part, name), **how):
            seen[name] = torch.is_autocast_enabled("cpu")
            return real(self, *args, **how)
        monkeypatch.setattr(part, name, watched)

    def cast(*words):
        seen.clear()
        model = sample.open_model(sample.parse(["report", image, "--weights", str(weights),
                                                "--device", "cpu", *words]))
        size = model.config.vit_image
        model.report(model.vit.prepare(torch.zeros(1, size, size, dtype=torch.uint8)), max_new=2)
        model.generate(["Large left effusion."], points=3)
        assert seen.keys() == {"report", "read_captions", "velocity", "decode"}
        assert not seen.pop("decode") and len({*seen.values()}) == 1
        return seen["report"]
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        for words in ((), ("--precision", "fp32")):         # narrow: never
            assert not cast(*words)
        assert cast("--precision", "bf16")
    load = UniX.load

    def wide(*how):
        model = load(*how)
        model.config.width = 512
        return model
    monkeypatch.setattr(UniX, "load", staticmethod(wide))
    assert cast() and not cast("--precision", "fp32")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not cast()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cast()


def test_bf16_gives_nearly_the_same_image(weights, tmp_path):
    for how in ("fp32", "bf16"):
        call(weights, "generate", "fine", "--points", 5, "--precision", how,
             "--out", tmp_path / f"{how}.png")
    a, b = (np.array(Image.open(tmp_path / f"{how}.png"), int) for how in ("fp32", "bf16"))
    assert 0 < abs(a - b).mean() < 8


# ---- look ----------------------------------------------------------------------------------------
def test_attention_weights_are_those_of_the_fused_attention(weights, image, monkeypatch):
    """Text, markers, latents and image: each attention of both branches, with and without masks."""
    model, fused, kinds = UniX.load(weights), joint_attn.attend, set()

    def compare(q, k, v, mask=None, causal=False):
        slow, out = sample.attention(q, k, mask, causal), fused(q, k, v, mask, causal)
        assert slow.shape == (*q.shape[:3], k.shape[2]) and slow.min() >= 0
        assert (slow.sum(-1) - 1).abs().max() < 1e-5
        many = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        assert (slow @ many - out).abs().max() < 1e-5
        kinds.add((mask is None, causal, q.shape[2] == k.shape[2]))
        return out
    monkeypatch.setattr(joint_attn, "attend", compare)
    with sample.recorded() as seen:
        model.generate(["fine", "large left effusion"], points=4)
        pixels = torch.randn(2, 3, 48, 48)
        model.report(pixels, max_new=4)
    assert joint_attn.attend is compare and len(kinds) == 4
    assert all((row.sum(-1) - 1).abs().max() < 1e-5 for row in seen)
    n = len(seen)
    model.report(pixels, max_new=2)
    assert len(seen) == n                               # no change to the path outside the block


def test_words_that_look_shows():
    def shown(text, split=1):
        ids = [text[i:i + split] for i in range(0, len(text), split)]
        found = sample.words(SimpleNamespace(decode="".join), ids)
        return [word for word, _ in found], ["".join(ids[i] for i in at) for _, at in found]
    text = "FINDINGS: Large right-sided effusion in the lung. It is a small heart. IMPRESSION: No."
    words = ["large", "right-sided", "effusion", "small", "heart", "no"]
    assert shown(text) == (words, ["Large", "right-sided", "effusion", "small", "heart", "No"])
    found, tokens = shown(text, 3)                      # tokens that cut across words
    assert found == words
    for word, token in zip(words, tokens):
        assert word in token.lower() and len(token) < len(word) + 5


def test_maps_of_a_caption(weights):
    model = UniX.load(weights)
    ids, side, steps = model.ids("Large left effusion."), model.latent_rows(None), []
    latents, maps = sample.caption_maps(model, ids, None, 3, points=5)
    assert latents.shape == (4, 16, 6, 6) and maps.shape == (4, 3, 6, 6, len(ids))
    with sample.recorded() as seen:
        for last in model.sample_latents([ids], side, side, [3], points=5):
            steps.append(seen[-3:])
    assert torch.equal(latents[-1:], last)
    for step, layer, row, column, token in ((0, 0, 0, 0, 0), (3, 2, 0, 5, 1),
                                            (1, 1, 4, 2, len(ids) - 1)):
        whole = steps[step][layer]                      # BOS text EOS, markers, latents
        assert whole.shape == (2 + 36, len(ids) + 2 + 2 + 36)
        assert maps[step, layer, row, column, token] == whole[2 + 6 * row + column, 1 + token]


def test_maps_of_a_report(weights, monkeypatch):
    model = UniX.load(weights)
    image = np.random.default_rng(0).integers(0, 255, (48, 48), np.uint8)
    monkeypatch.setattr(sample, "read", lambda *_: ["Small left effusion."])
    ids, maps = sample.report_maps(model, image)
    assert ids == model.ids("Small left effusion.") and maps.shape == (1, 3, 6, 6, len(ids))
    before = [*model.wrap(model.ids(INSTRUCTIONS[0])), model.config.bos]
    block = model.embed_image(vit_pixels(torch.from_numpy(image[None]).float()))
    for at in (0, len(ids) - 1):        # a token that is the last of its text
        tokens = torch.tensor([before + ids[:at + 1]])
        with sample.recorded() as seen:
            model.lm.read_text(tokens, torch.tensor([tokens.shape[1]]), block)
        want = seen[4][-1, 1:37].reshape(6, 6)          # layer 3: after two of each layer before
        assert torch.allclose(maps[0, 2, ..., at], want, atol=1e-6)


def test_overlay():
    image = np.full((4, 4), 100, np.uint8)
    assert (sample.overlay(image, np.zeros((2, 2))) == 100).all()
    found = sample.overlay(image, np.array([[1., 0], [0, 0]]))
    assert found[0, 0].tolist() == [208, 58, 30] and (found[3, 3] == 100).all()


def test_look(weights, image, tmp_path, capsys, monkeypatch):
    sheets = []
    monkeypatch.setattr(sample, "sheet", lambda *how: sheets.append(how))
    call(weights, "look", "Large left effusion in the lung.", "--points", 12, "--seed", 3,
         "--out", tmp_path / "a.png")
    cells, captions, columns, out = sheets[0]
    assert columns == 8 and len(cells) == len(captions) == 8 * 4 and out == tmp_path / "a.png"
    assert captions[0].startswith("image at t = 0.97") and captions[7] == "image at t = 0.00"
    assert [c.split()[0] for c in captions[8::8]] == ["large", "left", "effusion"]
    assert all(c.endswith("%") for c in captions[8:]) and "at t = 1.00" in captions[8]
    assert len({c.splitlines()[1] for c in captions[8:16]}) == 1        # one scale a row
    made = UniX.load(weights).generate(["Large left effusion in the lung."], seeds=[3], points=12)
    assert (cells[7] == made[0, 0].numpy()).all()
    model = UniX.load(weights)
    ids = model.ids("Large left effusion in the lung.")
    _, maps = sample.caption_maps(model, ids, None, 3, points=12, shift=3.0, scale=2.0, eta=0.0)
    steps = [0, 1, 3, 4, 6, 7, 9, 10]
    for row, (_, at) in zip(range(8, 32, 8), sample.words(model.tokenizer, ids)):
        heat = maps.mean(1)[steps][..., at].mean(-1)        # over the last image, one scale a row
        want = [sample.overlay(cells[7], one / heat.max()) for one in heat]
        assert (np.stack(want) == np.stack(cells[row:row + 8])).all()
    said = capsys.readouterr().out
    assert "12 points" in said and "seed 3" in said and said.endswith(f"wrote {out}\n")

    monkeypatch.setattr(sample, "read", lambda *_: ["Small left effusion is there."])
    call(weights, "look", image, "--out", tmp_path / "b.png")
    cells, captions, columns, out = sheets[1]
    assert [c.split()[0] for c in captions] == [image, "small", "left", "effusion"]
    assert columns == 6 and [c.shape for c in cells] == [(48, 48)] + [(48, 48, 3)] * 3
    assert capsys.readouterr().out == f"Small left effusion is there.\nwrote {out}\n"
    _, maps = sample.report_maps(model, cells[0])
    for layer in (1, 3):
        call(weights, "look", image, "--layer", layer, "--out", tmp_path / "b.png")
        heat = maps[0, layer - 1][..., sample.words(model.tokenizer, model.ids(
            "Small left effusion is there."))[2][1]].mean(-1)
        assert (sheets[-1][0][3] == sample.overlay(cells[0], heat / heat.max())).all()
    monkeypatch.undo()
    call(weights, "look", "Large left effusion.", "--points", 3, "--layer", 2,
         "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").height > 400


# ---- evaluate ------------------------------------------------------------------------------------
def test_evaluate_scores_everything_and_resumes(weights, tmp_path, monkeypatch, capsys):
    out, how = tmp_path / "e", ("--samples", 6, "--points", 3)
    call(weights, "evaluate", "--out", out, *how)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("samples") == 6
    assert list(metrics) == [
        "understanding", "autoencoder", "generation, features: our image encoder, mean of patches",
        "round trip of reports: generated images read back",
        "round trip of impressions: generated images read back", "severity of the heart"]
    printed = capsys.readouterr().out
    for name, table in metrics.items():
        assert table and f"{name} (6 images of phantom, val split; 95% interval)" in printed, name
        for figure, (value, low, high) in table.items():
            assert low <= high and np.isfinite([value, low, high]).all(), figure
            assert f"  {figure}" in printed
    assert "second reader" not in printed and "--best-of" not in printed
    assert {f"{k} F1-{n}{u}" for k in ("micro", "macro") for n in (14, 5) for u in
            ("", ", uncertain as positive")} | {f"BLEU-{n}" for n in range(1, 5)} | {
                "ROUGE-L"} <= set(metrics["understanding"])
    with open(out / "predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["index"] for r in rows] == list("012345")
    reports = [phantom_scene("val", i)[2] for i in range(6)]
    assert [r["Ground Truth"] for r in rows] == reports
    for kind, texts in (("reports", reports), ("impressions", [*map(impression, reports)])):
        with open(out / f"generated-{kind}.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert [r["Ground Truth"] for r in rows] == texts
        assert (out / f"{kind}.png").exists()
        assert len(list((out / "images" / kind).iterdir())) == 6
        made = UniX.load(weights).generate([texts[4]], seeds=[4], points=3, shift=3.0)[0, 0]
        assert (np.array(Image.open(out / "images" / kind / "4.png")) == made.numpy()).all()
        a, b = (sample.label_table([r[k] for r in rows]) == 1
                for k in ("Ground Truth", "Report Impression"))
        table = metrics[f"round trip of {kind}: generated images read back"]
        assert table["micro F1-14"][0] == pytest.approx(sample.f1_scores(a, b)["micro"])
        assert {f"F1 {c} ({n})" for c, n in zip(sample.CLASSES, a.sum(0)) if n} <= set(table)
    assert len(list((out / "images" / "hearts").iterdir())) == 60

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
        call(weights, "evaluate", "--out", out, *how, "--seed", 0)
    assert table.read_bytes() == kept
    assert json.loads((out / "metrics.json").read_text()) == {"samples": 6, **metrics}
    before = (out / "images" / "reports" / "3.png").read_bytes()
    call(weights, "evaluate", "--out", out, *how, "--seed", 1)      # other images
    assert (out / "images" / "reports" / "3.png").read_bytes() != before


def test_look_shows_a_written_report_longer_than_the_context(weights, tmp_path, monkeypatch):
    """Bytes that are no UTF-8, from a young reader, are three times as many when read again."""
    monkeypatch.setattr(sample, "read", lambda *_: ["The lungs are clear. " * 99])
    image = write_phantoms(tmp_path, 0, 1) / "val-0.png"
    call(weights, "look", image, "--out", tmp_path / "look.png")
    assert (tmp_path / "look.png").exists()


def test_look_says_where_nothing_was_written(weights, image, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "read", lambda *_: [" "])
    with pytest.raises(UserError, match="write nothing about this image"):
        sample.look(sample.parse(["look", str(image), "--weights", str(weights), "--out",
                                  str(tmp_path / "look.png")]))


def test_an_evaluation_cuts_reports_longer_than_the_context(weights, tmp_path):
    folder = write_phantoms(tmp_path / "long", 0, 2)
    rows = "\n".join(f"val-{i}.png,{'The lungs are clear. ' * 99},val" for i in range(2))
    (folder / "metadata.csv").write_text("image,report,split\n" + rows)
    call(weights, "evaluate", "--data", folder, "--out", tmp_path / "e", "--points", 2)
    assert len([*(tmp_path / "e" / "images" / "reports").iterdir()]) == 2


def test_the_origin_of_an_evaluation(weights, tmp_path):
    """Other weights, data, seed, size or settings: the origin. More images of a text: not."""
    shutil.copytree(weights, tmp_path / "weights")

    def origin(*words):
        args = sample.parse(["evaluate", "--weights", str(tmp_path / "weights"), "--device", "cpu",
                             "--out", str(tmp_path / "e"), *words])
        sample.Evaluation(args)
        kept = (tmp_path / "e" / "a.csv").exists() and (tmp_path / "e/images/x/a.png").exists()
        (tmp_path / "e" / "images" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "e" / "a.csv").touch()
        (tmp_path / "e" / "images" / "x" / "a.png").touch()
        return kept
    origin()
    assert origin() and origin("--best-of", "3") and origin("--samples", "9", "--seed", "0")
    assert origin("--judge", str(weights)) and origin("--points", "50", "--shift", "3")
    for words in (("--seed", "1"), ("--points", "9"), ("--guidance", "5"), ("--eta", ".5"),
                  ("--shift", "2"), ("--size", "32"), ("--split", "test"), ("--precision", "bf16")):
        assert not origin(*words) and origin(*words), words
    os.utime(tmp_path / "weights" / "config.json", (1, 1))      # trained further
    assert not origin(*words)


def test_evaluate_best_of_and_a_second_reader(weights, tmp_path, monkeypatch, capsys):
    """The reader calls the second of each three images right, the judge nothing."""
    model = UniX.load(weights)
    torch.nn.init.normal_(model.lm.lm_head.weight)
    model.save(tmp_path / "judge")
    texts = [phantom_scene("val", i)[2] for i in range(4)]

    def reads(model, images, *_):
        if len(images) != 12:       # the judge gets the four that were chosen, or true images
            others.append(model)
            return ["Nothing."] * len(images)
        sizes.append([*images])
        right = texts if len(sizes) == 1 else [*map(impression, texts)]
        return [right[i // 3] if i % 3 == 1 else "Nothing." for i in range(12)]
    sizes, others = [], []
    monkeypatch.setattr(sample, "read", reads)
    monkeypatch.setattr(sample.Evaluation, "hearts", lambda self: {})
    sheets = {}
    monkeypatch.setattr(sample, "sheet", lambda *how: sheets.update({how[-1].name: how}))
    call(weights, "evaluate", "--out", tmp_path / "e", "--samples", 4, "--points", 3, "--best-of",
         3, "--judge", tmp_path / "judge")
    assert len(others) == 3 and others[0] is not others[1] is others[2]
    assert torch.equal(others[1].lm.lm_head.weight, model.lm.lm_head.weight)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    for kind in ("reports", "impressions"):
        table = metrics[f"round trip of {kind}: generated images read back"]
        assert table["micro F1-14"][0] == 1 and table["micro F1-14, second reader"][0] == 0
        assert table["micro F1-14 of the true images (ceiling)"][0] == 0
        cells, captions = sheets[f"{kind}.png"][:2]
        text = impression(texts[1]) if kind == "impressions" else texts[1]
        assert captions[2:4] == [f"TRUE IMAGE\n{text}", f"GENERATED, AND READ AS\n{text}"]
        assert (cells[2] == phantom("val", 1, 48).image).all()
        chosen = Image.open(tmp_path / "e" / "images" / kind / "1-1.png")
        assert (cells[3] == np.array(chosen)).all()
        names = {p.name for p in (tmp_path / "e" / "images" / kind).iterdir()}
        assert names == {f"{i}{k}.png" for i in range(4) for k in ("", "-1", "-2")}
    seeds = [Image.open(tmp_path / "e" / "images" / "reports" / f"2{k}.png") for k in ("", "-2")]
    want = model.generate([texts[2]] * 2, seeds=[2, 2_000_002], points=3, shift=3.0)[:, 0].numpy()
    assert all((np.array(image) == w).all() for image, w in zip(seeds, want))
    said = capsys.readouterr().out
    assert "note: the reader that chose the best of 3 images also scores them\n" in said


def test_a_second_reader_judges_without_a_choice(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.Evaluation, "hearts", lambda self: {})
    call(weights, "evaluate", "--out", tmp_path / "e", "--samples", 2, "--points", 3, "--judge",
         weights)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    for kind in ("reports", "impressions"):     # itself
        table = metrics[f"round trip of {kind}: generated images read back"]
        for name in ("micro F1-14", "macro F1-14"):
            assert table[name] == table[f"{name}, second reader"]


# ---- what the console or the disk does not take --------------------------------------------------
def test_names_that_the_console_cannot_encode(weights, image, tmp_path):
    odd = tmp_path / "Ünïcode ☃.png"
    shutil.copy(image, odd)
    done = run("report", odd, odd, "--weights", weights, "--max-tokens", 3,
               env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u2603" in done.stdout and "Traceback" not in done.stderr
    done = run("report", tmp_path / "☃.png", "--weights", weights,
               env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and "\\u2603.png" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(weights, image, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "report", image,
                               "--weights", str(weights), "--max-tokens", "3"], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == "sample.py: [Errno 28] No space left on device\n"


def test_a_probe_reads_sides_where_they_are_and_only_there():
    """The weights of the repository keep the side of a finding from the second layer on; a word's
    own embedding, of which the first layer makes its keys and values, does not have it."""
    torch.manual_seed(0)
    x, left = torch.randn(900, 8), torch.rand(900).round()
    assert abs(side_probe.probe(x, left) - 0.5) < 0.1
    x[:, 3] += 6 * left
    assert side_probe.probe(x, left) > 0.97
    first, second, _ = side_probe.measure(UniX.load(SHIPPED), 400)
    assert first < 0.7 and second > 0.9
