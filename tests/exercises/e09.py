"""Exercise 9: the layer in which two experts meet in one softmax."""

import torch

import oracles
import pictures
from course import close, differs, noise

TITLE = "Two sets of weights, one softmax"
EQUATION = "Eq. 3-5"
LAB = "towers"
MINUTES = 45
DIFFICULTY = 3
TARGETS = ["joint_attn.Layer.denoise"]
TEXT = """
This is the heart of the paper. The sequence is `[text | BOI EOI | latents]`. Text was read before:
of it there are only keys and values, `past`. Left are two kinds of tokens, and each has its expert:

- the two markers, `boi_eoi` `(b, 2, d)`: expert `self.und` (d_u = 1 in Eq. 3);
- the noisy latents, `x` `(b, n, d)`: expert `self.gen` (d_g = 1).

`Layer.denoise(boi_eoi, x, cos_sin, past, mask, frozen)`:

1. Each expert makes q, k, v of its own tokens, with its method `qkv(tokens, cos_sin)`. All tokens
   of the block have one position, so one `cos_sin` serves both.
2. **One softmax** (Eq. 5): queries of markers and latents go over the keys of the text (`past[0]`),
   the markers and the latents, in this order. Values likewise (`past[1]`). `past` is None if there
   is no text. Nothing is causal here: the whole block sees everything.
   `attend(q, k, v, mask)` does it; `mask` is `(b, 1, 1, keys)`, True at keys that are no padding,
   in the same order, or None.
3. Each expert finishes its own tokens, with `finish(tokens, mixed)`.

Return the new `boi_eoi` and the new `x`, shapes as they came.

`frozen=True` (stages 2 and 3): expert `und` gets no gradient, neither through the new markers nor
through the new latents. Whatever it computes is computed without gradient: `torch.no_grad()`.
Values are the same as with `frozen=False`, expert `gen` and `x` get their gradient as usual. If the
caller works without gradients, so do you, frozen or not.

Worked example of the sizes, b = 1, 3 text tokens, 4 latents, 2 heads: `past[0]` is (1, 2, 3, k), q
is (1, 2, 6, k), k is (1, 2, 9, k), the softmax matrix of a head is 6 x 9, and no entry of it is 0.
The slow specification is `slow_denoise` in `tests/exercises/e09.py`.
"""
HINTS = (
    "Which three things do you need before a softmax over all keys can be taken? Which two things "
    "differ between the two kinds of tokens, and which one is common?",
    "Concatenate the experts' q, k and v on axis 2 (tokens), then `past` in front of k and v, call "
    "`attend` once, then `split([2, n], dim=2)`.",
    "For freezing: `und_grad = torch.is_grad_enabled() and not frozen`, and both calls of expert "
    "`und` (qkv and finish) under `with torch.set_grad_enabled(und_grad):`. The calls of `gen` and "
    "`attend` stay outside.",
)
SEES = ("The mask of [text, BOI, latents, EOI], the order of the sequence, measured by moving "
        "tokens: text is a triangle and blind to the block, the block's rows are full. The block "
        "has one position, so that BOI and EOI may be worked on together.")


def slow_denoise(layer, boi_eoi, x, i, past=None, keep=None, freeze=False):
    """One sample: markers (2, d), latents (n, d) at position i; past (g, m, k) each; keep (keys,)
    of bool -> new markers and latents."""
    u = oracles.expert_qkv(layer.und, boi_eoi, [i] * len(boi_eoi))
    u = [a.detach() for a in u] if freeze else u
    g = oracles.expert_qkv(layer.gen, x, [i] * len(x))
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(u, g))
    if past is not None:
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    sees = sees if keep is None else sees & keep
    mixed = oracles.attention(q, k, v, sees)
    m = len(boi_eoi)
    return (oracles.expert_finish(layer.und, boi_eoi, mixed[:, :m]),
            oracles.expert_finish(layer.gen, x, mixed[:, m:]))


def slow_batch(layer, boi_eoi, x, ids, past=None, mask=None, freeze=False):
    out = [slow_denoise(layer, boi_eoi[j], x[j], ids[j], past and (past[0][j], past[1][j]),
                        None if mask is None else mask[j, 0, 0], freeze) for j in range(len(x))]
    return tuple(torch.stack(a) for a in zip(*out))


