"""Cross-modal self-attention: two sets of weights, one softmax (Sec. 3.3, Eq. 3-5).

A layer holds two experts of one class. Expert `und` computes q, k, v of text, image features and
begin/end-of-image markers, expert `gen` those of noisy latents (Eq. 3, 4). One softmax runs over
all tokens (Eq. 5). Then each expert finishes its own tokens with its own o projection and MLP.

Text never sees latents. So a caption is read once, into a `Context` of keys and values, and every
denoising step attends to that.

Letters: b batch, l tokens, n latents, d width, h query heads, g key/value heads, k head width.
Text is read causally, latents see everything: both are plain calls of the fused attention, and no
(l, l) mask is ever built. A batch with padding needs one flag a key, (b, 1, 1, l).
tests/test_joint_attn.py has the slow version: token by token, with a dense mask.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS, THETA = 1e-6, 10000.0  # RMSNorm and RoPE constants (released code; not read from its config)


class Context(NamedTuple):
    """Text that was read: keys and values of every layer, and the position of the next token."""
    kv: list          # per layer: k and v, each (b, g, l, k), keys normed and rotated
    length: Tensor    # (b,) number of tokens; the rest of a row is padding
    next_id: Tensor   # (b,) RoPE id of the next token (a whole image block has one id)
    ragged: bool      # lengths differ, so that latents need a key mask

    def mask(self, extra: int) -> Tensor | None:
        """True at keys that are no padding: (b, 1, 1, l + extra). None if no key is padding."""
        if not self.ragged:
            return None
        at = torch.arange(self.kv[0][0].shape[2], device=self.length.device)
        return F.pad(at < self.length[:, None], (0, extra), value=True)[:, None, None]

    def drop(self, rows: Tensor) -> "Context":
        """Empties the context of the samples where `rows` (b,) is True: no caption, RoPE id 0."""
        return Context(self.kv, self.length * ~rows, self.next_id * ~rows, True)

    def with_empty(self) -> "Context":
        """Every sample twice, for guidance: first with its context, then with an empty one."""
        b, kv = len(self.length), [[a.repeat(2, 1, 1, 1) for a in pair] for pair in self.kv]
        twice = Context(kv, self.length.repeat(2), self.next_id.repeat(2), self.ragged)
        return twice.drop(torch.arange(2 * b, device=self.length.device) >= b)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:     # autocast: x is bf16; a fp32 weight would be slow
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPS)


def rope(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE ids (b, l) -> each (b, 1, l, dim), fp32; for `rotate`."""
    rate = THETA ** -(torch.arange(0, dim, 2, device=ids.device) / dim)
    angle = ids[:, None, :, None].float() * torch.cat([-rate, rate])
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates x (b, h, l, k) by `rope(...)`. Channel i and channel i + k/2 are a pair (LLaMA's
    rotate-half), and the sines of the first half are negative."""
    cos, sin = cos_sin
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False) -> Tensor:
    """Eq. 5, fused: q (b, h, l, k) over k, v (b, g, m, k) -> (b, h, l, k). Head j reads j*g//h."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.shape[1] != k.shape[1])


class Expert(nn.Module):
    """One branch's weights in one layer: W_u or W_g of Eq. 3, output projection, SwiGLU MLP."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int):
        super().__init__()
        self.head_dim = head_dim
        self.input_layernorm = RMSNorm(width)
        self.q_proj = Linear(width, heads * head_dim)
        self.k_proj = Linear(width, kv_heads * head_dim)
        self.v_proj = Linear(width, kv_heads * head_dim)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.o_proj = Linear(heads * head_dim, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width)
        self.gate_proj = Linear(width, mlp, bias=False)
        self.up_proj = Linear(width, mlp, bias=False)
        self.down_proj = Linear(mlp, width, bias=False)

    def qkv(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 3 for this expert's tokens: x (b, l, d) -> q (b, h, l, k), k and v (b, g, l, k)."""
        x = self.input_layernorm(x)
        q, k, v = (proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin), v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Adds the attention result (b, h, l, k), then the MLP, to the tokens x (b, l, d)."""
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Layer(nn.Module):
    """Two experts, one attention. `shared`: one expert serves both branches."""

    def __init__(self, *sizes: int, shared: bool = False):
        super().__init__()
        self.und = Expert(*sizes)
        self.gen = self.und if shared else Expert(*sizes)

    def read(self, x: Tensor, cos_sin, n_image: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[image block | text], x (b, l, d) -> (b, l, d), and the keys and values.

        Text sees everything before it; the image block, the first n_image tokens, sees itself.
        One causal pass is right for all text. Then the block attends again, without the mask.
        """
        q, k, v = self.und.qkv(x, cos_sin)
        mixed = attend(q, k, v, causal=True)
        if n_image:
            q_i, k_i, v_i = (a[:, :, :n_image] for a in (q, k, v))
            mixed = torch.cat([attend(q_i, k_i, v_i), mixed[:, :, n_image:]], dim=2)
        return self.und.finish(x, mixed), (k, v)

    def denoise(self, boi_eoi: Tensor, x: Tensor, cos_sin, past, mask, frozen: bool):
        """[context | markers | latents]: boi_eoi (b, 2, d), x (b, n, d) -> the same two, new.

        `past`: this layer's keys and values of the context, or None. Markers and latents see the
        context and each other. `frozen`: no gradient enters or passes expert `und`.
        """
        und_grad = torch.is_grad_enabled() and not frozen
        with torch.set_grad_enabled(und_grad):
            q_u, k_u, v_u = self.und.qkv(boi_eoi, cos_sin)      # Eq. 3, 4 where d_u = 1
        q_g, k_g, v_g = self.gen.qkv(x, cos_sin)                # Eq. 3, 4 where d_g = 1
        q, k, v = (torch.cat(pair, dim=2) for pair in ((q_u, q_g), (k_u, k_g), (v_u, v_g)))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = attend(q, k, v, mask)                           # Eq. 5, one softmax over all
        mixed_u, mixed_g = mixed.split([boi_eoi.shape[1], x.shape[1]], dim=2)
        with torch.set_grad_enabled(und_grad):
            boi_eoi = self.und.finish(boi_eoi, mixed_u)
        return boi_eoi, self.gen.finish(x, mixed_g)


