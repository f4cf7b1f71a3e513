"""From a laptop to a laboratory: the paper's widths, several processes, all rows of Table 1."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpu
import train
from ar import Tokenizer
from conftest import ROOT, small_config
from data import open_data
from diffusion import VAE
from phantoms import write_phantoms
from train import STAGES, Options, Processes
from unix import PRESETS, SPECIAL, UniX, read_safetensors

GIB = 2 ** 30
TINY_VAE = {"ch": 32, "mult": [1, 1, 1, 1, 1], "blocks": 1, "attn": []}     # 16 x 16 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A plain data folder of 24 small phantoms; their reports have different lengths."""
    return write_phantoms(tmp_path_factory.mktemp("images"), 16, 8)


@pytest.fixture(autouse=True)
def no_sheets(monkeypatch):
    monkeypatch.setattr(train.Trainer, "write_sheet", lambda self: None)


def options(folder, out, stage, **more) -> Options:
    return Options(**{**dict(stage=stage, data=str(folder), out=str(out), steps=2, batch_size=5,
                             precision="fp32"), **more})


# ---------------------------------------------------------------- every row of every preset


def small(preset: str) -> object:
    """A small model for a preset's rows of Table 1."""
    c = small_config(vocab=600, max_tokens=256, latent_side=32, bos=0, eos=1, boi=2, eoi=3,
                     vae=TINY_VAE)
    return c if preset == "unix" else replace(PRESETS["tiny"], layers=3, vit_layers=1, width=32,
                                              heads=1, kv_heads=1, mlp=40, vit_width=16,
                                              vit_heads=2, vit_mlp=24)


@pytest.mark.parametrize("preset", STAGES)
def test_each_stage_of_each_preset_takes_steps(folder, tmp_path, monkeypatch, preset):
    monkeypatch.setitem(train.PRESETS, preset, small(preset))
    for stage in STAGES[preset]:
        few = {"images": 4} if stage > 1 else {}
        train.run(options(folder, tmp_path, stage, preset=preset, batch_size=2, **few))
    model = UniX.load(tmp_path)
    assert model.config.resolution == STAGES[preset][3].pixels
    assert model.llm2vae.weight.any()


@pytest.mark.parametrize("preset", STAGES)
def test_stages_start_from_a_released_folder_with_another_image_encoder(
        folder, tmp_path, monkeypatch, preset):
    """--weights has images of 48 px, the preset of 32 or 96; the folder's sizes count."""
    monkeypatch.setitem(train.PRESETS, preset, small(preset))
    texts = [open_data("phantom", "train", 64).text(i)[0] for i in range(50)]
    tokenizer = Tokenizer.train(texts, 500, special=SPECIAL)
    config = replace(small("unix"), vit_image=48, vocab=len(tokenizer), vae={})
    UniX(config, tokenizer, VAE(**TINY_VAE)).save(tmp_path / "given")
    for stage in (1, 2, 3):
        more = {"weights": str(tmp_path / "given")} if stage == 1 else {"images": 4}
        train.run(options(folder, tmp_path / "out", stage, preset=preset, batch_size=2, **more))
    model = UniX.load(tmp_path / "out")
    assert model.config.vit_image == 48 and model.config.width == config.width
    assert model.llm2vae.weight.any()


# ---------------------------------------------------------------- several processes


GRADIENTS = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train
from pathlib import Path
options = train.Options(**{options!r})
stage = train.STAGES[options.preset][options.stage]
stage = train.replace(stage, batch=options.batch_size, steps=2)
procs = train.Processes()
trainer = train.set_up(options, stage, procs, Path(options.out))
for optimizer in trainer.optimizers:
    optimizer.step = optimizer.zero_grad = lambda: None
logged = trainer.train_step(next(trainer.stream()))
found = {{k: p.grad for k, p in trainer.trainable.items() if p.grad is not None}}
if procs.rank == 0:
    torch.save([logged, found], {file!r})
