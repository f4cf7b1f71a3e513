"""Exercise 10: padding, dropped captions, and a batch with and without them."""

import torch

import oracles
import pictures
from course import close, noise

TITLE = "An empty caption is not a caption of zeros"
EQUATION = "Eq. 5"
LAB = "towers"
MINUTES = 30
DIFFICULTY = 2
TARGETS = ["joint_attn.Context.mask", "joint_attn.Context.drop", "joint_attn.Context.with_empty"]
TEXT = """
Captions of a batch have different lengths, and guidance needs the network without any caption. A
`Context` holds what was read: `kv`, a list with keys and values `(b, g, l, k)` of each layer;
`length` `(b,)`, the number of tokens of each sample (what is behind them in `kv` is padding);
`next_id` `(b,)`, the RoPE id that the image block gets (not always the length: a whole image has
one id); `ragged`, whether some key is padding.

A key of zeros is still a key: its score is 0, e^0 = 1, and it takes its share of the softmax. So
what must not be seen is masked, and zeroing does not do. Write three methods:

- **`mask(extra)`**: None if the context is not ragged. Else bool `(b, 1, 1, l + extra)`: True at
  the first `length[i]` keys of sample i, False at its padding, and True at `extra` more keys (the
  markers and latents of the block), which come behind.
- **`drop(rows)`**: `rows` is bool `(b,)`. A new context that is *empty* where rows is True: length
  0, and next_id 0, as if there had never been a caption. Other samples keep theirs. The result must
  be masked, so it is ragged. Do not change `self` (a cache may hold it).
- **`with_empty()`**: a batch of twice the size, for guidance in one pass: first all samples with
  their captions, then all again with none. Order: c1 c2 c3, then 3 empty ones.

Worked example: lengths [2, 3], l = 3, next_id [2, 3].

```
mask(1)                   [T T F | T]      [T T T | T]
drop([False, True])       length [2, 0]    next_id [2, 0]    mask(1) = [T T F | T] [F F F | T]
with_empty()              length [2, 3, 0, 0]    next_id [2, 3, 0, 0]    kv of 4 samples
```

A `Context` is a NamedTuple: make a new one with `Context(kv, length, next_id, ragged)` or
`self._replace(...)`.
"""
HINTS = (
    "Which comparison between `torch.arange(l)` and `length` is True at the tokens and False at "
    "the padding? Check it at index 0 of a sample of length 0.",
    "An empty caption is a caption of length 0, all of whose keys are padding. Then `mask` does "
    "the rest, and `kv` may stay as it is.",
    "`keep = ~rows`; `length * keep`, `next_id * keep`, ragged True. For with_empty: "
    "`a.repeat(2, 1, 1, 1)` of every k and v, `length.repeat(2)`, `next_id.repeat(2)`; then drop "
    "the second half.",
)
SEES = ("How the softmax of one latent is shared: with its caption, with the caption dropped (all "
        "weight to the block), and what zeroed keys would have taken.")


def context(lib, seed, lengths, l: int = 4, layers: int = 2, ragged=None):
    """A context of random keys and values, l keys wide."""
    b = len(lengths)
    kv = [(noise(seed + 2 * i, b, 2, l, 8), noise(seed + 2 * i + 1, b, 2, l, 8))
          for i in range(layers)]
    ragged = any(n < l for n in lengths) if ragged is None else ragged
    length = torch.tensor(lengths)
    return lib.joint_attn.Context(kv, length, length + 5, ragged)   # ids are no lengths


def attended(seed, c, i: int, layer: int = 0, extra: int = 3) -> torch.Tensor:
    """What a query of sample i gets from the context and a block of `extra` keys."""
    q, k, v = (noise(seed + 50 + j, n, 8) for j, n in ((0, 1), (1, extra), (2, extra)))
    keys = torch.cat([c.kv[layer][0][i, 0], k])
    values = torch.cat([c.kv[layer][1][i, 0], v])
    mask = c.mask(extra)
    mask = torch.ones(len(keys), dtype=torch.bool) if mask is None else mask[i, 0, 0]
    return oracles.attention(q[None], keys[None], values[None], mask[None])[0, 0]


def alone(seed, c, i: int, n: int, layer: int = 0, extra: int = 3) -> torch.Tensor:
    """The same with the first n keys of sample i and no padding."""
    q, k, v = (noise(seed + 50 + j, m, 8) for j, m in ((0, 1), (1, extra), (2, extra)))
    keys, values = (torch.cat([c.kv[layer][j][i, 0, :n], a]) for j, a in enumerate((k, v)))
    ones = torch.ones(1, len(keys), dtype=torch.bool)
    return oracles.attention(q[None], keys[None], values[None], ones)[0, 0]


