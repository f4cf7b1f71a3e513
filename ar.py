"""Understanding: image encoder, connector, language model, loss (Sec. 3.2, Eq. 1); tokenizer.

Letters: b batch, l text tokens, n patches, d width, h heads, k head width, v vocabulary.
"""

import heapq
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import groupby, product
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data import UserError, atomic
from diffusion import broadcast, position_table
from joint_attn import Linear, Tower, attend

# --- image encoders, connector, language model ----------------------------------------------------


class ViTBlock(nn.Module):
    """Pre-norm transformer block with timm's parameter names; x (b, n, d) -> (b, n, d)."""

    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width),
                                   "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.attn["qkv"](self.norm1(x)), "b n (three h k) -> three b h n k",
                        three=3, h=self.heads)
        x = x + self.attn["proj"](rearrange(attend(*qkv), "b h n k -> b n (h k)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """SigLIP-style image encoder (Sec. 3.2): every patch of the last layer, no class token."""

    def __init__(self, image: int, patch: int, width: int, mlp: int, heads: int, layers: int):
        super().__init__()
        self.image, self.patch = image, patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.pos_embed = nn.Parameter(position_table(image // patch, width)[None] / 2)
        self.blocks = nn.ModuleList(ViTBlock(width, mlp, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.init_local_attention()

    @torch.no_grad()
    def init_local_attention(self):
        """A start that learns fast (ours, after Trockman and Kolter 2023): queries are keys, so a
        patch attends to patches near its own, and what it finds there is subtracted."""
        for block in self.blocks:
            q, k, v = block.attn["qkv"].weight.chunk(3)
            k.copy_(q.normal_(std=3 * len(q) ** -0.5))
            block.attn["proj"].weight.copy_(-v.normal_(std=(0.4 / len(v)) ** 0.5).T)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> patch embeddings + positions (b, n, d)."""
        return rearrange(self.patch_embed["proj"](pixels), "b d h w -> b (h w) d") + self.pos_embed

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> features (b, n, d)."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (b, h, w) of any size -> what forward takes."""
        return vit_pixels(resize(images, self.image))

    def patches(self, images: Tensor) -> Tensor:
        """uint8 images (b, h, w) -> a feature a patch (b, n, d): the teacher of stage 2."""
        return self(self.prepare(images))

    def summary(self, images: Tensor) -> Tensor:
        """uint8 images (b, h, w) -> one feature an image (b, d), for distances between sets."""
        return self.patches(images).mean(1)


def vit_pixels(images: Tensor) -> Tensor:
    """uint8 or float (b, h, w), 0 to 255 -> float (b, 3, h, w), the ViT's input (released code)."""
    return ((images.float() / 255 - .555895) / .336385)[:, None].expand(-1, 3, -1, -1)


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 images (b, h, w) -> float (b, side, side) in [0, 255]."""
    if images.shape[1:] == (side, side):
        return images.float()
    return F.interpolate(images[:, None].float(), (side, side), mode="bicubic",
                         antialias=True).clamp(0, 255)[:, 0]


class RadDino(ViT):
    """RAD-DINO (a DINOv2 ViT-B/14): teacher of stage 2, features of the generation metrics.

    DINOv2 is our ViT with a class token in front and each residual scaled; the scales are folded
    into the projections. Any size that patches divide: the position table is resized.
    """

    NAMES = (       # Hugging Face's, older and newer -> ours, one after the other
        (r"^dinov2\.", ""), (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.position_embeddings", "pos_embed"), (r"^embeddings\.cls_token", "cls"),
        (r"^encoder\.layer\.", "blocks."), (r"^layernorm\.", "norm."),
        (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."))

    def __init__(self, folder: Path, weights: dict[str, Tensor], heads: int, side=518, mean=0.5307,
                 std=0.2583):
        """`weights`: Hugging Face names; `side`, `mean`, `std`: of the images that it takes.
        Raises UserError: a tensor of `weights` is missing or of another shape."""
        w = {}
        for name, tensor in weights.items():
            for theirs, ours in self.NAMES:
                name = re.sub(theirs, ours, name)
            w[name] = tensor.float()
        try:
            width, _, _, patch = w["patch_embed.proj.weight"].shape
            layers = len({k.split(".")[1] for k in w if k.startswith("blocks.")})
            super().__init__(patch * math.isqrt(w["pos_embed"].shape[1] - 1), patch, width,
                             len(w["blocks.0.mlp.fc1.weight"]), heads, layers)
            self.cls, self.pos_embed = (nn.Parameter(w[k]) for k in ("cls", "pos_embed"))
            for block, kind in product((f"blocks.{i}." for i in range(layers)), ("weight", "bias")):
                w[f"{block}attn.qkv.{kind}"] = torch.cat(
                    [w[f"{block}attn.{n}.{kind}"] for n in "qkv"])
                for i, name in ((1, "attn.proj"), (2, "mlp.fc2")):
                    scale, value = w[f"{block}layer_scale{i}.lambda1"], w[f"{block}{name}.{kind}"]
                    w[f"{block}{name}.{kind}"] = broadcast(scale, value) * value
            self.load_state_dict({k: w[k] for k in self.state_dict()})
        except (LookupError, ValueError, RuntimeError) as e:    # RuntimeError: of another shape
            raise UserError(f"{folder}: no DINOv2 model with plain MLPs; wrong is "
                            f"{str(e).splitlines()[-1].strip()}") from None
        self.side, self.mean, self.std = side, mean, std
        self.requires_grad_(False).eval()

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> class token and patches (b, 1 + n, d)."""
        x = self.patch_embed["proj"](pixels)
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=self.image // self.patch)
        if grid.shape[2:] != x.shape[2:]:
            grid = F.interpolate(grid, x.shape[2:], mode="bicubic")
        x = rearrange(x + grid, "b d h w -> b (h w) d")
        return torch.cat([(self.cls + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def prepare(self, images: Tensor) -> Tensor:
        pixels = (resize(images, self.side) / 255 - self.mean) / self.std
        return pixels[:, None].expand(-1, 3, -1, -1)

    def patches(self, images: Tensor) -> Tensor:
        return self(self.prepare(images))[:, 1:]

    def summary(self, images: Tensor) -> Tensor:
        return self(self.prepare(images))[:, 0]          # the class token


class Connector(nn.Module):
    """Two-layer MLP from image features to the language model's width: (b, n, d_v) -> (b, n, d).
    tanh GELU, as released inference computes; the module used in training had the exact one.
    """

    def __init__(self, vit_width: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(vit_width, width), nn.GELU("tanh"),
                                    nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LanguageModel(nn.Module):
    """Token embeddings, the two-expert tower, and the head that predicts the next token."""

    def __init__(self, vocab: int, layers: int, *sizes: int, share: int = 0):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, sizes[0])
        self.tower = Tower(layers, *sizes, share=share)
        self.lm_head = Linear(sizes[0], vocab, bias=False)

    @torch.no_grad()
    def init_local_attention(self):
        """A start that binds words (ours): half the heads look near, by a bias of q and k in RoPE's
        fastest channels; in the first layer they copy. So "effusion" carries its "left"."""
        for i, und in enumerate(layer.und for layer in self.tower.layers):
            k, v, o = und.head_dim, und.v_proj.weight, und.o_proj.weight
            for bias in (und.q_proj.bias, und.k_proj.bias):         # (heads, 2 of a pair, pairs)
                bias.view(-1, 2, k // 2).chunk(2)[0][:, :, :k // 4] = 1
            if i == 0:
                near, r = v[:len(v) // k // 2 * k], o.shape[1] // len(v)    # r queries share a key
                copied = repeat(nn.init.orthogonal_(near, 0.5), "(g k) d -> d (g r k)", k=k, r=r)
                o[:, :copied.shape[1]] = 0.2 * copied

    def read_text(self, tokens: Tensor, length: Tensor, image: Tensor | None = None):
        """Reads `[BOI image EOI]` (one RoPE id) and then text -> hidden of the text, Context.

        tokens (b, l) padded on the right, `length` (b,) of them count; image (b, m, d) embedded
        with its two markers. Without an image the text starts at RoPE id 0.
        """
        x, ids = self.embed_tokens(tokens), torch.arange(tokens.shape[1], device=tokens.device)
        n_image = 0 if image is None else image.shape[1]
        if n_image:
            x = torch.cat([image, x], dim=1)
            ids = torch.cat([ids.new_zeros(n_image), ids + 1])
        hidden, context = self.tower.read_context(x, ids.expand(len(x), -1), length + n_image,
                                                  n_image)
        return hidden[:, n_image:], context


def report_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1: summed cross entropy of the report's tokens, and how many there are.

    hidden (b, l, d), labels (b, l) with -100 where no loss is taken (prompt, image, padding).
    """
    at = labels != -100
    return F.cross_entropy(head(hidden[at]).float(), labels[at], reduction="sum"), at.sum()


def pick(logits: Tensor, temperature: float, top_p: float, generator=None) -> Tensor:
    """Next token of each row of logits (b, v): greedy at temperature 0, else sampled from the
    smallest set of tokens whose probability reaches top_p (nucleus sampling)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)             # the first is never dropped
    chosen = torch.multinomial(p.cpu(), 1, generator=generator).to(order.device)
    return order.gather(-1, chosen)[:, 0]


@torch.no_grad()
def decode(lm: LanguageModel, tokens: Tensor, length: Tensor, image: Tensor | None, eos: int,
           max_new: int, pick=lambda logits: logits.argmax(-1)):
    """Writes token by token. Yields (next ids (b,), logits (b, v)); a finished sample yields eos.

    Reads the context once, then feeds one token a step to a preallocated key/value cache. Ends
    when every sample has written eos, or after max_new tokens.
    """
    hidden, (cache, at, ids, ragged) = lm.read_text(tokens, length, image)
    rows, size = torch.arange(len(tokens), device=tokens.device), cache[0][0].shape[2]
    cache = [[F.pad(a, (0, 0, 0, max_new)) for a in pair] for pair in cache]
    done = torch.zeros_like(length, dtype=torch.bool)
    hidden = hidden[rows, length - 1]
    for i in range(max_new):
        logits = lm.lm_head(hidden)
        token = torch.where(done, eos, pick(logits))
        yield token, logits
        done |= token == eos
        if done.all() or i + 1 == max_new:
            return
        hidden = lm.tower.step(lm.embed_tokens(token), ids + i, cache, at + i, size + i + 1, ragged)


# --- tokenizer (Hugging Face's file format; you need not read on): text -> words ------------------
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORD = ("L", "M", "Nd", "Nl", "Pc")  # the Unicode categories that \w stands for
# The parts of a regex: a property like \p{Lu} or \P{^N}, another escape, "[", "[^", "&&", any other
PARTS = re.compile(r"\\([pP])\{(\^?)(\w+)\}|\\.|\[\^?|&&|.", re.S)
BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


@lru_cache(None)
def _categories(size: int) -> dict[str, str]:
    """{category: its characters below `size`, as the inside of a [class]}; slow, so kept."""
    ranges, end = defaultdict(str), 0
    for category, run in groupby(map(unicodedata.category, map(chr, range(size)))):
        start, end = end, end + len(list(run))
        ranges[category] += f"\\U{start:08x}-\\U{end - 1:08x}"
    return ranges


@lru_cache(None)
def _compile(pattern: str, size: int = 0x10000) -> re.Pattern:
    """A regex of tokenizer.json (Oniguruma's dialect) as Python's, all of it in one group.

    Python lacks properties and classes in classes, and x{1,3}+ means (x{1,3})+ there. Its sets are
    fast below 0x10000 only, so the properties end at `size`: ASCII texts need no more. Raises
    ValueError or re.error on what is not supported.
    """
    out, depth = [], 0  # depth: how many classes are open
    for m in PARTS.finditer(re.sub(r"\{1,\d*\}\+", "+", pattern)):
        part, (p, caret, name) = m[0], m.groups()
        if depth and part in ("[^", "&&"):
            raise ValueError(f"{part} in a class in a regex")
        if name or part in (r"\w", r"\W"):
            names, negate = name or WORD, (p == "P") != bool(caret) or part == r"\W"
            ranges = [r for c, r in _categories(size).items() if c.startswith(names) != negate]
            if not ranges:
                raise ValueError(f"the property {part} in a regex")
            part = "".join(ranges) if depth else f"[{''.join(ranges)}]"
        elif part in ("[", "[^") or part == "]" and depth:
            outside, depth = depth, depth + (-1 if part == "]" else 1)
            part = part if 0 in (outside, depth) else ""  # so [a[bc]] becomes [abc]
        out.append(part)
    return re.compile(f"({''.join(out)})", re.M)  # ^ and $ are those of lines


def _split(pattern: str, behavior: str, invert: bool, text: str) -> list[str]:
    """Cut `text` at the matches of a regex (or, `invert`: at the rest) as `behavior` says."""
    regex = _compile(pattern, 0x10000 if text.isascii() else 0x110000)
    parts, period = regex.split(text), 1 + regex.groups  # no match, a match and its groups, ...
    others, matches = parts[::period], [*parts[1::period], ""]
    if behavior == "Removed":
        words = matches if invert else others
    elif behavior == "Isolated":
        words = [word for pair in zip(others, matches) for word in pair]
    elif (behavior == "MergedWithPrevious") != invert:
        words = map("".join, zip(others, matches))
    else:
        words = map("".join, zip(["", *matches], others))
    return [word for word in words if word]


def _byte_level(add_space: bool, use_regex: bool, text: str) -> list[str]:
    """Cut `text` into words and show every byte as one printable character: " é" -> ["ĠÃ©"]."""
    if add_space and text[:1] not in ("", " "):
        text = " " + text
    words = _split(GPT2_WORDS, "Isolated", False, text) if use_regex else [text]
    return [w.encode("utf-8", "replace").decode("latin-1").translate(BYTE_TO_CHAR) for w in words]


def _steps(spec: dict) -> list[Callable[[str], list[str]]]:
    """A pre-tokenizer of tokenizer.json as functions from a text to its pieces, one by one."""
    kind, behavior, invert = spec["type"], "Isolated", False
    if kind == "Sequence":
        return [step for part in spec["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel":
        return [partial(_byte_level, spec["add_prefix_space"], spec.get("use_regex", True))]
    if kind == "Digits":
        pattern = r"\p{N}" if spec["individual_digits"] else r"\p{N}+"
    elif kind == "Split" and spec["behavior"] in BEHAVIORS:
        (form, pattern), = spec["pattern"].items()
        pattern = re.escape(pattern) if form == "String" else pattern
        behavior, invert = spec["behavior"], spec["invert"]
        if behavior == "Contiguous":  # matches in a row are one
            pattern, behavior = f"(?:{pattern})+", "Isolated"
    else:
        raise UserError(f"tokenizer.json: the pre-tokenizer {kind} is not supported")
    _compile(pattern)  # an error comes now, not at the first text
    return [partial(_split, pattern, behavior, invert)]


# --- tokenizer: words -> ids ----------------------------------------------------------------------
class Tokenizer:
    """Byte-level BPE; ids and texts are those of Hugging Face's `tokenizers` on the same file.

    Text is cut into words, a word's UTF-8 bytes become 256 printable characters (" " is "Ġ"), and
    the neighbours whose merge was learned first are put together, again and again: with the merges
    (a b) and (Ġ ab), "abc ab" is the words abc and Ġab, and the tokens ab, c, Ġab.
    """

    def __init__(self, spec: dict):
        """`spec`: a parsed tokenizer.json; `load` turns errors into UserError."""
        self.spec, model = spec, spec["model"]
        kinds = re.findall(r'"type": "(\w+)"', json.dumps(spec.get("normalizer")))
        odd = {model.get("type", "BPE"), *kinds} - {"BPE", "NFC", "Sequence"}
        odd |= {n for n in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(n)}
        self.nfc, self.steps = "NFC" in kinds, _steps(spec["pre_tokenizer"] or {"type": None})
        if odd or _byte_level not in [step.func for step in self.steps]:
            raise UserError(f"tokenizer.json: {', '.join(odd) or 'no ByteLevel'}: not supported")
        self.cache = {}  # (steps done, piece) -> ids
        self.pieces, self.merges = model["vocab"], {}  # merges: (id, id) -> (rank, id of the two)
        for rank, pair in enumerate(model["merges"]):
            a, b = pair.split(" ") if isinstance(pair, str) else pair
            self.merges[self.pieces[a], self.pieces[b]] = rank, self.pieces[a + b]

        self.added = {token["content"]: token for token in spec.get("added_tokens") or ()}
        self.finder = re.compile("|".join(
            rf"(?<!\w){re.escape(t)}(?!\w)" if self.added[t]["single_word"] else re.escape(t)
            for t in sorted(self.added, key=len, reverse=True)) or "(?!)")  # the longest one wins
        # All tokens, the added ones too, and what an id decodes to
        self.vocab = {content: t["id"] for content, t in self.added.items()} | self.pieces
        if not all(type(i) is int and i >= 0 for i in self.vocab.values()):
            raise ValueError("an id is not a whole number")
        self.bytes = {}
        for token, i in self.vocab.items():
            known = all(c in CHAR_TO_BYTE for c in token)
            self.bytes[i] = bytes(CHAR_TO_BYTE[c] for c in token) if known else token.encode()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises UserError if it is missing, broken or not supported."""
        try:
            return cls(json.loads(Path(path).read_text("utf-8-sig")))
        except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError,
                re.error) as e:
            raise UserError(f"cannot use the tokenizer {path}: {type(e).__name__} {e}") from e

    def save(self, path: Path):
        """Write a tokenizer.json that `tokenizers` of Hugging Face opens too, or nothing."""
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")

    def __len__(self):
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Adds no begin or end token: the file's post-processor is not run."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids, end = [], 0
        for m in self.finder.finditer(text):
            token, before = self.added[m[0]], text[end:m.start()]
            ids += self._ids(before.rstrip() if token["lstrip"] else before) + [token["id"]]
            end = re.compile(r"\s*").match(text, m.end()).end() if token["rstrip"] else m.end()
        return ids + self._ids(text[end:])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, special tokens too. Skips unknown ids; bad UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def _ids(self, piece: str, done: int = 0) -> list[int]:
        """Ids of a piece that has been through `done` steps; those of short ones are remembered."""
        if (done, piece) in self.cache:
            return self.cache[done, piece]
        ids = self._merge(piece) if done == len(self.steps) else [
            i for part in self.steps[done](piece) for i in self._ids(part, done + 1)]
        if len(piece) <= 48 and len(self.cache) < 200_000:
            self.cache[done, piece] = ids
        return ids

    def _merge(self, word: str) -> list[int]:
        """Ids of a word of byte characters, by a heap of the possible merges: O(n log n)."""
        if self.spec["model"].get("ignore_merges") and word in self.pieces:
            return [self.pieces[word]]
        ids = [self.pieces[c] for c in word if c in self.pieces]
        n, heap = len(ids), []
        ids.append(None)  # ids[n] and ids[-1]: the neighbour of both ends, it merges with nothing
        before, after = [*range(-1, n)], [*range(1, n + 1), n]

        def offer(i):  # symbol i and the next one
            merge = self.merges.get((ids[i], ids[after[i]]))
            if merge:
                heapq.heappush(heap, (merge[0], i))

        for i in range(n):
            offer(i)
        while heap:  # the oldest merge first, of these the leftmost
            rank, i = heapq.heappop(heap)
            gone = after[i]
            current, both = self.merges.get((ids[i], ids[gone]), (None, None))
            if current == rank:  # else one of the two has been merged meanwhile
                ids[i], ids[gone], after[i] = both, None, after[gone]
                before[after[i]] = i
                offer(before[i])
                offer(i)
        return [i for i in ids if i is not None]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int,
              special: Iterable[str] = ()) -> "Tokenizer":
        """Learn a tokenizer with GPT-2's words: ids are `special` tokens, 256 bytes, merges.

        The most frequent pair is merged first, of equal ones that with the smallest ids. Stops
        early when no pair is left. Raises UserError if `vocab_size` has no room for the bytes.
        """
        special = dict.fromkeys(special)  # each once
        vocab = {token: i for i, token in enumerate(special | dict.fromkeys(sorted(CHAR_TO_BYTE)))}
        if vocab_size < len(vocab):
            raise UserError(f"vocab_size must be at least {len(vocab)}: special tokens and bytes")
        counts = Counter(word for text in texts for word in _byte_level(False, True, text))
        # A word is a string too while it is merged: its characters stand for ids
        words = [["".join(chr(vocab[c]) for c in word), count] for word, count in counts.items()]
        pairs, where = Counter(), defaultdict(set)  # how often, and in which words, a pair is

        def tally(n, sign):
            word, count = words[n]
            for pair in zip(word, word[1:]):
                pairs[pair] += sign * count
                where[pair].add(n)

        for n in range(len(words)):
            tally(n, 1)
        merges = []
        while len(vocab) < vocab_size and (most := max(pairs.values(), default=0)):
            pair = min(pair for pair, count in pairs.items() if count == most)
            left, right = (list(vocab)[ord(c)] for c in pair)
            merges.append(f"{left} {right}")
            new = vocab.setdefault(left + right, len(vocab))
            for n in where.pop(pair):
                tally(n, -1)
                words[n][0] = words[n][0].replace("".join(pair), chr(new))
                tally(n, 1)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": vocab[t], "content": t, **flags, "special": True} for t in special]
        return cls({"version": "1.0", "added_tokens": added, "pre_tokenizer": level,
                    "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}})
