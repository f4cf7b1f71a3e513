"""Exercise 11: writing with a cache."""

import time

import torch

import course
import oracles
import oracles_training as oracle
import pictures
from course import close

TITLE = "Writing with a cache"
EQUATION = "Sec. 3.2"
LAB = "training"
MINUTES = 45
DIFFICULTY = 3
TARGETS = ["joint_attn.Tower.step", "ar.decode"]
TEXT = """
A report is written token by token. For a report of 60 tokens, reading everything again for each of
them would cost about 60 times as much; so keys and values of what was read are kept, and a step computes one token a sample.

`Tower.step(self, x, ids, cache, at, end, ragged)` reads one more token of each of b samples: `x`
`(b, d)` its embedding, `ids` `(b,)` its RoPE ids. `cache` has for every layer a pair of tensors,
keys and values, `(b, g, size, k)`, which are **changed in place**: the new key and value of sample
i go to row `at[i]`. Samples have different lengths, so the rows differ. Then the new token attends
to rows 0 to `at[i]` of its own sample. Behind them, up to row `end - 1`, another sample may have
tokens, and this one has padding, which it must not see: a mask does that if `ragged` is True. If it
is False all samples have one length and end with row `end - 1`. Rows from `end` on are empty room.
Return the hidden states `(b, d)` after the final norm.

The parts: expert `layer.und` has `qkv(x, cos_sin)` (norm, projections and rotation; x is
`(b, l, d)`, here with l = 1) and `finish(x, mixed)`. `rope(ids, self.head_dim)` makes `cos_sin` of
ids `(b, l)`. `attend(q, k, v, mask)` is Eq. 5; the mask is `(b, 1, 1, keys)`, True where a query
sees a key.

`decode(lm, tokens, length, image, eos, max_new, pick)` writes. Read the context once,
`lm.read_text(tokens, length, image)`, which returns the hidden states of the text `(b, l, d)` and a
`Context`: `context.kv` (keys and values of every layer, image block included), `context.length`
`(b,)` (how many rows of each sample count), `context.next_id` `(b,)` (RoPE id of the next token: a
whole image block has one id, so this is not the length) and `context.ragged`. Make room behind the
context for `max_new` tokens, before you begin, and then repeat:

1. logits `(b, v)` from the hidden state of each sample's last token, with `lm.lm_head`;
2. the next token of each sample is `pick(logits)`, but eos for samples that have already written eos;
3. `yield token, logits` (so the first eos of a sample is yielded as well);
4. stop if all samples have written eos, or after `max_new` tokens; else read the new tokens with
   `lm.tower.step`.

`decode` is a generator; nothing it was given may change.

Worked example: two samples with 5 and 3 text tokens, no image. Their first new tokens are written
to rows 5 and 3 and have the ids 5 and 3; `end` is 6. With an image block of 4 tokens before the
text, the rows are 9 and 7, and the ids 6 and 4, since the image block has id 0 and text begins
at 1.
"""
HINTS = (
    "Write down, for two samples of 5 and 3 tokens, which rows of the cache are filled after one "
    "step and which of them each sample may see.",
    "`keys[rows, :, at] = ...` with `rows = torch.arange(b)` writes another row for each sample. The "
    "mask is `torch.arange(end) <= at[:, None]`. In `decode`, keep length and next id apart.",
    "Step i: `lm.tower.step(lm.embed_tokens(token), next_id + i, cache, length + i, size + i + 1, "
    "ragged)`, where size is the number of rows of the context. `F.pad(a, (0, 0, 0, max_new))` "
    "makes the room.",
)
SEES = ("Two curves: with a cache the time for a token stays level, without one it rises with every "
        "token.")


def small_lm(lib, seed):
    lm = lib.ar.LanguageModel(41, 2, 24, 4, 2, 8, 20)
    return oracles.randomize(lm, seed).eval()


# ---------------------------------------------------------------- Tower.step


def start(lib, seed, lengths, new, gap=0):
    """A tower, whole sequences (l + new, d), their ids, and a cache with the first l tokens of
    each; what lies behind them is garbage. Ids jump by `gap` after the first token."""
    tower, rng = small_lm(lib, seed).tower, torch.Generator().manual_seed(seed)
    x = [torch.randn(n + new, 24, generator=rng) for n in lengths]
    ids = [[0] + [i + gap for i in range(1, n + new)] for n in lengths]
    size = max(lengths) + new + 2
    cache = [[3 * torch.randn(len(x), 2, size, 8, generator=rng) for _ in "kv"]
             for _ in tower.layers]
    with torch.no_grad():
        whole = [oracle.read(tower, a, i) for a, i in zip(x, ids)]
        for b, (_, kv) in enumerate(whole):
            for rows, pair in zip(cache, kv):
                for row, a in zip(rows, pair):
                    row[b, :, :lengths[b]] = a[:, :lengths[b]]
    return tower, x, ids, cache, whole


