"""Exercise 7: one expert, which makes q, k, v of its tokens and finishes them."""

import torch

import oracles
from course import close, differs, noise

TITLE = "One expert"
EQUATION = "Eq. 3 and 4"
LAB = "towers"
MINUTES = 30
DIFFICULTY = 2
TARGETS = ["joint_attn.Expert.qkv", "joint_attn.Expert.finish"]
TEXT = """
An expert holds one branch's weights of a layer: what comes before attention, and what comes after.
Its parts are made in `Expert.__init__`. All tokens x are `(b, l, d)`.

**`qkv(x, cos_sin)`** is Eq. 3 for the tokens of one branch. In this order:

1. `input_layernorm` of x;
2. `q_proj`, `k_proj`, `v_proj`, each a matrix product with a bias;
3. cut the channels into heads: head j has the channels `j * head_dim ... (j + 1) * head_dim - 1`.
   There are h query heads, and g heads of keys and of values; g may be smaller than h;
4. *QK-norm*: `q_norm` and `k_norm`, over the channels of each head. `v` has none;
5. `rotate(..., cos_sin)` of q and k (exercise 6; it works here). `v` is not rotated.

It returns q `(b, h, l, k)`, and k and v `(b, g, l, k)`.

**`finish(x, mixed)`** takes the tokens that went into the layer and the result of attention, mixed
`(b, h, l, k)`:

    x = x + o_proj(heads of mixed, side by side)
    y = post_attention_layernorm(x)
    x = x + down_proj(silu(gate_proj(y)) * up_proj(y))

The first line adds to x as it came in, not to its norm. `F.silu(a) = a * sigmoid(a)`.

A slow specification is `expert_qkv` and `expert_finish` in `tests/exercises/oracles.py`: one
sequence at a time, written with loops over heads.
"""
HINTS = (
    "For the heads: which of `(b, l, h, k)` and `(b, h, l, k)` is a plain `view` of "
    "`(b, l, h * k)`?",
    "`view(b, l, -1, head_dim).transpose(1, 2)` cuts; `-1` finds h or g. For `finish` the way back "
    "is `transpose(1, 2).flatten(2)`. einops' `rearrange` says the same in letters.",
    "q is `rotate(self.q_norm(q), cos_sin)`, k likewise, v as it is. In `finish`, keep the sum of "
    "the first line: it is normed for the MLP, and then added to.",
)
SEES = "Nothing to look at here; in exercise 9 two of these experts meet in one softmax."


def setting(lib, seed, heads=4, kv_heads=2):
    """An expert with random weights, tokens (2, 5, 24), and their positions."""
    expert = oracles.randomize(lib.joint_attn.Expert(24, heads, kv_heads, 8, 20), seed)
    ids = torch.tensor([[0, 1, 2, 3, 4], [5, 5, 5, 6, 7]])
    return expert, noise(seed, 2, 5, 24), ids, oracles.angles(ids, 8)


def check_shapes(lib, seed):
    """qkv(): q (b, h, l, k), k and v (b, g, l, k)."""
    for heads, kv_heads in ((4, 2), (3, 3), (4, 1)):
        expert, x, _, cos_sin = setting(lib, seed, heads, kv_heads)
        got = [tuple(a.shape) for a in expert.qkv(x, cos_sin)]
        want = [(2, heads, 5, 8), (2, kv_heads, 5, 8), (2, kv_heads, 5, 8)]
        assert got == want, f"qkv() must return shapes {want} of q, k and v, not {got}"


def check_values_of_v(lib, seed):
    """v: normed tokens, projected, cut into heads; no QK-norm, no rotation."""
    expert, x, ids, cos_sin = setting(lib, seed)
    v = tuple(expert.qkv(x, cos_sin))[2]
    want = torch.stack([oracles.expert_qkv(expert, a, i)[2] for a, i in zip(x, ids)])
    raw = torch.stack([oracles.heads(oracles.project(expert.v_proj, a), 8) for a in x])
    assert differs(v, raw), "qkv() must project input_layernorm(x), not x"
    normed = oracles.rms_norm(want, expert.k_norm.weight)
    assert differs(v, normed), "QK-norm is for q and k alone: v has no norm of its own"
    wrong = want.transpose(1, 2).reshape(want.shape)
    assert differs(v, wrong), ("heads are cut wrongly: view as (b, l, heads, k), then exchange the "
                               "two middle axes")
    turned = torch.stack([oracles.rotated_all(a, i) for a, i in zip(want, ids)])
    assert differs(v, turned), "v must not be rotated: only q and k have a position"
    close(v, want, "v must be v_proj of input_layernorm(x), cut into heads: head j has the "
          "channels from j * head_dim")


