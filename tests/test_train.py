"""Training: each stage teaches what it should and nothing else, and nothing is ever lost."""

import gc
import json
import math
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample
import train
import unix
from ar import Tokenizer
from conftest import GOLDEN, ROOT, unix_only
from data import UserError, phantom
from diffusion import VAE, repa_loss, sample_time, vae_pixels
from phantoms import write_phantoms
from train import (STAGES, CaptionCache, LatentCache, Log, Muon, Options, Processes, Trainer,
                   orthogonal)
from unix import UniX, load_rad_dino, load_vae, read_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain data folder of 24 small phantoms."""
    return write_phantoms(tmp_path_factory.mktemp("images"), 16, 8)


@pytest.fixture(autouse=True)
def few_sheets(request, monkeypatch):
    """A sheet takes a second or more; only the tests of sheets and of long texts write them."""
    if not re.search("sheet|longer", request.node.name):
        monkeypatch.setattr(Trainer, "write_sheet", lambda self: None)


def options(folder, out, stage, **more) -> Options:
    return Options(**{**dict(stage=stage, data=str(folder), out=str(out), steps=2, batch_size=4,
                             precision="fp32",      # what is compared is not to be rounded to bf16
                             sheet_every=100, save_every=100), **more})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Stages 0 to 3, two steps each; the weights after each stage are kept."""
    out, kept = tmp_path_factory.mktemp("run"), {}
    for stage in (0, 1, 2, 3):
        train.run(options(folder, out, stage))
        if stage:
            kept[stage] = {k: v.clone() for k, v in
                           read_safetensors(out / "model.safetensors").items()}
        kept["vae", stage] = (out / "vae" / "model.safetensors").read_bytes()
    return out, kept


def test_a_stage_changes_its_branch_and_leaves_the_rest_bit_identical(trained):
    out, kept = trained
    generation = [k for k in kept[1] if "_moe_gen" in k or k.startswith(("vae2llm", "llm2vae", "time_"))]
    understanding = [k for k in kept[1] if k not in generation]
    for stage in (2, 3):
        assert all(torch.equal(kept[stage][k], kept[1][k]) for k in understanding)
        assert not all(torch.equal(kept[stage][k], kept[stage - 1][k]) for k in generation)
    assert kept["vae", 0] == kept["vae", 1] == kept["vae", 2] == kept["vae", 3]


def test_what_a_run_leaves_behind(trained):
    out, _ = trained
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "vae", "log.jsonl", "curves.png",
            "stage0-000002.png", "stage1-000002.png", "stage2-000002.png", "stage3-000002.png"} <= names
    model = UniX.load(out)
    assert model.config.resolution == 128 and model.vae.factor == 8
    assert len(model.generate(["Large left effusion."], points=3)) == 1