@torch.no_grad()
def steps(tower, x, ids, cache, lengths, new):
    """Feeds the last tokens one by one -> hidden states (new, b, d)."""
    out, ragged = [], len(set(lengths)) > 1
    for i in range(new):
        at = torch.tensor(lengths) + i
        token = torch.stack([a[n + i] for a, n in zip(x, lengths)])
        number = torch.tensor([a[n + i] for a, n in zip(ids, lengths)])
        got = tower.step(token, number, cache, at, max(lengths) + i + 1, ragged)
        assert isinstance(got, torch.Tensor) and got.shape == token.shape, (
            f"step() must return hidden states (b, d), {tuple(token.shape)}")
        out.append(got)
    return torch.stack(out)


def check_one_sample(lib, seed):
    """A token that is read with a cache has the state that it has when all is read again."""
    tower, x, ids, cache, whole = start(lib, seed, [5], 3)
    got = steps(tower, x, ids, cache, [5], 3)
    plain = whole[0][0][5:] / tower.norm.weight
    unit = got[:, 0] / tower.norm.weight
    assert not (bool((got[:, 0].square().mean(-1) - plain.square().mean(-1)).abs().max() > 0.5)
                and bool((unit.square().mean(-1) - 1).abs().max() > 0.1)), (
        "step() must return states after the final norm, self.norm")
    close(got[:, 0], whole[0][0][5:], "a token read with a cache must have the state that it has "
          "when the whole text is read again")


def check_ids(lib, seed):
    """A token is rotated by its RoPE id, not by its row in the cache."""
    tower, x, ids, cache, whole = start(lib, seed, [5], 2, gap=7)
    got = steps(tower, x, ids, cache, [5], 2)
    close(got[:, 0], whole[0][0][5:], "a token must be rotated by its RoPE id, not by its row in "
          "the cache: after an image block they differ")


def check_rows(lib, seed):
    """In a batch each sample writes to its own row, and to no other."""
    lengths = [4, 2, 5]
    tower, x, ids, cache, whole = start(lib, seed, lengths, 1)
    before = [[a.clone() for a in pair] for pair in cache]
    steps(tower, x, ids, cache, lengths, 1)
    for old, pair, i in zip(before, cache, range(len(cache))):
        for a, b, name, j in zip(old, pair, ("key", "value"), (0, 1)):
            for s, n in enumerate(lengths):
                assert not torch.equal(a[s, :, n], b[s, :, n]), (
                    f"the new {name} of a sample belongs in row `at` of that sample, in place: "
                    "nothing was written there")
                others = [r for r in range(a.shape[2]) if r != n]
                assert torch.equal(a[s][:, others], b[s][:, others]), (
                    f"each sample writes its own row `at` and no other: another {name} changed")
                if i == 0:
                    close(b[s, :, n], whole[s][1][0][j][:, n], f"the {name} that is kept must be "
                          "the one of expert und, after norm and rotation")


def check_ragged(lib, seed):
    """A sample does not see padding, nor room that is still empty."""
    for lengths in ([4, 2, 5], [6, 6], [1, 7, 3]):
        tower, x, ids, cache, whole = start(lib, seed, lengths, 3)
        got = steps(tower, x, ids, cache, lengths, 3)
        for s, n in enumerate(lengths):
            close(got[:, s], whole[s][0][n:], "a sample must not see padding: rows behind `at` "
                  f"belong to no token of it (lengths {lengths}, sample {s})")


# ---------------------------------------------------------------- decode


def inputs(lib, seed, image=True):
    """A model, tokens padded on the right, lengths and an image block."""
    lm, rng = small_lm(lib, seed), torch.Generator().manual_seed(seed)
    lengths = [5, 2, 4]
    tokens = torch.randint(40, (3, 5), generator=rng)
    picture = torch.randn(3, 4, 24, generator=rng) if image else None
    return lm, tokens, torch.tensor(lengths), picture