"""


def start(command: list, world: int) -> list[subprocess.Popen]:
    """The same command as the processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(world)} for i in range(world)]
    return [subprocess.Popen(command, env=os.environ | about | rank, cwd=ROOT, text=True,
                             stderr=subprocess.PIPE) for rank in ranks]


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory) -> Path:
    """A run with stages 0 to 2 done, one step each."""
    out = tmp_path_factory.mktemp("begun")
    for stage in (0, 1, 2):
        gpu.run_until(options(folder, out, stage, steps=1, batch_size=2), Processes(), 0, {}, False)
    return out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_equal_one(folder, begun, tmp_path, stage):
    """Five images, so two and three; two parts each; reports of different lengths. Latents are
    computed by both."""
    found, latents = [], []
    for world in (1, 2):
        out = tmp_path / str(world)
        subprocess.run(["cp", "-r", begun, out], check=True)
        for old in [*out.glob(f"stage{stage}.pt"), *out.glob("latents-*")]:
            old.unlink()
        o = dict(stage=stage, data=str(folder), out=str(out), batch_size=5, accumulate=2,
                 precision="fp32")
        code = GRADIENTS.format(root=str(ROOT), options=o, file=str(out / "found"))
        runs = start([sys.executable, "-c", code], world)
        assert [run.communicate(timeout=300)[1] and run.returncode for run in runs] in (
            [[0] * world, [""] * world]), "a process failed"
        found.append(torch.load(out / "found"))
        latents.append([train.np.load(f) for f in sorted(out.glob("latents-*.npy"))])
    (logged, one), (logged_two, two) = found
    assert one.keys() == two.keys() and logged.keys() == logged_two.keys()
    for k in one:
        assert (one[k] - two[k]).abs().max() <= 1e-5 * max(1, one[k].abs().max()), k
    for k in logged:
        assert abs(logged[k] - logged_two[k]) <= 1e-5 * max(1, abs(logged[k])), k
    for a, b in zip(*latents):
        assert a.shape == b.shape and train.np.abs(a.astype(float) - b).max() <= 2e-3
    assert len(latents[0]) == {1: 0, 2: 2, 3: 1}[stage]


def test_a_killed_process_ends_the_run_within_a_minute(folder, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "1", "--data", str(folder),
               "--out", str(tmp_path), "--steps", "100000", "--batch-size", "2"]
    first, second = start(command, 2)
    while not (tmp_path / "log.jsonl").exists():        # 20 steps were taken
        assert first.poll() is None and second.poll() is None
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith("train.py:")]
    assert first.returncode == 2 and len(lines) == 1 and "another process" in lines[0]
    assert "Traceback" not in said
    second.communicate()


# ---------------------------------------------------------------- the paper's widths, the plan


def full_width() -> object:
    """Every width as in the paper, two layers a tower, few words."""
    return replace(PRESETS["unix"], layers=2, vit_layers=2, vocab=8192, bos=0, eos=1, boi=2, eoi=3)


def take_steps(stage: int) -> dict:
    """In a child: what tests/gpu.py finds in real steps of a stage at full width, and the plan."""
    train.keep_freed_memory()
    before = gpu.Lab(True)
    start, lab = before.memory(peak=True), before
    lab.config, lab.sizes, lab.batches = full_width(), (256, 512), ((2, 2),)
    found = gpu.steps_of(stage)(lab)
    train.PRESETS["unix"] = lab.config
    o = Options(stage=stage, preset="unix", precision="bf16")
    row, = [v for k, v in found.items() if k.startswith("batch")]
    plan = train.peak_memory(o, STAGES["unix"][stage], 1, round(row["text_tokens"]), gpu=False)
    return found | {"peak": row["memory_gib"]["peak"] - start, "plan": plan / GIB}


@pytest.mark.skipif("UNIX_LAB" not in os.environ, reason="minutes on a CPU that emulates bf16")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_width_steps_in_bf16_and_the_plan(stage):
    """Two layers a tower. Losses are finite, what is frozen keeps every bit, and the plan's memory
    is right within 15%."""
    done = subprocess.run([sys.executable, __file__, str(stage)], text=True, cwd=ROOT,
                          stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"], found
    assert abs(found["peak"] / found["plan"] - 1) <= 0.15, (found["peak"], found["plan"])


if __name__ == "__main__":
    print(json.dumps(take_steps(int(sys.argv[1]))))
