"""One command on one GPU: is the code right there, how fast is it, how much memory does it take?

    python tests/gpu.py [--seconds 150] [--json gpu.json] [--only agrees kernels ...]

Sections, one after the other; one that fails or finds no time is reported, and the others still
run. The results are printed and written after each section. `unix` is the paper's size with random
weights. Without CUDA nothing runs. `--small` runs the same code on the CPU with `tiny` instead of
`unix`; tests/test_gpu.py does that. Exit code 0: nothing failed; 1: something did.
"""

import argparse
import gc
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # same sums in every run
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np                                        # noqa: E402
import torch                                              # noqa: E402
import torch.nn.functional as F                           # noqa: E402
from torch import nn                                      # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel    # noqa: E402

import parity                                             # noqa: E402
import train                                              # noqa: E402
from ar import Tokenizer, decode                          # noqa: E402
from data import open_data                                # noqa: E402
from diffusion import VAE, position_table                 # noqa: E402
from phantoms import write_phantoms                       # noqa: E402
from train import STAGES, Options, Processes, Stopped, Trainer    # noqa: E402
from unix import PRESETS, SPECIAL, Config, UniX, read_safetensors  # noqa: E402

GIB = 2 ** 30
GOLDEN = Path(__file__).resolve().parent / "golden" / "A"
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


class OutOfTime(Exception):
    """A section took longer than it may."""


class Lab:
    """The device, the sizes, and the ceilings that were measured."""

    def __init__(self, small: bool):
        self.small, self.device = small, "cpu" if small else "cuda:0"
        self.kind = self.device.split(":")[0]
        self.half = torch.float32 if small else torch.bfloat16      # some CPUs emulate bf16
        self.config = PRESETS["tiny" if small else "unix"]
        self.sizes = (64, 128) if small else (256, 512)     # pixels of generated images
        self.batches = ((2, 2),) if small else ((8, 2), (64, 8))    # images of a step, its parts
        self.precision = "bf16"             # of the steps of `unix`
        self.flops = self.bandwidth = math.nan
        images = open_data("phantom", "train", 64)
        reports = [images.text(i)[0] for i in range(60 if small else 240)]
        self.tokenizer = Tokenizer.train(reports, 1024, special=SPECIAL)
        self.texts = [" ".join(reports[3 * i:3 * i + 3]) for i in range(len(reports) // 3)]
        if small:
            self.texts = reports

    def wait(self):
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def memory(self, peak=False) -> float:
        """GiB of the GPU that are in use, or were at most; of a CPU's process (on Linux)."""
        if self.kind == "cuda":
            used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
            return used() / GIB
        status = Path("/proc/self/status")
        if not status.exists():
            return 0.0
        word = "VmHWM:" if peak else "VmRSS:"
        return int(status.read_text().split(word)[1].split()[0]) * 1024 / GIB

    def procs(self) -> Processes:
        procs = Processes()
        procs.device = self.device
        return procs

    def seconds(self, work, n=5, warm=2) -> float:
        """Median time of a call."""
        times = []
        for _ in range(warm + n):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm:])

    def build(self, dtype=torch.float32, **changes) -> UniX:
        """The model with random weights, made on the device."""
        config = replace(self.config, **changes)
        with torch.device("meta"):
            model = UniX(config).to(dtype)
            model.vae = VAE(**config.vae)
        model.to_empty(device=self.device)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.normal_(std=0.02)
                else:
                    p.fill_(float("norm" in name and name.endswith("weight")))
            model.positions.copy_(position_table(config.latent_side, config.width))
        model.tokenizer = self.tokenizer
        return model.eval()

    def pixels(self, b: int) -> torch.Tensor:
        return torch.randn(b, 3, self.config.vit_image, self.config.vit_image, device=self.device)


def ceilings(lab: Lab) -> dict:
    """What the card can do: the rate of a bf16 matrix product, and of copying memory."""
    n, size = (64, 2 ** 20) if lab.small else (8192, 2 ** 32)
    a, b = (torch.randn(n, n, device=lab.device, dtype=lab.half) for _ in range(2))
    lab.flops = 2 * n ** 3 / lab.seconds(lambda: a @ b, n=10)
    source = torch.randint(0, 255, (size,), device=lab.device, dtype=torch.uint8)
    to = torch.empty_like(source)
    lab.bandwidth = 2 * size / lab.seconds(lambda: to.copy_(source), n=10)
    return {"ok": True, "bf16_tflops": lab.flops / 1e12, "copy_tb_per_s": lab.bandwidth / 1e12}