@torch.no_grad()
def slow_decode(lm, tokens, length, image, eos, max_new, pick=lambda logits: logits.argmax(-1)):
    """Reads everything again for every token."""
    texts = [row[:n].tolist() for row, n in zip(tokens, length.tolist())]
    done = [False] * len(texts)
    for _ in range(max_new):
        hidden = torch.stack([
            oracle.read_tokens(lm, text, None if image is None else image[i])[-1]
            for i, text in enumerate(texts)])
        logits = hidden @ lm.lm_head.weight.T
        chosen = [eos if d else t for d, t in zip(done, pick(logits).tolist())]
        yield torch.tensor(chosen), logits
        done = [d or t == eos for d, t in zip(done, chosen)]
        if all(done):
            return
        for text, token in zip(texts, chosen):
            text.append(token)


def compare(got, want, what: str):
    """Two lists of (token, logits); logits of samples that have ended do not count."""
    assert len(got) == len(want), f"{what}: {len(got)} tokens were written, not {len(want)}"
    for i, ((t, l), (token, logits)) in enumerate(zip(got, want)):
        assert t.shape == token.shape, f"{what}: yield one token a sample, (b,), first"
        assert l.shape == logits.shape, f"{what}: yield the logits (b, v) behind the token"
        close(l, logits, f"{what}: logits of token {i}", 1e-3, 1e-3)
        assert torch.equal(t.long(), token), f"{what}: token {i} is not the one that pick() chose"


def check_first(lib, seed):
    """The first token comes from the last token of each sample, not from padding."""
    lm, tokens, length, image = inputs(lib, seed)
    got = [*lib.ar.decode(lm, tokens, length, image, 40, 1)]
    assert len(got) == 1, f"with max_new = 1 one token is written, not {len(got)}"
    want = next(slow_decode(lm, tokens, length, image, 40, 1))
    close(got[0][1], want[1], "the first logits must come from the last token of each sample: "
          "position length - 1, not the padding", 1e-3, 1e-3)


def check_against_rereading(lib, seed):
    """Writing with a cache gives what reading everything again gives."""
    for image in (False, True):
        lm, tokens, length, picture = inputs(lib, seed, image)
        for rows, name in ((slice(1), "one sample"), (slice(3), "samples of several lengths")):
            part = tokens[rows, :int(length[rows].max())], length[rows]
            shown = None if picture is None else picture[rows]
            got = [*lib.ar.decode(lm, *part, shown, 99, 5)]
            want = [*slow_decode(lm, *part, shown, 99, 5)]
            compare(got, want, f"{name}, {'after an image' if image else 'without an image'}: what "
                    "is written with a cache must be what reading all again gives")


def check_pick(lib, seed):
    """What pick() chooses is written and read."""
    lm, tokens, length, image = inputs(lib, seed)

    def second(logits):
        return logits.topk(2, dim=-1).indices[:, 1]
    got = [*lib.ar.decode(lm, tokens, length, image, 99, 4, second)]
    compare(got, [*slow_decode(lm, tokens, length, image, 99, 4, second)],
            "the token that pick() chose must be yielded and read next")


def planned(plan):
    """A pick() that says what is on a list, a row for each step."""
    rows = iter(plan)
    return lambda logits: torch.tensor(next(rows))


def check_eos(lib, seed):
    """A sample that has ended yields eos; all ends when the last sample has ended."""
    lm, tokens, length, image = inputs(lib, seed)
    plan = [[7, 8, 9], [40, 3, 4], [5, 6, 40], [1, 40, 2], [3, 3, 3], [4, 4, 4]]
    got = [t.tolist() for t, _ in lib.ar.decode(lm, tokens, length, image, 40, 6, planned(plan))]
    assert len(got) >= 4, ("writing must go on until every sample has written eos, and the last eos "
                           f"is yielded too: here 4 times, not {len(got)}")
    assert len(got) == 4, ("writing must end when every sample has written eos: here after 4 "
                           f"tokens, not {len(got)}")
    assert got[1][0] == 40, "the first eos of a sample must be yielded too"
    ended = all(row[0] == 40 for row in got[1:]) and got[3][2] == 40
    assert ended, "a sample that has ended must yield eos from then on, whatever pick() says"
    assert got == [[7, 8, 9], [40, 3, 4], [40, 6, 40], [40, 40, 40]], (
        "each sample must end by itself: the others go on as pick() says")


def check_max_new(lib, seed):
    """No more than max_new tokens, and none is read that nobody needs."""
    lm, tokens, length, image = inputs(lib, seed)
    count, step = [0], lm.tower.step

    def counted(*args, **more):
        count[0] += 1
        return step(*args, **more)
    lm.tower.step = counted
    got = [*lib.ar.decode(lm, tokens, length, image, 99, 4)]
    assert len(got) == 4, f"with max_new = 4 four tokens are written, not {len(got)}"
    assert count[0] >= 3, "each new token must be read with lm.tower.step()"
    assert count[0] == 3, ("the last token need not be read: four tokens take three steps, not "
                           f"{count[0]}")