class Setting:
    """Two samples: 3 text tokens as keys and values, 2 markers, 4 latents, width 24."""

    def __init__(self, lib, seed, kv_heads=2, shared=False, text=3):
        self.layer = oracles.small_layer(lib, seed, 4, kv_heads, shared)
        self.boi_eoi, self.x = noise(seed + 1, 2, 2, 24), noise(seed + 2, 2, 4, 24)
        self.ids = [3, 5]
        self.cos_sin = oracles.angles(torch.tensor([[3], [5]]), 8)
        self.past = (noise(seed + 3, 2, kv_heads, text, 8), noise(seed + 4, 2, kv_heads, text, 8))

    def run(self, past=None, mask=None, frozen=False):
        found = self.layer.denoise(self.boi_eoi, self.x, self.cos_sin, past, mask, frozen)
        assert isinstance(found, (tuple, list)) and len(found) == 2, (
            "denoise() must return two things: the new markers and the new latents")
        return found

    def slow(self, past=None, mask=None, freeze=False):
        return slow_batch(self.layer, self.boi_eoi, self.x, self.ids, past, mask, freeze)


def check_returns(lib, seed):
    """denoise() returns the new markers (b, 2, d) and the new latents (b, n, d)."""
    s = Setting(lib, seed)
    shapes = [tuple(a.shape) for a in s.run(s.past)]
    assert shapes == [(2, 2, 24), (2, 4, 24)], (
        f"denoise() must return markers (b, 2, d) and latents (b, n, d), here (2, 2, 24) and (2, "
        f"4, 24), not {shapes}")


def check_experts(lib, seed):
    """Markers belong to expert und, latents to expert gen (Eq. 3, 4)."""
    s = Setting(lib, seed)
    with torch.no_grad():           # where no token attends to another, experts are seen alone
        for expert in (s.layer.und, s.layer.gen):
            expert.o_proj.weight.zero_()
    markers, x = s.run()
    zero = torch.zeros(4, 4, 8)
    for got, tokens, own, other, name in ((markers, s.boi_eoi, s.layer.und, s.layer.gen, "markers"),
                                          (x, s.x, s.layer.gen, s.layer.und, "latents")):
        want, wrong = (torch.stack([oracles.expert_finish(e, a, zero[:, :len(a)]) for a in tokens])
                       for e in (own, other))
        assert differs(got, wrong), f"the {name} are finished by the wrong expert"
        close(got, want, f"the {name} must be finished by their own expert")


def check_block_alone(lib, seed):
    """Without text: markers and latents in one softmax."""
    s = Setting(lib, seed)
    with torch.no_grad():
        for a, b, name in zip(s.run(), s.slow(), ("markers", "latents")):
            close(a, b, f"without text (past = None) the {name} must be those of Eq. 3-5: q, k, v "
                  "of markers by expert und, of latents by expert gen, one softmax over all")


def check_sees_text(lib, seed):
    """With text: its keys and values come first, in the same softmax."""
    for kv_heads in (2, 4, 1):
        s = Setting(lib, seed, kv_heads)
        with torch.no_grad():
            got, want, blind = s.run(s.past), s.slow(s.past), s.slow()
            added = two_softmaxes(s)
        for a, b, none, two, name in zip(got, want, blind, added, ("markers", "latents")):
            assert differs(a, none), f"the {name} are blind to the text: `past` has no effect"
            assert differs(a, two), ("there must be one softmax over text and block together, not "
                                     "two whose results are added")
            close(a, b, f"with text the {name} must attend to the keys and values of text, markers "
                  "and latents in one softmax")


def two_softmaxes(s: Setting):
    """A wrong answer: attention to the text and attention to the block, added."""
    out = []
    for j in range(2):
        u = oracles.expert_qkv(s.layer.und, s.boi_eoi[j], [s.ids[j]] * 2)
        g = oracles.expert_qkv(s.layer.gen, s.x[j], [s.ids[j]] * 4)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(u, g))
        ones = torch.ones(6, 6, dtype=torch.bool)
        mixed = oracles.attention(q, k, v, ones) + oracles.attention(
            q, s.past[0][j], s.past[1][j], ones[:, :3])
        out.append((oracles.expert_finish(s.layer.und, s.boi_eoi[j], mixed[:, :2]),
                    oracles.expert_finish(s.layer.gen, s.x[j], mixed[:, 2:])))
    return tuple(torch.stack(a) for a in zip(*out))


