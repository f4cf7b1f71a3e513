"""From a laptop to a laboratory: the paper's widths, several processes, all rows of Table 1."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

import gpu
import train
from ar import Tokenizer
from conftest import ROOT, small_config
from data import open_data
from diffusion import VAE
from phantoms import write_phantoms
from train import STAGES, Options, Processes, Trainer
from unix import INSTRUCTIONS, PRESETS, SPECIAL, UniX

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
procs = train.Processes()
for about in {options!r}:
    options = train.Options(**about)
    stage = train.STAGES[options.preset][options.stage]
    stage = train.replace(stage, batch=options.batch_size, steps=2)
    trainer = train.set_up(options, stage, procs, Path(options.out))
    for optimizer in trainer.optimizers:
        optimizer.step = optimizer.zero_grad = lambda: None
    logged = trainer.train_step(next(trainer.stream()))
    found = {{k: p.grad for k, p in trainer.trainable.items() if p.grad is not None}}
    if procs.rank == 0:
        torch.save([logged, found], options.out + "/found")
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


@pytest.fixture(scope="module")
def steps_of_one_and_two(folder, begun, tmp_path_factory) -> Path:
    """DIR/WORLD/STAGE/found: what a step of a stage logs, and its gradients, in one and in two
    processes."""
    root = tmp_path_factory.mktemp("processes")
    for world in (1, 2):
        for stage in (1, 2, 3):
            out = root / str(world) / str(stage)
            shutil.copytree(begun, out)
            for old in [*out.glob(f"stage{stage}.pt"), *out.glob("latents-*")]:
                old.unlink()
        about = [dict(stage=stage, data=str(folder), out=str(root / str(world) / str(stage)),
                      batch_size=5, accumulate=2, precision="fp32") for stage in (1, 2, 3)]
        code = GRADIENTS.format(root=str(ROOT), options=about)
        for run in start([sys.executable, "-c", code], world):
            said = run.communicate(timeout=300)[1]
            assert run.returncode == 0, said
    return root


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_equal_one(steps_of_one_and_two, stage):
    """Five images, so two and three; two parts each; reports of different lengths. Latents are
    computed by both."""
    outs = [steps_of_one_and_two / str(world) / str(stage) for world in (1, 2)]
    (logged, one), (logged_two, two) = (torch.load(out / "found") for out in outs)
    latents = [[train.np.load(f) for f in sorted(out.glob("latents-*.npy"))] for out in outs]
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


# ---------------------------------------------------------------- memory: plan, count, card


REAL = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_view.default)   # flags; a view


class Untouched(TorchDispatchMode):
    """Runs code without its arithmetic, and counts the bytes that its tensors hold. Results get
    memory of the right size that is never written, so that the system need not provide it: a step
    of a model that is larger than this computer takes seconds. Views and integers are computed.
    """

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known, self.shapes = 0, 0, set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, alias = kwargs or {}, [r.alias_info for r in func._schema.returns]
        flat, tree = tree_flatten((args, kwargs))
        given = [x for x in flat if isinstance(x, Tensor)]
        floats = not given or any(x.is_floating_point() for x in given)
        if func is torch.ops.aten._local_scalar_dense.default and floats:
            return 1.0
        if floats and (not alias or alias[0] and alias[0].is_write):
            return args[0] if alias else None           # it only writes, so it is left out
        if not floats or alias[0] or func in REAL:
            return self.count(func(*args, **kwargs))
        key = func, str(tree), *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x
                                 for x in flat)
        real = args, kwargs
        if key not in self.shapes:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            kwargs |= {"device": "meta"} if "device" in kwargs else {}
            self.shapes[key] = func(*args, **kwargs)
        if not all(x.is_floating_point() for x in tree_leaves(self.shapes[key])
                   if isinstance(x, Tensor)):
            return self.count(func(*real[0], **real[1]))
        return self.count(tree_map_only(Tensor, lambda x: torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype), self.shapes[key]))

    def count(self, out):
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key: int, n: int):
        self.known.discard(key)
        self.held -= n


def counted(options: Options, stage: train.Stage, c, rows: int, text=120) -> float:
    """GiB that a process holds at most in a training step on a GPU with `rows` images a part,
    counted in a step of the real Trainer without arithmetic."""
    stage = replace(stage, batch=rows)
    words = SimpleNamespace(encode=lambda x: [5] * (10 if x in INSTRUCTIONS else text))
    with torch.device("meta"):
        model = UniX(c, words, VAE(**c.vae))
    procs = SimpleNamespace(device="cpu", rank=0, world=1)
    with Untouched() as memory:
        model.to_empty(device="cpu")
        data = SimpleNamespace(maps={"features": torch.empty(1, 1, c.vit_width)})
        trainer = Trainer(options, stage, model, data, procs, Path())
    trainer.by_time, random, side = [], trainer.randomness(0), stage.pixels // model.vae.factor
    random["drop"][:] = False
    batch = {"image": torch.zeros(rows, c.vit_image, c.vit_image, dtype=torch.uint8),
             "moments": torch.zeros(rows, 2 * model.vae.channels, side, side),
             "features": torch.zeros(rows, (c.vit_image // c.vit_patch) ** 2, c.vit_width),
             "report": ["-"] * rows, "caption": ["-"] * rows}
    with memory:
        for p in trainer.trainable.values():
            p.grad = torch.empty_like(p)            # of the parts before
        for optimizer in trainer.optimizers:
            optimizer.step()                        # so that it has its state
        memory.peak = memory.held
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(trainer.losses(batch, random).values())
        loss.backward()
    return memory.peak / GIB


def planned(options: Options, stage: train.Stage, c, rows: int, bf16=True) -> float:
    """What train.py --plan says, in GiB."""
    with torch.device("meta"):
        model = UniX(c, vae=VAE(**c.vae))
    return sum(train.memory(model, options, stage, rows, bf16).values())


def full_width(layers=2) -> object:
    """Every width as in the paper, two layers a tower, few words."""
    return replace(PRESETS["unix"], layers=layers, vit_layers=layers, vocab=8192, bos=0, eos=1,
                   boi=2, eoi=3)


def lean_norm(x, shape, weight, eps):
    """Replaces F.rms_norm where memory is measured: the GPU's fused kernel keeps for the backward
    pass what layer_norm keeps; a CPU's keeps more."""
    return F.layer_norm(x, shape, weight)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_plan_is_what_a_step_holds(monkeypatch, stage, checkpointing):
    """Within 15%, for 8 images, two layers a tower at full width."""
    monkeypatch.setattr(F, "rms_norm", lean_norm)
    o = Options(stage=stage, preset="unix", precision="bf16", checkpointing=checkpointing)
    one = counted(o, STAGES["unix"][stage], full_width(), 8)
    two = planned(o, STAGES["unix"][stage], full_width(), 8)
    assert abs(two / one - 1) <= 0.15, (one, two)


