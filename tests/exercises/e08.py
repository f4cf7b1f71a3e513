"""Exercise 8: reading an image block and text with one expert."""

import torch

import oracles
import pictures
from course import close, noise

TITLE = "Reading an image and its report"
EQUATION = "Eq. 5"
LAB = "towers"
MINUTES = 25
DIFFICULTY = 2
TARGETS = ["joint_attn.Layer.read"]
TEXT = """
The understanding branch reads `[BOI image EOI | text]`. All tokens use expert `self.und`. Who sees
whom:

- **Text is causal**: a token sees the whole image, the text before it, and itself.
- **The image block sees itself**: its first `n_image` tokens (markers included) see each other in
  both directions, and nothing that comes after.

`Layer.read(x, cos_sin, n_image)` takes tokens x `(b, l, d)` and returns two things: the new tokens
`(b, l, d)`, and the pair (k, v) of this layer, each `(b, g, l, k)`, normed and rotated, as `qkv`
gives them. The denoising branch will attend to them. `n_image` may be 0 (a caption alone).

You have: `self.und.qkv(x, cos_sin)` and `self.und.finish(x, mixed)` (exercise 7), and
`attend(q, k, v, mask=None, causal=False)`, which is Eq. 5 for all heads, also where there are fewer
key heads than query heads. A boolean mask that broadcasts to (b, h, l, l), True where a query sees
a key, is right. The real code avoids the (l, l) mask with two calls of `attend`.

Worked example, 3 image tokens and 2 of text; a row is a query, `x` where it sees a key:

```
         i1 i2 i3 t1 t2
    i1    x  x  x  .  .
    i2    x  x  x  .  .
    i3    x  x  x  .  .
    t1    x  x  x  x  .
    t2    x  x  x  x  x
```
"""
HINTS = (
    "Without an image the whole thing is causal. What is wrong with a causal pass for the image?",
    "One causal call over everything is right for all rows of text. The image's rows can be "
    "computed again, among themselves, without a mask.",
    "`torch.cat([attend(q_i, k_i, v_i), mixed[:, :, n_image:]], dim=2)`, where `q_i` has the first "
    "n_image tokens of axis 2. Skip it if n_image is 0. Call `finish` once, for all tokens.",
)
SEES = "The mask, measured: move a token a little, and see which outputs change."


def sees_of(n_image: int, n_text: int) -> torch.Tensor:
    sees = torch.ones(n_image + n_text, n_image + n_text).tril().bool()
    sees[:n_image, :n_image] = True
    return sees


def ids_of(n_image: int, n_text: int) -> list[int]:
    return [0] * n_image + list(range(bool(n_image), n_text + bool(n_image)))


def measured(lib, seed, n_image: int, n_text: int) -> torch.Tensor:
    """Which output of read() depends on which input: (l, l) of bool."""
    layer = oracles.small_layer(lib, seed).double()
    cos_sin = tuple(a.double() for a in oracles.angles(
        torch.tensor([ids_of(n_image, n_text)]), 8))
    with torch.no_grad():
        return oracles.reads(lambda x: layer.read(x[None], cos_sin, n_image)[0][0],
                             noise(seed, n_image + n_text, 24))


def check_returns(lib, seed):
    """read() returns the new tokens, and the pair of keys and values."""
    layer, ids = oracles.small_layer(lib, seed), torch.tensor([ids_of(3, 4)]).expand(2, -1)
    found = layer.read(noise(seed, 2, 7, 24), oracles.angles(ids, 8), 3)
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    assert pair, "read() must return two things: the tokens, and the pair (k, v)"
    assert found[0].shape == (2, 7, 24), (
        f"read() must return tokens (b, l, d), not {tuple(found[0].shape)}")
    assert len(found[1]) == 2, "the second thing that read() returns must be the pair (k, v)"


def check_image_sees_itself(lib, seed):
    """The image block sees itself in both directions, and no text."""
    sees = measured(lib, seed, 4, 3)
    assert bool(sees[:4, :4].all()), ("every image token must see every other one, also those "
                                      "after it: the image block must not be causal")
    assert not bool(sees[:4, 4:].any()), "no image token may see text"


def check_text_is_causal(lib, seed):
    """Text sees the image, the text before it and itself, nothing after it."""
    for n_image in (4, 0):
        text = measured(lib, seed, n_image, 4)[n_image:]
        assert bool(text[:, :n_image].all()), "every text token must see the whole image"
        after = text[:, n_image:].triu(1)
        assert not bool(after.any()), "text must be causal: a token sees a token after it"
        assert bool((text[:, n_image:] | ~torch.ones(4, 4).tril().bool()).all()), (
            "a text token must see all text before it, and itself")