def block_mask(lib, seed, text: int = 3) -> torch.Tensor:
    """Which new token of [BOI EOI latents] depends on which: measured, (6, 6) of bool."""
    s = Setting(lib, seed, text=text)
    layer, past = s.layer.double(), tuple(a[:1].double() for a in s.past)
    cos_sin = tuple(a[:1].double() for a in s.cos_sin)

    def step(tokens):
        return torch.cat(layer.denoise(tokens[None, :2], tokens[None, 2:], cos_sin, past, None,
                                       True), dim=1)[0]
    with torch.no_grad():
        return oracles.reads(step, torch.cat([s.boi_eoi[0], s.x[0]]))


def check_bidirectional(lib, seed):
    """Every token of the block sees every other one."""
    sees = block_mask(lib, seed)
    assert bool(sees[2:, 2:].all()), ("every latent must see all latents, also those after it: "
                                      "nothing is causal in the block")
    assert bool(sees[2:, :2].all()), "every latent must see both markers"
    assert bool(sees[:2].all()), "the markers must see each other and all latents"


def check_mask(lib, seed):
    """Keys that the mask has as False are not seen."""
    s, mask = Setting(lib, seed), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 1:3], mask[1, ..., 8] = False, False
    with torch.no_grad():
        got, want, without = s.run(s.past, mask), s.slow(s.past, mask), s.slow(s.past)
    for a, b, c, name in zip(got, want, without, ("markers", "latents")):
        assert differs(a, c), f"the mask has no effect on the {name}: padding is seen"
        close(a, b, f"the {name} must not see keys where the mask is False; its order is text, "
              "markers, latents")


def check_frozen_gradient(lib, seed):
    """frozen: expert und gets no gradient, expert gen and the latents get theirs."""
    s = Setting(lib, seed)
    s.x.requires_grad_(True)
    markers, x = s.run(s.past, None, True)
    assert torch.is_grad_enabled(), "gradients must be on again after denoise()"
    assert x.requires_grad, "with frozen=True expert gen must still learn: the latents have no grad"
    (x.square().sum() + markers.square().sum()).backward()
    touched = [k for k, p in s.layer.und.named_parameters() if p.grad is not None and p.grad.any()]
    assert not touched, f"with frozen=True expert und must get no gradient; {touched[0]} has one"
    lost = [k for k, p in s.layer.gen.named_parameters() if p.grad is None]
    assert not lost, f"with frozen=True expert gen must get its gradient; {lost[0]} has none"
    assert s.x.grad is not None and s.x.grad.any(), "a gradient must reach the latents that came in"
    assert all(p.requires_grad for p in s.layer.parameters()), (
        "denoise() must not switch requires_grad of weights: they are others' too")
    grad = s.layer.gen.k_proj.weight.grad.clone()
    s.layer.zero_grad()
    _, want = s.slow(s.past, freeze=True)
    want.square().sum().backward()
    close(grad, s.layer.gen.k_proj.weight.grad, "with frozen=True the gradient of expert gen must "
          "be that of the new latents, with all that expert und computes held constant", 1e-3, 1e-3)


def check_free_gradient(lib, seed):
    """Not frozen: both experts learn, und also through the latents that see its keys."""
    s = Setting(lib, seed)
    for a in s.past:
        a.requires_grad_(True)
    _, x = s.run(s.past)
    x.square().sum().backward()
    assert all(a.grad is not None and a.grad.any() for a in s.past), (
        "with frozen=False the text's keys and values must get a gradient: whoever read it learns")
    for name in ("k_proj", "v_proj"):
        p = getattr(s.layer.und, name).weight
        assert p.grad is not None and p.grad.any(), (
            f"with frozen=False expert und must learn through the latents: its {name} has no "
            "gradient")
    s.layer.zero_grad()
    s.run(s.past)[0].square().sum().backward()
    p = s.layer.und.down_proj.weight
    assert p.grad is not None and p.grad.any(), (
        "with frozen=False expert und must learn through the markers that it finishes")


def check_frozen_values(lib, seed):
    """Freezing changes no value, and nothing has a gradient where the caller wants none."""
    s = Setting(lib, seed)
    for a, b in zip(s.run(s.past, None, True), s.run(s.past, None, False)):
        close(a, b, "frozen must change no value, only gradients")
    with torch.no_grad():
        for frozen in (True, False):
            out = s.run(s.past, None, frozen)
            assert not any(a.requires_grad for a in out), (
                "under torch.no_grad() denoise() must not switch gradients on")