def test_control_c_is_as_usual_after_a_stage(trained):
    """What follows a stage in the same program must not swallow Ctrl-C."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_stage_says_so(trained, folder, capsys):
    train.run(options(folder, trained[0], 3))
    assert "is finished (2 steps)" in capsys.readouterr().out


def test_latents_of_the_autoencoder_have_unit_variance(trained, folder):
    vae = load_vae(trained[0] / "vae" / "model.safetensors")
    images = torch.from_numpy(np.stack([phantom("train", i, 64).image for i in range(16)]))
    with torch.no_grad():
        moments = vae.moments(vae_pixels(images))
        z = vae.latents(moments, torch.randn(16, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.2


@pytest.mark.parametrize("stage, said", [(2, "--stage 1"), (3, "--stage 2")])
def test_a_stage_whose_predecessor_is_missing_names_the_command(folder, tmp_path, stage, said):
    with pytest.raises(UserError, match=said):
        train.run(options(folder, tmp_path / "new", stage))
    assert not (tmp_path / "new").exists()


def test_no_stage_runs_another(trained, folder, tmp_path):
    """A missing or unfinished autoencoder is one line with the command, and nothing is written."""
    shutil.copytree(trained[0], tmp_path / "run")
    for name in ("stage0.pt", "stage2.pt", "vae/model.safetensors"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match="has not been through stage 0.*train.py --stage 0.*--vae"):
        train.run(options(folder, tmp_path / "run", 2))
    half = begun(folder, tmp_path / "run", 0, 1, None)
    with pytest.raises(UserError, match="stage 0 .* is not finished.*train.py --stage 0"):
        train.run(options(folder, tmp_path / "run", 2))
    assert half.file.exists() and not (tmp_path / "run" / "stage2.pt").exists()
    train.run(options(folder, tmp_path / "run", 2, vae=str(trained[0] / "vae/model.safetensors")))


def begun(folder, out, stage, step, base, **more) -> Trainer:
    """A stage of a copy of a run, stopped at `step` as Ctrl-C stops it."""
    if base:
        shutil.copytree(base, out, dirs_exist_ok=True)
        (out / f"stage{stage}.pt").unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    o = options(folder, out, stage, steps=4, **more)
    s = train.replace(STAGES["tiny"][stage], steps=4, batch=4)
    trainer = train.set_up(o, s, Processes(), out)
    stream = trainer.stream()
    while trainer.step < step:
        trainer.train_step(next(stream))
    trainer.save_checkpoint()
    return trainer


@pytest.mark.parametrize("stage, more", [(0, {}), (1, {}), (2, {}), (2, {"train": "both"}),
                                         (2, {"train": "both", "share_layers": 2})])
def test_resumed_equals_never_stopped_bit_for_bit(trained, folder, tmp_path, stage, more):
    base = None if stage < 2 else trained[0]
    whole = begun(folder, tmp_path / "whole", stage, 4, base, **more)
    begun(folder, tmp_path / "parts", stage, 2, base, **more)
    again = train.set_up(whole.options, whole.stage, Processes(), tmp_path / "parts")
    again.resume()
    assert again.step == 2
    stream = again.stream()
    while again.step < 4:
        again.train_step(next(stream))
    for name, p in whole.trainable.items():
        assert torch.equal(p, again.trainable[name]), name
    kept = again.average()
    assert all(torch.equal(v, kept[k]) for k, v in whole.average().items())
    assert bool(kept) == (stage > 1)


@pytest.mark.parametrize("patch, steps", [(2, 2), (1, 2), (2, 4)])
def test_stage_2_from_other_weights_resumes(trained, folder, tmp_path, patch, steps):
    """Its first start copies the tower and, for another autoencoder, makes new projections; they
    are neither made again nor taken for other weights when it resumes. A finished one says so."""
    start = UniX.load(trained[0])
    for p in start.branch("generation").values():
        torch.nn.init.normal_(p)                            # the tower is no copy
    start.vae2llm, start.llm2vae = nn.Linear(16 * patch ** 2, 128), nn.Linear(128, 16 * patch ** 2)
    start.config.latent_patch = patch
    start.save(tmp_path / "start")
    more = {"steps": 4, "weights": str(tmp_path / "start")}
    train.run(options(folder, tmp_path / "whole", 2, **more))
    o, row = options(folder, tmp_path / "parts", 2, **more), STAGES["tiny"][2]
    trainer = train.set_up(o, train.replace(row, steps=4, batch=4), Processes(), tmp_path / "parts")
    stream = trainer.stream()
    while trainer.step < steps:
        trainer.train_step(next(stream))
    trainer.save_checkpoint()
    train.run(o)
    whole, parts = (read_safetensors(tmp_path / k / "model.safetensors") for k in ("whole", "parts"))
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    assert whole["vae2llm.weight"].shape == (128, 64)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_equals_the_big_batch(trained, folder, tmp_path, stage):
    """Token-weighted: reports of different lengths lie in the parts."""
    base, learned = None if stage < 2 else trained[0], []
    for parts in (1, 2, 3):
        trainer = begun(folder, tmp_path / str(parts), stage, 0, base, accumulate=parts)
        learned.append(gradients(trainer))
    for others in learned[1:]:
        for k, g in learned[0].items():
            torch.testing.assert_close(others[k], g, atol=2e-6, rtol=1e-3)


def gradients(trainer) -> dict:
    """What one step would have the optimizers see."""
    batch = next(trainer.stream())
    for optimizer in trainer.optimizers:
        optimizer.step = optimizer.zero_grad = lambda: None
    trainer.train_step(batch)
    return {k: p.grad.clone() for k, p in trainer.trainable.items() if p.grad is not None}


@pytest.mark.parametrize("stage, train", [(1, "own"), (2, "own"), (2, "both")])
def test_checkpointing_changes_no_gradient(trained, folder, tmp_path, stage, train):
    a, b = (gradients(begun(folder, tmp_path / name, stage, 0, None if stage < 2 else trained[0],
                            train=train, checkpointing=name == "less"))
            for name in ("usual", "less"))
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(b[k], a[k], atol=1e-6, rtol=1e-4)


def test_changed_settings_are_refused(trained, folder, tmp_path):
    trainer = begun(folder, tmp_path, 1, 1, None)
    other = options(folder, tmp_path, 1, steps=4, seed=1)
    with pytest.raises(UserError, match="seed was 0, now 1"):
        train.run(other)
    assert trainer.file.exists()


def test_a_broken_checkpoint_is_named(trained, folder, tmp_path):
    trainer = begun(folder, tmp_path, 1, 1, None)
    trainer.file.write_bytes(trainer.file.read_bytes()[:1000])
    with pytest.raises(UserError, match="stage1.pt is broken"):
        train.run(options(folder, tmp_path, 1, steps=4))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("unexpected pos 974592 vs 974480")])
@pytest.mark.parametrize("saves", [0, 1])
def test_a_full_disk_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch, error, saves):
    """torch says RuntimeError. The one line names the step that is kept, if there is one."""
    trainer = begun(folder, tmp_path, 1, 1, None)
    if not saves:
        trainer.file.unlink()
    before = trainer.file.read_bytes() if saves else b""

    def full(state, path):
        path.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", full)
    kept = "step 1 is kept" if saves else "nothing is saved"
    with pytest.raises(UserError, match=f"could not save step 4 .*full.*; {kept}: make room") as e:
        trainer.fit()
    assert error.args[-1] in str(e.value) and "resumes" not in str(e.value)
    assert not saves or trainer.file.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    trainer = begun(folder, tmp_path, 1, 1, None)
    next(iter(trainer.trainable.values())).data[:] = float("nan")
    with pytest.raises(UserError, match=r"step 1: the loss is not finite.*stage1.pt.*--lr"):
        trainer.train_step(next(trainer.stream()))


@unix_only
def test_interrupting_saves_and_the_command_resumes(folder, tmp_path):
    """SIGINT to a real process: exit code 130, a checkpoint, no traceback; then it resumes."""
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "1", "--data", str(folder), "--out",
               str(tmp_path), "--steps", "100000", "--batch-size", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seen = ""
    while not (tmp_path / "log.jsonl").exists():                    # step 20 is written
        time.sleep(0.1)
    run.send_signal(2)
    _, rest = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command resumes" in rest and "Traceback" not in seen + rest
    state = torch.load(tmp_path / "stage1.pt", weights_only=True)
    assert state["step"] >= 20


def test_the_cache_of_latents_is_made_again_when_something_changed(trained, folder, tmp_path):
    model, data = UniX.load(trained[0]), train.open_data(str(folder), "train", 64)
    def cache():
        made = LatentCache(data, 6, tmp_path)
        made.fill(model, model.vit, Processes(), 0, False)
        return made, (tmp_path / "latents-64.moments.npy").stat().st_mtime_ns
    _, stamp = cache()
    assert cache()[1] == stamp
    model.vae.quant_conv.bias.data += 0.5
    again, later = cache()
    assert later > stamp
    got = torch.from_numpy(again[3]["moments"])
    with torch.no_grad():
        want = model.vae.moments(vae_pixels(torch.from_numpy(data[3]["image"])[None]))[0]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


def test_latents_of_an_image_that_was_repaired(trained, tmp_path):
    """They used to stay those of the image that had replaced it."""
    root = write_phantoms(tmp_path / "images", 30, 4)
    data = train.open_data(str(root), "train", 64)
    file = root / data.items[3].path
    whole, model = file.read_bytes(), UniX.load(trained[0])
    def cache(begun):
        made = LatentCache(train.open_data(str(root), "train", 64), 6, tmp_path)
        made.fill(model, None, Processes(), 0, begun)
        return (made[3]["moments"] == made[4]["moments"]).all()
    file.write_text("broken")
    assert cache(False)
    file.write_bytes(whole)
    assert cache(True)                  # a stage that has begun keeps what it learned from
    assert not cache(False)


def test_a_loader_process_opens_the_latents_itself(trained, folder, tmp_path):
    """Where processes are spawned, each used to get a copy of all latents through a pipe."""
    data = train.open_data(str(folder), "train", 64)
    made = LatentCache(data, 6, tmp_path)
    made.fill(UniX.load(trained[0]), None, Processes(), 0, False)
    sent = pickle.dumps(made)
    assert len(sent) < made.maps["moments"].nbytes
    got = pickle.loads(sent)[3]
    assert (got["moments"] == made[3]["moments"]).all() and got["caption"] == made[3]["caption"]


def test_weights_without_a_tokenizer_are_refused_at_once(trained, folder, tmp_path):
    shutil.copytree(trained[0], tmp_path / "weights")
    (tmp_path / "weights" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json"):
        train.run(Options(stage=2, data=str(folder), weights=str(tmp_path / "weights"),
                          out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_stage_that_has_begun_keeps_its_images(trained, folder, tmp_path):
    """More or other images would change the order of the batches, and what was not cached."""
    begun(folder, tmp_path / "run", 2, 1, trained[0])
    for images in (5, 7):
        with pytest.raises(UserError, match="not those that this stage began with"):
            train.run(options(folder, tmp_path / "run", 2, steps=4, images=images))
    train.run(options(folder, tmp_path / "run", 2, steps=4))


def test_only_the_endless_phantoms_are_cut(trained, folder, tmp_path, monkeypatch):
    """Stages 2 and 3 learn from all images of a folder, and from 8,192 phantoms."""
    seen = []
    monkeypatch.setattr(train, "LatentCache", lambda data, count, *_: seen.append(count) or 1 / 0)
    for data in ("phantom", str(folder)):
        for images in (None, 7):
            with pytest.raises(ZeroDivisionError):
                train.run(Options(stage=2, data=data, images=images, out=str(tmp_path),
                                  weights=str(trained[0])))
    assert seen == [8192, 7, 16, 7]


@pytest.mark.parametrize("stage, more, said", [
    (2, {"memory": 80.0}, "bf16"), (2, {}, "fp32"), (2, {"precision": "bf16"}, "bf16"),
    (2, {"memory": 80.0, "precision": "fp32"}, "fp32"), (2, {"preset": "tiny"}, "fp32"),
    (0, {"preset": "tiny"}, "fp32")])
def test_the_plan_names_the_precision_of_training(stage, more, said, capsys, monkeypatch):
    """--memory plans for a card; without it the plan is for this machine."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train.run(Options(**{"stage": stage, "preset": "unix", "plan": True, **more}))
    assert f" px, {said}, 1 process" in capsys.readouterr().out