def check_reads_once(lib, seed):
    """The context is read once; the arguments stay as they were."""
    lm, tokens, length, image = inputs(lib, seed)
    count, read = [0], lm.tower.read_context

    def counted(*args, **more):
        count[0] += 1
        return read(*args, **more)
    lm.tower.read_context = counted
    before = tokens.clone(), length.clone(), image.clone()
    for _, logits in lib.ar.decode(lm, tokens, length, image, 99, 4):
        assert not logits.requires_grad, "writing needs no gradients: keep @torch.no_grad()"
    assert count[0] == 1, f"the context must be read once, then kept: it was read {count[0]} times"
    assert all(torch.equal(a, b) for a, b in zip(before, (tokens, length, image))), (
        "decode() must not change its arguments: `+=` changes a tensor in place")


def expected(lib):
    return course.load(course.assemble(course.clean_sources(), RIGHT), keep=True)


def show(lib):
    """Milliseconds for each token, with the cache and without."""
    lm = oracles.randomize(lib.ar.LanguageModel(64, 2, 64, 4, 4, 16, 128), 0).eval()
    new, text = 160, torch.randint(60, (1, 8))

    def times(next_token):
        found, begin = [], time.perf_counter()
        for _ in range(new):
            next_token()
            found.append(1000 * (time.perf_counter() - begin))
            begin = time.perf_counter()
        return [sorted(found[max(0, i - 8):i + 9])[len(found[max(0, i - 8):i + 9]) // 2]
                for i in range(new)]
    writing = lib.ar.decode(lm, text, torch.tensor([8]), None, 99, new)
    rows = text

    def again():
        nonlocal rows
        hidden, _ = lm.read_text(rows, torch.tensor([rows.shape[1]]))
        rows = torch.cat([rows, lm.lm_head(hidden[:, -1]).argmax(-1)[:, None]], dim=1)
    lines = {"with a cache": times(lambda: next(writing)), "all read again": times(again)}
    return pictures.curves({k: (range(8, new), v[8:]) for k, v in lines.items()},
                           ("tokens written", "ms a token"), (420, 260))


RIGHT = {
    "joint_attn.Tower.step": """
def step(self, x, ids, cache, at, end, ragged):
    cos_sin = rope(ids.unsqueeze(1), self.head_dim)
    x = x.unsqueeze(1)
    for i, layer in enumerate(self.layers):
        keys, values = cache[i]
        q, k, v = layer.und.qkv(x, cos_sin)
        mixed = []
        for b in range(len(x)):
            n = int(at[b])
            keys[b, :, n], values[b, :, n] = k[b, :, 0], v[b, :, 0]
            mixed.append(attend(q[b:b + 1], keys[b:b + 1, :, :n + 1], values[b:b + 1, :, :n + 1]))
        x = layer.und.finish(x, torch.cat(mixed))
    return self.norm(x).squeeze(1)
""",
    "ar.decode": """
@torch.no_grad()
def decode(lm, tokens, length, image, eos, max_new, pick=lambda logits: logits.argmax(-1)):
    hidden, context = lm.read_text(tokens, length, image)
    cache = []
    for keys, values in context.kv:
        b, g, size, k = keys.shape
        room = keys.new_zeros(b, g, max_new, k)
        cache.append((torch.cat([keys, room], 2), torch.cat([values, room], 2)))
    state = torch.stack([row[n - 1] for row, n in zip(hidden, length.tolist())])
    ended, written = [False] * len(tokens), 0
    while True:
        logits = lm.lm_head(state)
        token = pick(logits).clone()
        for i, e in enumerate(ended):
            if e:
                token[i] = eos
        yield token, logits
        written += 1
        ended = [e or t == eos for e, t in zip(ended, token.tolist())]
        if written == max_new or all(ended):
            break
        state = lm.tower.step(lm.embed_tokens(token), context.next_id + written - 1, cache,
                              context.length + written - 1, size + written, context.ragged)
""",
}


def _step(**changes) -> dict:
    part = {"ids": "ids[:, None]", "mask": "torch.arange(end) <= at[:, None]",
            "expert": "layer.und", "rows": "rows, :, at", "k": "k[:, :, 0]",
            "attend": "attend(q, keys[:, :, :end], values[:, :, :end], mask if ragged else None)",
            "end": "self.norm(x)[:, 0]"} | changes
    return {"joint_attn.Tower.step": f"""
def step(self, x, ids, cache, at, end, ragged):
    x, cos_sin, rows = x[:, None], rope({part["ids"]}, self.head_dim), torch.arange(len(x))
    mask = ({part["mask"]})[:, None, None]
    for layer, (keys, values) in zip(self.layers, cache):
        q, k, v = {part["expert"]}.qkv(x, cos_sin)
        keys[{part["rows"]}], values[{part["rows"]}] = {part["k"]}, v[:, :, 0]
        x = {part["expert"]}.finish(x, {part["attend"]})
    return {part["end"]}
"""}


def _decode(**changes) -> dict:
    part = {"last": "hidden[rows, length - 1]", "token": "torch.where(done, eos, pick(logits))",
            "ids": "context.next_id + i", "at": "context.length + i", "end": "size + i + 1",
            "ragged": "context.ragged", "before": "pass", "after": "pass",
            "stop": "done.all() or i + 1 == max_new", "fed": "token",
            "state": "lm.tower.step(lm.embed_tokens(fed), ids, cache, at, end, ragged)"} | changes
    return {"ar.decode": f"""
@torch.no_grad()
def decode(lm, tokens, length, image, eos, max_new, pick=lambda logits: logits.argmax(-1)):
    hidden, context = lm.read_text(tokens, length, image)
    rows, size = torch.arange(len(tokens)), context.kv[0][0].shape[2]
    cache = [[F.pad(a, (0, 0, 0, max_new)) for a in pair] for pair in context.kv]
    done = torch.zeros_like(length, dtype=torch.bool)
    hidden = {part["last"]}
    for i in range(max_new):
        logits = lm.lm_head(hidden)
        token = {part["token"]}
        {part["before"]}
        yield token, logits
        {part["after"]}
        done = done | (token == eos)
        if {part["stop"]}:
            return
        fed, ids, at, end, ragged = ({part["fed"]}, {part["ids"]}, {part["at"]}, {part["end"]},
                                     {part["ragged"]})
        hidden = {part["state"]}
"""}


WRONG = {
    "rotated by the row": _step(ids="at[:, None]"),
    "id off by one in step": _step(ids="ids[:, None] + 1"),
    "all rows at one place": _step(rows=":, :, at[0]"),
    "padding seen": _step(mask="torch.arange(end) < end + 0 * at[:, None]"),
    "does not see itself": _step(mask="torch.arange(end) < at[:, None]"),
    "empty room seen": _step(
        attend="attend(q, keys, values, F.pad(mask, (0, keys.shape[2] - end), value=True) "
               "if ragged else None)"),
    "is_causal with a cache": _step(attend="attend(q, keys[:, :, :end], values[:, :, :end], "
                                           "causal=True)"),
    "the cache is not seen": _step(attend="attend(q, k, v)"),
    "nothing kept": _step(k="keys[rows, :, at]"),
    "the wrong expert": _step(expert="layer.gen"),
    "no final norm": _step(end="x[:, 0]"),
    "the final norm of gen": _step(end="self.norm_gen(x)[:, 0]"),
    "first logits from padding": _decode(last="hidden[:, -1]"),
    "id off by one": _decode(ids="context.next_id + i + 1"),
    "length for id": _decode(ids="context.length + i"),
    "the first row is overwritten": _decode(at="context.length + i - 1"),
    "a row is skipped": _decode(at="context.length + i + 1", end="size + i + 2"),
    "all samples behind the longest": _decode(at="torch.full_like(length, size + i)"),
    "ids do not count": _decode(ids="context.next_id"),
    "never ragged": _decode(ragged="False"),
    "feeds the likeliest, not the chosen": _decode(fed="logits.argmax(-1)"),
    "writes after eos": _decode(token="pick(logits)"),
    "the first eos is kept back": _decode(before="if bool(((token == eos) | done).all()): return"),
    "stops at the first eos": _decode(stop="done.any() or i + 1 == max_new"),
    "never stops": _decode(stop="i + 1 == max_new"),
    "one token too many is read": _decode(stop="done.all()"),
    "no cache": _decode(
        after="tokens = torch.cat([tokens, token[:, None]], 1); "
              "tokens[rows, length + i] = token; longer = length + i + 1",
        state="lm.read_text(tokens, longer, image)[0][rows, longer - 1]"),
    "changes the lengths": _decode(at="length.add_(1) - 1 + context.length - length + i"),
}