def check_mask(lib, seed):
    """mask(): True at tokens and at the extra keys, False at padding."""
    c = context(lib, seed, [2, 4, 1])
    for extra in (1, 5):
        got = c.mask(extra)
        assert got is not None, "mask() of a ragged context must not be None"
        assert got.shape == (3, 1, 1, 4 + extra), (
            f"mask({extra}) must have shape (b, 1, 1, l + extra), not {tuple(got.shape)}")
        assert got.dtype == torch.bool, "mask() must be of bool, True where a key is seen"
        assert bool(got[..., 4:].all()), (
            "mask() must be True at the extra keys: the block sees itself")
        for i, n in enumerate((2, 4, 1)):
            row = got[i, 0, 0, :4].tolist()
            assert all(row[:n]), "mask() must be True at all tokens of a sample"
            assert not any(row[n:]), ("mask() must be False at padding: keys from index length[i] "
                                      "on are seen")


def check_no_mask(lib, seed):
    """mask() is None where no key is padding: attention is faster without one."""
    got = context(lib, seed, [4, 4]).mask(3)
    assert got is None, "mask() must be None where the context is not ragged"


def check_padding_is_not_seen(lib, seed):
    """A sample attends as if it were alone."""
    c = context(lib, seed, [2, 4, 3])
    for i, n in enumerate((2, 4, 3)):
        close(attended(seed, c, i), alone(seed, c, i, n), "with mask(), a sample must attend as if "
              "it were alone, without padding")


def check_drop_fields(lib, seed):
    """drop(): length 0 and RoPE id 0 where dropped, others as they were."""
    c = context(lib, seed, [3, 4, 2, 4])
    got = c.drop(torch.tensor([True, False, False, True]))
    lengths, ids = got.length.tolist(), got.next_id.tolist()
    assert lengths != [3, 0, 0, 4], "drop() empties the wrong samples: those where rows is True"
    assert lengths == [0, 4, 2, 0], (
        f"drop() must set the length of dropped samples to 0 and keep others: {lengths}")
    assert ids == [0, 9, 7, 0], (
        "drop() must set next_id of dropped samples to 0: an image without a caption begins at "
        f"RoPE id 0 ({ids})")
    assert len(got.kv) == 2 and got.kv[0][0].shape == (4, 2, 4, 8), (
        "drop() must keep the shapes of the keys and values")


def check_drop_is_masked(lib, seed):
    """drop(): a dropped caption takes no part in the softmax, of a full batch too."""
    for lengths in ([4, 4, 4], [2, 4, 3]):
        c = context(lib, seed, lengths)
        got = c.drop(torch.tensor([False, True, False]))
        assert got.mask(3) is not None, ("after drop() the context must be ragged: else there is "
                                         "no mask, and the dropped caption is seen")
        for layer in (0, 1):
            close(attended(seed, got, 1, layer), alone(seed, c, 1, 0, layer), "a dropped caption "
                  "must take no share of the softmax: mask its keys (zeroed keys have a score of "
                  "0, and e^0 = 1)")
            for i in (0, 2):
                close(attended(seed, got, i, layer), alone(seed, c, i, lengths[i], layer),
                      "drop() must leave the other samples as they are")


def check_drop_keeps_self(lib, seed):
    """drop() makes a new context; the old one may be in a cache."""
    c = context(lib, seed, [3, 4])
    before = [c.length.clone(), c.next_id.clone(), *(a.clone() for pair in c.kv for a in pair)]
    rows = torch.tensor([True, False])
    c.drop(rows)
    c.with_empty()
    after = [c.length, c.next_id, *(a for pair in c.kv for a in pair)]
    kept = all(torch.equal(a, b) for a, b in zip(before, after))
    assert kept and rows.tolist() == [True, False], (
        "drop() and with_empty() must not change the context or rows in place")
    none = c.drop(torch.tensor([False, False]))
    close(attended(seed, none, 0), alone(seed, c, 0, 3), "drop() of no sample must change nothing")