def check_queries_and_keys(lib, seed):
    """q and k: QK-norm first, then rotation."""
    expert, x, ids, cos_sin = setting(lib, seed)
    q, k, _ = expert.qkv(x, cos_sin)
    still = oracles.angles(torch.zeros_like(ids), 8)
    want = [torch.stack(a) for a in zip(*(oracles.expert_qkv(expert, a, [0] * 5) for a in x))]
    for name, got, ours in zip("qk", expert.qkv(x, still), want):
        close(got, ours, f"at position 0, {name} must be {name}_norm of each head of {name}_proj("
              "input_layernorm(x))")
    want = [torch.stack(a) for a in zip(*(oracles.expert_qkv(expert, a, i)
                                          for a, i in zip(x, ids)))]
    for name, got, ours in (("q", q, want[0]), ("k", k, want[1])):
        close(got, ours, f"{name} must be normed ({name}_norm, over each head) and then rotated, "
              "in this order")


def check_finish_attention(lib, seed):
    """finish(): the attention result is added to x through o_proj."""
    expert, x, *_ = setting(lib, seed)
    mixed = noise(seed + 1, 2, 4, 5, 8)
    with torch.no_grad():
        expert.down_proj.weight.zero_()             # so that the MLP adds nothing
    want = torch.stack([oracles.expert_finish(expert, a, m) for a, m in zip(x, mixed)])
    got = expert.finish(x, mixed)
    normed = want - x + torch.stack([oracles.rms_norm(a, expert.input_layernorm.weight) for a in x])
    assert differs(got, normed), "finish() must add to x as it came in, not to its norm"
    assert differs(got, want - x), "finish() forgets x: o_proj of attention is added to it"
    close(got, want, "with an MLP of zeros finish() must be x + o_proj(heads side by side): head j "
          "fills the channels from j * head_dim")


def check_finish_mlp(lib, seed):
    """finish(): then the MLP of the normed sum is added to the sum."""
    expert, x, *_ = setting(lib, seed)
    got = expert.finish(x, torch.zeros(2, 4, 5, 8))
    want = torch.stack([oracles.expert_finish(expert, a, torch.zeros(4, 5, 8)) for a in x])
    assert differs(got, want - x), "finish() must add the MLP to x, not replace x by it"
    y = oracles.rms_norm(x, expert.post_attention_layernorm.weight)
    gate, up = oracles.project(expert.gate_proj, y), oracles.project(expert.up_proj, y)
    other = x + oracles.project(expert.down_proj, gate * up * torch.sigmoid(up))
    assert differs(got, other), "the SiLU belongs to gate_proj, not to up_proj"
    close(got, want, "the MLP must be down_proj(silu(gate_proj(y)) * up_proj(y)), y the "
          "post_attention_layernorm of the tokens")


def check_finish_all(lib, seed):
    """finish(): both parts together, for any batch."""
    expert, x, *_ = setting(lib, seed, 3, 3)
    mixed = noise(seed + 1, 2, 3, 5, 8)
    want = torch.stack([oracles.expert_finish(expert, a, m) for a, m in zip(x, mixed)])
    close(expert.finish(x, mixed), want, "the MLP must read the norm of x + attention, and be "
          "added to x + attention")
    one = expert.finish(x[:1, :2], mixed[:1, :, :2])
    close(one, want[:1, :2], "a token must be finished the same in any batch: each by itself")


def check_arguments_stay(lib, seed):
    """Neither function changes its arguments, and gradients reach the weights."""
    expert, x, _, cos_sin = setting(lib, seed)
    mixed = noise(seed + 1, 2, 4, 5, 8)
    before = x.clone(), mixed.clone()
    q, k, v = expert.qkv(x, cos_sin)
    out = expert.finish(x, mixed)
    assert torch.equal(x, before[0]) and torch.equal(mixed, before[1]), (
        "an argument was changed in place; x is needed after attention")
    total = sum(a.square().sum() for a in (q, k, v, out))
    assert total.requires_grad, "gradients must reach the weights: do not detach"
    total.backward()
    lost = [name for name, p in expert.named_parameters() if p.grad is None]
    assert not lost, f"these weights have no part in the result: {', '.join(lost)}"


