"""Slow formulas of a layer with two experts, token by token, with a dense mask (Eq. 3-5).

What the exercises on towers compare with. Nothing here calls the functions that are judged; only
the weights are taken from the modules. One sequence at a time: x (l, d), ids a list of l numbers.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divides by the root of the mean square of the last axis, then multiplies by a weight."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, i: float) -> Tensor:
    """One head vector x (k,) at position i: channels c and c + k/2 are one complex number, which
    is turned by the angle i * 10000^(-2c/k)."""
    half, out = len(x) // 2, torch.empty_like(x)
    for c in range(half):
        angle = i * 10000 ** (-2 * c / len(x))
        a, b = x[c], x[c + half]
        out[c] = a * math.cos(angle) - b * math.sin(angle)
        out[c + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def rotated_all(x: Tensor, ids) -> Tensor:
    """The same for x (h, l, k), with complex numbers."""
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.as_tensor(ids, dtype=torch.float64)[:, None] * rate
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1).to(x.dtype)


def project(layer, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def heads(x: Tensor, k: int) -> Tensor:
    """(l, h k) -> (h, l, k): head j has the channels from j k."""
    return torch.stack([x[:, j:j + k] for j in range(0, x.shape[1], k)])


def expert_qkv(expert, x: Tensor, ids) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 for tokens x (l, d) of one expert -> q (h, l, k), k and v (g, l, k)."""
    y = rms_norm(x, expert.input_layernorm.weight)
    q, k, v = (heads(project(p, y), expert.head_dim)
               for p in (expert.q_proj, expert.k_proj, expert.v_proj))
    return (rotated_all(rms_norm(q, expert.q_norm.weight), ids),
            rotated_all(rms_norm(k, expert.k_norm.weight), ids), v)


def expert_finish(expert, x: Tensor, mixed: Tensor) -> Tensor:
    """Adds the attention result mixed (h, l, k), then the MLP, to x (l, d)."""
    x = x + project(expert.o_proj, torch.cat(list(mixed), dim=-1))
    y = rms_norm(x, expert.post_attention_layernorm.weight)
    gate, up = project(expert.gate_proj, y), project(expert.up_proj, y)
    return x + project(expert.down_proj, gate * torch.sigmoid(gate) * up)


def attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Eq. 5: q (h, l, k) over k, v (g, m, k); sees (l, m) is True where a query sees a key."""
    out = []
    for j in range(len(q)):
        g = j * len(k) // len(q)
        scores = (q[j] @ k[g].T / math.sqrt(q.shape[-1])).masked_fill(~sees, -math.inf)
        out.append(scores.softmax(-1) @ v[g])
    return torch.stack(out)


def layer(experts: list, x: Tensor, ids: list, sees: Tensor):
    """One layer over one packed sequence x (l, d); experts[i] is that of token i -> new tokens
    (l, d), and the keys and values of all (g, l, k)."""
    parts = [expert_qkv(e, x[i:i + 1], ids[i:i + 1]) for i, e in enumerate(experts)]
    q, k, v = (torch.cat([p[j] for p in parts], dim=1) for j in range(3))
    mixed = attention(q, k, v, sees)
    new = [expert_finish(e, x[i:i + 1], mixed[:, i:i + 1]) for i, e in enumerate(experts)]
    return torch.cat(new), (k, v)


def angles(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What Layer's methods take as `cos_sin`, for ids (b, l): each (b, 1, l, dim); the sines of the
    first half are negative."""
    rate = 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angle = ids[:, None, :, None].float() * rate
    return (torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1))


def randomize(module, seed: int):
    """Random weights of a size that makes every detail visible; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.4))
            if "norm" in name:
                p.add_(1)
    return module


def small_layer(lib, seed: int, heads: int = 4, kv_heads: int = 2, shared: bool = False):
    """A layer of width 24 with random weights, and other ones in each expert."""
    return randomize(lib.joint_attn.Layer(24, heads, kv_heads, 8, 20, shared=shared), seed)


def reads(function, x: Tensor, tolerance: float = 1e-7) -> Tensor:
    """Measures which output token depends on which input token: (outputs, inputs) of bool.
    function: (l, d) -> (m, d)."""
    x = x.double().detach()
    base, out = function(x), []
    for j in range(len(x)):
        moved = x.clone()
        moved[j] += 0.1 * torch.randn(x.shape[1], dtype=x.dtype,
                                      generator=torch.Generator().manual_seed(j))
        out.append((function(moved) - base).abs().amax(-1) > tolerance)
    return torch.stack(out, dim=1)