def check_with_empty(lib, seed):
    """with_empty(): all samples with their captions, then all with none."""
    for lengths in ([2, 4, 3], [4, 4, 4]):
        c = context(lib, seed, lengths)
        got = c.with_empty()
        found = got.length.tolist()
        assert len(found) == 6, f"with_empty() must have twice the samples, not {len(found)}"
        pairs = [n for length in lengths for n in (length, 0)]
        assert found != pairs, ("with_empty() must have all samples with captions first, then all "
                                "without: not in pairs")
        assert found == lengths + [0, 0, 0], (
            f"with_empty() must have the lengths {lengths + [0, 0, 0]}, not {found}")
        assert got.next_id.tolist() == [n + 5 for n in lengths] + [0, 0, 0], (
            "with_empty() must have the ids of the captions first, then zeros")
        assert len(got.kv) == 2 and all(a.shape == (6, 2, 4, 8) for pair in got.kv for a in pair), (
            "with_empty() must have keys and values of all layers for both halves")
        for i in range(3):
            for layer in (0, 1):
                close(attended(seed, got, i, layer), alone(seed, c, i, lengths[i], layer),
                      "the first half of with_empty() must attend to its own captions")
                close(attended(seed, got, 3 + i, layer), alone(seed, c, i, 0, layer),
                      "the second half of with_empty() must attend to no caption")


def check_in_a_tower(lib, seed):
    """A dropped caption gives what no context at all gives."""
    tower = oracles.randomize(lib.joint_attn.Tower(2, 24, 4, 2, 8, 20), seed).eval()
    boi_eoi, x = noise(seed + 1, 1, 2, 24), noise(seed + 2, 1, 4, 24)
    with torch.no_grad():
        _, c = tower.read_context(noise(seed, 1, 5, 24), torch.arange(5)[None], torch.tensor([5]))
        want, _ = tower.denoise(boi_eoi, x, None)
        got, _ = tower.denoise(boi_eoi, x, c.drop(torch.tensor([True])))
        both, _ = tower.denoise(boi_eoi.expand(2, -1, -1), x.expand(2, -1, -1), c.with_empty())
    close(got, want, "a tower must give for a dropped caption what it gives without a context")
    close(both[1:], want, "the second half of with_empty() must give what no context gives")


def expected(lib):
    def mask(self, extra):
        rows = [[j < n for j in range(self.kv[0][0].shape[2])] + [True] * extra
                for n in self.length.tolist()]
        return torch.tensor(rows)[:, None, None]

    def drop(self, rows):
        length, ids = (torch.tensor([0 if gone else n for n, gone in zip(a, rows)])
                       for a in (self.length.tolist(), self.next_id.tolist()))
        return self._replace(length=length, next_id=ids, ragged=True)
    lib.joint_attn.Context.mask, lib.joint_attn.Context.drop = mask, drop
    return lib


def show(lib):
    c = context(lib, 3, [5, 5], 5)
    c = lib.joint_attn.Context([tuple(a * 1.5 for a in pair) for pair in c.kv], c.length, c.next_id,
                               False)
    q, block = noise(9, 8) * 1.5, noise(10, 4, 8)
    names = ["t1", "t2", "t3", "t4", "t5", "BOI", "EOI", "x1", "x2"]

    def weights(keys, mask):
        scores = torch.cat([keys, block]) @ q / 8 ** 0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)
    keys, every = c.kv[0][0][0, 0], torch.ones(9, dtype=torch.bool)
    dropped = c.drop(torch.tensor([True, False])).mask(4)
    gone = every if dropped is None else dropped[0, 0, 0]
    rows = {"with its caption": weights(keys, every), "caption dropped": weights(keys, gone),
            "keys set to zero": weights(keys * 0, every)}
    table = pictures.matrix(torch.stack(list(rows.values())), list(rows), names, 26, high=0.5)
    lost = {name: w[:5].sum().item() for name, w in rows.items()}
    return pictures.stack([
        pictures.titled(table, "softmax weights of one latent"),
        pictures.titled(pictures.bars(lost, 1.0, 220), "share that goes to the caption's keys")])


RIGHT = {
    "joint_attn.Context.mask": """
def mask(self, extra):
    if not self.ragged:
        return None
    l = self.kv[0][0].shape[2]
    out = torch.ones(len(self.length), 1, 1, l + extra, dtype=torch.bool)
    for i, n in enumerate(self.length.tolist()):
        out[i, :, :, n:l] = False
    return out
""",
    "joint_attn.Context.drop": """
def drop(self, rows):
    length = self.length.masked_fill(rows, 0)
    next_id = torch.where(rows, torch.zeros_like(self.next_id), self.next_id)
    ragged = self.ragged or bool(rows.any())
    return self._replace(length=length, next_id=next_id, ragged=ragged)
""",
    "joint_attn.Context.with_empty": """
def with_empty(self):
    kv = [tuple(torch.cat([a, torch.zeros_like(a)]) for a in pair) for pair in self.kv]
    none = torch.zeros_like(self.length)
    return Context(kv, torch.cat([self.length, none]), torch.cat([self.next_id, none]), True)
""",
}