RIGHT = {
    "joint_attn.Expert.qkv": """
def qkv(self, x, cos_sin):
    from einops import rearrange
    y = self.input_layernorm(x)
    q = rearrange(self.q_proj(y), "b l (h k) -> b h l k", k=self.head_dim)
    k = rearrange(self.k_proj(y), "b l (g k) -> b g l k", k=self.head_dim)
    v = rearrange(self.v_proj(y), "b l (g k) -> b g l k", k=self.head_dim)
    return rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin), v
""",
    "joint_attn.Expert.finish": """
def finish(self, x, mixed):
    b, h, l, k = mixed.shape
    w = self.o_proj.weight.view(-1, h, k)
    out = torch.einsum("bhlk,dhk->bld", mixed, w) + x
    y = self.post_attention_layernorm(out)
    gate = self.gate_proj(y)
    out = out + self.down_proj(gate * gate.sigmoid() * self.up_proj(y))
    return out
""",
}


def qkv(norm="self.input_layernorm(x)", cut="view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)",
        result="rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin), v") -> dict:
    return {"joint_attn.Expert.qkv": f"""
def qkv(self, x, cos_sin):
    x = {norm}
    q, k, v = (proj(x).{cut} for proj in (self.q_proj, self.k_proj, self.v_proj))
    return {result}
"""}


def finish(first="x + self.o_proj(mixed.transpose(1, 2).flatten(2))",
           second="self.post_attention_layernorm(x)",
           third="x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))") -> dict:
    return {"joint_attn.Expert.finish": f"""
def finish(self, x, mixed):
    x = {first}
    y = {second}
    return {third}
"""}


WRONG = {
    "norm after rotation": qkv(result="self.q_norm(rotate(q, cos_sin)), "
                                      "self.k_norm(rotate(k, cos_sin)), v"),
    "heads cut wrongly": qkv(cut="view(len(x), -1, x.shape[1], self.head_dim)"),
    "heads interleaved": qkv(cut="view(*x.shape[:2], self.head_dim, -1).permute(0, 3, 1, 2)"),
    "no norm before": qkv(norm="x"),
    "the other norm before": qkv(norm="self.post_attention_layernorm(x)"),
    "no QK-norm": qkv(result="rotate(q, cos_sin), rotate(k, cos_sin), v"),
    "norms of q and k exchanged": qkv(result="rotate(self.k_norm(q), cos_sin), "
                                             "rotate(self.q_norm(k), cos_sin), v"),
    "v is normed": qkv(result="rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin), "
                              "self.k_norm(v)"),
    "v is rotated": qkv(result="rotate(self.q_norm(q), cos_sin), rotate(self.k_norm(k), cos_sin), "
                               "rotate(v, cos_sin)"),
    "k is not rotated": qkv(result="rotate(self.q_norm(q), cos_sin), self.k_norm(k), v"),
    "not transposed": qkv(cut="view(*x.shape[:2], -1, self.head_dim)", result="self.q_norm(q), "
                                                                          "self.k_norm(k), v"),
    "residual of the normed": finish(first="self.input_layernorm(x) + self.o_proj("
                                           "mixed.transpose(1, 2).flatten(2))"),
    "no residual": finish(first="self.o_proj(mixed.transpose(1, 2).flatten(2))"),
    "MLP residual of the normed": finish(third="y + self.down_proj(F.silu(self.gate_proj(y)) * "
                                               "self.up_proj(y))"),
    "no residual of the MLP": finish(third="self.down_proj(F.silu(self.gate_proj(y)) * "
                                           "self.up_proj(y))"),
    "heads joined wrongly": finish(first="x + self.o_proj(mixed.reshape(*x.shape[:2], -1))"),
    "SiLU of up": finish(third="x + self.down_proj(self.gate_proj(y) * F.silu(self.up_proj(y)))"),
    "GELU": finish(third="x + self.down_proj(F.gelu(self.gate_proj(y)) * self.up_proj(y))"),
    "no gate": finish(third="x + self.down_proj(F.silu(self.gate_proj(y)))"),
    "no norm before the MLP": finish(second="x"),
    "MLP reads the old x": finish(first="x", third="x + self.o_proj(mixed.transpose(1, 2)."
                                  "flatten(2)) + self.down_proj(F.silu(self.gate_proj(y)) * "
                                  "self.up_proj(y))"),
    "in place": finish(first="x.add_(self.o_proj(mixed.transpose(1, 2).flatten(2)))"),
}
