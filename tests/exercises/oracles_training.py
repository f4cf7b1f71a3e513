"""Slow formulas and small models for the exercises on training: no batch, no cache, no fused loss.

What exercises 11 to 16 compare with. Nothing here calls the functions that are judged.
"""

import math
import zlib

import torch
from torch import Tensor

import oracles

SIZES = dict(
    vit_image=16, vit_patch=8, vit_width=16, vit_mlp=24, vit_heads=2, vit_layers=1, vocab=61,
    layers=3, width=24, heads=4, kv_heads=2, head_dim=8, mlp=20, max_tokens=64, latent_side=8,
    latent_channels=4, latent_patch=1, bos=50, eos=51, boi=52, eoi=53, resolution=32)
MARKERS = {50: "BOS", 51: "EOS", 52: "BOI", 53: "EOI"}


class Words:
    """A tokenizer that gives every word a number below 50."""

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % 50 for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def small_unix(lib, seed: int, **changes):
    """A UniX whose every weight is random: nothing is zero, no two experts are alike."""
    model = lib.unix.UniX(lib.unix.Config(**(SIZES | changes)), Words())
    return oracles.randomize(model, seed).eval()


def token_lists(seed: int, lengths, below: int = 50) -> list[list[int]]:
    """Random token ids, a list for each length."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(below, (n,), generator=rng).tolist() for n in lengths]


def read(tower, x: Tensor, ids: list[int], n_image: int = 0):
    """One sequence x (l, d) through the understanding experts of a tower -> hidden (l, d) after the
    final norm, and each layer's keys and values (g, l, k). The first n_image tokens see each other,
    text sees what is before it."""
    at = torch.arange(len(x))
    sees = (at <= at[:, None]) | ((at < n_image) & (at[:, None] < n_image))
    kv = []
    for layer in tower.layers:
        q, k, v = oracles.expert_qkv(layer.und, x, ids)
        x = oracles.expert_finish(layer.und, x, oracles.attention(q, k, v, sees))
        kv.append((k, v))
    return oracles.rms_norm(x, tower.norm.weight), kv


def read_tokens(lm, tokens: list[int], image: Tensor | None = None) -> Tensor:
    """[image block (m, d) | tokens] -> hidden of the tokens (l, d), read from the start. The image
    block has position 0, text counts on from 1; without an image text begins at 0."""
    x, m = lm.embed_tokens.weight[torch.tensor(tokens)], 0
    ids = list(range(len(tokens)))
    if image is not None:
        m = len(image)
        x, ids = torch.cat([image, x]), [0] * m + [i + 1 for i in ids]
    return read(lm.tower, x, ids, m)[0][m:]


def cross_entropy(hidden: Tensor, weight: Tensor, label: int) -> Tensor:
    """-log of the probability that one hidden state (d,) gives to one token."""
    logits = (weight.double() @ hidden.double()).tolist() if not hidden.requires_grad else None
    if logits is None:
        scores = weight @ hidden
        return scores.logsumexp(0) - scores[label]
    top = max(logits)
    return torch.tensor(top + math.log(sum(math.exp(a - top) for a in logits)) - logits[label])


def bilinear(features: Tensor, h: int, w: int) -> Tensor:
    """Features (side, side, d), read at the centres of h x w cells: the mean of the four nearest,
    weighted by how near they are. Beyond the outer centres the nearest counts."""
    side, out = features.shape[0], torch.empty(h, w, features.shape[2])
    for i in range(h):
        for j in range(w):
            y, x = ((a + 0.5) * side / n - 0.5 for a, n in ((i, h), (j, w)))
            y, x = min(max(y, 0), side - 1), min(max(x, 0), side - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
            top = features[y0, x0] * (1 - x + x0) + features[y0, x1] * (x - x0)
            bottom = features[y1, x0] * (1 - x + x0) + features[y1, x1] * (x - x0)
            out[i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return out


def area(features: Tensor, h: int, w: int) -> Tensor:
    """The mean of the features (side, side, d) that each of h x w cells touches."""
    side, out = features.shape[0], torch.empty(h, w, features.shape[2])
    for i in range(h):
        for j in range(w):
            rows = slice(i * side // h, -(-(i + 1) * side // h))
            columns = slice(j * side // w, -(-(j + 1) * side // w))
            out[i, j] = features[rows, columns].flatten(0, 1).mean(0)
    return out