def test_latents_of_a_folder_whose_images_are_broken_are_refused(trained, tmp_path):
    """As batches are: in one line, whatever thread meets them."""
    root = write_phantoms(tmp_path / "images", 30, 4)
    data = train.open_data(str(root), "train", 64)
    for item in data.items[4:]:
        (root / item.path).write_text("broken")
    model = UniX.load(trained[0])
    with pytest.raises(UserError, match="images unreadable"):
        LatentCache(data, len(data), tmp_path).fill(model, None, Processes(), 0, False)
    assert not (tmp_path / "latents-64.json").exists()


def test_train_both_is_refused_under_torchrun(folder, tmp_path):
    """Its processes would learn different weights: one reads, another draws."""
    procs = Processes()
    procs.world = 2
    with pytest.raises(UserError, match="--train both runs in one process"):
        train.run(options(folder, tmp_path, 2, train="both"), procs)


def test_table_1():
    """The paper's rates, warm-up, steps, batches and resolutions."""
    want = {1: ("understanding", 384, 1e-4, 80, 3840, 256, 0.0),
            2: ("generation", 256, 2e-4, 2000, 75000, 256, 0.5),
            3: ("generation", 512, 1e-4, 0, 5000, 256, 0.0)}
    for k, row in want.items():
        s = STAGES["unix"][k]
        assert (s.trains, s.pixels, s.lr, s.warmup, s.steps, s.batch, s.repa_weight) == row
        assert not s.ours.cooldown and not s.ours.muon and s.ours.time_shift == 1