@pytest.mark.parametrize("stage, rows, peak", [(1, 4, 47.8), (1, 8, 58.0), (2, 4, 36.1),
                                               (2, 8, 38.9), (3, 4, 43.5), (3, 8, 54.0)])
def test_the_plan_is_what_an_h200_held(stage, rows, peak):
    """GiB that tests/gpu.py measured at the paper's size (tests/README.md, GPU)."""
    o = Options(stage=stage, preset="unix")
    assert abs(planned(o, STAGES["unix"][stage], PRESETS["unix"], rows) / peak - 1) <= 0.15


def test_the_plan_counts_repas_projector():
    """At least 16 bytes for each of its weights: itself, its gradient, two of AdamW."""
    c, stage, o = full_width(), STAGES["unix"][2], Options(stage=2, preset="unix")
    own = planned(o, stage, c, 1, False) - planned(o, replace(stage, repa_weight=0.0), c, 1, False)
    projector = 2 * 2048 * 2048 + 2048 * 1024               # three layers, to the ViT's 1024
    assert 16 <= own * 2**30 / projector <= 20


def take_steps(stage: int) -> dict:
    """In a child: what tests/gpu.py finds in real steps of a stage at full width, and the plan."""
    F.rms_norm = lean_norm
    lab = gpu.Lab(True)
    start = lab.memory(peak=True)
    lab.config, lab.sizes, lab.batches = full_width(), (256, 512), ((2, 2),)
    # without AVX-512 torch multiplies bf16 matrices in a plain loop: a step would take an hour
    lab.precision = "bf16" if torch.cpu._is_avx512_supported() else "fp32"
    found = gpu.steps_of(stage)(lab)
    row, = [v for k, v in found.items() if k.startswith("batch")]
    plan = planned(Options(stage=stage, preset="unix"), STAGES["unix"][stage], lab.config, 1,
                   lab.precision == "bf16")
    return found | {"peak": row["memory_gib"]["peak"] - start, "plan": plan}


@pytest.mark.skipif("UNIX_LAB" not in os.environ, reason="minutes, and 8 GiB")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_width_steps(stage):
    """Two layers a tower, in bf16 where the CPU has it. Losses are finite, what is frozen keeps
    every bit, and the plan's memory is right within 15%."""
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}     # what is freed, at once
    done = subprocess.run([sys.executable, __file__, str(stage)], text=True, cwd=ROOT,
                          stdout=subprocess.PIPE, env=returned)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"], found
    assert abs(found["peak"] / found["plan"] - 1) <= 0.15, (found["peak"], found["plan"])


if __name__ == "__main__":
    print(json.dumps(take_steps(int(sys.argv[1]))))