def mask(keep: str, pad: str = "(0, extra), value=True", out: str = "[:, None, None]") -> dict:
    return {"joint_attn.Context.mask": f"""
def mask(self, extra):
    if not self.ragged:
        return None
    at = torch.arange(self.kv[0][0].shape[2])
    return F.pad({keep}, {pad}){out}
"""}


def drop(result: str, before: str = "keep = ~rows") -> dict:
    return {"joint_attn.Context.drop": f"""
def drop(self, rows):
    {before}
    return Context({result})
"""}


KEPT = "self.kv, self.length * keep, self.next_id * keep, "
ZEROED = "[tuple(a * keep[:, None, None, None] for a in pair) for pair in self.kv]"


def twice(kv: str, length: str, next_id: str, ragged: str = "True") -> dict:
    return {"joint_attn.Context.with_empty": f"""
def with_empty(self):
    none = torch.zeros_like(self.length)
    kv = [[{kv} for a in pair] for pair in self.kv]
    return Context(kv, {length}, {next_id}, {ragged})
"""}


LENGTHS, IDS = "torch.cat([self.length, none])", "torch.cat([self.next_id, none])"
WRONG = {
    "one too many": mask("at <= self.length[:, None]"),
    "by RoPE ids": mask("at < self.next_id[:, None]"),
    "one too few": mask("at < self.length[:, None] - 1"),
    "upside down": mask("at >= self.length[:, None]"),
    "padding seen": mask("at < self.length.max().expand(len(self.length), 1)"),
    "the block is hidden": mask("at < self.length[:, None]", "(0, extra), value=False"),
    "extra keys in front": mask("at < self.length[:, None]", "(extra, 0), value=True"),
    "no axes for heads and queries": mask("at < self.length[:, None]", out=""),
    "a mask of numbers": mask("(at < self.length[:, None]).float()", "(0, extra), value=1.0"),
    "always a mask": {"joint_attn.Context.mask": """
def mask(self, extra):
    at = torch.arange(self.kv[0][0].shape[2])
    return F.pad(at < self.length[:, None], (0, extra), value=True)[:, None, None]
"""},
    "zeroed keys": drop(f"{ZEROED}, self.length, self.next_id * keep, self.ragged"),
    "zeroed keys, length 0, no mask": drop(f"{ZEROED}, self.length * keep, self.next_id * keep, "
                                           "self.ragged"),
    "not ragged": drop(KEPT + "self.ragged"),
    "RoPE id kept": drop("self.kv, self.length * keep, self.next_id, True"),
    "the other rows": drop(KEPT + "True", "keep = rows"),
    "all rows": drop("self.kv, self.length * 0, self.next_id * 0, True"),
    "in place": drop("self.kv, self.length, self.next_id, True",
                     "self.length[rows] = 0\n    self.next_id[rows] = 0"),
    "in pairs": twice("a.repeat_interleave(2, 0)", "torch.stack([self.length, none], 1).flatten()",
                      "torch.stack([self.next_id, none], 1).flatten()"),
    "empty ones first": twice("a.repeat(2, 1, 1, 1)", "torch.cat([none, self.length])",
                              "torch.cat([none, self.next_id])"),
    "both halves full": twice("a.repeat(2, 1, 1, 1)", "self.length.repeat(2)",
                              "self.next_id.repeat(2)", "self.ragged"),
    "empty half with ids": twice("a.repeat(2, 1, 1, 1)", LENGTHS, "self.next_id.repeat(2)"),
    "empty half of zeros": twice("torch.cat([a, a * 0])", "self.length.repeat(2)", IDS,
                                 "self.ragged"),
    "keys not doubled": twice("a", LENGTHS, IDS),
    "not ragged when doubled": twice("a.repeat(2, 1, 1, 1)", LENGTHS, IDS, "self.ragged"),
    "samples in a circle": twice("torch.cat([a, a]).roll(1, 0)", LENGTHS, IDS),
}