def test_captions_are_dropped_one_time_in_ten_and_times_are_logit_normal(folder, tmp_path):
    trainer = begun(folder, tmp_path, 0, 0, None)
    trainer.stage = train.replace(trainer.stage, batch=20000, pixels=8)     # little noise to draw
    random = trainer.randomness(7)
    assert abs(random["drop"].float().mean() - 0.1) < 0.01
    assert abs(random["short"].float().mean() - 0.25) < 0.01
    assert not torch.equal(random["drop"], trainer.randomness(8)["drop"])
    assert torch.equal(random["time"], trainer.randomness(7)["time"])
    assert abs(torch.logit(random["time"]).std() - 1) < 0.05
    shifted = train.replace(trainer.stage.ours, time_shift=8.0)
    trainer.stage = train.replace(trainer.stage, ours=shifted, steps=100)
    for k, shift in ((0, 8), (30, 8), (65, 8 ** 0.5), (100, 1)):     # a shift adds its log to z
        middle = torch.logit(trainer.randomness(k)["time"]).median()
        assert abs(middle - math.log(shift)) < 0.05
    assert abs(sample_time(20000).median() - 0.5) < 0.02


def test_dropped_captions_are_empty_contexts_in_the_loss(trained, folder, tmp_path):
    """A dropped caption leaves the loss of no caption at all: where the flags are used."""
    trainer = begun(folder, tmp_path, 2, 0, trained[0])
    nn.init.normal_(trainer.model.llm2vae.weight, std=0.3)
    batch, random = next(trainer.stream()), trainer.randomness(0)
    everything = random | {"drop": torch.ones(4, dtype=torch.bool)}
    dropped = trainer.losses(batch, everything)["flow"]
    trainer.options.no_context = True
    torch.testing.assert_close(trainer.losses(batch, random)["flow"], dropped)


def test_repa_is_minus_one_when_the_teacher_is_met_and_matches_in_two_dimensions():
    """A teacher on a finer grid is averaged over squares, not along the raster line; one value an
    image, so that nothing is divided by the batch here."""
    plane = torch.arange(16.).reshape(1, 4, 4, 1)
    fine = torch.cat([plane, torch.ones(1, 4, 4, 1)], -1)           # features (row-major, 2)
    coarse = torch.nn.functional.interpolate(fine.permute(0, 3, 1, 2), (2, 2), mode="bilinear")
    states = coarse.flatten(2).transpose(1, 2)
    met = repa_loss(states, fine.flatten(1, 2), (2, 2))
    assert met.shape == (1,) and abs(met + 1) < 1e-5
    assert repa_loss(states.flip(1), fine.flatten(1, 2), (2, 2)) > -0.9999
    twice = repa_loss(states.repeat(2, 1, 1), fine.flatten(1, 2).repeat(2, 1, 1), (2, 2))
    torch.testing.assert_close(twice, met.repeat(2))