def check_shared(lib, seed):
    """A layer whose two experts are one object works too."""
    s = Setting(lib, seed, shared=True)
    with torch.no_grad():
        for a, b in zip(s.run(s.past), s.slow(s.past)):
            close(a, b, "with shared experts (und is gen) the result must follow the same "
                  "equations")


def check_arguments_stay(lib, seed):
    """No argument is changed: `past` serves all denoising steps."""
    s = Setting(lib, seed)
    things = (s.boi_eoi, s.x, *s.past)
    before = [a.clone() for a in things]
    with torch.no_grad():
        s.run(s.past)
    assert all(torch.equal(a, b) for a, b in zip(things, before)), (
        "an argument was changed in place; the text's keys and values serve all denoising steps")


def expected(lib):
    def denoise(self, boi_eoi, x, cos_sin, past, mask, frozen):
        angle = torch.atan2(cos_sin[1], cos_sin[0])[:, 0, 0, -1]
        ids = (angle / 10000 ** (-3 / 4)).round().int().tolist()
        return slow_batch(self, boi_eoi, x, ids, past, mask, frozen)
    lib.joint_attn.Layer.denoise = denoise
    return lib


def show(lib):
    """The mask of the whole sequence: text is read by a causal layer, then the block comes."""
    names = ["t1", "t2", "t3", "BOI", "x1", "x2", "x3", "x4", "EOI"]
    s = Setting(lib, 0)
    layer = s.layer.double()
    cos_sin = tuple(a[:1].double() for a in s.cos_sin)

    def whole(tokens):
        text, block = tokens[:3], tokens[3:]
        sees = torch.ones(3, 3).tril().bool()
        read, (k, v) = oracles.layer([layer.und] * 3, text, [0, 1, 2], sees)
        boi_eoi, x = layer.denoise(block[[0, 5]][None], block[1:5][None], cos_sin, (k[None],
                                   v[None]), None, True)
        return torch.cat([read, boi_eoi[0, :1], x[0], boi_eoi[0, 1:]])
    tokens = torch.cat([noise(7, 3, 24), s.boi_eoi[0, :1], s.x[0], s.boi_eoi[0, 1:]])
    sees = oracles.reads(whole, tokens)
    return pictures.titled(pictures.matrix(sees.float(), names, names),
                           "a row sees the blue columns")


RIGHT = {"joint_attn.Layer.denoise": """
def denoise(self, boi_eoi, x, cos_sin, past, mask, frozen):
    def ours(tokens):
        return [a.detach() for a in tokens] if frozen else tokens
    m = boi_eoi.shape[1]
    q1, k1, v1 = ours(self.und.qkv(boi_eoi, cos_sin))
    q2, k2, v2 = self.gen.qkv(x, cos_sin)
    keys = [k1, k2] if past is None else [past[0], k1, k2]
    values = [v1, v2] if past is None else [past[1], v1, v2]
    keys, values = torch.cat(keys, 2), torch.cat(values, 2)
    each = q1.shape[1] // keys.shape[1]
    keys, values = (a.repeat_interleave(each, 1) for a in (keys, values))
    out = []
    for q in (q1, q2):
        scores = q @ keys.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + torch.where(mask, 0.0, -float("inf"))
        out.append(torch.softmax(scores, -1) @ values)
    if frozen:
        with torch.no_grad():
            new = self.und.finish(boi_eoi, out[0])
    else:
        new = self.und.finish(boi_eoi, out[0])
    return new, self.gen.finish(x, out[1])
"""}

PLAIN = """
def denoise(self, boi_eoi, x, cos_sin, past, mask, frozen):
    grad = torch.is_grad_enabled() and not frozen
    with torch.set_grad_enabled(grad):
        q_u, k_u, v_u = self.und.qkv(boi_eoi, cos_sin)
    q_g, k_g, v_g = self.gen.qkv(x, cos_sin)
    q, k, v = (torch.cat(pair, dim=2) for pair in ((q_u, q_g), (k_u, k_g), (v_u, v_g)))
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    mixed = attend(q, k, v, mask)
    mixed_u, mixed_g = mixed.split([2, x.shape[1]], dim=2)
    with torch.set_grad_enabled(grad):
        boi_eoi = self.und.finish(boi_eoi, mixed_u)
    return boi_eoi, self.gen.finish(x, mixed_g)
"""


