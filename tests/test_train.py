"""Training: each stage teaches what it should and nothing else, and nothing is ever lost."""

import functools
import json
import math
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
from ar import Tokenizer
from conftest import GOLDEN, ROOT
from data import UserError, phantom
from diffusion import VAE, sample_time
from phantoms import write_phantoms
from train import STAGES, Latents, Log, Muon, Options, Processes, Trainer, align, orthogonal
from unix import UniX, load_vae, read_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain data folder of 24 small phantoms."""
    return write_phantoms(tmp_path_factory.mktemp("images"), 16, 8)


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
    """Stage 2 may run stage 0 first; what follows must not swallow Ctrl-C."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_stage_says_so(trained, folder, capsys):
    train.run(options(folder, trained[0], 3))
    assert "is finished (2 steps)" in capsys.readouterr().out


def test_latents_of_the_autoencoder_have_unit_variance(trained, folder):
    vae = load_vae(trained[0] / "vae" / "model.safetensors")
    images = torch.from_numpy(np.stack([phantom("train", i, 64).image for i in range(16)]))
    with torch.no_grad():
        moments = vae.moments(train.vae_pixels(images))
        z = vae.latents(moments, torch.randn(16, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.2


@pytest.mark.parametrize("stage, said", [(2, "--stage 1"), (3, "--stage 2")])
def test_a_stage_whose_predecessor_is_missing_names_the_command(folder, tmp_path, stage, said):
    with pytest.raises(UserError, match=said):
        train.run(options(folder, tmp_path / "new", stage))


def begun(folder, out, stage, step, base, contexts=True, **more) -> Trainer:
    """A stage of a copy of a run, stopped at `step` as Ctrl-C stops it. `contexts`: captions are
    kept in memory, as `fit` does it, and not read in each step."""
    if base:
        shutil.copytree(base, out, dirs_exist_ok=True)
        (out / f"stage{stage}.pt").unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    o = options(folder, out, stage, steps=4, **more)
    s = train.replace(STAGES["tiny"][stage], steps=4, batch=4)
    trainer = train.set_up(o, s, Processes(), out)
    if contexts:
        trainer.read_captions()
    stream = trainer.stream()
    while trainer.step < step:
        trainer.one_step(next(stream))
    trainer.save()
    return trainer


@pytest.mark.parametrize("stage, more", [(0, {}), (1, {}), (2, {}), (2, {"train": "both"}),
                                         (2, {"train": "both", "share_layers": 2})])
def test_resumed_equals_never_stopped_bit_for_bit(trained, folder, tmp_path, stage, more):
    base = None if stage < 2 else trained[0]
    whole = begun(folder, tmp_path / "whole", stage, 4, base, **more)
    begun(folder, tmp_path / "parts", stage, 2, base, **more)
    again = train.set_up(whole.options, whole.stage, Processes(), tmp_path / "parts")
    again.resume()
    again.read_captions()
    assert again.step == 2
    stream = again.stream()
    while again.step < 4:
        again.one_step(next(stream))
    for name, p in whole.learns.items():
        assert torch.equal(p, again.learns[name]), name
    if whole.average:
        assert all(torch.equal(v, again.average[k]) for k, v in whole.average.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_and_lanes_equal_the_big_batch(trained, folder, tmp_path, stage):
    """Token-weighted: reports of different lengths lie in the parts."""
    base = None if stage < 2 else trained[0]
    learned = []
    for parts, lanes in ((1, 1), (3, 1), (1, 2), (2, 2)):
        trainer = begun(folder, tmp_path / f"{parts}{lanes}", stage, 0, base, accumulate=parts)
        trainer.lanes, trainer.map = lanes, ThreadPoolExecutor(lanes).map
        trainer.stage = train.replace(trainer.stage, muon=0)
        learned.append(gradients(trainer))
    for others in learned[1:]:
        for k, g in learned[0].items():
            torch.testing.assert_close(others[k], g, atol=2e-6, rtol=1e-3)


def test_muon_moves_matrices_alike_one_by_one_and_side_by_side():
    torch.manual_seed(0)
    start, moved = [torch.randn(6, 5), torch.randn(4, 3, 2, 2)], []
    for run in (map, ThreadPoolExecutor(2).map):
        matrices = [nn.Parameter(w.clone()) for w in start]
        optimizer = Muon(matrices, 0.05, run=run)
        for _ in range(3):
            sum((p ** 2).sum() for p in matrices).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(matrices)
    for w, a, b in zip(start, *moved):
        assert torch.equal(a, b) and not torch.equal(a, w)


def gradients(trainer) -> dict:
    """What one step would have the optimizers see."""
    batch = next(trainer.stream())
    for optimizer in trainer.optimizers:
        optimizer.step = optimizer.zero_grad = lambda: None
    trainer.one_step(batch)
    return {k: p.grad.clone() for k, p in trainer.learns.items() if p.grad is not None}


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


def test_a_full_disk_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch):
    trainer = begun(folder, tmp_path, 1, 1, None)
    before = trainer.file.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    trainer.step = 2
    with pytest.raises(UserError, match="No space left"):
        trainer.save()
    assert trainer.file.read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    trainer = begun(folder, tmp_path, 1, 1, None)
    next(iter(trainer.learns.values())).data[:] = float("nan")
    with pytest.raises(UserError, match=r"step 1: the loss is not finite.*stage1.pt.*--lr"):
        trainer.one_step(next(trainer.stream()))


def test_interrupting_saves_and_the_command_goes_on(folder, tmp_path):
    """SIGINT to a real process: exit code 130, a checkpoint, no traceback; then it resumes."""
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "1", "--data", str(folder), "--out",
               str(tmp_path), "--steps", "100000", "--batch-size", "2"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seen = ""
    while " 2/100000" not in seen:
        seen += run.stderr.read(1)
    run.send_signal(2)
    _, rest = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command goes on" in rest and "Traceback" not in seen + rest
    state = torch.load(tmp_path / "stage1.pt", weights_only=True)
    assert state["step"] >= 2


def test_the_cache_of_latents_is_made_again_when_something_changed(trained, folder, tmp_path):
    model, data = UniX.load(trained[0]), train.open_data(str(folder), "train", 64)
    first = Latents(data, 6, model, model.vit, tmp_path)
    stamp = first.file("moments").stat().st_mtime_ns
    Latents(data, 6, model, model.vit, tmp_path)
    assert first.file("moments").stat().st_mtime_ns == stamp
    model.vae.quant_conv.bias.data += 0.5
    again = Latents(data, 6, model, model.vit, tmp_path)
    assert again.file("moments").stat().st_mtime_ns > stamp
    got = torch.from_numpy(again[3]["moments"])
    with torch.no_grad():
        want = model.vae.moments(train.vae_pixels(torch.from_numpy(data[3]["image"])[None]))[0]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


def test_latents_of_a_folder_whose_images_are_broken_are_refused(trained, tmp_path):
    """As batches are: in one line, whatever thread meets them."""
    root = write_phantoms(tmp_path / "images", 30, 4)
    data = train.open_data(str(root), "train", 64)
    for item in data.items[4:]:
        (root / item.path).write_text("broken")
    model = UniX.load(trained[0])
    with pytest.raises(UserError, match="images unreadable"):
        Latents(data, len(data), model, None, tmp_path)
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
        assert (s.trains, s.pixels, s.lr, s.warmup, s.steps, s.batch, s.repa) == row
        assert not s.decay and not s.muon and s.shift == 1


def test_captions_are_dropped_one_time_in_ten_and_times_are_logit_normal(folder, tmp_path):
    trainer = begun(folder, tmp_path, 0, 0, None)
    trainer.stage = train.replace(trainer.stage, batch=20000)
    draw = trainer.draws(7)
    assert abs((draw["keep"] < 0.1).float().mean() - 0.1) < 0.01
    assert abs(draw["cut"].float().mean() - 0.25) < 0.01
    assert not torch.equal(draw["keep"], trainer.draws(8)["keep"])
    assert torch.equal(draw["time"], trainer.draws(7)["time"])
    assert abs(torch.logit(draw["time"]).std() - 1) < 0.05
    trainer.stage = train.replace(trainer.stage, shift=8.0, steps=100)
    for k, shift in ((0, 8), (30, 8), (65, 8 ** 0.5), (100, 1)):     # a shift adds its log to z
        middle = torch.logit(trainer.draws(k)["time"]).median()
        assert abs(middle - math.log(shift)) < 0.05
    assert abs(sample_time(20000).median() - 0.5) < 0.02


def test_align_is_one_when_the_teacher_is_met_and_matches_in_two_dimensions():
    """A teacher on a finer grid is averaged over squares, not along the raster line."""
    plane = torch.arange(16.).reshape(1, 4, 4, 1)
    fine = torch.cat([plane, torch.ones(1, 4, 4, 1)], -1)           # features (row-major, 2)
    coarse = torch.nn.functional.interpolate(fine.permute(0, 3, 1, 2), (2, 2), mode="bilinear")
    states = coarse.flatten(2).transpose(1, 2)
    assert abs(align(states, fine.flatten(1, 2), (2, 2)) + 1) < 1e-5
    assert align(states.flip(1), fine.flatten(1, 2), (2, 2)) > -0.9999


def test_muon_makes_orthogonal_updates_and_descends():
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonal(x))
    assert 0.6 < s.min() and s.max() < 1.3
    a, b = torch.linalg.svd(x, full_matrices=False)[::2]
    torch.testing.assert_close(orthogonal(x) @ b.T, a * s.mean(), atol=0.35, rtol=0)
    w = torch.nn.Parameter(torch.randn(6, 5))
    goal, optimizer = torch.randn(6, 5), Muon([w], 0.05)
    for _ in range(200):
        loss = (w - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_the_log_forgets_what_comes_after_a_resumed_step(tmp_path):
    log = Log(tmp_path / "log.jsonl", 1, 0)
    for step in range(1, 61):
        log.add(step, {"text": 2.0}, [(torch.tensor([0.05, 0.95]), torch.tensor([1.0, 3.0]))])
    rows = [json.loads(r) for r in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [20, 40, 60] and rows[0]["text"] == 2.0
    assert rows[0]["flow_by_t"][0] == 1.0 and rows[0]["flow_by_t"][9] == 3.0
    Log(tmp_path / "log.jsonl", 1, 40)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    Log(tmp_path / "log.jsonl", 2, 0).curves(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] == 640


@pytest.mark.parametrize("preset, stage", [("tiny", 0), ("tiny", 1), ("tiny", 2), ("unix", 2),
                                           ("unix", 3)])
def test_plan_prints_without_training(preset, stage, capsys, tmp_path):
    train.run(Options(stage=stage, preset=preset, plan=True, out=str(tmp_path / "none")))
    said = capsys.readouterr().out
    assert "trained" in said and "GiB" in said and not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [["--stage", "5"], [], ["--stage", "1", "--stepz", "3"],
                                   ["--stage", "1", "--lr", "fast"], ["--stage", "1", "--steps", "0"]])
def test_unknown_flags_and_values_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse(words)
    assert e.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_vae_of_tiny_is_read_back_from_its_shapes():
    kind = train.PRESETS["tiny"].vae
    told = {k: kind[k] for k in ("scale", "shift", "groups")}       # config.json tells these
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


def test_two_processes_equal_one(trained, folder, tmp_path):
    """torchrun with gloo: the same global batch gives the same weights, within rounding.

    A bias on all keys of an image changes no softmax: the gradient of the ViT's is rounding noise,
    which AdamW with eps 1e-15 turns into steps of full size. It is left out."""
    outs = []
    for n in (1, 2):
        out = tmp_path / str(n)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                   f"--master_port={29500 + n}", str(ROOT / "train.py")]
        subprocess.run([*command, "--stage", "1", "--data", str(folder), "--out", str(out), "--steps",
                        "3", "--batch-size", "4", "--precision", "fp32"], check=True, capture_output=True)
        outs.append(read_safetensors(out / "model.safetensors"))
    for k, v in outs[0].items():
        w = outs[1][k]
        if k.endswith("attn.qkv.bias"):
            v, w = (torch.cat([a.chunk(3)[i] for i in (0, 2)]) for a in (v, w))
        torch.testing.assert_close(w, v, atol=1e-5, rtol=1e-4, msg=lambda m: f"{k}: {m}")  # noqa: B023


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
    trainer.report_terms = lambda batch, draw: seen.update(text=len(batch["report"])) or {}
    trainer.flow_terms = lambda batch, draw: seen.update(flow=len(draw["time"])) or {}
    trainer.terms(next(trainer.stream()), trainer.draws(0))
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
        trainer = begun(folder, out, 2, 2, trained[0], contexts=False, no_context=cut)
        batch, draw = next(trainer.stream()), trainer.draws(0)
        other = batch | {"caption": ["Large left pneumothorax."] * len(batch["caption"])}
        losses[cut] = [trainer.terms(b, draw)["flow"].item() for b in (batch, other)]
        images = UniX.load(out).generate(["Normal.", "Large left pneumothorax."], 64, [3, 3], points=3)
        assert torch.equal(*images) == cut
    assert losses[True][0] == losses[True][1] and losses[False][0] != losses[False][1]


def test_repa_0_leaves_no_trace_of_the_alignment(trained, folder, tmp_path):
    out = tmp_path / "run"
    train.run(options(folder, out, 2, repa=0.0, weights=str(trained[0])))
    rows = [json.loads(r) for r in (out / "log.jsonl").read_text().splitlines()]
    assert "flow" in rows[-1] and "repa" not in rows[-1]
    assert (out / "latents-64.moments.npy").exists()
    assert not (out / "latents-64.features.npy").exists()


def test_compiled_layers_compute_the_same(trained, folder, tmp_path, monkeypatch):
    """Traced as --compile does it; the C++ that would be built from that takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    a, b = (gradients(begun(folder, tmp_path / name, 2, 0, trained[0], compile=name == "fast"))
            for name in ("usual", "fast"))
    for k in a:
        torch.testing.assert_close(b[k], a[k], atol=1e-5, rtol=1e-3)


def test_stage_1_leaves_the_generation_branch_as_it_was(folder, tmp_path):
    trainer = begun(folder, tmp_path, 1, 0, None)
    before = {k: p.clone() for k, p in trainer.model.branch("generation").items()}
    trainer.one_step(next(trainer.stream()))
    assert before and all(torch.equal(p, before[k])
                          for k, p in trainer.model.branch("generation").items())


def test_what_the_log_tells(trained):
    rows = [json.loads(r) for r in (trained[0] / "log.jsonl").read_text().splitlines()]
    losses = {0: {"mse", "kl"}, 1: {"text"}, 2: {"flow", "repa"}, 3: {"flow"}}
    for row in rows:
        assert {"step", "lr", "grad", "steps_per_s", *losses.pop(row["stage"])} <= row.keys()
        assert ("flow_by_t" in row) == (row["stage"] > 1)
        assert row["tokens_per_s"] > row["steps_per_s"] > 0
    assert not losses
    speeds = [r["tokens_per_s"] / r["steps_per_s"] for r in rows]
    assert [round(speeds[i]) for i in (0, 2, 3)] == [4 * 64, 4 * 16, 4 * 64]


def test_stage_2_first_brings_a_stopped_stage_0_to_its_end(trained, folder, tmp_path):
    """Killed in the autoencoder that stage 2 had begun: half of one is not taken for a whole."""
    shutil.copytree(trained[0], tmp_path / "run")
    for name in ("stage0.pt", "stage2.pt", "vae/model.safetensors"):
        (tmp_path / "run" / name).unlink()
    half = train.set_up(options(folder, tmp_path / "run", 0),
                        train.replace(STAGES["tiny"][0], steps=2), Processes(), tmp_path / "run")
    half.one_step(next(half.stream()))
    half.save()
    train.run(options(folder, tmp_path / "run", 2))
    assert torch.load(tmp_path / "run" / "stage0.pt")["step"] == 2


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


def test_an_excerpt_is_the_impression():
    assert train.excerpt("FINDINGS: Small left effusion. IMPRESSION: Effusion.") == "Effusion."
    for plain in ("clear lungs", "", "FINDINGS: "):
        assert train.excerpt(plain) == plain


def test_contexts_in_memory_are_those_that_are_read(trained, folder, tmp_path):
    """Whole and cut captions, and empty ones for guidance; fp16 rounds a little."""
    trainer = begun(folder, tmp_path, 2, 0, trained[0])
    nn.init.normal_(trainer.model.llm2vae.weight, std=0.3)      # so that the loss tells them apart
    batch, draw = next(trainer.stream()), trainer.draws(0)
    draw |= {"cut": torch.tensor([0, 1, 0, 1]) > 0, "keep": torch.tensor([1, 1, 0, 0.])}
    model = trainer.model
    texts = [train.excerpt(c) if cut else c for c, cut in zip(batch["caption"], draw["cut"])]
    want = model.read_captions([model.ids(t) for t in texts])
    got = trainer.contexts.of(batch["index"], draw["cut"], "cpu")
    assert torch.equal(got.length, want.length) and torch.equal(got.next_id, want.next_id)
    assert got.ragged == want.ragged
    real = want.mask(0)[:, 0, 0] if want.ragged else torch.ones(4, want.kv[0][0].shape[2]) > 0
    for pair, true in zip(got.kv, want.kv):
        for a, b in zip(pair, true):
            torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=2e-3,
                                       rtol=2e-3)
    trainer.by_time = []
    kept, trainer.contexts = trainer.terms(batch, draw)["flow"], None
    torch.testing.assert_close(trainer.terms(batch, draw)["flow"], kept, rtol=2e-5, atol=0)
    for change in ({"cut": ~draw["cut"]}, {"keep": 1 - draw["keep"]}):
        assert abs(trainer.terms(batch, draw | change)["flow"] / kept - 1) > 1e-4


def test_parts_of_a_batch_are_all_of_it_and_even():
    """A part's texts are of like length; many images with short ones are as much as few with long."""
    texts = ["x" * n for n in (900, 10, 600, 20, 300, 10, 200, 10)]
    for n in (1, 2, 3, 8):
        parts = train.even_parts(texts, 100, n)
        assert sorted(torch.cat(parts).tolist()) == [*range(8)] and len(parts) <= n
        for longer, shorter in zip(parts, parts[1:]):
            assert min(len(texts[i]) for i in longer) >= max(len(texts[i]) for i in shorter)
    assert [sorted(p.tolist()) for p in train.even_parts(texts, 100, 2)] == [
        [0, 2], [1, 3, 4, 5, 6, 7]]
    assert [len(p) for p in train.even_parts(["long" * 90, ""], 0, 2)] == [1, 1]
    assert [len(p) for p in train.even_parts([""] * 8, 100, 4)] == [2, 2, 2, 2]


def test_stage_2_aligns_with_the_folder_that_repa_names(trained, folder, tmp_path):
    """The features are the teacher's; going on with another teacher, or none, is refused."""
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "stage2.pt").unlink()
    teacher = GOLDEN / "dinov2"
    train.run(options(folder, tmp_path / "run", 2, repa=str(teacher)))
    features = np.load(tmp_path / "run" / "latents-64.features.npy")
    width = json.loads((teacher / "config.json").read_text())["hidden_size"]
    assert features.shape[2] == width and features.shape[1] == (518 // 14) ** 2
    with pytest.raises(UserError, match="repa was"):
        train.run(options(folder, tmp_path / "run", 2))
    with pytest.raises(UserError, match="no weight and no folder"):
        train.run(options(folder, tmp_path / "run", 2, repa="0,5"))
