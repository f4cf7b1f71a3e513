"""How close this code comes to the limits of the machine it runs on.

    python tests/bench.py [--quick] [--json] [--only decoding denoising ...] [--reports FILE.csv]
    python tests/bench.py --only peer --peer PYTHON     a Python with Hugging Face's transformers

Each part measures the machine's own ceiling (matrix product rate, bandwidth at which the weights of
a matrix-vector product are read) or the obvious slower way right beside this code, in turns, and
prints the ratio of the medians with the 10th and 90th percentile of the measurement. Only ratios
compare between machines. `mid` is 512 wide with 8 layers; `tiny` and `unix` are the presets.
`--quick` (within a minute) leaves out peaks of memory and the 3B-parameter model.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np                                        # noqa: E402
import torch                                              # noqa: E402
import torch.nn.functional as F                           # noqa: E402
from PIL import Image                                     # noqa: E402
from torch import nn                                      # noqa: E402

import train                                              # noqa: E402
from ar import Tokenizer, decode                          # noqa: E402
from data import open_data, save_image                 # noqa: E402
from diffusion import path, position_ids                  # noqa: E402
from joint_attn import Linear, Tower, attend, rope        # noqa: E402
from unix import PRESETS, Config, UniX                    # noqa: E402

MID = Config(vit_image=64, vit_width=64, vit_mlp=64, vit_heads=1, vit_layers=1, vocab=8192,
             layers=8, width=512, heads=8, kv_heads=8, head_dim=64, mlp=1408, max_tokens=4096,
             latent_side=64, bos=0, eos=1, boi=2, eoi=3)
CAPTION = list(range(10, 72))       # 64 tokens with its two markers


@dataclass
class Row:
    """One line of the table: a measurement, what it is held against, their ratio and its target."""
    what: str
    measured: str
    spread: str
    against: str
    ratio: float
    target: str = ""
    ok: bool | None = None


def row(what, times, unit, against, ratio, target=None, show=lambda t: t) -> Row:
    """`times` are seconds (or any numbers), shown as `show` of them; `target` is (sign, number)."""
    values = sorted(map(show, times))
    low, high = values[len(values) // 10], values[-1 - len(values) // 10]
    ok = target and (ratio >= target[1] if target[0] == ">=" else ratio <= target[1])
    return Row(what, f"{statistics.median(values):.3g} {unit}", f"{low:.3g} to {high:.3g}", against,
               float(f"{ratio:.3g}"), f"{target[0]} {target[1]}" if target else "", ok)


def timed(*ways, n=7, warm=1) -> list[list[float]]:
    """Seconds of each of some functions, called in turns n times after `warm` for warming up."""
    found = [[] for _ in ways]
    for _ in range(warm + n):
        for times, way in zip(found, ways):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return [times[warm:] for times in found]


def ratio(a, b) -> float:
    return statistics.median(a) / statistics.median(b)


def multiply(dtype=torch.float32, n=2048):
    """A matrix product, the ceiling of all that is limited by arithmetic, and its FLOPs."""
    n = n if dtype == torch.float32 else n // 2
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return lambda: F.linear(a, b), 2 * n ** 3


def stream(dtype=torch.float32, parts=8, rows=2816, width=512, count=24):
    """Matrix-vector products over more weights than caches hold, and their bytes. parts = 0: as
    F.linear does them; else in parts that all cores share: the ceiling of writing a report."""
    weights = [torch.randn(rows, width).to(dtype) for _ in range(count)]
    x = torch.randn(1, width).to(dtype)

    def run():
        for w in weights:
            if parts:
                torch.bmm(w.view(parts, -1, width), x.T.expand(parts, -1, -1))
            else:
                F.linear(x, w)
    return run, rows * width * count * dtype.itemsize


def sized(config: Config, seed=0) -> UniX:
    torch.manual_seed(seed)
    model = UniX(config).eval()
    nn.init.normal_(model.llm2vae.weight, std=0.02)
    return model


def size(module, word=".und.") -> int:
    """Parameters of the matrices of one expert in all layers."""
    return sum(p.numel() for k, p in module.named_parameters() if word in k and p.dim() == 2)


@contextlib.contextmanager
def plain_linear():
    """Every Linear of the model is F.linear, whatever the number of rows."""
    kept, Linear.forward = Linear.forward, nn.Linear.forward
    yield
    Linear.forward = kept


def ceilings(args):
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        run, flops = multiply(dtype)
        yield row(f"matrix product {name}", timed(run)[0], "GFLOP/s", "", 1,
                  show=lambda t: flops / t / 1e9)
        (split, size), (one, _) = stream(dtype), stream(dtype, 0)
        a, b = timed(split, one)
        yield row(f"weights read, one row, {name}", a, "GB/s", "F.linear", ratio(b, a),
                  show=lambda t: size / t / 1e9)


def token_times(model, context: int, b=1, n=24) -> list[float]:
    """Seconds of each token written after a context."""
    tokens = torch.randint(4, model.config.vocab, (b, context))
    steps = decode(model.lm, tokens, torch.full((b,), context), None, -1, n)
    at = [time.perf_counter() for _ in steps]
    return [y - x for x, y in zip(at[1:], at[2:])]


def many(ways, n) -> list[list[float]]:
    """Like `timed`, of functions that return several times themselves."""
    found = [[] for _ in ways]
    for i in range(n + 1):
        for times, way in zip(found, ways):
            times += way() if i else way()[:0]
    return found


def decoding(args):
    """Report tokens against the time in which their weights and cache can be read."""
    for name, config in (("mid", MID), ("tiny", PRESETS["tiny"])):
        model, context = sized(config), 600 if name == "mid" else 200
        fixed = 4 * (size(model.lm.tower) + model.lm.lm_head.weight.numel())
        each = 2 * 4 * config.layers * config.kv_heads * config.head_dim    # of one token's cache
        read, amount = stream()

        def plain():
            with plain_linear():
                return token_times(model, context)
        n = 1 if args.quick else 5
        one, slow, eight, least = many(
            [lambda: token_times(model, context), plain, lambda: token_times(model, context, 8),
             lambda: timed(read, n=1)[0]], n)
        bound = (fixed + each * context) / amount
        yield row(f"{name}: a report token", one, "tokens/s", "weights and cache read once",
                  bound * ratio(least, one), show=lambda t: 1 / t)
        yield row(f"{name}: the same", one, "tokens/s", "the same with F.linear", ratio(slow, one),
                  show=lambda t: 1 / t)
        yield row(f"{name}: batch of 8", eight, "tokens/s", "batch of 1", 8 * ratio(one, eight),
                  (">=", 4), show=lambda t: 8 / t)
        if name == "mid":
            short, long = many([lambda: token_times(model, 64),
                                lambda: token_times(model, 1600)], n)
            grown = (fixed + each * 1600) / (fixed + each * 64)
            yield row("mid: a token after 1600", long, "ms", "after 64, per byte read",
                      ratio(long, short) / grown, ("<=", 1.1), show=lambda t: 1e3 * t)


def step_flops(c: Config, per: int, n: int, text: int) -> int:
    """Useful FLOPs of a denoising pass: n latents and two markers through one expert each."""
    return 2 * per * (n + 2) + 4 * c.layers * (n + 2) * (n + 2 + text) * c.heads * c.head_dim


@torch.no_grad()
def denoising(args):
    """A step of the sampler at 256 px, 256 latents, against the matrix product rate."""
    model, n, count = sized(MID), 256, 5 if args.quick else 15
    per, noise = size(model.lm.tower, ".gen."), [0]

    def steps(text, scale, dtype=torch.float32):
        """A sampler that stands at its first steps (t near 1, where guidance is on)."""
        def fresh():
            return model.sample_latents([CAPTION[:1] * (text - 2)], 16, 16, noise, points=200, scale=scale)
        state = [fresh()]
        next(state[0])
        return lambda: next(state[0])
    product, flops = multiply()
    guided, single, longer, ceiling = timed(steps(64, 2), steps(64, 1), steps(512, 1), product,
                                            n=count)
    useful = step_flops(MID, per, n, 64) + step_flops(MID, per, n, 0)
    yield row("mid: guided step", guided, "s", "matrix product rate, useful FLOPs",
              useful / flops * ratio(ceiling, guided), (">=", 0.8))
    yield row("mid: step outside the guidance interval", single, "s", "guided step",
              ratio(single, guided), ("<=", 0.55))
    grown = step_flops(MID, per, n, 512) / step_flops(MID, per, n, 64)
    yield row("mid: step, caption of 512", longer, "s", "caption of 64, per FLOP",
              ratio(longer, single) / grown, ("<=", 1.1))
    reads, kept = [], Tower.read_context
    Tower.read_context = lambda *a, **k: reads.append(1) or kept(*a, **k)
    list(model.sample_latents([CAPTION], 16, 16, noise, points=6))
    Tower.read_context = kept
    yield row("mid: contexts read in 5 steps", [len(reads)], "", "one image", len(reads), ("<=", 1))
    if torch.cpu._is_avx512_bf16_supported():
        def half():
            with torch.autocast("cpu", torch.bfloat16):
                next(state)
        state = model.sample_latents([CAPTION], 16, 16, noise, points=200, scale=2)
        fast, slow = timed(half, steps(64, 2), n=count)
        yield row("mid: guided step in bf16", fast, "s", "fp32", ratio(slow, fast), (">=", 1.7))


def dense_loss(model, x0, eps, t, everywhere=False):
    """The slow way of stage 2, the oracle: the whole sequence [text | BOI EOI latents] in one piece
    under a dense (l, l) mask, nothing frozen. `everywhere`: each expert works on every token."""
    c, b, n = model.config, len(x0), x0[0, 0].numel()
    x0, eps = (a.flatten(2).transpose(1, 2) for a in (x0, eps))
    tokens = model.pad([model.wrap(CAPTION)] * b)[0]
    side = math.isqrt(n)
    x = model.vae2llm(path(x0, eps, t)) + model.time_embedder(t)[:, None]
    x = x + model.positions[position_ids(side, side, c.latent_side)]
    x, text = torch.cat([model.lm.embed_tokens(tokens), model.boi_eoi(b), x], dim=1), tokens.shape[1]
    ids = torch.cat([torch.arange(text), torch.full((n + 2,), text)]).expand(b, -1)
    mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    mask[text:] = True
    cos_sin, at = rope(ids, c.head_dim), text + 2

    def both(und, gen, *inputs):
        """Und's results at text and markers, gen's at latents; inputs have tokens in dim -2."""
        if everywhere:
            return [torch.cat([a.narrow(-2, 0, at), z.narrow(-2, at, n)], dim=-2)
                    for a, z in zip(und(*inputs), gen(*inputs))]
        return [torch.cat(pair, dim=-2) for pair in zip(
            und(*(a.narrow(-2, 0, at) for a in inputs)),
            gen(*(a.narrow(-2, at, n) for a in inputs)))]
    for layer in model.lm.tower.layers:
        q, k, v = both(*(lambda x, cos, sin, e=e: e.qkv(x, (cos, sin))
                         for e in (layer.und, layer.gen)), x, *cos_sin)
        mixed = attend(q, k, v, mask)
        x, = both(*(lambda x, m, e=e: [e.finish(x, m)] for e in (layer.und, layer.gen)), x, mixed)
    v = model.llm2vae(model.lm.tower.norm_gen(x[:, at:]))
    return (v - (eps - x0)).square().flatten(1).mean(1)


def trainer(kind: str, side=16, b=4):
    """A model and one training step (loss, gradients, AdamW) of stage 2 in one of three ways."""
    model, rng = sized(MID), torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(b, 16, side, side, generator=rng) for _ in range(2))
    t = torch.rand(b, generator=rng)
    learns = model.branch("generation")
    model.requires_grad_(kind != "ours")
    for p in learns.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

    def loss():
        if kind != "ours":
            return dense_loss(model, x0, eps, t, kind == "everywhere")
        with torch.no_grad():
            context = model.read_captions([CAPTION] * b)
        return model.flow_loss(x0, context, t, eps)[0]

    def step():
        loss().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, loss, step


def peak() -> int:
    """Most bytes this process has held so far (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def child(*words) -> dict:
    """What `measure` returns in a fresh process, where a peak of memory can be measured."""
    done = subprocess.run([sys.executable, __file__, "--measure", *map(str, words)], text=True,
                          capture_output=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what, *words) -> dict:
    """In a child process: bytes that a training step takes, or figures of the 3B-parameter model."""
    if what == "unix":
        return unix_figures(Path(words[0]))
    before = peak()
    _, _, step = trainer(what, int(words[0]))
    weights = peak()
    step()
    step()
    return {"all": peak() - before, "step": peak() - weights}


def training(args):
    """Stage 2, batch 4: frozen text read without gradients, against both towers trained densely."""
    model, loss, step = trainer("ours")
    _, slow_loss, slow_step = trainer("dense")
    slowest_step = (lambda: None) if args.quick else trainer("everywhere")[2]
    worst = (loss() - slow_loss()).abs().max().item()
    yield row("mid: loss of stage 2", [loss().mean().item()], "", "dense mask: difference", worst,
              ("<=", 1e-4))
    product, flops = multiply()
    ours, slow, slowest, ceiling = timed(step, slow_step, slowest_step, product,
                                         n=1 if args.quick else 7)
    c, per, n, text = MID, size(model.lm.tower, ".gen."), 256, 64
    attention = 4 * c.layers * (n + 2) * (n + 2 + text) * c.width
    useful = 4 * (2 * per * (text + 2) + 3 * (2 * per * n + attention))
    yield row("mid: training step", ours, "s", "matrix product rate, useful FLOPs",
              useful / flops * ratio(ceiling, ours), (">=", 0.75))
    yield row("mid: the same", ours, "s", "dense mask, both towers trained", ratio(slow, ours),
              (">=", 1.5))
    if args.quick:
        return
    yield row("mid: the same", ours, "s", "... each tower on every token", ratio(slowest, ours),
              (">=", 1.5))
    a, large = child("ours", 16), child("ours", 32)
    for kind, name in (("dense", "dense mask, both towers trained"),
                       ("everywhere", "... each tower on every token")):
        yield row("mid: peak memory", [a["all"] / 1e6], "MB", name,
                  a["all"] / child(kind, 16)["all"], ("<=", 0.6))
    yield row("mid: memory of a step at twice the side", [large["step"] / 1e6], "MB",
              "at the side itself", large["step"] / a["step"], ("<=", 4.5))


@torch.no_grad()
def attention(args):
    """The largest single tensor when 4,096 latents are denoised over 1,024 padded context tokens."""
    from torch.profiler import ProfilerActivity, profile
    tower = Tower(1, 16, 1, 1, 16, 16)
    context = tower.read_context(torch.randn(1, 1024, 16), torch.arange(1024)[None], torch.tensor([1000]))[1]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        tower.denoise(torch.randn(1, 2, 16), torch.randn(1, 4096, 16), context)
    largest = max(e.cpu_memory_usage for e in seen.events())
    yield row("largest allocation, 4096 latents", [largest / 1e6], "MB", "tokens x tokens",
              largest / (4096 * 5122 * 4), ("<=", 0.33))


def tokenizer(args):
    """Learning 2,000 merges, encoding, and one word of a megabyte."""
    import csv
    if args.reports:
        with open(args.reports, newline="") as f:
            texts = [" ".join(line.values()) for line in csv.DictReader(f)]
    else:
        images = open_data("phantom", "train", 64)
        texts = [images.text(i)[0] for i in range(3000)]
    (took,) = timed(lambda: Tokenizer.train(texts, 2256), n=1)
    tok, text = Tokenizer.train(texts, 2256), "\n".join(texts)
    yield row(f"tokenizer: 2,000 merges of {len(text) / 1e6:.1f} MB", took, "s", "10 s", took[0] / 10,
              ("<=", 1))

    def encode(text):
        tok.cache.clear()
        tok.encode(text)
    took, part, whole = timed(lambda: encode(text), lambda: encode("ab" * 125_000),
                              lambda: encode("ab" * 500_000),
                              n=1 if args.quick else 3)
    yield row("tokenizer: reports", took, "MB/s", "1 MB/s", len(text) / 1e6 / statistics.median(took),
              (">=", 1), lambda t: len(text) / 1e6 / t)
    yield row("tokenizer: one word of 1 MB", whole, "MB/s", "a word of 0.25 MB, per byte",
              ratio(whole, part) / 4, ("<=", 1.3), lambda t: 1 / t)


def waiting(options, n: int) -> tuple[list[float], list[float]]:
    """Seconds that each training step waited for its images, and that it took without."""
    stage = train.STAGES["tiny"][options.stage]
    t = train.set_up(options, stage, train.Processes(), Path(options.out))
    stream, waits, works = t.stream(), [], []
    for _ in range(n + 3):
        a = time.perf_counter()
        batch = next(stream)
        b = time.perf_counter()
        t.train_step(batch)
        waits.append(b - a)
        works.append(time.perf_counter() - b)
    return waits[3:], works[3:]


def data(args):
    """The share of stage 1's time that is spent on waiting for images."""
    n = 6 if args.quick else 30
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        lines = ["image,report"]
        for i in range(64):             # as large as those of NIH ChestX-ray14
            save_image(np.random.default_rng(i).integers(0, 255, (128, 128), np.uint8).repeat(8, 0)
                      .repeat(8, 1), images / f"{i}.png")
            lines.append(f"{i}.png,The lungs are clear.")
        (images / "metadata.csv").write_text("\n".join(lines))
        for source, workers in (("phantom", 0), ("phantom", 2), (images, 2))[:1 if args.quick else 3]:
            out = Path(folder) / f"{Path(source).name}{workers}"
            waits, works = waiting(train.Options(stage=1, data=str(source), out=str(out),
                                                 workers=workers), n)
            share = sum(waits) / (sum(waits) + sum(works))
            name = "phantoms" if source == "phantom" else "images of 1024 px"
            yield row(f"data: {name}, {workers} workers", waits, "s", "a training step", share,
                      ("<=", 0.03))


PEER = """
import time, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
torch.set_num_threads({threads})
model = Qwen3ForCausalLM(Qwen3Config(
    hidden_size={c.width}, num_hidden_layers={c.layers}, num_attention_heads={c.heads},
    num_key_value_heads={c.kv_heads}, head_dim={c.head_dim}, intermediate_size={c.mlp},
    vocab_size={c.vocab}, tie_word_embeddings=False, attn_implementation="sdpa")).eval()
tokens = torch.randint(0, {c.vocab}, (1, 600))
def seconds(n):
    begin = time.perf_counter()
    model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n,
                   min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return time.perf_counter() - begin
seconds(2)
print((min(seconds(64) for _ in range({n})) - min(seconds(1) for _ in range({n}))) / 63)
"""


def peer(args):
    """Report tokens of `mid` against Hugging Face's Qwen3 of the same sizes: the same kind of layer
    (QK-norm, SwiGLU, RMSNorm, RoPE). In another environment, since it is no requirement of ours."""
    if not args.peer:
        return
    n = 1 if args.quick else 3
    code = PEER.format(c=MID, threads=torch.get_num_threads(), n=n)
    done = subprocess.run([args.peer, "-c", code], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"bench.py: --peer {args.peer}: {done.stderr.strip().splitlines()[-1]}")
    theirs = float(done.stdout.split()[-1])
    (ours,) = many([lambda: token_times(sized(MID), 600, n=64)], n)
    yield row("mid: Hugging Face's Qwen3", [theirs], "tokens/s", "", 1, show=lambda t: 1 / t)
    yield row("mid: a report token", ours, "tokens/s", "Hugging Face's Qwen3",
              theirs / statistics.median(ours), (">=", 3), lambda t: 1 / t)


def start(args):
    """Seconds until something is seen."""
    for name in ("train.py", "sample.py", "data.py"):
        (took,) = timed(lambda: subprocess.run([sys.executable, name, "--help"], cwd=ROOT, check=True,
                                               capture_output=True), n=3)
        yield row(f"{name} --help", took, "s", "1 s", statistics.median(took), ("<=", 1))
    code = ("import train, sys; o = train.Options(stage=1, out=sys.argv[1]); "
            "t = train.set_up(o, train.STAGES['tiny'][1], train.Processes(), train.Path(o.out)); "
            "t.train_step(next(t.stream()))")
    with tempfile.TemporaryDirectory() as folder:
        (took,) = timed(lambda: subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT,
                                               check=True, capture_output=True), n=1, warm=0)
    yield row("first loss of stage 1", took, "s", "10 s", took[0] / 10, ("<=", 1))


