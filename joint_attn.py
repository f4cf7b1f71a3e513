"""Cross-modal self-attention: two sets of weights, one softmax (Sec. 3.3, Eq. 3-5).

A layer holds two experts of one class. `und` computes q, k, v of text, image features and
begin/end-of-image markers; `gen` those of noisy latents (Eq. 3, 4). One softmax runs over all of
them (Eq. 5); then each expert finishes its own tokens with its own output projection and MLP.
Text never sees latents, so it is read once into a `Context` that every denoising step attends to.

Letters: b batch, l tokens, d width, h query heads, g key/value heads, k head width.
Masks: reading is causal, drawing sees everything, so no (l, l) mask is ever built; a ragged batch
needs one flag a key, (b, 1, 1, l).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS, THETA = 1e-6, 10000.0  # RMSNorm and RoPE constants (released code; not read from its config)


class Context(NamedTuple):
    """What has been read: keys and values of every layer, and where the next token stands."""
    kv: list          # per layer: k and v, each (b, g, l, k), keys normed and rotated
    length: Tensor    # (b,) tokens that count in each sample; those behind are padding
    next_id: Tensor   # (b,) RoPE id of the next token (an image block takes just one)
    ragged: bool      # lengths differ, so that drawing needs a key mask

    def mask(self, extra: int) -> Tensor | None:
        """True where a key counts: (b, 1, 1, l + extra), or None if all of them do."""
        if not self.ragged:
            return None
        at = torch.arange(self.kv[0][0].shape[2], device=self.length.device)
        return F.pad(at < self.length[:, None], (0, extra), value=True)[:, None, None]

    def drop(self, rows: Tensor) -> "Context":
        """Empties the context of the samples where `rows` (b,) is True: no caption, RoPE id 0."""
        keep = ~rows
        return Context(self.kv, self.length * keep, self.next_id * keep, True)

    def with_empty(self) -> "Context":
        """Every sample twice, for guidance: first with its context, then with an empty one."""
        b, kv = len(self.length), [[a.repeat(2, 1, 1, 1) for a in pair] for pair in self.kv]
        twice = Context(kv, self.length.repeat(2), self.next_id.repeat(2), self.ragged)
        return twice.drop(torch.arange(2 * b, device=self.length.device) >= b)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


class Linear(nn.Linear):
    """nn.Linear that reads its weights with all cores of a CPU when there are few rows, as parts
    of W times x^T: F.linear reads them with one core, or slower (twice the time, tests/bench.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        few = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= 8 * x.shape[-1]
        if not few or self.weight.numel() < 1 << 18:        # small ones are in the cache anyway
            return super().forward(x)
        parts, n = math.gcd(self.out_features, 8), self.in_features
        w, rows = self.weight.view(parts, -1, n), x.reshape(-1, n).T.expand(parts, -1, -1)
        y = torch.bmm(w, rows) if self.bias is None else torch.baddbmm(
            self.bias.view(parts, -1, 1), w, rows)              # (parts, out / parts, rows)
        return y.flatten(0, 1).T.contiguous().view(*x.shape[:-1], -1)


def rope(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE ids (b, l) -> each (b, 1, l, dim), fp32; see `rotate`."""
    rate = THETA ** -(torch.arange(0, dim, 2, device=ids.device) / dim)
    angle = ids[:, None, :, None].float() * torch.cat([-rate, rate])
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turns x (b, h, l, k) by `rope(...)`; halves are pairs (LLaMA's rotate-half:
    the sines of the first half are negative)."""
    cos, sin = turn
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

    def qkv(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 3 for this expert's tokens: x (b, l, d) -> q (b, h, l, k), k and v (b, g, l, k)."""
        x = self.input_layernorm(x)
        q, k, v = (proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn), v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Adds the attention result (b, h, l, k), then the MLP, to the tokens x (b, l, d)."""
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Layer(nn.Module):
    """Two experts, one attention. `shared` makes them one object (the paper's counterpart)."""

    def __init__(self, *sizes: int, shared: bool = False):
        super().__init__()
        self.und = Expert(*sizes)
        self.gen = self.und if shared else Expert(*sizes)

    def read(self, x: Tensor, turn, n_image: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Reads [image block | text], x (b, l, d): the block sees itself, text sees all before it.

        One causal pass is right for every text row; the rows of the block are done again in full.
        """
        q, k, v = self.und.qkv(x, turn)
        mixed = attend(q, k, v, causal=True)
        if n_image:
            block = attend(*(a[:, :, :n_image] for a in (q, k, v)))
            mixed = torch.cat([block, mixed[:, :, n_image:]], dim=2)
        return self.und.finish(x, mixed), (k, v)

    def draw(self, marks: Tensor, x: Tensor, turn, past, mask, frozen: bool):
        """One layer over [context | marks | latents]: marks (b, 2, d) are und's, x (b, n, d) gen's;
        `past`: the context's keys and values of this layer, or (). Returns new marks and x.

        All see the context and each other. `frozen`: nothing on und's side gets a gradient.
        """
        grad = torch.is_grad_enabled() and not frozen
        with torch.set_grad_enabled(grad):
            q_u, k_u, v_u = self.und.qkv(marks, turn)
        q_g, k_g, v_g = self.gen.qkv(x, turn)                           # Eq. 3: d_u, d_g
        q = torch.cat([q_u, q_g], dim=2)
        k = torch.cat([*past[:1], k_u, k_g], dim=2)
        v = torch.cat([*past[1:], v_u, v_g], dim=2)
        mixed = attend(q, k, v, mask)                                   # Eq. 5: one softmax
        with torch.set_grad_enabled(grad):
            marks = self.und.finish(marks, mixed[:, :, :marks.shape[1]])
        return marks, self.gen.finish(x, mixed[:, :, marks.shape[1]:])


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
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def read(self, x: Tensor, ids: Tensor, length: Tensor, n_image: int = 0):
        """Reads tokens x (b, l, d) with RoPE ids (b, l) -> hidden (b, l, d) after the norm, and
        the Context.

        The first n_image tokens are an image block. Samples shorter than l are padded on the
        right, where causality keeps padding from changing anything; `length` (b,) says how long.
        """
        turn, kv = rope(ids, self.head_dim), []
        for layer in self.layers:
            x, pair = self._run(layer.read, x, turn, n_image)
            kv.append(pair)
        next_id = ids.gather(1, length[:, None] - 1)[:, 0] + 1
        return self.norm(x), Context(kv, length, next_id, bool((length < x.shape[1]).any()))

    def step(self, x: Tensor, ids: Tensor, cache: list, at: Tensor, end: int, ragged: bool):
        """Reads one more token a sample: x (b, d) with RoPE ids (b,) -> hidden (b, d).

        `cache`: per layer k and v, (b, g, size, k); row `at` (b,) is written, rows < `end` read.
        """
        x, turn, rows = x[:, None], rope(ids[:, None], self.head_dim), torch.arange(len(x))
        mask = None
        if ragged:
            mask = (torch.arange(end, device=x.device) <= at[:, None])[:, None, None]
        for layer, (keys, values) in zip(self.layers, cache):
            q, k, v = layer.und.qkv(x, turn)
            keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
            x = layer.und.finish(x, attend(q, keys[:, :, :end], values[:, :, :end], mask))
        return self.norm(x)[:, 0]

    def draw(self, marks: Tensor, x: Tensor, context: Context | None, frozen=True, tap=0,
             keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Runs the noisy block, marks (b, 2, d) and latents x (b, n, d), after the context (None:
        empty) -> x (b, n, d) after the norm.

        Also returns the latents' states after layer `tap` (counted from 1; None if 0), for REPA.
        The whole block has one RoPE id, so the order inside it, markers first, is of no matter.
        `keep` (b, n) is False at latents that only pad a batch of images of several sizes.
        """
        b, n, tapped = *x.shape[:2], None
        ids = context.next_id if context else x.new_zeros(b, dtype=torch.long)
        mask = context.mask(marks.shape[1] + n) if context else None
        if keep is not None:
            read = context.kv[0][0].shape[2] if context else 0
            if mask is None:
                mask = keep.new_ones(b, 1, 1, read + marks.shape[1] + n)
            mask = torch.cat([mask[..., :-n], keep[:, None, None]], dim=-1)
        turn = rope(ids[:, None], self.head_dim)
        for i, layer in enumerate(self.layers):
            past = context.kv[i] if context else ()
            marks, x = self._run(layer.draw, marks, x, turn, past, mask, frozen)
            tapped = x if i + 1 == tap else tapped
        return self.norm_gen(x), tapped