# ---------------------------------------------------------------- attention kernels, parity


@contextmanager
def recorded(calls: dict):
    """Every call of the fused attention is tried with each kernel by itself; `calls` gets what
    works, by the shapes of the call."""
    kept = F.scaled_dot_product_attention

    def attend(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        def call():
            return kept(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
        shapes = [tuple(x.shape) for x in (q, k)] + [attn_mask is not None, is_causal]
        about = (f"q {shapes[0]} k {shapes[1]} {str(q.dtype)[6:]}" + " mask" * shapes[2]
                 + " causal" * is_causal + " gqa" * enable_gqa
                 + " backward" * (q.requires_grad or k.requires_grad))
        if about not in calls:
            calls[about] = []
            for kernel in FUSED:
                try:
                    with sdpa_kernel(kernel):
                        call()
                    calls[about].append(kernel.name.removesuffix("_ATTENTION").lower())
                    break                       # one is enough
                except RuntimeError:
                    continue
        if not calls[about]:
            return call()
        with sdpa_kernel(list(FUSED)):
            return call()
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


def exercise(lab: Lab, model: UniX):
    """All that the two branches attend with: reports, sampled images, and both losses."""
    ids = [model.ids(lab.texts[0]), model.ids(lab.texts[1])[:9]]
    pixels, side = lab.pixels(2), model.latent_rows(lab.sizes[0])
    with torch.no_grad():
        model.report(pixels, max_new=2)
        next(model.sample_latents(ids, side, side, [0, 1], scale=2.0))
        next(model.sample_latents(ids, side, side, [0, 1], scale=1.0))
    model.understanding_loss(pixels, ids, ids)[0].backward()
    x0, eps = torch.randn(2, 2, model.vae.channels, side, side, device=lab.device)
    t = torch.tensor([0.3, 0.8], device=lab.device)
    for context in (model.read_captions(ids), None):
        model.flow_loss(x0, context, t, eps, False)[0].sum().backward()


def kernels(lab: Lab) -> dict:
    """No attention of any shape falls back to the slow "math" kernel."""
    found, shallow = {}, {"layers": 1, "vit_layers": 1}
    for name, more in (("preset", {}), ("grouped", {"kv_heads": lab.config.kv_heads // 2})):
        for bf16 in (False, True)[:1 if lab.small else 2]:
            model, calls = lab.build(**shallow, **more), {}
            with warnings.catch_warnings(), recorded(calls), torch.autocast(
                    lab.kind, torch.bfloat16, enabled=bf16):
                warnings.simplefilter("ignore")         # each kernel says why it does not work
                exercise(lab, model)
            lacking = [k for k, v in calls.items() if not v]
            used = sorted({k for v in calls.values() for k in v})
            found[f"{name} {'bf16' if bf16 else 'fp32'}"] = {
                "calls": len(calls), "kernels": used, "math": lacking}
    # CUDA has no fused kernel for grouped queries in fp32; no preset groups them
    return {"ok": not any(v["math"] for k, v in found.items()
                          if lab.small or k != "grouped fp32"), **found}


def agrees(lab: Lab) -> dict:
    """The official code's numbers (tests/golden/A), in fp32 without TF32."""
    p = parity.compare(GOLDEN, lab.device)
    relative = {k: float(r) for k, (gap, r) in p.seen.items() if p.want[k].dtype != np.uint8}
    worst = max(relative, key=relative.get)
    levels = max([0.0] + [float(gap) for k, (gap, r) in p.seen.items() if k not in relative])
    return {"ok": relative[worst] <= 1e-4 and levels <= 1, "arrays": len(p.seen),
            "largest_relative": relative[worst], "at": worst, "levels": levels,
            "beyond_the_cpu_tolerance": p.bad[:10]}


# ---------------------------------------------------------------- the four stages of tiny


def precisions(trainer: Trainer, batch: dict) -> dict:
    """Each loss of a batch, computed in fp32 and in bf16."""
    random, found = trainer.randomness(trainer.step), {}
    weights = trainer.loss_weights(batch, random)
    for name, bf16 in (("fp32", False), ("bf16", True)):
        with torch.no_grad(), torch.autocast(trainer.device.split(":")[0], torch.bfloat16,
                                             enabled=bf16):
            found[name] = {k: float(weights[k] * v)
                           for k, v in trainer.losses(batch, random).items()}
    found["relative"] = max(             # of a negative cosine near 0: the share of 0.5
        abs(found["bf16"][k] - v) / max(abs(v), 0.5 if k == "repa" else 1e-3)
        for k, v in found["fp32"].items())
    return found


def run_until(options: Options, procs: Processes, stop: int, seen: dict, sheets: bool):
    """Runs a stage that stops itself after step `stop`; `seen`: losses in both precisions."""
    step, write_sheet = Trainer.train_step, Trainer.write_sheet

    def watched(self, batch):
        logged = step(self, batch)
        if self.step == stop:
            self.stop.fill_(1)
        if self.step == options.steps:
            seen.update(precisions(self, batch))
        return logged
    Trainer.train_step = watched
    if not sheets:
        Trainer.write_sheet = lambda self: None
    try:
        train.run(options, procs)
    except Stopped:
        pass
    finally:
        Trainer.train_step, Trainer.write_sheet = step, write_sheet


def stages(lab: Lab) -> dict:
    """Four stages of `tiny`, a few steps each: once without a stop, once stopped and resumed; the
    weights must be the same. Losses in bf16 are within 2% of those in fp32."""
    found, steps = {}, 2 if lab.small else 6
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantoms(Path(folder) / "images", 16, 8)
        for k in (0, 1, 2, 3):
            start, weights, seen = time.perf_counter(), {}, {}
            for name, stops in (("whole", [0]), ("resumed", [steps // 2, 0])):
                out = Path(folder) / name
                for stop in stops:
                    run_until(Options(stage=k, data=str(data), out=str(out), steps=steps,
                                      batch_size=4, precision="fp32"), lab.procs(), stop, seen,
                              sheets=name == "whole" and not lab.small)
                weights[name] = read_safetensors(
                    out / ("model.safetensors" if k else "vae/model.safetensors"))
            gaps = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
                    for a, b in zip(*(w.values() for w in weights.values()))]
            found[f"stage {k}"] = {
                "bit_identical": max(gaps) == 0, "largest_relative": max(gaps),
                "seconds": time.perf_counter() - start, **seen}
    torch.use_deterministic_algorithms(False)
    return {"ok": all(v["largest_relative"] <= 1e-3 and v["relative"] <= 0.02
                      for v in found.values()), **found}


# ---------------------------------------------------------------- the paper's size


def matrices(module: nn.Module, word="") -> int:
    """Number of weights in the matrices of a module whose name has a word in it."""
    return sum(p.numel() for k, p in module.named_parameters() if word in k and p.dim() > 1)


@torch.no_grad()
def inference(lab: Lab) -> dict:
    """Report tokens and denoising steps in bf16, against the card's ceilings."""
    start = time.perf_counter()
    model = lab.build(lab.half)
    lab.wait()
    c, found = model.config, {"build_s": time.perf_counter() - start}
    found["weights_gib"] = sum(p.nbytes for p in model.parameters()) / GIB
    prompt = model.wrap(model.ids(lab.texts[0])[:8]) + [c.bos]
    for b in (1, 8):
        pixels, rows = lab.pixels(b).to(lab.half), model.pad([prompt] * b)
        found[f"image_read_ms_batch_{b}"] = 1e3 * lab.seconds(lambda: model.embed_image(pixels))
        times = []
        for _ in decode(model.lm, *rows, model.embed_image(pixels), -1, 21):
            lab.wait()
            times.append(time.perf_counter())
        token = statistics.median(y - x for x, y in zip(times[1:], times[2:]))
        found[f"report_tokens_per_s_batch_{b}"] = b / token
        length = len(prompt) + (c.vit_image // c.vit_patch) ** 2 + 12
        moved = 2 * (matrices(model.lm.tower, ".und.") + model.lm.lm_head.weight.numel()
                     + 2 * b * length * c.layers * c.kv_heads * c.head_dim)
        found[f"share_of_bandwidth_batch_{b}"] = moved / token / lab.bandwidth
    per, ids = matrices(model.lm.tower, ".gen."), [model.ids(lab.texts[0])]
    for size in lab.sizes:
        side = model.latent_rows(size)
        n = (side // c.latent_patch) ** 2
        for name, scale, passes in (("guided", 2.0, 2), ("single", 1.0, 1)):
            steps = model.sample_latents(ids, side, side, [0], points=50, scale=scale)
            took = lab.seconds(lambda: next(steps), n=6, warm=3)
            useful = passes * (2 * per * n + 4 * c.layers * n * (n + len(ids[0])) * c.width)
            found[f"{name}_step_ms_{size}"] = 1e3 * took
            found[f"{name}_share_of_product_{size}"] = useful / took / lab.flops
        found[f"image_s_{size}"] = lab.seconds(
            lambda: model.generate([lab.texts[0]], size, points=4 if lab.small else 50), n=1,
            warm=0)
    found["peak_gib"] = lab.memory(peak=True)
    return {"ok": True, **found}


def synthetic(lab: Lab, model: UniX, b: int, side: int) -> dict:
    """A batch as the loaders give it, of random numbers."""
    c, vae = model.config, model.vae
    texts = [lab.texts[i % len(lab.texts)] for i in range(b)]
    return {"image": torch.randint(0, 255, (b, c.vit_image, c.vit_image), dtype=torch.uint8),
            "moments": torch.randn(b, 2 * vae.channels, side, side),
            "features": torch.randn(b, (c.vit_image // c.vit_patch) ** 2, c.vit_width),
            "report": texts, "caption": texts}


def useful_flops(model: UniX, stage: int, text: float, n: int) -> float:
    """Arithmetic that a sample of a stage needs: forward once, backward twice where it learns."""
    c, width = model.config, model.config.heads * model.config.head_dim
    if stage == 1:
        image = (c.vit_image // c.vit_patch) ** 2
        length, vit = image + text + 12, 2 * image * matrices(model.vit)
        attention = 4 * c.layers * length ** 2 / 2 * width + (
            4 * c.vit_layers * image ** 2 * c.vit_width)
        return 3 * (vit + 2 * length * matrices(model.lm.tower, ".und.") + attention
                    + 2 * text * model.lm.lm_head.weight.numel())
    attention = 4 * c.layers * n * (n + text) * width
    return (2 * text * matrices(model.lm.tower, ".und.")
            + 3 * (2 * n * matrices(model.lm.tower, ".gen.") + attention))


def checksums(model: UniX) -> dict[str, int]:
    """A number for the bits of each parameter (fp32)."""
    return {k: int(p.detach().view(torch.int32).sum(dtype=torch.int64))
            for k, p in model.named_parameters()}


def kept(trainer: Trainer, batch: dict, b: int) -> int:
    """Bytes that the forward pass of the first b samples keeps for the backward pass."""
    skip = {p.untyped_storage()._cdata for p in trainer.model.parameters()}
    found, some = {}, torch.arange(b)

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in skip:
            found[storage._cdata] = storage.nbytes()            # None: x may hold what holds x
    random = trainer.randomness(trainer.step)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(
            trainer.device.split(":")[0], torch.bfloat16, enabled=trainer.bf16):
        sums = trainer.losses(train.pick_rows(batch, some), train.pick_rows(random, some))
    del sums
    return sum(found.values())


def steps_of(stage: int):
    """The section that takes real training steps of a stage, at full size."""
    def section(lab: Lab) -> dict:
        found, ok = {}, True
        k, pixels = stage, lab.sizes[stage == 3]
        model = lab.build()
        side, names = model.latent_rows(pixels), {}
        n = (side // model.config.latent_patch) ** 2
        for batch, parts in lab.batches:
            table = STAGES["unix"][k]
            o = Options(stage=k, preset="unix", batch_size=batch, accumulate=parts,
                        precision=lab.precision)
            s = replace(table, batch=batch, warmup=0,
                        pixels=model.config.vit_image if k == 1 else pixels)
            data = SimpleNamespace(maps={"features": np.zeros((1, 1, model.config.vit_width))})
            before = checksums(model)
            trainer = Trainer(o, s, model, data, lab.procs(), Path("."))
            rows, logged, times = synthetic(lab, model, batch, side), [], []
            memory = {"before": lab.memory()}
            if lab.kind == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(2 if lab.small else 3):
                lab.wait()
                start = time.perf_counter()
                logged.append(trainer.train_step(rows))
                lab.wait()
                times.append(time.perf_counter() - start)
            memory |= {"after": lab.memory(),
                       "peak": lab.memory(peak=True)}
            moved = [name for name, value in checksums(model).items()
                     if value != before[name] and name not in trainer.trainable]
            text = statistics.mean(len(model.ids(t)) for t in rows["report"])
            took = min(times[1:])
            tokens = n + 2 if k > 1 else (model.config.vit_image // model.config.vit_patch) ** 2 + 2
            found[f"batch {batch} in {parts} parts"] = {
                "step_s": took, "first_step_s": times[0], "images_per_s": batch / took,
                "tokens_per_s": batch * (tokens + text) / took, "text_tokens": text,
                "share_of_product": batch * useful_flops(model, k, text, n) / took / lab.flops,
                "days_of_table_1": table.steps * 256 * took / batch / 86400,
                "memory_gib": memory, "losses": logged, "frozen_that_moved": moved}
            ok &= not moved and all(np.isfinite([*step.values()]).all() for step in logged)
            if not names:
                names = precisions(trainer, rows)
                found["kept_for_backward_gib"] = {b: kept(trainer, rows, b) / GIB for b in (1, 2)}
            del trainer, rows
            gc.collect()
        return {"ok": ok and names["relative"] <= 0.02, **found, "bf16_against_fp32": names}
    section.__name__ = f"stage{stage}"
    return section


def load(lab: Lab) -> dict:
    """Writing and opening a weights folder in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        model = lab.build(lab.half)
        wrote = lab.seconds(lambda: model.save(folder), n=1, warm=0)
        del model
        opened = lab.seconds(lambda: UniX.load(folder, lab.device, lab.half), n=1, warm=0)
    return {"ok": True, "save_s": wrote, "load_s": opened}


# ---------------------------------------------------------------- main

# Section, and the most seconds it may take
SECTIONS = ((ceilings, 20), (kernels, 30), (agrees, 30), (inference, 40), (steps_of(1), 40),
            (steps_of(2), 40), (stages, 60), (steps_of(3), 40), (load, 40))


def too_long(*_):
    raise OutOfTime


def guarded(section, lab: Lab, seconds: float) -> dict:
    """What a section found, or why it did not end."""
    if seconds < 3:
        return {"ok": False, "error": "no time was left"}
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        if lab.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = section(lab)
    except OutOfTime:
        found = {"ok": False, "error": f"took more than {seconds:.0f} s"}
    except Exception as e:              # whatever it is, the next section is to run
        found = {"ok": False, "error": f"{type(e).__name__}: {e}"[:600],
                 "where": traceback.format_exc().splitlines()[-8:]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.use_deterministic_algorithms(False)
    gc.collect()
    if lab.kind == "cuda":
        torch.cuda.empty_cache()
    return found | {"section_s": time.perf_counter() - start}


def rounded(x):
    """Numbers with four digits, for reading."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [*map(rounded, x)]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    names = [section.__name__ for section, _ in SECTIONS]
    parser.add_argument("--seconds", type=float, default=150, help="for all sections (default 150)")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these sections")
    parser.add_argument("--small", action="store_true", help="the same code on the CPU, with tiny")
    args = parser.parse_args(argv)
    if not args.small and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here, so nothing was checked")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    end = time.perf_counter() + args.seconds
    lab = Lab(args.small)
    found = {"device": "CPU" if args.small else torch.cuda.get_device_name(),
             "torch": torch.__version__, "preset": "tiny" if args.small else "unix"}
    for section, most in SECTIONS:
        name = section.__name__
        if name in args.only:
            left = end - time.perf_counter()
            found[name] = rounded(guarded(section, lab, left if args.small else min(most, left)))
            print(name, json.dumps(found[name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
    bad = [name for name in names if name in found and not found[name]["ok"]]
    print("failed: " + ", ".join(bad) if bad else "nothing failed", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