class Tower(nn.Module):
    """All layers and both final norms. The first `share` layers have one expert for both branches
    (0: UniX; all: the shared-weights model; some: the Y shape of UniFork, arXiv 2506.17202)."""

    def __init__(self, layers: int, *sizes: int, share: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(Layer(*sizes, shared=i < share) for i in range(layers))
        self.norm = RMSNorm(sizes[0])
        self.norm_gen = self.norm if share >= layers else RMSNorm(sizes[0])
        self.head_dim, self.checkpointing = sizes[3], False

    def _run(self, layer, *args):
        recompute = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)

    def read_context(self, x: Tensor, ids: Tensor, length: Tensor, n_image: int = 0):
        """Tokens x (b, l, d) with RoPE ids (b, l) -> hidden (b, l, d) after the norm, Context.

        The first n_image tokens are an image block. Samples shorter than l are padded on the
        right, where causality keeps padding from changing anything; `length` (b,) counts tokens.
        """
        cos_sin, kv = rope(ids, self.head_dim), []
        for layer in self.layers:
            x, pair = self._run(layer.read, x, cos_sin, n_image)
            kv.append(pair)
        next_id = ids.gather(1, length[:, None] - 1)[:, 0] + 1
        return self.norm(x), Context(kv, length, next_id, bool((length < x.shape[1]).any()))

    def step(self, x: Tensor, ids: Tensor, cache: list, at: Tensor, end: int, ragged: bool):
        """Reads one more token a sample: x (b, d) with RoPE ids (b,) -> hidden (b, d).

        `cache`: per layer k and v, (b, g, size, k). Row `at` (b,) is written, rows < `end` read.
        """
        x, cos_sin = x[:, None], rope(ids[:, None], self.head_dim)
        rows = torch.arange(len(x), device=x.device)
        mask = (torch.arange(end, device=x.device) <= at[:, None])[:, None, None]   # (b, 1, 1, end)
        for layer, (keys, values) in zip(self.layers, cache):
            q, k, v = layer.und.qkv(x, cos_sin)
            keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
            x = layer.und.finish(x, attend(q, keys[:, :, :end], values[:, :, :end],
                                           mask if ragged else None))
        return self.norm(x)[:, 0]

    def denoise(self, boi_eoi: Tensor, x: Tensor, context: Context | None, frozen=True,
                repa_layer=0, latent_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Markers (b, 2, d) and noisy latents x (b, n, d) after a context (None: an empty one)
        -> x (b, n, d) after the norm, and the states of x after layer `repa_layer` (1 is the
        first; None if 0). The block has one RoPE id, so its order, markers first, changes nothing.
        `latent_mask` (b, n) is False at padding in a batch of images of several sizes.
        """
        b, n, repa_states = *x.shape[:2], None
        ids = context.next_id if context else x.new_zeros(b, dtype=torch.long)
        mask = context.mask(2 + n) if context else None
        if latent_mask is not None:
            seen = 2 + (context.kv[0][0].shape[2] if context else 0)
            before = latent_mask.new_ones(b, 1, 1, seen) if mask is None else mask[..., :-n]
            mask = torch.cat([before, latent_mask[:, None, None]], dim=-1)
        cos_sin = rope(ids[:, None], self.head_dim)
        for i, layer in enumerate(self.layers, 1):
            past = context.kv[i - 1] if context else None
            boi_eoi, x = self._run(layer.denoise, boi_eoi, x, cos_sin, past, mask, frozen)
            repa_states = x if i == repa_layer else repa_states
        return self.norm_gen(x), repa_states


class Linear(nn.Linear):
    """nn.Linear for up to 8 rows on a CPU. You may skip this. Parts of W times x^T keep all cores
    busy, where F.linear reads W with one: a token of `mid` is 1.16 times as fast (bench.py)."""

    def forward(self, x: Tensor) -> Tensor:
        few = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= 8 * x.shape[-1]
        if not few or self.weight.numel() < 1 << 18 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)                   # small weights are in the caches anyway
        parts, n = math.gcd(self.out_features, 8), self.in_features
        w, rows = self.weight.view(parts, -1, n), x.reshape(-1, n).T.expand(parts, -1, -1)
        y = torch.bmm(w, rows) if self.bias is None else torch.baddbmm(
            self.bias.view(parts, -1, 1), w, rows)              # (parts, out / parts, rows)
        return y.flatten(0, 1).T.contiguous().view(*x.shape[:-1], -1)
