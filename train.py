"""Teaches UniX in the paper's stages (Sec. 3.4, Table 1).

    python train.py --stage 0      a small autoencoder, where no pretrained one is at hand (--vae)
    python train.py --stage 1      understanding: reads images, writes reports     (Eq. 1)
    python train.py --stage 2      generation at low resolution, with REPA        (Eq. 2)
    python train.py --stage 3      generation at high resolution

What a stage does not train is frozen: no gradient, not in the optimizer. The same command goes on
where it was stopped, bit for bit: every random draw depends on (seed, stage, step) alone.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path


@dataclass
class Stage:
    """One column of Table 1."""
    trains: str             # the branch that learns; all others are frozen
    pixels: int             # resolution
    lr: float
    warmup: int             # steps of linear warm-up; constant afterwards
    steps: int
    batch: int = 256
    repa: float = 0.0       # weight of the alignment loss
    ema: float = 0.0        # decay of the averaged weights that are saved; 0: none (ours)
    decay: float = 0.0      # share of the steps at the end over which the rate falls to 0 (ours)
    muon: float = 0.0       # learning rate of matrices under Muon; 0: AdamW for all, as the paper
    images: int = 0          # how many images of an endless set are used; 0: no limit (ours)
    shift: float = 1.0      # of times towards noise; falls to 1 in the last 70% of steps (ours)


STAGES = {
    "unix": {   # Table 1; stage 0 is ours
        0: Stage("vae", 256, 1e-4, 1000, 50_000, batch=32, ema=0.999),
        1: Stage("understanding", 384, 1e-4, 80, 3_840),
        2: Stage("generation", 256, 2e-4, 2_000, 75_000, repa=0.5, ema=0.9999),
        3: Stage("generation", 512, 1e-4, 0, 5_000, ema=0.9999),
    },
    "tiny": {   # the same in 30 to 55 minutes on two cores; sizes keep the paper's ratios
        0: Stage("vae", 64, 2e-3, 50, 2_000, batch=2, decay=0.4, muon=0.02),
        1: Stage("understanding", 96, 2e-3, 50, 4_000, batch=16, decay=0.4, muon=0.005),
        2: Stage("generation", 64, 2e-3, 50, 5_000, batch=16, repa=0.5, ema=0.998, decay=1.0,
                 muon=0.02, images=8_192, shift=8.0),
        3: Stage("generation", 128, 2e-3, 0, 9_000, batch=16, ema=0.998, decay=1.0, muon=0.02,
                 images=8_192, shift=8.0),
    },
}

PROMPTS = (     # Figure 4: severity, side, several findings
    "Heart size is normal. The lungs are clear.", "The heart is mildly enlarged.",
    "The heart is severely enlarged.", "Small left pleural effusion.",
    "Large right pleural effusion.", "Large left pneumothorax.",
    "Large right pneumothorax.",
    "Consolidation in the right upper lobe. Small left pleural effusion.")


def option(default, text: str, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Options:
    """What a user can say; `--help` is made from this."""
    stage: int = option(None, "which stage to run: 0, 1, 2 or 3", choices=(0, 1, 2, 3))
    data: str = option("phantom", "phantom (drawn images, no download) or a data folder")
    out: str = option(None, "weights folder to write and go on with (default: runs/NAME)")
    preset: str = option("tiny", "tiny (a laptop) or unix (the paper)", choices=tuple(STAGES))
    weights: str = option(None, "weights folder to start from: UniX, Janus-Pro, or a run of yours")
    vae: str = option(None, "autoencoder to use instead of stage 0: CompVis .ckpt or .safetensors")
    steps: int = option(None, "optimizer steps (default: see --plan)")
    batch_size: int = option(None, "images a step, over all processes")
    accumulate: int = option(1, "parts that a batch is worked through in; same result, less memory")
    lr: float = option(None, "learning rate")
    repa: str = option(None, "stage 2's alignment: its weight, or a RAD-DINO folder to align with\n"
                       "(default: 0.5, with the model's own image encoder)")
    train: str = option("own", "own: only the stage's branch learns; both: Table 5",
                        choices=("own", "both"))
    mix: str = option("1:1", "with --train both: images that are read : images that are drawn",
                      choices=("1:1", "1:2", "1:4", "0:1"))
    share_layers: int = option(0, "first layers that both branches share (from stage 1 or 2 on)")
    no_context: bool = option(False, "cut the joint attention: images are drawn without text")
    precision: str = option("auto", "auto: bf16 where it is fast", choices=("auto", "fp32", "bf16"))
    checkpointing: bool = option(False, "recompute activations: less memory, more time")
    compile: bool = option(False, "torch.compile the layers")
    workers: int = option(0, "processes that load images")
    save_every: int = option(200, "steps between checkpoints")
    sheet_every: int = option(500, "steps between sample sheets")
    seed: int = option(0, "seed of everything random")
    plan: bool = option(False, "print sizes, memory and steps, then stop")


def parse(argv=None) -> Options:
    """Options from the command line; argparse prints help and mistakes (exit code 2)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    for f in fields(Options):
        text, more = f.metadata["help"], {k: v for k, v in f.metadata.items() if k != "help"}
        if f.type is bool:
            more["action"] = "store_true"
        else:
            more.update(type=f.type, default=f.default)
            text += "" if f.default is None else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **more)
    options = Options(**vars(parser.parse_args(argv)))
    if options.stage is None:
        parser.error("say which stage: --stage 0 (autoencoder), 1 (reports), 2 or 3 (images)")
    for name in ("steps", "batch_size", "accumulate", "save_every", "sheet_every", "lr"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return options


OPTIONS = parse() if __name__ == "__main__" else None    # --help answers before torch is imported

import numpy as np                                        # noqa: E402
import torch                                              # noqa: E402
import torch.nn.functional as F                           # noqa: E402
from torch import Tensor, nn                              # noqa: E402
from PIL import Image, ImageDraw                          # noqa: E402
from tqdm import tqdm                                     # noqa: E402

from ar import Tokenizer, vit_pixels                                  # noqa: E402
from data import (UserError, atomic, batches, open_data, sheet)  # noqa: E402
from diffusion import VAE, repa_loss, sample_time, to_uint8, vae_pixels          # noqa: E402
from joint_attn import Context                            # noqa: E402
from unix import (INSTRUCTIONS, PRESETS, SPECIAL, Config, UniX, load_rad_dino,  # noqa: E402
                  load_vae, save_vae)


class Processes:
    """One process, or those that torchrun started. Gradients are summed over them by hand."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = "mps" if torch.backends.mps.is_available() and self.world == 1 else "cpu"
        if torch.cuda.is_available():
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if "cuda" in self.device else "gloo")

    def total(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def sum_gradients(self, parameters: list):
        if self.world > 1:
            flat = self.total(torch.cat([p.grad.flatten() for p in parameters]))
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))

    @contextmanager
    def first(self):
        """Rank 0 goes through first, then the others, who find its files."""
        if self.world > 1 and self.rank:
            torch.distributed.barrier()
        yield
        if self.world > 1 and not self.rank:
            torch.distributed.barrier()


def side_by_side(device: str) -> tuple[int, Callable]:
    """How many things a CPU works on at once, in threads, and the `map` that does so (ours): a
    small tensor gains less from a second thread than two do from a thread of their own."""
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        return 1, map
    n = min(threads, 4)
    return n, ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(threads // n,)).map


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by three Newton-Schulz steps (Jordan 2024), in fp32;
    torch.optim.Muon runs them in bf16, which many CPUs emulate, and takes no convolutions."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, run=map):
        """`run`: map(function, parameters), or one that works on several at once."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.run = run

    def step(self):
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for _ in self.run(partial(self.move, group), moved):
                pass

    @torch.no_grad()
    def move(self, group: dict, p: Tensor):
        state, momentum = self.state[p], group["momentum"]
        mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - momentum)
        update = orthogonal(p.grad.lerp(mean, momentum).flatten(1))
        ratio = max(1, update.shape[0] / update.shape[1]) ** 0.5
        p.add_(update.view_as(p), alpha=-group["lr"] * ratio)