def check_values(lib, seed):
    """Tokens equal Eq. 3-5 with a dense mask, all by expert und."""
    for n_image, n_text, kv_heads in ((3, 4, 2), (0, 5, 4), (5, 1, 1)):
        layer = oracles.small_layer(lib, seed, 4, kv_heads)
        ids, n = ids_of(n_image, n_text), n_image + n_text
        x, cos_sin = noise(seed, 2, n, 24), oracles.angles(torch.tensor([ids]), 8)
        got, pair = layer.read(x, cos_sin, n_image)
        slow = [oracles.layer([layer.und] * n, a, ids, sees_of(n_image, n_text)) for a in x]
        close(got, torch.stack([s[0] for s in slow]), "new tokens must be those of Eq. 3-5 with "
              f"the mask of the text, all with expert und (n_image = {n_image})")
        for i, name in enumerate(("keys", "values")):
            close(pair[i], torch.stack([s[1][i] for s in slow]), f"read() must return the {name} "
                  "of all tokens, as qkv() gives them")


def check_padding(lib, seed):
    """Tokens behind the end of a shorter text change nothing before it."""
    layer, ids = oracles.small_layer(lib, seed), torch.tensor([ids_of(3, 4)])
    x = noise(seed, 1, 7, 24)
    long, _ = layer.read(x, oracles.angles(ids, 8), 3)
    cut, _ = layer.read(x[:, :5], oracles.angles(ids[:, :5], 8), 3)
    close(long[:, :5], cut, "tokens behind a shorter text must not change it: causality keeps "
          "padding out")


def check_arguments_stay(lib, seed):
    """read() does not change x, and lets gradients through."""
    layer, ids = oracles.small_layer(lib, seed), torch.tensor([ids_of(3, 2)])
    x = noise(seed, 1, 5, 24)
    before = x.clone()
    out, (k, v) = layer.read(x, oracles.angles(ids, 8), 3)
    assert torch.equal(x, before), "read() must not change x in place"
    assert out.requires_grad and k.requires_grad and v.requires_grad, (
        "gradients must reach expert und: stage 1 trains it through read()")


def expected(lib):
    def read(self, x, cos_sin, n_image):
        angle = torch.atan2(cos_sin[1], cos_sin[0])[0, 0, :, -1]    # the slowest channel: id * rate
        ids = (angle / 10000 ** (-3 / 4)).round().int().tolist()
        n = x.shape[1]
        new, (k, v) = oracles.layer([self.und] * n, x[0], ids, sees_of(n_image, n - n_image))
        return new[None], (k[None], v[None])
    lib.joint_attn.Layer.read = read
    return lib


def show(lib):
    names = ["BOI", "i1", "i2", "i3", "EOI", "t1", "t2", "t3", "t4"]
    one = pictures.matrix(measured(lib, 0, 5, 4).float(), names, names)
    two = pictures.matrix(measured(lib, 0, 0, 4).float(), names[5:], names[5:])
    return pictures.beside([pictures.titled(one, "a row sees the blue columns"),
                            pictures.titled(two, "a caption alone")], 20)


RIGHT = {"joint_attn.Layer.read": """
def read(self, x, cos_sin, n_image):
    l = x.shape[1]
    q, k, v = self.und.qkv(x, cos_sin)
    at = torch.arange(l, device=x.device)
    sees = (at[:, None] >= at) | ((at[:, None] < n_image) & (at < n_image))
    repeat = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("bhik,bhjk->bhij", q, keys) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~sees, -1e9).softmax(-1)
    return self.und.finish(x, weights @ values), (k, v)
"""}


def variant(old: str, new: str) -> dict:
    """A right answer with one thing changed."""
    text = """
def read(self, x, cos_sin, n_image):
    q, k, v = self.und.qkv(x, cos_sin)
    mixed = attend(q, k, v, causal=True)
    if n_image:
        q_i, k_i, v_i = (a[:, :, :n_image] for a in (q, k, v))
        mixed = torch.cat([attend(q_i, k_i, v_i), mixed[:, :, n_image:]], dim=2)
    return self.und.finish(x, mixed), (k, v)
"""
    assert text.count(old) == 1
    return {"joint_attn.Layer.read": text.replace(old, new)}


WRONG = {
    "image block causal": variant("if n_image:", "if False:"),
    "text looks ahead": variant("causal=True", "causal=False"),
    "image sees text": variant("attend(q_i, k_i, v_i)", "attend(q_i, k, v)"),
    "text sees no image": variant("mixed[:, :, n_image:]", "attend(q[:, :, n_image:], "
                                  "k[:, :, n_image:], v[:, :, n_image:], causal=True)"),
    "text causal from the wrong end": variant(
        "mixed[:, :, n_image:]", "attend(q[:, :, n_image:], k, v, causal=True)"),
    "finished by gen": variant("self.und.finish", "self.gen.finish"),
    "q, k, v of gen": variant("self.und.qkv", "self.gen.qkv"),
    "no finish": variant("self.und.finish(x, mixed)", "x + mixed.transpose(1, 2).flatten(2)[..., "
                         ":x.shape[-1]]"),
    "keys of the text alone": variant("(k, v)\n", "(k[:, :, n_image:], v[:, :, n_image:])\n"),
    "values and keys exchanged": variant("mixed), (k, v)", "mixed), (v, k)"),
    "EOI is taken for text": variant("if n_image:", "n_image = max(0, n_image - 1)\n"
                                     "    if n_image:"),
    "detached keys": variant("mixed), (k, v)", "mixed), (k.detach(), v.detach())"),
}