def test_muon_makes_orthogonal_updates_and_descends():
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonal(x[None])[0])
    assert 0.6 < s.min() and s.max() < 1.3
    a, b = torch.linalg.svd(x, full_matrices=False)[::2]
    torch.testing.assert_close(orthogonal(x[None])[0] @ b.T, a * s.mean(), atol=0.35, rtol=0)
    w = torch.nn.Parameter(torch.randn(6, 5))
    goal, optimizer = torch.randn(6, 5), Muon([w], 0.05)
    for _ in range(200):
        loss = (w - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_the_last_line_of_a_step_counts_and_a_torn_one_is_skipped(tmp_path):
    """A power cut or a full disk tears the last line; the next start appends to it."""
    file = tmp_path / "log.jsonl"
    log = Log(file, 1)
    for step in range(1, 61):
        log.add(step, {"text": 2.0}, [(torch.tensor([0.05, 0.95]), torch.tensor([1.0, 3.0]))])
    rows = [json.loads(r) for r in file.read_text().splitlines()]
    assert [r["step"] for r in rows] == [20, 40, 60] and rows[0]["text"] == 2.0
    assert rows[0]["flow_by_t"][0] == 1.0 and rows[0]["flow_by_t"][9] == 3.0
    file.write_text(file.read_text()[:-30])                         # torn in the line of step 60
    again = Log(file, 1)
    for step in range(21, 41):                                      # resumed at step 20
        again.add(step, {"text": 1.0}, [])
    assert [(r["step"], r["text"]) for r in again.rows()] == [(20, 2.0), (40, 1.0)]
    for torn in (b"", b"\xff\xfe{", b"[1]\n7\n{}\n"):
        file.write_bytes(torn)
        assert Log(file, 1).rows() == []


def test_curves_have_a_panel_for_each_loss(tmp_path):
    rows = [{"stage": k, "step": i, "text": 6 / i} for k in (1, 2) for i in range(1, 50)]
    rows += [{"stage": 2, "step": i, "repa": -0.1 * i} for i in (5, 9)]
    train.plot_curves(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (720, 3 * 200)
    train.plot_curves(rows[:1], tmp_path / "curves.png")            # one point, no loss
    train.plot_curves([], tmp_path / "curves.png")


@pytest.mark.parametrize("preset, stage", [("tiny", 0), ("tiny", 1), ("tiny", 2), ("unix", 2),
                                           ("unix", 3)])
def test_plan_prints_without_training(preset, stage, capsys, tmp_path):
    train.run(Options(stage=stage, preset=preset, plan=True, out=str(tmp_path / "none")))
    said = capsys.readouterr().out
    assert "trained" in said and "GiB" in said and not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["--stage", "5"], [], ["--stage", "1", "--stepz", "3"],
                                   ["--stage", "1", "--lr", "fast"], ["--stage", "1", "--steps", "0"],
                                   ["--stage", "1", "--seed", "-1"], ["--stage", "1", "--seed", "4294967295"],
                                   ["--stage", "1", "--workers", "-1"], ["--stage", "1", "--lr", "nan"],
                                   ["--stage", "1", "--lr", "inf"], ["--stage", "2", "--repa-weight", "-1"],
                                   ["--stage", "0", "--weights", "x"], ["--stage", "0", "--vae", "x"],
                                   ["--stage", "1", "--repa-weight", "1"], ["--stage", "3", "--repa-teacher", "x"],
                                   ["--stage", "2", "--mix", "1:2"], ["--stage", "1", "--train", "both"],
                                   ["--stage", "0", "--checkpointing"], ["--stage", "1", "--no-context"],
                                   ["--stage", "3", "--share-layers", "1"], ["--stage", "1", "--images", "9"],
                                   ["--stage", "2", "--repa-weight", "0", "--repa-teacher", "x"]])
def test_unknown_flags_and_values_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(words)
    assert e.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_vae_of_tiny_is_read_back_from_its_shapes():
    kind = train.PRESETS["tiny"].vae
    told = {k: kind[k] for k in ("scale", "latent_mean", "groups")}       # config.json tells these
    assert VAE.sizes(VAE(**kind).state_dict()) | told == kind | {"z": 16, "embed": 16}


def test_the_tokenizer_of_a_run_covers_its_reports(trained, folder):
    tokenizer = Tokenizer.load(trained[0] / "tokenizer.json")
    report = phantom("train", 3, 64).report
    assert tokenizer.decode(tokenizer.encode(report)) == report


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    """A folder of no known layout, as a user types it."""
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), "--stage", "1", "--data", str(tmp_path),
                          "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "layout" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_both_branches_learn_with_train_both(trained, folder, tmp_path):
    """Table 5: nothing is frozen, reports and images share a batch."""
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "stage2.pt").unlink()
    before = read_safetensors(tmp_path / "run" / "model.safetensors")
    before = {k: v.clone() for k, v in before.items()}
    train.run(options(folder, tmp_path / "run", 2, train="both", mix="1:1"))
    after = read_safetensors(tmp_path / "run" / "model.safetensors")
    for k in ("language_model.model.layers.0.self_attn.q_proj.weight", "llm2vae.weight",
              "vit_model.vision_tower.patch_embed.proj.weight"):
        assert not torch.equal(before[k], after[k]), k


@pytest.mark.parametrize("mix, reads", [("1:1", 8), ("1:2", 5), ("1:4", 3), ("0:1", 0)])
def test_mix_is_the_share_of_a_batch_that_is_read(trained, folder, tmp_path, mix, reads):
    trainer = begun(folder, tmp_path / "run", 2, 0, trained[0], train="both", mix=mix)
    trainer.stage = train.replace(trainer.stage, batch=16)
    seen = {"text": 0, "flow": 0}
    trainer.report_losses = lambda batch, random: seen.update(text=len(batch["report"])) or {}
    trainer.flow_losses = lambda batch, random: seen.update(flow=len(random["time"])) or {}
    trainer.losses(next(trainer.stream()), trainer.randomness(0))
    assert seen == {"text": reads, "flow": 16 - reads}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("since", [1, 2])