def orthogonal(x: Tensor) -> Tensor:
    """Nearly orthogonal matrix with the singular vectors of x (m, n). Works on the smaller of the
    two Gram matrices: x <- p(x xT) x again and again is one product of polynomials p times x."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.T, None
    for _ in range(3):
        if product is not None:
            gram = p @ gram @ p
        p = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        p.diagonal().add_(3.4445)
        product = p if product is None else p @ product
    return product @ x


def read_checkpoint(file: Path, device="cpu") -> dict:
    """What a stage has saved; a finished one has no "learns". Raises UserError."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as e:      # torch has no common class for a broken file
        problem = f"{file} is broken ({str(e)[:50]}); delete it to start over"
        raise UserError(problem) from None


def digest(module: nn.Module | None) -> str:
    """Fingerprint of a module's weights."""
    found = hashlib.sha1()
    for v in module.state_dict().values() if module else ():
        found.update(v.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()


class Latents:
    """An image set seen through the frozen autoencoder: moments [mean | log variance] of all,
    and the alignment teacher's features of it, computed once and kept beside the run. The cache
    knows what it was made from, and is made again when images, size, autoencoder or teacher change.
    """

    def __init__(self, source, count: int, model: UniX, teacher, folder: Path, images=None,
                 begun=False):
        """`images`: the same images at the image encoder's size, where these are wanted too.
        `begun`: the stage is under way, and its teacher has learned since (--train both)."""
        self.source, self.folder, self.stem = source, folder, f"latents-{source.size}"
        self.images = images
        origin = [source.fingerprint(), count, digest(model.vae), digest(teacher)]
        about = folder / f"{self.stem}.json"
        known = json.loads(about.read_text()) if about.exists() else {}
        if begun and "origin" in known and self.file("features").exists():
            origin[-1] = known["origin"][-1]
        if known.get("origin") != origin:
            about.unlink(missing_ok=True)
            known = {"origin": origin, "texts": self.build(count, model, teacher)}
            with atomic(about) as temporary:
                temporary.write_text(json.dumps(known))
        self.texts = known["texts"]
        self.maps = {k: np.load(self.file(k), mmap_mode="r") for k in ("moments", "features")
                     if self.file(k).exists()}

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.stem}.{kind}.npy"

    def build(self, count: int, model: UniX, teacher) -> list:
        """Fills the memory maps; returns the texts [report, caption] of the images."""
        self.file("features").unlink(missing_ok=True)       # those of another teacher
        texts, maps, (lanes, run) = [], {}, side_by_side(str(model.device))

        @torch.no_grad()
        def see(rows: range) -> tuple[list, dict]:
            samples = self.source.__getitems__(rows)
            if any(f["image"] is None for f in samples):
                return samples, {}                       # so many are broken that account() raises
            images = torch.from_numpy(np.stack([f["image"] for f in samples])).to(model.device)
            out = {"moments": model.vae.moments(vae_pixels(images))}
            return samples, out | ({"features": teacher.patches(images)} if teacher else {})

        parts = [range(i, min(i + 8, count)) for i in range(0, count, 8)]   # a CPU's caches hold 8
        bar = tqdm(total=count, desc=f"latents at {self.source.size} px", unit="image")
        for some in (parts[i:i + lanes] for i in range(0, len(parts), lanes)):
            for samples, out in run(see, some):
                self.source.account(samples)
                for k, v in out.items():
                    if k not in maps:
                        maps[k] = np.lib.format.open_memmap(self.file(k), "w+", np.float16,
                                                            (count, *v.shape[1:]))
                    maps[k][len(texts):len(texts) + len(samples)] = v.cpu().numpy()
                texts += [[f["report"], f["caption"]] for f in samples]
                bar.update(len(samples))
        bar.close()
        for written in maps.values():
            written.flush()
        return texts

    def account(self, samples: list):
        """Nothing can be broken here any more."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict:
        report, caption = self.texts[i]
        sample = {"index": i, "report": report, "caption": caption,
                  **{k: v[i].astype(np.float32) for k, v in self.maps.items()}}
        return sample if self.images is None else sample | {"image": self.images[i]["image"]}


class Contexts:
    """What the frozen understanding branch reads of captions, each whole and as its `excerpt`: kept
    in memory as fp16, so that no step reads one again (ours)."""

    def __init__(self, model: UniX, captions: list[str]):
        c = model.config
        ids = [model.ids(text) for caption in captions for text in (caption, excerpt(caption))]
        length = [len(i) + 2 for i in ids]              # with BOS and EOS
        self.begin = [0, *itertools.accumulate(length)]
        self.kv = torch.empty(self.begin[-1], c.layers, 2, c.kv_heads, c.head_dim,
                              dtype=torch.float16)      # a token is a row

        @torch.no_grad()
        def read(rows: list[int]):
            context = model.read_captions([ids[i] for i in rows])
            kv = torch.stack([torch.stack(pair) for pair in context.kv])  # (layers, 2, b, g, l, k)
            for own, i in zip(kv.permute(2, 4, 0, 1, 3, 5).cpu(), rows):
                self.kv[self.begin[i]:self.begin[i + 1]] = own[:length[i]]
        order = torch.tensor(length).argsort(stable=True)       # a batch has little padding
        for _ in side_by_side(str(model.device))[1](read, [x.tolist() for x in order.split(16)]):
            pass

    @staticmethod
    def size(c: Config, tokens: float) -> float:
        """Bytes of so many tokens; 0: it would be a gigabyte or more, so none are kept."""
        n = tokens * c.layers * c.kv_heads * c.head_dim * 4
        return n if n < 2**30 else 0

    def of(self, images: Tensor, cut: Tensor, device) -> Context:
        """The Context of the captions of `images` (b,), or of excerpts where `cut` (b,) is True."""
        rows = (2 * images + cut).tolist()
        own = [self.kv[self.begin[i]:self.begin[i + 1]] for i in rows]
        length = torch.tensor([len(part) for part in own], device=device)
        kv = nn.utils.rnn.pad_sequence(own, True).to(device).float().permute(2, 3, 0, 4, 1, 5)
        return Context([*map(tuple, kv)], length, length, bool((length < kv.shape[4]).any()))


class Trainer:
    """One stage of one run."""

    def __init__(self, options: Options, stage: Stage, model, data, procs: Processes, out: Path):
        self.options, self.stage, self.model, self.out = options, stage, model, out
        self.data, self.procs, self.device = data, procs, procs.device
        self.step, self.stop = 0, torch.zeros((), device=self.device)
        self.file = out / f"stage{options.stage}.pt"
        self.settings = {k: v for k, v in asdict(options).items() if k in (
            "data", "preset", "accumulate", "train", "mix", "share_layers", "no_context", "seed")}
        self.settings.update(steps=stage.steps, batch=stage.batch, lr=stage.lr,
                             repa=alignment(options)[1] or stage.repa)
        self.vae = model if stage.trains == "vae" else model.vae
        if stage.trains == "understanding":
            self.image_tokens = (model.config.vit_image // model.config.vit_patch) ** 2
        else:
            side = stage.pixels // self.vae.factor
            self.image_tokens = side ** 2 if model is self.vae else math.prod(
                model.grid(side, side))
        self.projector, self.both, self.contexts = None, options.train == "both", None
        self.learns = self.choose()
        self.average = None
        if stage.ema:
            self.average = {k: p.detach().clone() for k, p in self.learns.items()}
        self.threads = torch.get_num_threads()
        self.lanes, self.map = (1, map) if options.compile else side_by_side(self.device)
        self.optimizers = self.choose_optimizers()
        fast = "cuda" in self.device or torch.cpu._is_avx512_bf16_supported() and (
            stage.trains == "vae" or model.config.width >= 512)     # small matrices are slower
        bf16 = options.precision == "bf16" or options.precision == "auto" and fast
        self.cast = lambda: torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=bf16)
        if stage.trains != "vae":
            model.lm.tower.checkpointing = options.checkpointing
            for layer in model.lm.tower.layers if options.compile else ():
                layer.read, layer.denoise = torch.compile(layer.read), torch.compile(layer.denoise)

    def choose(self) -> dict[str, nn.Parameter]:
        """Freezes everything, then frees what this stage trains (Table 1)."""
        model, stage = self.model, self.stage
        model.requires_grad_(False)
        if stage.trains == "vae":
            learns = dict(model.named_parameters())
        else:
            names = {stage.trains, *(["understanding", "generation"] if self.both else [])}
            learns = {k: p for name in sorted(names) for k, p in model.branch(name).items()}
        if stage.repa:
            d, d_teacher = model.config.width, self.data.maps["features"].shape[-1]
            torch.manual_seed(self.options.seed)
            self.projector = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(),
                                           nn.Linear(d, d_teacher)).to(self.device)
            learns |= {f"projector.{k}": p for k, p in self.projector.named_parameters()}
        for p in learns.values():
            p.requires_grad_(True)
        return learns

    def choose_optimizers(self) -> list:
        """AdamW(0.9, 0.95, eps 1e-15) without weight decay (Sec. 3.4). `tiny` gives the matrices
        inside the networks to Muon instead, which needs fewer steps."""
        outside = ("embed_tokens", "lm_head", "pos_embed", "projector.4", "llm2vae")
        matrices = {k: p for k, p in self.learns.items()
                    if self.stage.muon and p.dim() > 1 and not any(word in k for word in outside)}
        rest = [p for k, p in self.learns.items() if k not in matrices]
        found = [torch.optim.AdamW(rest, self.stage.lr, (0.9, 0.95), eps=1e-15, weight_decay=0,
                                   fused=True)]
        return found + [Muon(matrices.values(), self.stage.muon, run=self.map)] * bool(matrices)

    # ------------------------------------------------------------ one step

    def read_captions(self):
        """Reads all captions once, where understanding is frozen and there is room for it."""
        if self.stage.trains == "generation" and not self.both and not self.options.no_context:
            captions = [caption for _, caption in self.data.texts]
            tokens = sum(map(len, captions)) / 3        # four letters each, and those of excerpts
            if Contexts.size(self.model.config, tokens):
                self.contexts = Contexts(self.model, captions)

    def draws(self, k: int) -> dict[str, Tensor]:
        """All randomness of step k, for the whole batch and on the CPU, so that neither a restart,
        nor the number of processes, nor accumulation changes it."""
        o, b = self.options, self.stage.batch
        rng = torch.Generator().manual_seed((o.seed * 10 + o.stage) * 10**9 + k)
        shift = self.stage.shift ** min(1.0, (1 - k / self.stage.steps) / 0.7)
        draw = {"keep": torch.rand(b, generator=rng), "time": sample_time(b, rng, shift),
                "prompt": torch.randint(len(INSTRUCTIONS), (b,), generator=rng)}
        if self.stage.trains != "understanding":
            side = self.stage.pixels // self.vae.factor * (2 if self.stage.trains == "vae" else 1)
            shape = (b, self.vae.channels, side, side)
            draw |= {name: torch.randn(shape, generator=rng) for name in ("eps", "z")}
            draw["cut"] = torch.rand(b, generator=rng) < 0.25
        share = [int(n) for n in o.mix.split(":")]
        reads = round(b * share[0] / sum(share)) if self.both else b
        draw["reads"] = torch.arange(b) < reads
        return draw

    def terms(self, batch: dict, draw: dict) -> dict[str, Tensor]:
        """Summed loss terms of some images."""
        if self.stage.trains == "vae":
            return self.vae_terms(batch, draw)
        if not self.both:
            return (self.report_terms if self.stage.trains == "understanding"
                    else self.flow_terms)(batch, draw)
        found, split = {}, draw["reads"]
        for rows, terms in ((split, self.report_terms), (~split, self.flow_terms)):
            if rows.any():
                found |= terms(pick_rows(batch, rows), pick_rows(draw, rows))
        return found

    def vae_terms(self, batch: dict, draw: dict) -> dict[str, Tensor]:
        """Reconstruction error and a light pull of the latents towards N(0, 1) (ours)."""
        pixels = vae_pixels(batch["image"].to(self.device))
        mean, logvar = self.vae.moments(pixels).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = draw["z"][..., :mean.shape[2], :mean.shape[3]].to(self.device)
        image = self.vae.decoder(self.vae.post_quant_conv(
            mean + z * (0.5 * logvar).exp()))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return {"mse": (image - pixels).square().flatten(1).mean(1).sum(),
                "kl": kl.flatten(1).mean(1).sum()}

    def report_terms(self, batch: dict, draw: dict) -> dict[str, Tensor]:
        """Eq. 1, summed over the reports' tokens."""
        prompts = [self.model.ids(INSTRUCTIONS[i]) for i in draw["prompt"].tolist()]
        pixels = vit_pixels(batch["image"].to(self.device))
        reports = [self.model.ids(r) for r in batch["report"]]
        total, _ = self.model.understanding_loss(pixels, prompts, reports)
        return {"text": total}

    def flow_terms(self, batch: dict, draw: dict) -> dict[str, Tensor]:
        """Eq. 2 and the alignment of stage 2, summed over images."""
        model, device = self.model, self.device
        x0 = self.vae.latents(batch["moments"].to(device), draw["z"].to(device))
        frozen = not self.both
        repa_layer = round(model.config.layers * 8 / 24) if self.projector else 0
        context, dropped = None, draw["keep"].to(device) < 0.1      # for guidance
        with torch.set_grad_enabled(not frozen):    # frozen understanding: no gradient, no graph
            if self.contexts:
                context = self.contexts.of(batch["index"], draw["cut"], device)
            elif not self.options.no_context:
                context = model.read_captions([model.ids(excerpt(c) if cut else c)
                                      for c, cut in zip(batch["caption"], draw["cut"])])
            context = context.drop(dropped) if context else None
        loss, states = model.flow_loss(x0, context, draw["time"].to(device),
                                       draw["eps"].to(device), frozen, repa_layer)
        found = {"flow": loss.sum()}
        self.by_time.append((draw["time"], loss.detach().cpu()))
        if self.projector:
            found["repa"] = align(self.projector(states), batch["features"].to(device),
                                  model.grid(*x0.shape[2:]))
        return found

    def weights(self, batch: dict, draw: dict) -> dict[str, float]:
        """What each summed term is multiplied with: its weight over its count in the batch."""
        tokens = 0
        if self.stage.trains == "understanding" or self.both:
            tokens = sum(len(self.model.ids(r)) + 1 for r, reads in zip(batch["report"],
                                                                        draw["reads"]) if reads)
        images = int((~draw["reads"]).sum()) if self.both else len(draw["reads"])
        counts = torch.tensor([tokens, images], device=self.device)
        tokens, images = self.procs.total(counts).tolist()
        self.tokens = tokens
        if self.stage.trains == "vae":
            self.tokens += images * batch["image"][0].numel() // self.vae.factor ** 2
        elif self.stage.trains == "generation":
            self.tokens += images * self.image_tokens
        return {"text": 1 / max(tokens, 1), "flow": 1 / max(images, 1), "mse": 1 / images,
                "repa": self.stage.repa / max(images, 1), "kl": 1e-5 / images}

    def one_step(self, batch: dict) -> dict[str, float]:
        """Forward and backward in parts, on a CPU side by side in lanes, then clip, update.
        Returns what the log shows."""
        torch.set_num_threads(max(1, self.threads // self.lanes))   # of this thread, until the end
        k, b = self.step, self.stage.batch
        mine = slice(b * self.procs.rank // self.procs.world,
                     b * (self.procs.rank + 1) // self.procs.world)
        draw = {name: v[mine] for name, v in self.draws(k).items()}
        self.by_time, weights, logged = [], self.weights(batch, draw), {}
        texts = [""] * len(draw["keep"])                # an image is work, and so is its text
        if self.stage.trains != "vae":
            texts = batch["report" if self.stage.trains == "understanding" else "caption"]
        rows = even_parts(texts, 12 * self.image_tokens, self.options.accumulate * self.lanes)
        for terms, grads in self.map(partial(self.part, batch, draw, weights), rows):
            for name, v in terms.items():
                logged[name] = logged.get(name, 0) + v * weights[name]
            for p, g in zip(self.learns.values(), grads):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
        learned = [p for p in self.learns.values() if p.grad is not None]
        self.procs.sum_gradients(learned)
        norm = nn.utils.clip_grad_norm_(learned, 1.0)
        names = list(logged)
        values = self.procs.total(torch.stack([*logged.values()])).tolist()
        if not all(map(math.isfinite, [*values, float(norm)])):
            kept = f"last good checkpoint: {self.file}" if self.file.exists() else "nothing saved"
            raise UserError(f"step {k}: the loss is not finite ({dict(zip(names, values))}) at "
                            f"learning rate {self.rate(k):.2e}; {kept}. Try a lower --lr")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self.rate(k) / self.stage.lr
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.average:
            decay = min(self.stage.ema, (1 + k) / (10 + k))
            torch._foreach_lerp_(list(self.average.values()),
                                 [p.detach() for p in self.learns.values()], 1 - decay)
        torch.set_num_threads(self.threads)
        return dict(zip(names, values)) | {"grad": float(norm), "tokens": self.tokens}

    def part(self, batch: dict, draw: dict, weights: dict, rows: Tensor) -> tuple[dict, tuple]:
        """Loss terms of some images of a batch, and the gradients of what learns (None: unused)."""
        with self.cast():
            terms = self.terms(pick_rows(batch, rows), pick_rows(draw, rows))
            loss = sum(v * weights[name] for name, v in terms.items())
        grads = torch.autograd.grad(loss, [*self.learns.values()], allow_unused=True)
        return {name: v.detach() for name, v in terms.items()}, grads

    def rate(self, k: int) -> float:
        """Learning rate of step k: linear warm-up, constant, and for `tiny` a linear fall."""
        s = self.stage
        rise = min(1.0, (k + 1) / s.warmup) if s.warmup else 1.0
        fall = min(1.0, (s.steps - k) / (s.decay * s.steps)) if s.decay else 1.0
        return s.lr * min(rise, fall)

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def averaged(self):
        """The averaged weights stand in for the trained ones."""
        if self.average:
            kept = {k: p.data for k, p in self.learns.items()}
            for k, p in self.learns.items():
                p.data = self.average[k]
        try:
            yield
        finally:
            if self.average:
                for k, p in self.learns.items():
                    p.data = kept[k]

    def save(self):
        """First all that resuming needs, in one file, then the weights folder; each is atomic. A
        finished stage keeps only the note that it is."""
        if self.procs.rank:
            return
        note = {"step": self.step, "settings": self.settings}
        state = note | {"learns": {k: p.detach() for k, p in self.learns.items()},
                        "average": self.average,
                        "optimizers": [x.state_dict() for x in self.optimizers]}
        try:
            with atomic(self.file) as temporary:
                torch.save(state, temporary)
            self.publish()
            if self.step >= self.stage.steps:
                with atomic(self.file) as temporary:
                    torch.save(note, temporary)
        except (UserError, OSError, RuntimeError) as e:
            raise UserError(f"could not save step {self.step} in {self.out} ({e}); the checkpoint "
                            "before it is whole: make room, then run the same command") from None

    def publish(self):
        """Writes the (averaged) weights where sample.py reads them."""
        with self.averaged():
            if self.stage.trains == "vae":
                self.measure_latents()
                save_vae(self.model, self.out / "vae")
            else:
                self.model.save(self.out)

    @torch.no_grad()
    def measure_latents(self):
        """Sets scale and shift of the latents so that they have mean 0 and variance 1."""
        images = self.data[0].__getitems__(range(min(128, len(self.data[0]))))
        images = [f["image"] for f in images if f["image"] is not None]
        mean, logvar = self.vae.moments(vae_pixels(torch.from_numpy(np.stack(images)).to(
            self.device))).chunk(2, dim=1)
        self.vae.latent_mean = float(mean.mean())
        self.vae.scale = float((mean.var() + logvar.clamp(-30, 20).exp().mean()).rsqrt())

    def resume(self):
        """Goes on from the checkpoint of this stage, if there is one; True if it is finished.
        Raises UserError."""
        for left in [*self.out.glob(".*.part"), *self.out.glob("vae/.*.part")]:
            if not self.procs.rank:             # a kill in the middle of saving left it
                left.unlink()
        if not self.file.exists():
            return False
        state = read_checkpoint(self.file, self.device)
        changed = [f"{k} was {v}, now {self.settings.get(k)}" for k, v in state["settings"].items()
                   if v != self.settings.get(k)]
        if changed:
            raise UserError(f"{self.file} was made with other settings ({'; '.join(changed)}): use "
                            "the same ones, another --out, or delete it to start over")
        self.step = state["step"]
        if "learns" in state:
            with torch.no_grad():
                for k, p in self.learns.items():
                    p.copy_(state["learns"][k])
            self.average = state["average"]
            for optimizer, kept in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(kept)
            if self.step >= self.stage.steps:       # stopped between the state and the weights
                self.save()
        return self.step >= self.stage.steps

    # ------------------------------------------------------------ the loop

    def stream(self):
        """Batches from this step on. Stage 0 sees images at its resolution fifteen times, then
        once images twice as large."""
        def start(data, step):
            return batches(data, self.stage.batch, self.options.seed, step, self.options.workers,
                           self.procs.rank, self.procs.world)
        if self.stage.trains != "vae":
            return ahead(start(self.data, self.step))
        small, large = (start(d, n) for d, n in zip(self.data, (self.step - self.step // 16,
                                                                self.step // 16)))
        return ahead(next(large if k % 16 == 15 else small) for k in itertools.count(self.step))

    def fit(self):
        """Trains to the end, or until Ctrl-C, which saves."""
        usual = {kind: signal.signal(kind, lambda *_: self.stop.fill_(1))
                 for kind in (signal.SIGINT, signal.SIGTERM)}
        o, s = self.options, self.stage
        self.read_captions()
        stream = self.stream()
        bar = tqdm(total=s.steps, initial=self.step, desc=f"stage {o.stage}", unit="step",
                   disable=self.procs.rank > 0)
        log = Log(self.out / "log.jsonl", o.stage, self.step) if not self.procs.rank else None
        while self.step < s.steps and not self.procs.total(self.stop):
            logged = self.one_step(next(stream))
            bar.update()
            speed = {"tokens/s": logged["tokens"] * (bar.format_dict["rate"] or 0)}
            bar.set_postfix_str(" ".join(f"{k} {v:.{3 if v < 100 else 0}f}" for k, v in (
                logged | speed).items() if k != "tokens"))
            if log:
                log.add(self.step, logged | {"lr": self.rate(self.step - 1)}, self.by_time,
                        self.step == s.steps)
            if self.step % o.save_every == 0 or self.step == s.steps:
                self.save()
            if log and (self.step % o.sheet_every == 0 or self.step == s.steps):
                with self.averaged():
                    self.draw_sheet()
        bar.close()
        if self.step < s.steps:
            self.save()
        elif log:
            log.curves(self.out / "curves.png")
        for kind, handler in usual.items():     # another stage may follow; it sets itself up first
            signal.signal(kind, handler)
        if self.step < s.steps:
            raise Stopped(f"stopped at step {self.step} and saved; the same command goes on")

    # ------------------------------------------------------------ what one sees

    @torch.no_grad()
    def draw_sheet(self):
        """Writes a PNG that shows what the stage has learned so far."""
        name = self.out / f"stage{self.options.stage}-{self.step:06d}.png"
        if self.stage.trains == "generation":
            return self.draw_images(name)
        size = self.stage.pixels if self.stage.trains == "vae" else self.model.config.vit_image
        held_out = open_data(self.options.data, "val", size)
        samples = [held_out[i] for i in range(min(8, len(held_out)))]
        images = torch.from_numpy(np.stack([f["image"] for f in samples])).to(self.device)
        if self.stage.trains == "vae":
            back = to_uint8(self.vae.decoder(self.vae.post_quant_conv(
                self.vae.moments(vae_pixels(images)).chunk(2, dim=1)[0])))[:, 0]
            pairs = [x for pair in zip(images.cpu().numpy(), back.cpu().numpy()) for x in pair]
            return sheet(pairs, ["original", "reconstruction"] * len(samples), 4, name)
        written = self.model.report(vit_pixels(images), max_new=120)
        sheet([f["image"] for f in samples], [f"WRITTEN {w}\nTRUE {f['report']}" for w, f in
                                            zip(written, samples)], 4, name)

    def draw_images(self, name: Path):
        """An image a prompt of Figure 4, and one image on its way from noise, left to right."""
        model, size = self.model, self.stage.pixels
        images = list(model.generate(list(PROMPTS), size, points=25)[:, 0].cpu().numpy())
        side, scale = size // self.vae.factor, model.config.guidance
        steps = list(model.sample_latents([model.ids(PROMPTS[4])], side, side, [4], points=25,
                                          scale=scale))
        strip = [to_uint8(self.vae.decode(x))[0, 0].cpu().numpy() for x in steps[2::3]]
        times = [f"t = {1 - (i + 1) / 24:.2f} before the shift" for i in range(2, 24, 3)]
        sheet(images + strip, [*PROMPTS, *times], 8, name)


def pick_rows(batch: dict, rows: Tensor) -> dict:
    """Some samples of a batch; rows are indices or True/False flags."""
    indices = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    return {k: v[indices] if isinstance(v, Tensor) else [v[i] for i in indices.tolist()]
            for k, v in batch.items()}


def ahead(source: Iterator):
    """The same items without end; a thread fetches each while the one before it is worked on."""
    thread = ThreadPoolExecutor(1)
    coming = thread.submit(next, source)
    while True:
        item, coming = coming.result(), thread.submit(next, source)
        yield item


def even_parts(texts: list[str], image: int, n: int) -> list[Tensor]:
    """Places of a batch's images in at most n parts of like work. They are sorted by the length of
    their texts, since a part is padded to its longest; an image counts as `image` letters."""
    work = torch.tensor([float(image + len(text)) for text in texts])
    order = work.argsort(descending=True, stable=True)
    middle = work[order].cumsum(0) - work[order] / 2
    part = (middle * n / work.sum()).long()
    return [order[part == i] for i in part.unique()]


def excerpt(caption: str) -> str:
    """The last section of a caption, its impression, without a name: a quarter of the captions are
    cut to it, so that short prompts are understood too (ours). It sums up what is found; sentences
    picked at random would not, and teach that what is not named may be drawn all the same."""
    sections = [*filter(None, map(str.strip, re.split("FINDINGS: |IMPRESSION: ", caption)))]
    return sections[-1] if sections else caption


def align(states: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """REPA: negative cosine between projected states (b, n, d) and a teacher's features (b, m, d)
    of the clean image, both on their grids; the teacher's is resized in 2-D. Summed over images."""
    side = math.isqrt(features.shape[1])
    features = features.transpose(1, 2).unflatten(2, (side, side))
    if features.shape[2:] != grid:
        features = F.interpolate(features, grid, mode="area" if grid[0] < side else "bilinear")
    features = features.flatten(2).transpose(1, 2)
    return -F.cosine_similarity(states.float(), features, dim=-1).mean(1).sum()


class Stopped(Exception):
    """Training was interrupted and saved."""


class Log:
    """log.jsonl, one line of means every 20 steps; lines past a resumed step are taken out."""

    def __init__(self, file: Path, stage: int, step: int):
        self.file, self.stage = file, stage
        lines = file.read_text().splitlines() if file.exists() else []
        self.rows = [r for r in map(json.loads, lines) if r["stage"] != stage or r["step"] <= step]
        with atomic(file) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.rows))
        self.clear()

    def clear(self):
        self.sums, self.n, self.bins = {}, 0, [[] for _ in range(10)]
        self.begin = time.perf_counter()

    def add(self, step: int, values: dict, by_time: list, last=False):
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + v
        for times, losses in by_time:
            for t, v in zip(times.tolist(), losses.tolist()):
                self.bins[min(int(t * 10), 9)].append(v)
        self.n += 1
        if step % 20 and not last:
            return
        seconds = time.perf_counter() - self.begin
        row = {"stage": self.stage, "step": step, "steps_per_s": self.n / seconds,
               "tokens_per_s": self.sums.pop("tokens", 0) / seconds,
               **{k: v / self.n for k, v in self.sums.items()}}
        if any(self.bins):      # flow loss for each tenth of t
            row["flow_by_t"] = [sum(b) / len(b) if b else None for b in self.bins]
        self.rows.append(row)
        with open(self.file, "a") as f:
            f.write(json.dumps(row) + "\n")
        self.clear()

    def curves(self, file: Path):
        """One panel a stage and loss, against steps, drawn with Pillow."""
        lines = {}
        for r in self.rows:
            for k in {"mse", "text", "flow", "repa"} & r.keys():
                lines.setdefault(f"stage {r['stage']}: {k}", []).append((r["step"], r[k]))
        if not lines:
            return
        canvas = Image.new("RGB", (640, 180 * len(lines)), "white")
        pen = ImageDraw.Draw(canvas)
        for i, (name, points) in enumerate(sorted(lines.items())):
            low, high = (f(y for _, y in points) for f in (min, max))
            place = [(40 + 580 * x / points[-1][0],
                      180 * i + 160 - 130 * (y - low) / max(high - low, 1e-9)) for x, y in points]
            pen.line(place if len(place) > 1 else place * 2, fill="black", width=2)
            text = f"{name}, {low:.4g} to {high:.4g} over {points[-1][0]} steps"
            pen.text((40, 180 * i + 6), text, fill="black")
        with atomic(file) as temporary:
            canvas.save(temporary, "PNG")


# ---------------------------------------------------------------- setting up


def plan(options: Options, stage: Stage):
    """Prints sizes, memory and steps, without training (meta device: no memory is used)."""
    rank, world = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank:
        return
    with torch.device("meta"):
        config = PRESETS[options.preset]
        model = UniX(config)
        model.vae = VAE(**config.vae)
    count = {name: sum(p.numel() for p in model.branch(name).values())
             for name in ("understanding", "generation", "vae")}
    learns = count[stage.trains] + (count["understanding"] if options.train == "both" else 0)
    image = (config.vit_image // config.vit_patch) ** 2 + 2
    drawn = (stage.pixels // model.vae.factor // config.latent_patch) ** 2 + 2
    print(f"preset {options.preset}, stage {options.stage}: {stage}")
    for name, n in count.items():
        print(f"  {name:14} {n / 1e6:10.2f} M parameters  "
              f"{'trained' if name == stage.trains or options.train == 'both' else 'frozen'}")
    print(f"  tokens a sample: {image} image, {drawn} to draw, and the text")
    tokens = {"understanding": image + 150, "generation": drawn}.get(stage.trains, 0)
    kept = config.width if options.checkpointing else 14 * config.width + 3 * config.mlp
    total = sum(count.values())
    images = stage.batch / options.accumulate / world
    memory = {"weights": 4 * total, "gradients": 4 * learns, "optimizer": 8 * learns,
              "average": 4 * learns if stage.ema else 0,
              "activations": 4 * kept * config.layers * tokens * images}
    print(f"  memory of each of {world} device(s): "
          + ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in memory.items())
          + f"; in all {sum(memory.values()) / 2**30:.2f} GiB")
    if options.train == "own" and not options.no_context:
        captions = Contexts.size(config, 55 * stage.images)
        print(f"  captions that have been read, kept on the CPU: {captions / 2**30:.2f} GiB")
    images = stage.steps * stage.batch
    print(f"  {stage.steps} steps of {stage.batch} images = {images:,} images"
          + (f" = {images / stage.images:.1f} epochs" if stage.images else ""))


def new_model(options: Options, out: Path, data) -> UniX:
    """The model a stage starts from: --weights, the run's own folder, or a new one (stage 1)."""
    if options.weights or (out / "model.safetensors").exists():
        return UniX.load(options.weights or out)
    if options.stage > 1 and options.train == "own":
        raise UserError(f"{out} has no weights; first run: python train.py --stage 1"
                        + command_tail(options))
    texts = [data.text(i)[0] for i in range(min(len(data), 2000))]
    config = PRESETS[options.preset]
    tokenizer = Tokenizer.train(texts + list(INSTRUCTIONS), config.vocab, special=SPECIAL)
    ids = dict(zip(("bos", "eos", "boi", "eoi"), map(tokenizer.token_to_id, SPECIAL)))
    own = out / "vae" / "model.safetensors"
    vae = load_vae(own) if own.exists() else None       # of stage 0; a restart finds it, too
    torch.manual_seed(options.seed)
    return UniX(replace(config, vocab=len(tokenizer), share_layers=options.share_layers, **ids),
                tokenizer, vae)


def share(model: UniX, layers: int):
    """Gives the first layers of a model one expert for both branches: understanding's."""
    tower = model.lm.tower
    for layer in tower.layers[:layers]:
        layer.gen = layer.und
    if layers >= len(tower.layers):
        tower.norm_gen = tower.norm
    model.config.share_layers = max(layers, model.config.share_layers)


def alignment(options: Options) -> tuple[float | None, str | None]:
    """What --repa says: (weight, None), or (None, folder of a teacher). Raises UserError."""
    try:
        return float(options.repa), None
    except (TypeError, ValueError):
        if options.repa and not Path(options.repa).is_dir():
            raise UserError(f"--repa {options.repa} is no weight and no folder") from None
        return None, options.repa


def unfinished(file: Path) -> bool:
    """Was this stage begun, but not brought to its end? Raises UserError."""
    return file.exists() and "learns" in read_checkpoint(file)


def command_tail(options: Options) -> str:
    said = {k: getattr(options, k) for k in ("data", "out", "preset")}
    return "".join(f" --{k} {v}" for k, v in said.items() if v != getattr(Options(), k))


def make_folder(out: Path):
    """Makes the folder of a run, once all that the run needs has been found."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make {out} ({e.strerror}); choose another --out") from None


def set_up(options: Options, stage: Stage, procs: Processes, out: Path) -> Trainer:
    """Data and model of a stage. Raises UserError where something it needs is not there."""
    o, k = options, options.stage
    if k == 0:
        data = [open_data(o.data, "train", stage.pixels * k) for k in (1, 2)]
        make_folder(out)
        torch.manual_seed(o.seed)
        return Trainer(o, stage, VAE(**PRESETS[o.preset].vae).to(procs.device), data, procs, out)
    if k == 3 and not o.weights and not (out / "stage2.pt").exists():
        raise UserError(f"{out} has not been through stage 2; first run: python train.py --stage 2"
                        + command_tail(o))
    pixels = stage.pixels if k > 1 else PRESETS[o.preset].vit_image
    data = open_data(o.data, "train", pixels, "report" if k == 1 else "image")
    model = new_model(o, out, data).to(procs.device)
    if o.vae:
        model.vae = load_vae(o.vae).to(procs.device)
    make_folder(out)
    if k > 1:
        if model.vae is None or not (o.vae or o.weights) and unfinished(out / "stage0.pt"):
            print("no autoencoder yet: stage 0 comes first (--vae takes a pretrained one instead)")
            run(Options(stage=0, data=o.data, out=str(out), preset=o.preset, steps=o.steps), procs)
            model.vae = load_vae(out / "vae" / "model.safetensors").to(procs.device)
        begun = (out / f"stage{k}.pt").exists()
        if k == 2 and not begun:
            model.copy_tower()
            model.resize_projections()
        if o.share_layers and k < 3:
            share(model, o.share_layers)
        model.config.no_context = o.no_context
        teacher = model.vit if stage.repa else None
        if teacher and alignment(o)[1]:
            teacher = load_rad_dino(alignment(o)[1]).to(procs.device)
        images = open_data(o.data, "train", model.config.vit_image) if o.train == "both" else None
        with procs.first():
            count = min(len(data), stage.images or len(data))
            data = Latents(data, count, model, teacher, out, images,
                           begun and o.train == "both")
        model.config.resolution = stage.pixels
    return Trainer(o, stage, model, data, procs, out)


def run(options: Options, procs: Processes | None = None):
    """Runs a stage, or prints its plan. Raises UserError, and Stopped after Ctrl-C."""
    stage = STAGES[options.preset][options.stage]
    chosen = {"steps": options.steps, "batch": options.batch_size, "lr": options.lr,
              "repa": alignment(options)[0] if options.stage == 2 else None}
    stage = replace(stage, **{k: v for k, v in chosen.items() if v is not None})
    if options.plan:
        return plan(options, stage)
    procs = procs or Processes()
    if options.train == "both" and procs.world > 1:
        raise UserError("--train both runs in one process: start it without torchrun")
    out = Path(options.out or f"runs/{Path(options.data).resolve().name}")
    trainer = set_up(options, stage, procs, out)
    finished = trainer.resume()
    if finished:
        print(f"stage {options.stage} in {out} is finished ({trainer.step} steps)")
    else:
        trainer.fit()


def keep_freed_memory():
    """glibc gives large tensors back to the system at once and fetches them again at the next
    step; keeping them makes a training step on a CPU up to a quarter faster. Elsewhere: nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for parameter in (-1, -3):      # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(parameter, 1 << 30)


if __name__ == "__main__":
    keep_freed_memory()
    code = 0
    try:
        run(OPTIONS)
    except UserError as e:
        code = print(f"train.py: {e}", file=sys.stderr) or 2
    except Stopped as e:
        code = print(f"train.py: {e}", file=sys.stderr) or 130
    except KeyboardInterrupt:           # before the first step: there is nothing to save yet
        code = print("train.py: stopped before the first step", file=sys.stderr) or 130
    sys.exit(code)