def write_large(folder: Path):
    """A weights folder of the full 3B size in bf16; its random numbers repeat every million."""
    with torch.device("meta"):
        model = UniX(PRESETS["unix"])
    block = torch.randn(1 << 20) * 0.02
    state = {}
    for k, p in model.state_dict().items():
        flat = block.repeat(-(-p.numel() // len(block)))[:p.numel()].view(p.shape)
        state[k] = torch.ones(p.shape) if "norm" in k and p.dim() == 1 else flat
        state[k] = state[k].bfloat16()
    model.load_state_dict(state, assign=True)
    model.save(folder)


@torch.no_grad()
def unix_figures(folder: Path) -> dict:
    """In a child: memory of loading, one denoising step and some report tokens of the 3B model."""
    before = peak()
    model = UniX.load(folder, dtype=torch.bfloat16)
    total = sum(p.sum(dtype=torch.float32).item() for p in model.parameters())   # reads every page
    weights = sum(p.nbytes for p in model.parameters())
    found = {"loaded": (peak() - before) / weights, "weights": weights, "finite": math.isfinite(total)}
    product, flops = multiply(torch.bfloat16)
    read, amount = stream(torch.bfloat16, 0, 5632, 2048, 12)
    steps = model.sample_latents([CAPTION], 16, 16, [0], points=50, scale=1)
    step, ceiling = timed(lambda: next(steps), product, n=1)
    tokens, least = token_times(model, 64, 1, 6), timed(read, n=3)[0]
    c, per = model.config, size(model.lm.tower, ".gen.")
    bytes_read = 2 * (size(model.lm.tower) + model.lm.lm_head.weight.numel()
                      + 2 * c.layers * 64 * c.kv_heads * c.head_dim)
    return found | {"step": step, "token": tokens, "peak": peak(),
                    "step_share": step_flops(c, per, 256, 64) / flops * ratio(ceiling, step),
                    "token_share": bytes_read / amount * ratio(least, tokens)}


def unix(args):
    """The full 3B size in bf16: loading, one denoising step at 256 px, report tokens."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.quick or memory < 20e9:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_large(Path(folder))
        found = child("unix", folder)
    yield row("unix: loaded, every weight read", [found["loaded"] * found["weights"] / 1e9], "GB",
              "its weights", found["loaded"], ("<=", 1.15))
    yield row("unix: denoising step, bf16", found["step"], "s", "matrix product rate, useful FLOPs",
              found["step_share"], (">=", 0.6))
    yield row("unix: a report token, bf16", found["token"], "s", "weights and cache read once",
              found["token_share"], (">=", 0.6))
    yield row("unix: peak memory", [found["peak"] / 2**30], "GiB", "24 GiB", found["peak"] / 2**30 / 24,
              ("<=", 1))


PARTS = (ceilings, decoding, peer, denoising, training, attention, tokenizer, data, start, unix)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="fewer repeats; no peaks of memory, no 3B model")
    parser.add_argument("--json", action="store_true", help="print the figures for a program")
    parser.add_argument("--only", nargs="+", choices=[p.__name__ for p in PARTS], help="these parts")
    parser.add_argument("--reports", help="a .csv of reports to learn the tokenizer from")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has transformers")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    train.keep_freed_memory()
    if args.measure:
        return print(json.dumps(measure(*args.measure)))
    about = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} "
                        f"threads, torch {torch.__version__}"}
    rows = []
    if not args.json:
        print(about["machine"])
        print(f"{'':42}{'median':>16} {'spread':>18}   {'against':36}{'ratio':>8}  target")
    for part in PARTS:
        for r in part(args) if not args.only or part.__name__ in args.only else ():
            rows.append(r)
            if not args.json:
                verdict = {None: "", True: "reached", False: "MISSED"}[r.ok]
                print(f"{r.what:42}{r.measured:>16} {r.spread:>18}   {r.against:36}{r.ratio:8.3g}  "
                      f"{r.target} {verdict}", flush=True)
    if args.json:
        print(json.dumps(about | {"rows": [asdict(r) for r in rows]}, indent=1))


if __name__ == "__main__":
    main()