def test_shared_layers_are_one_expert_through_both_stages(trained, folder, tmp_path, layers, since):
    """Shared in a new model, or from stage 2 on: trained from both sides, and kept on disk."""
    out = tmp_path / "run"
    for stage in (1, 2):
        more = {"share_layers": layers} if stage >= since else {}
        vae = str(trained[0] / "vae" / "model.safetensors")
        train.run(options(folder, out, stage, train="both" if stage == 2 else "own",
                          vae=vae if stage == 2 else None, **more))
        model, shared = UniX.load(out), layers * (stage >= since)
        assert model.config.share_layers == shared
        tower = model.lm.tower
        assert [x.gen is x.und for x in tower.layers] == [i < shared for i in range(3)]
        assert (tower.norm_gen is tower.norm) == (shared == 3)
        assert sum("gen." in k for k in model.branch("generation")) == 14 * (3 - shared) + (shared < 3)


def test_without_context_images_do_not_depend_on_captions(trained, folder, tmp_path):
    losses = {}
    for cut in (True, False):
        out = tmp_path / str(cut)
        trainer = begun(folder, out, 2, 2, trained[0], no_context=cut)
        batch, random = next(trainer.stream()), trainer.randomness(0)
        other = batch | {"caption": ["Large left pneumothorax."] * len(batch["caption"])}
        losses[cut] = [trainer.losses(b, random)["flow"].item() for b in (batch, other)]
        images = UniX.load(out).generate(["Normal.", "Large left pneumothorax."], 64, [3, 3], points=3)
        assert torch.equal(*images) == cut
    assert losses[True][0] == losses[True][1] and losses[False][0] != losses[False][1]


def test_repa_0_leaves_no_trace_of_the_alignment(trained, folder, tmp_path):
    out = tmp_path / "run"
    train.run(options(folder, out, 2, repa_weight=0.0, weights=str(trained[0])))
    rows = [json.loads(r) for r in (out / "log.jsonl").read_text().splitlines()]
    assert "flow" in rows[-1] and "repa" not in rows[-1]
    assert (out / "latents-64.moments.npy").exists()
    assert not (out / "latents-64.features.npy").exists()


def test_stage_1_leaves_the_generation_branch_as_it_was(folder, tmp_path):
    trainer = begun(folder, tmp_path, 1, 0, None)
    before = {k: p.clone() for k, p in trainer.model.branch("generation").items()}
    trainer.train_step(next(trainer.stream()))
    assert before and all(torch.equal(p, before[k])
                          for k, p in trainer.model.branch("generation").items())


def test_what_the_log_holds(trained):
    rows = [json.loads(r) for r in (trained[0] / "log.jsonl").read_text().splitlines()]
    losses = {0: {"mse", "kl"}, 1: {"text"}, 2: {"flow", "repa"}, 3: {"flow"}}
    for row in rows:
        assert {"step", "lr", "grad", "steps_per_s", *losses.pop(row["stage"])} <= row.keys()
        assert ("flow_by_t" in row) == (row["stage"] > 1) and row["steps_per_s"] > 0
    assert not losses


def test_a_kill_in_the_middle_of_the_first_save_loses_nothing(folder, tmp_path, monkeypatch):
    """The state is there, the weights folder is not whole yet, half-written files lie about."""
    def killed(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("unix.write_safetensors", killed)
        with pytest.raises(KeyboardInterrupt):
            begun(folder, tmp_path, 1, 2, None)
    (tmp_path / ".stage1.pt.77.part").write_bytes(b"half")
    train.run(options(folder, tmp_path, 1, steps=4))
    assert UniX.load(tmp_path).tokenizer is not None
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_captions_in_memory_are_those_that_are_read(trained, folder, tmp_path):
    """A memo changes no context, whatever was read before; fp16 rounds a little. Those of the data
    set are read at once, with their impressions, and in an order that depends on them alone."""
    model = UniX.load(trained[0])
    texts = ["Small left effusion.", "No acute cardiopulmonary process. The lungs are clear.",
             "Small left effusion."]
    cache = CaptionCache(model)
    want, got = model.read_captions([model.ids(t) for t in texts]), cache.context(texts)
    assert torch.equal(got.length, want.length) and torch.equal(got.next_id, want.next_id)
    assert got.ragged and want.ragged and len(cache.kept) == 2
    real = want.mask(0)[:, 0, 0]
    for pair, true in zip(got.kv, want.kv):
        for a, b in zip(pair, true):
            torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=2e-3,
                                       rtol=2e-3)
    full = CaptionCache(model, room=0)                              # no room: read again, the same
    for again in (full.context(texts), full.context(texts)):
        assert not full.kept and torch.equal(again.length, got.length)
        for pair, true in zip(again.kv, got.kv):
            assert all(map(torch.equal, pair, true))
    assert not full.context(texts[:1]).ragged
    whole = "FINDINGS: Mild edema in both lungs. IMPRESSION: Mild edema."
    many = [whole, *texts, *("Edema." * (1 + k % 9) + f" Nodule {k}." for k in range(70))]
    ahead = CaptionCache(model, many)
    again, few = CaptionCache(model, many[::-1]), CaptionCache(model, many, room=100_000)
    assert ahead.ahead == again.ahead                   # else their batches would round otherwise
    for k in (slice(0, 3), slice(2, 80)):
        got, same, short = (c.context(many[k]) for c in (ahead, again, few))
        assert torch.equal(got.length, short.length)
        for pair, pair_again, pair_few in zip(got.kv, same.kv, short.kv):
            for a, b, c in zip(pair, pair_again, pair_few):
                assert torch.equal(a, b)
                torch.testing.assert_close(a, c, atol=2e-3, rtol=2e-3)
    assert {*many, "Mild edema."} <= {*ahead.kept} == {*again.kept} != {*few.kept} != set()
    assert sum(row.nbytes for row in few.kept.values()) < 100_000
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in ahead.kept.values())
    single = cache.context(many[1:2]).kv[0][0], ahead.context(many[1:2]).kv[0][0]
    torch.testing.assert_close(*single, atol=2e-3, rtol=2e-3)