def variant(old: str, new: str) -> dict:
    """A right answer with one thing changed."""
    assert PLAIN.count(old) == 1, old
    return {"joint_attn.Layer.denoise": PLAIN.replace(old, new)}


PAST = "k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)"
ATTEND = "mixed = attend(q, k, v, mask)"
WRONG = {
    "latents blind to text": variant("if past is not None:", "if False:"),
    "markers' keys from gen": variant("self.und.qkv(boi_eoi, cos_sin)",
                                      "self.gen.qkv(boi_eoi, cos_sin)"),
    "latents' q, k, v from und": variant("self.gen.qkv(x, cos_sin)", "self.und.qkv(x, cos_sin)"),
    "keys of gen alone": variant("(k_u, k_g), (v_u, v_g)", "(k_g, k_g[:, :, :0]), "
                                 "(v_g, v_g[:, :, :0])"),
    "markers finished by gen": variant("self.und.finish", "self.gen.finish"),
    "latents finished by und": variant("self.gen.finish(x", "self.und.finish(x"),
    "causal with a cache": variant(ATTEND, "mixed = attend(q, k, v, causal=True)"),
    "block causal": variant(ATTEND, """l, m = q.shape[2], k.shape[2]
    tri = torch.ones(l, m, dtype=torch.bool).tril(m - l)
    mixed = attend(q, k, v, tri if mask is None else tri & mask)"""),
    "two softmaxes added": variant(ATTEND, """mixed = attend(q, k, v)
    if past is not None:
        n = past[0].shape[2]
        mixed = attend(q, k[:, :, n:], v[:, :, n:]) + attend(q, past[0], past[1])"""),
    "each expert its own softmax": variant(ATTEND, """mixed = torch.cat([attend(q_u, k_u, v_u),
                       attend(q_g, k_g, v_g)], dim=2)"""),
    "latents do not see markers": variant(ATTEND, """n = k.shape[2] - x.shape[1]
    keep = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
    keep[..., n - 2:n] = False
    mixed = torch.cat([attend(q[:, :, :2], k, v, mask),
                       attend(q[:, :, 2:], k, v, keep if mask is None else keep & mask)],
                      dim=2)"""),
    "mask forgotten": variant(ATTEND, "mixed = attend(q, k, v)"),
    "text behind the block": variant(PAST, "k, v = torch.cat([k, past[0]], dim=2), "
                                           "torch.cat([v, past[1]], dim=2)"),
    "text's values forgotten": variant(PAST, "k, v = torch.cat([past[0], k], dim=2), "
                                             "torch.cat([past[0], v], dim=2)"),
    "latents first": variant("mixed_u, mixed_g = mixed.split([2, x.shape[1]], dim=2)",
                             "mixed_g, mixed_u = mixed.split([x.shape[1], 2], dim=2)"),
    "markers are lost": variant("return boi_eoi,", "return 0 * x[:, :2],"),
    "not frozen": variant("and not frozen", ""),
    "frozen half: finish": variant("    with torch.set_grad_enabled(grad):\n        boi_eoi =",
                                   "    if True:\n        boi_eoi ="),
    "frozen half: keys": variant("    with torch.set_grad_enabled(grad):\n        q_u",
                                 "    if True:\n        q_u"),
    "all frozen": variant("    return boi_eoi, self.gen.finish(x, mixed_g)",
                          "    with torch.set_grad_enabled(grad):\n"
                          "        return boi_eoi, self.gen.finish(x, mixed_g)"),
    "text and latents frozen": variant(ATTEND, "with torch.set_grad_enabled(grad):\n"
                                               "        mixed = attend(q, k, v, mask)"),
    "text cut off": variant(PAST, "k, v = torch.cat([past[0].detach(), k], dim=2), "
                                  "torch.cat([past[1].detach(), v], dim=2)"),
    "always frozen": variant("torch.is_grad_enabled() and not frozen", "False"),
    "gradients switched on": variant("torch.is_grad_enabled() and not frozen", "not frozen"),
    "weights switched off": variant("grad = torch.is_grad_enabled() and not frozen", "grad = "
                                    "torch.is_grad_enabled()\n    self.und.requires_grad_(not "
                                    "frozen)"),
}
