"""Recomputes the arrays of a golden folder (config.json, model.safetensors, VAE, expected.npz) that
this code has too, and compares them with what the official code computed.

    python tests/parity.py DIR [DIR ...]

Prints the largest absolute and relative difference of each group, what is not covered, and exits
with 1 when an array differs by more than atol 5e-5 + rtol 1e-4 (pictures: by more than one level).
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ar import decode  # noqa: E402
from data import UserError  # noqa: E402
from diffusion import (guide, path, position_ids, sample, shift_time, time_features,  # noqa: E402
                       to_uint8, velocity_loss)
from unix import UniX, released  # noqa: E402

ATOL, RTOL = 5e-5, 1e-4


class Parity:
    """A loaded folder, its expected arrays, and the differences found so far."""

    def __init__(self, folder: Path, device="cpu"):
        self.model, self.device = UniX.load(folder, device), device
        self.want = dict(np.load(folder / "expected.npz"))
        self.seen, self.bad = {}, []
        ids = self.want["meta/special_ids"].tolist()
        for name, i in zip(("bos", "eos", "boi", "eoi"), ids):
            setattr(self.model.config, name, i)

    def get(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.want[name])).to(self.device)

    def check(self, name: str, got, tol=1.0):
        """Compares one array, and notes it as covered."""
        want = np.asarray(self.want[name])
        got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
        if want.shape != got.shape and want.size == got.size:
            got = got.reshape(want.shape)
        if want.shape != got.shape:
            self.seen[name] = (np.inf, np.inf)
            self.bad.append(f"{name}: shape {got.shape}, not {want.shape}")
            return
        got, want = got.astype(np.float64), want.astype(np.float64)
        want = np.nan_to_num(want)                      # a NaN gradient norm is "no gradient": 0
        gap = np.abs(got - want)
        worst, scale = gap.max(initial=0), np.abs(want).max(initial=0)
        self.seen[name] = (worst, worst / scale if scale else worst)
        whole = self.want[name].dtype == np.uint8
        close = gap <= (1 if whole else tol * (ATOL + RTOL * np.abs(want)))
        if not close.all():
            self.bad.append(f"{name}: differs by {worst:.2e} (largest value {scale:.2e})")


def parity_parts(p: Parity):
    """vit/ pos/ time/ vae/: the pieces by themselves."""
    m, get = p.model, p.get
    features = m.vit(get("vit/image"))
    p.check("vit/embed", m.vit.embed(get("vit/image")))
    p.check("vit/features", features)
    p.check("vit/connector", m.connector(features))
    exact = torch.nn.functional.gelu(m.connector.layers[0](features))
    p.check("vit/connector_erf", m.connector.layers[2](exact))
    for name in [n for n in p.want if n.startswith("pos/ids_") and "interpolate" not in n]:
        size = name[len("pos/ids_"):]
        h, w = (int(n) // m.vae.factor for n in size.split("x"))
        ids = position_ids(h, w, m.config.latent_side)
        p.check(name, ids)
        p.check(f"pos/ids_interpolate_{size}", position_ids(h, w, m.config.latent_side, True))
        p.check(f"pos/rows_{size}", m.positions[ids])
    p.check("time/t", get("time/t"))
    p.check("time/freq", time_features(get("time/t")))
    p.check("time/emb", m.time_embedder(get("time/t")))
    moments = m.vae.moments(get("vae/image"))
    p.check("vae/moments", moments)
    p.check("vae/latent_mode", m.vae.latents(moments))
    p.check("vae/latent_sample", m.vae.latents(moments, get("vae/sample_eps")))
    p.check("vae/decoded", m.vae.decode(get("vae/z")))


def tokens(p: Parity, name: str) -> list[int]:
    return p.want[name].tolist()


def check_cache(p: Parity, prefix: str, suffix: str, kv: list):
    """Arrays prefix + k_{suffix}_l{n}: (tokens, kv heads, head width)."""
    for name in [n for n in p.want if re.fullmatch(rf"{prefix}/[kv]_{suffix}_l\d+", n)]:
        layer, which = int(name.rsplit("_l", 1)[1]), "kv".index(name.split("/")[1][0])
        p.check(name, kv[layer][which][0].transpose(0, 1))


def parity_understanding(p: Parity):
    """und/ und_text/: caches after the image and after the prompt, greedy decoding, stopping."""
    m, c = p.model, p.model.config
    image = m.embed_image(p.get("vit/image"))
    block = m.lm.tower.read_context(image, torch.zeros(1, image.shape[1], dtype=torch.long),
                            torch.tensor([image.shape[1]]), image.shape[1])[1]
    check_cache(p, "und", "img", block.kv)
    prompt = m.wrap(tokens(p, "und/prompt_ids"))
    context = m.lm.read_text(*m.pad([prompt]), image)[1]
    check_cache(p, "und", "ctx", context.kv)
    p.check("und/ctx_kv_len", context.length)
    p.check("und/ctx_rope", context.next_id)
    for group, picture in (("und", image), ("und_text", None)):
        fed, want = tokens(p, f"{group}/fed_ids"), p.get(f"{group}/logits")
        start = prompt if picture is not None else text_prompt(p)
        row, length = m.pad([start + [c.bos]])
        steps = list(decode(m.lm, row, length, picture, -1, len(want)))
        logits, written = torch.cat([x for _, x in steps]), [int(t) for t, _ in steps]
        p.check(f"{group}/logits", logits)
        p.check(f"{group}/next_ids", written)
        p.check(f"{group}/fed_ids", [c.bos, *written[:-1]])
        begin = len(start) + (picture is not None)
        p.check(f"{group}/position_ids", np.arange(begin, begin + len(fed)))
        top = logits.topk(2).values
        p.check(f"{group}/argmax_margin", top[:, 0] - top[:, 1])
    stop = int(p.want["und/stop_end_token"])
    row, length = m.pad([prompt + [c.bos]])
    steps = decode(m.lm, row, length, image, stop, len(tokens(p, "und/fed_ids")))
    stopped = [int(t) for t, _ in steps]
    p.check("und/stop_ids", [c.bos, *stopped[:-1]])


def text_prompt(p: Parity) -> list[int]:
    """The prompt of und_text/ is not stored: it is that of und/ or that of gen/, whichever has the
    right length and the nearer first logits."""
    m, found = p.model, []
    for name in ("und/prompt_ids", "gen/prompt_ids"):
        ids = m.wrap(tokens(p, name))
        if len(ids) == p.want["und_text/position_ids"][0]:
            hidden, _ = m.lm.read_text(*m.pad([ids + [m.config.bos]]))
            gap = (m.lm.lm_head(hidden[0, -1]) - p.get("und_text/logits")[0]).abs().max()
            found.append((float(gap), ids))
    return min(found)[1]


def parity_generation(p: Parity):
    """gen/: every velocity, guidance variant, trajectory and decoded image."""
    m, get = p.model, p.get
    prompt = tokens(p, "gen/prompt_ids")
    context = m.read_captions([prompt])
    check_cache(p, "gen", "ctx", context.kv)
    p.check("gen/ctx_kv_len", context.length)
    p.check("gen/ctx_rope", context.next_id)
    scale, interval = float(p.want["meta/cfg_scale"]), tuple(p.want["meta/cfg_interval"].tolist())
    for height, width in p.want["meta/gen_sizes"].tolist():
        base = f"gen/{height}x{width}"
        h, w = height // m.vae.factor, width // m.vae.factor
        rows, noise = position_ids(h, w, m.config.latent_side), get(f"{base}/noise")[None]

        def velocity(x, t, conditional):
            return m.velocity(x, t, context if conditional else None, rows)[0]

        def pair(x, t, guided):
            if not guided:
                return velocity(x, t, True)
            twice = m.velocity(x.repeat(2, 1, 1), t.repeat(2), context.with_empty(), rows)[0]
            return twice.chunk(2)
        p.check(f"{base}/packed_vae_position_ids", rows)
        p.check(f"{base}/packed_position_ids", context.next_id.expand(h * w + 2))
        p.check(f"{base}/packed_text_ids", [m.config.boi, m.config.eoi])
        for t in p.want["meta/gen_t"].tolist():
            at, name = torch.tensor([t]), f"t{round(t, 6)}"
            c, u = velocity(noise, at, True), velocity(noise, at, False)
            for kind, v in (("cond", c), ("uncond", u), ("cfg", guide(c, u, scale)),
                            ("cfg_channel", guide(c, u, scale, "channel")),
                            ("cfg_text_channel", guide(c, u, scale, "channel")),
                            ("cfg_min0.9", guide(c, u, scale, least=0.9)),
                            ("cfg_text3.0_img1.5", guide(c, u, 1 + 1.5 * (3 - 1)))):
                if f"{base}/v_{kind}_{name}" in p.want:
                    p.check(f"{base}/v_{kind}_{name}", v)
        for shift in p.want["meta/shifts"].tolist():
            run = f"{base}/shift{shift}"
            points = int(p.want["meta/num_timesteps"])
            steps = list(sample(pair, noise, points, shift, scale, interval))
            p.check(f"{run}/t", torch.stack([t for t, _, _ in steps]))
            p.check(f"{run}/v", torch.cat([v for _, v, _ in steps]))
            p.check(f"{run}/x", torch.cat([noise, *(x for _, _, x in steps)]))
            p.check(f"{run}/final", steps[-1][2])
            if f"{run}/decoded" in p.want:
                pixels = m.vae.decode(steps[-1][2].transpose(1, 2).unflatten(2, (h, w)))
                p.check(f"{run}/decoded", pixels)
                p.check(f"{run}/image_u8", to_uint8(pixels)[0].permute(1, 2, 0))


def unpack(p: Parity, name: str) -> list[dict]:
    """The samples of a packed training batch: token ids and latents of each, by their positions."""
    get = lambda k: p.want.get(f"train/{name}/{k}", np.zeros(0, int))   # noqa: E731
    begin, found, image = 0, [], 0
    for length in get("sample_lens").tolist():
        inside = lambda k: (get(k) >= begin) & (get(k) < begin + length)    # noqa: B023,E731
        text = get("packed_text_ids")[inside("packed_text_indexes")].tolist()
        latent = inside("packed_vae_token_indexes")
        one = {"begin": begin, "len": length, "latent": latent, "ce": inside("ce_loss_indexes"),
               "mse": inside("mse_loss_indexes")}
        boi = text.index(p.model.config.boi) if latent.any() else None
        if latent.any():
            one["caption"] = text[1:boi - 1] if boi else None           # [BOS ids EOS] BOI EOI
            h, w = get("patchified_vae_latent_shapes")[image].tolist()
            one["clean"] = p.get(f"train/{name}/padded_latent")[image, :, :h, :w]
            image += 1
        else:
            n = int(one["ce"].sum())                                    # BOI EOI [prompt] [report]
            one["prompt"], one["report"] = text[3:-n - 2], text[-n:-1]
        found.append(one)
        begin += length
    return found


def flow_batch(p: Parity, name: str, samples: list[dict], frozen: bool, shift=1.0):
    """Velocities and losses of the samples with latents as one padded batch -> v, losses, x_t."""
    m, n = p.model, max(s["clean"][0].numel() for s in samples)
    pad = lambda a: torch.nn.functional.pad(a, (0, 0, 0, n - len(a)), value=7.0)    # noqa: E731
    x0 = torch.stack([pad(s["clean"].flatten(1).T) for s in samples])
    eps = torch.stack([pad(p.get(f"train/{name}/noise")[s["latent"]]) for s in samples])
    keep = torch.stack([torch.arange(n) < s["clean"][0].numel() for s in samples])
    rows = torch.zeros(len(samples), n, dtype=torch.long)
    for row, s in zip(rows, samples):
        ids = position_ids(*s["clean"].shape[1:], m.config.latent_side)
        row[:len(ids)] = ids
    raw = torch.stack([p.get(f"train/{name}/raw_timesteps")[s["latent"]][0] for s in samples])
    t = shift_time(torch.sigmoid(raw), shift)
    dropped = torch.tensor([s["caption"] is None for s in samples])
    with torch.set_grad_enabled(not frozen):
        context = m.read_captions([s["caption"] or [0] for s in samples]).drop(dropped)
    v, _ = m.velocity(path(x0, eps, t), t, context, rows, frozen, latent_mask=keep)
    square = (v - (eps - x0)).square()
    torch.testing.assert_close(square.flatten(1).mean(1), velocity_loss(v, x0, eps))
    return v[keep], square[keep], path(x0, eps, t)[keep]


def check_gradients(p: Parity, base: str, loss: torch.Tensor):
    """Gradient norms of every parameter, and the full gradients that are stored."""
    m = p.model
    m.zero_grad()
    loss.backward()
    ours = {released(k): v.grad for k, v in m.named_parameters()}
    names = p.want["train/param_names"].tolist()
    norm = lambda g: 0.0 if g is None else float(g.norm())              # noqa: E731
    p.check(f"{base}/grad_norms", np.array([norm(ours.get(k)) for k in names]))
    for k in [k for k in p.want if k.startswith(f"{base}/grad:")]:
        p.check(k, ours[k.split("grad:")[1]])
    if f"{base}/grad_embed_rows" in p.want:
        rows = p.get(f"{base}/grad_embed_rows_ids")
        p.check(f"{base}/grad_embed_rows_ids", rows)
        p.check(f"{base}/grad_embed_rows", m.lm.embed_tokens.weight.grad[rows])


def parity_training(p: Parity):
    """train/gen, train/und, train/pack_gu, train/pack_gg: losses and gradients, as batches."""
    m = p.model
    for name in ("gen", "und", "pack_gu", "pack_gg"):
        if f"train/{name}/sample_lens" not in p.want:
            continue
        samples, base = unpack(p, name), f"train/{name}"
        noisy = [s for s in samples if "clean" in s]
        read = [s for s in samples if "report" in s]
        for frozen in (True, False):
            loss = 0.0
            if noisy:
                v, square, x_t = flow_batch(p, name, noisy, frozen)
                loss = loss + square.mean()
                p.check(f"{base}/v_pred", v)
                p.check(f"{base}/x_t", x_t)
                p.check(f"{base}/mse", square)
                p.check(f"{base}/mse_mean", square.mean())
            if read:
                pixels = p.get("vit/image").expand(len(read), -1, -1, -1)
                prompts, reports = [s["prompt"] for s in read], [s["report"] for s in read]
                total, count = m.understanding_loss(pixels, prompts, reports)
                p.check(f"{base}/ce_mean", total / count)
                each = [m.understanding_loss(pixels[:1], prompts[:1], [reports[0]])[0]]
                p.check(f"{base}/ce", per_token(p, pixels, prompts, reports))
                torch.testing.assert_close(sum(each), total)
                loss = loss + total / count
            flag = f"{base}/freeze{int(frozen)}"
            if f"{flag}/grad_norms" in p.want and (noisy and not read or not frozen):
                check_gradients(p, flag, loss)
        if f"{base}/shift3.0/mse" in p.want:
            _, square, x_t = flow_batch(p, name, noisy, True, 3.0)
            p.check(f"{base}/shift3.0/mse", square)
            p.check(f"{base}/shift3.0/x_t", x_t)


def per_token(p: Parity, pixels, prompts, reports) -> torch.Tensor:
    """Cross entropy of each report token, and the logits it comes from."""
    m = p.model
    rows, length = m.pad([m.wrap(a) + m.wrap(b) for a, b in zip(prompts, reports)])
    hidden, _ = m.lm.read_text(rows, length, m.embed_image(pixels))
    logits = torch.cat([m.lm.lm_head(h[len(a) + 2:len(a) + len(b) + 3])
                        for h, a, b in zip(hidden, prompts, reports)])
    labels = torch.cat([torch.tensor(b + [m.config.eos]) for b in reports])
    if "train/und/logits" in p.want and len(p.want["train/und/logits"]) == len(logits):
        p.check("train/und/logits", logits)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


# ---------------------------------------------------------------- report

NOT_OURS = {    # besides inputs: things of the official code that have no counterpart here
    r"pre/.*": "the official resize and crop (we pad to square, as the paper says)",
    r"pos/ids_interpolate_.*": "interpolated position ids (off by default)",
    r"mask/.*|train/.*/mask\d": "dense masks: we never build one",
    r".*packed_.*|.*_loss_indexes|.*len.*|.*ce_loss_weights": "bookkeeping of packed sequences",
    r"train/(mixed|clean)/.*": "text after a noisy image, clean latents as context: not the paper",
    r"train/.*/hidden": "states of packed sequences (their losses and logits are covered)",
    r"train/(und|pack_gu)/freeze1/.*": "a report loss with understanding frozen trains nothing",
    r"train/und/ce_erf_connector": "the connector's exact GELU (vit/connector_erf is covered)"}
INPUTS = (r"meta/.*|vit/image|vae/(image|z|sample_eps)|und/(prompt_ids|stop_end_token)"
          r"|gen/prompt_ids|gen/[^/]*/noise|train/param_names"
          r"|train/.*/(noise|raw_timesteps|padded_latent)"
          r"|train/.*/patchified_vae_latent_shapes")


def show(p: Parity):
    """A line a group: how many arrays, and the largest differences."""
    groups = {}
    for name, (gap, relative) in p.seen.items():
        group = "/".join(name.split("/")[:3 if name.startswith("train") else 2])
        short = re.sub(r"(grad):.*", r"\1", group)
        n, a, b = groups.get(short, (0, 0.0, 0.0))
        groups[short] = n + 1, max(a, gap), max(b, relative)
    print(f"{'group':34}{'arrays':>7}{'max |diff|':>12}{'/ max |array|':>15}")
    for short, (n, gap, relative) in sorted(groups.items()):
        print(f"{short:34}{n:7}{gap:12.1e}{relative:15.1e}")
    left = [k for k in p.want if k not in p.seen and not re.fullmatch(INPUTS, k)]
    print(f"{len(p.seen)} arrays compared; not covered: {len(left)}")
    for pattern, why in NOT_OURS.items():
        some = [k for k in left if re.fullmatch(pattern, k)]
        left = [k for k in left if k not in some]
        if some:
            print(f"  {len(some):3} {why}")
    for k in left:
        print(f"      {k}")
    for line in p.bad:
        print("FAIL", line)


def compare(folder: Path, device="cpu") -> Parity:
    """Recomputes one folder on a device. Raises UserError where it cannot be opened."""
    if not (folder / "expected.npz").is_file():
        raise UserError(f"{folder}: no expected.npz; give a folder in the format of tests/golden/A")
    p = Parity(folder, device)
    with torch.device(device):
        for part in (parity_parts, parity_understanding, parity_generation):
            with torch.no_grad():
                part(p)
        parity_training(p)
    return p


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    failed = False
    for folder in parser.parse_args().folders:
        try:
            p = compare(folder)
        except UserError as e:
            print(f"parity.py: {e}", file=sys.stderr)
            return 2
        print(f"{folder}")
        show(p)
        failed |= bool(p.bad)
    print("differs" if failed else f"equal within rtol {RTOL}, atol {ATOL}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