def test_reports_longer_than_the_context_lose_their_end(trained, folder, tmp_path, capsys):
    """They used to stop training, at whatever step met one; 9 of 1,868 reports of Open-i did."""
    shutil.copytree(folder, tmp_path / "long")
    names = [f"{split}-{i}.png" for split, n in (("train", 16), ("val", 8)) for i in range(n)]
    rows = [f"{name},{'The lungs are clear. ' * 300},{name.split('-')[0]}" for name in names]
    (tmp_path / "long" / "metadata.csv").write_text("\n".join(["image,report,split", *rows]))
    for stage in (1, 2, 3):
        train.run(options(tmp_path / "long", tmp_path / "run", stage, vae=str(
            trained[0] / "vae" / "model.safetensors") if stage == 2 else None))
        assert "(what exceeds 254 is cut)" in capsys.readouterr().out
    trainer = begun(tmp_path / "long", tmp_path / "new", 1, 0, trained[0])
    batch = next(trainer.stream())
    weight = trainer.loss_weights(batch, trainer.randomness(0))["text"]
    assert weight == 1 / (4 * (254 + 1))                    # and EOS
    with pytest.raises(UserError, match="more than fit; shorten it"):
        UniX.load(tmp_path / "run").ids(batch["report"][0])     # what a user types is not cut


def test_broken_validation_images_and_early_sheets_stop_nothing(folder, tmp_path):
    """Sheets take training images instead, and come before the log's first line, at step 20."""
    shutil.copytree(folder, tmp_path / "data")
    for file in (tmp_path / "data").glob("val-*.png"):
        file.write_bytes(b"junk")
    train.run(options(tmp_path / "data", tmp_path / "run", 0, steps=3, sheet_every=1))
    assert len([*(tmp_path / "run").glob("stage0-00000?.png")]) == 3
    assert (tmp_path / "run" / "curves.png").exists()


def test_images_that_break_while_both_branches_train(trained, folder, tmp_path):
    """The cache of latents does not hide them: one line, and what was learned is saved."""
    shutil.copytree(folder, tmp_path / "data")
    trainer = begun(tmp_path / "data", tmp_path / "run", 2, 1, trained[0], train="both")
    for file in (tmp_path / "data").glob("train-*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(UserError, match="is broken, images unreadable.*step 1 is saved"):
        trainer.fit()


AREAS = (0, 10), (9, 19), (18, 28), (27, 37)     # of 37 patches, what 4 tokens cover


def test_stage_2_aligns_with_the_teacher_that_is_named(trained, folder, tmp_path):
    """The features are the teacher's; resuming with another teacher, or none, is refused."""
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "stage2.pt").unlink()
    teacher = GOLDEN / "dinov2"
    train.run(options(folder, tmp_path / "run", 2, repa_teacher=str(teacher)))
    features = np.load(tmp_path / "run" / "latents-64.features.npy")
    width = json.loads((teacher / "config.json").read_text())["hidden_size"]
    assert features.shape[2] == width and features.shape[1] == 16       # tokens of 64 px
    images = train.open_data(str(folder), "train", 64)
    images = torch.stack([torch.from_numpy(images[i]["image"]) for i in range(2)])
    with torch.no_grad():
        want = load_rad_dino(teacher).patches(images).unflatten(1, (37, 37))
    want = torch.stack([want[:, a:b, c:d].mean((1, 2)) for a, b in AREAS for c, d in AREAS], 1)
    torch.testing.assert_close(torch.from_numpy(features[:2]).float(), want, atol=5e-3, rtol=5e-3)
    with pytest.raises(UserError, match="repa_teacher was"):
        train.run(options(folder, tmp_path / "run", 2))


def test_stage_2_begins_with_no_prediction(trained, folder, tmp_path):
    """The copied tower is not the one that the old projection of weights that generate read: the
    first loss was three times that of a new model."""
    trainer = begun(folder, tmp_path / "run", 2, 0, trained[0])
    model = trainer.model
    assert UniX.load(trained[0]).llm2vae.weight.any()
    assert not model.llm2vae.weight.any() and not model.llm2vae.bias.any()


def test_features_of_a_run_without_repa(trained, folder, tmp_path):
    more = {"weights": str(trained[0])}
    train.run(options(folder, tmp_path / "run", 2, repa_weight=0.0, **more))
    with pytest.raises(UserError, match="begun with --repa-weight 0"):
        train.run(options(folder, tmp_path / "run", 2, **more))


def test_weights_are_not_the_folder_that_is_written(trained, folder):
    """They would be gone after the first checkpoint, and the run could not be resumed."""
    with pytest.raises(UserError, match="--weights is the folder that this run writes"):
        train.run(options(folder, trained[0], 3, weights=str(trained[0])))


def test_no_context_stays_in_stage_3(trained, folder, tmp_path):
    for stage, more in ((2, {"no_context": True, "weights": str(trained[0])}), (3, {})):
        train.run(options(folder, tmp_path / "run", stage, **more))
        assert UniX.load(tmp_path / "run").config.no_context


def test_the_largest_seed(trained, folder, tmp_path):
    begun(folder, tmp_path / "run", 1, 1, trained[0], seed=10**9)
    assert "--seed" in Options(stage=1, seed=10**9 + 1).problem()


def test_large_weights_are_not_taught_at_the_rates_of_tiny(trained, folder, tmp_path, monkeypatch):
    model = UniX.load(trained[0])
    model.config.width = 512
    monkeypatch.setattr(train, "initial_model", lambda *_: model)
    with pytest.raises(UserError, match="too large for the rates of tiny"):
        train.run(options(folder, tmp_path / "run", 1))


def test_an_empty_cache_of_latents_is_made_again(trained, folder, tmp_path):
    """After a power cut a file may be empty: EOFError was a traceback."""
    data, model = train.open_data(str(folder), "train", 64), UniX.load(trained[0])
    for _ in range(2):
        made = LatentCache(data, 6, tmp_path)
        made.fill(model, None, Processes(), 0, False)
        assert made[3]["moments"].any()
        (tmp_path / "latents-64.moments.npy").write_bytes(b"")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
def test_on_windows_no_weights_are_mapped(trained, folder, tmp_path, monkeypatch):
    """Windows replaces no file that is mapped, so that no checkpoint could be written there."""
    shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.setattr(unix, "WINDOWS", True)
    model = UniX.load(tmp_path / "run")
    with open("/proc/self/maps") as file:
        assert str(tmp_path) not in file.read()
    for name, p in UniX.load(trained[0]).named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])


def test_a_plan_where_the_system_does_not_say_its_memory(monkeypatch):
    monkeypatch.delattr(train.os, "sysconf")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="give --memory GIB"):
        train.run(Options(stage=1, plan=True))
    train.run(Options(stage=1, plan=True, memory=4.0))


def test_the_cpu_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Processes().device == "mps" and Processes("cpu").device == "cpu"


def test_a_slash_at_the_end_of_a_folder_changes_nothing(folder, tmp_path):
    begun(f"{folder}/", tmp_path / "run", 1, 1, None)
    train.run(options(folder, tmp_path / "run", 1, steps=4))


def test_too_little_memory_is_one_line(monkeypatch):
    """MPS and CPUs raise a plain RuntimeError; another error keeps its traceback."""
    def fails(options):
        raise RuntimeError(text)
    monkeypatch.setattr(train, "run", fails)
    monkeypatch.setitem(sample.COMMANDS, "report", fails)
    args = sample.parse(["report", "a.png"])
    for text in ("MPS backend out of memory (allocated: 8 GB)",
                 "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"):
        assert train.main()[0] == 2 and "--accumulate" in train.main()[1]
        code, said = sample.run(args)
        assert code == 2 and "too little memory" in said
    text = "CUDA error: an illegal memory access was encountered"
    for call in (train.main, lambda: sample.run(args)):
        with pytest.raises(RuntimeError, match="illegal"):
            call()


def test_processes_that_see_different_checkpoints(trained, folder, tmp_path, monkeypatch):
    """Two machines without a shared folder: one would resume, the other begin."""
    monkeypatch.setattr(Processes, "gather", lambda self, x: [x, 400] if isinstance(x, int) else [x])
    with pytest.raises(UserError, match="must be one folder for all"):
        train.run(options(folder, tmp_path / "run", 1))


def test_broken_images_are_no_full_disk(trained, tmp_path, monkeypatch):
    """Stage 0 measures its latents by the first 128 images: it reads them before it trains."""
    root = write_phantoms(tmp_path / "images", 60, 4)
    for k in range(4):
        (root / f"train-{k}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="images unreadable") as found:
        train.run(options(root, tmp_path / "run", 0))
    assert "disk full" not in str(found.value) and not (tmp_path / "run" / "stage0.pt").exists()


def test_nothing_is_called_saved_before_the_first_step(trained, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    trainer = begun(tmp_path / "data", tmp_path / "run", 1, 0, trained[0])
    for file in (tmp_path / "data").glob("train-*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(UserError, match="broken.*nothing is saved yet"):
        trainer.fit()


def test_an_image_repaired_while_both_branches_train(trained, folder, tmp_path):
    """Its report would be that of the image which had replaced it."""
    shutil.copytree(folder, tmp_path / "data")
    data = train.open_data(str(tmp_path / "data"), "train", 64)
    file = tmp_path / "data" / data.items[3].path
    whole = file.read_bytes()
    file.write_bytes(b"junk")
    made = LatentCache(data, 8, tmp_path, train.open_data(str(tmp_path / "data"), "train", 96))
    made.fill(UniX.load(trained[0]), None, Processes(), 0, False)
    assert made[3]["report"] == data.text(4)[0]
    file.write_bytes(whole)
    with pytest.raises(UserError, match="image 3 .* was repaired since"):
        made.fetch(3)
