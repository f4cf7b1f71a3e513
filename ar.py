"""Understanding: tokenizer, image encoder, connector, language model (Sec. 3.2, Eq. 1).

Letters: b batch, l text tokens, n patches, d width, h heads, k head width, v vocabulary.
"""

import heapq
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data import UserError, vit_pixels
from joint_attn import Tower, attend

# --- tokenizer: text -> words ---------------------------------------------------------------------
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SETS = {"s": ("Z", "Ccs"), "d": ("Nd",), "w": ("L", "M", "Nd", "Nl", "Pc")}  # categories
PROPERTY = re.compile(r"\\([pP])\{(\^?)(\w+)\}|\\([sSdDwW])|\\.", re.S)
# a class, an interval and what follows it, a property or another escape, "(" or "(?", a character
TOKEN = re.compile(r"\[\^?\]?(?:\\.|[^][\\])*\]|(\{(?:\d+,?\d*|,\d+)\})([+?]?)"
                   r"|\\[pP]\{\^?\w+\}|\\.|\(\??|.", re.S)
UNLIKE_PYTHON = re.compile(r"\(\?[a-z]*[msx-]|\\[bBZ]|&&")
# Which neighbours (before, after: is it a match?) a Split puts together again
GLUED = {"Isolated": [], "Removed": [], "Contiguous": [(True, True), (False, False)],
         "MergedWithPrevious": [(False, True)], "MergedWithNext": [(True, False)]}
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


@lru_cache(None)
def _code_points(size):
    """{general category: its code points below `size`, as the inside of a [class]}."""
    categories = list(map(unicodedata.category, map(chr, range(size))))
    for point in (*range(9, 14), 0x85):  # the controls in \s; `re` also takes \x1c-\x1f for spaces
        categories[point] = "Ccs"
    ranges, start = defaultdict(str), 0
    for category, run in groupby(categories):
        end = start + len(list(run))
        ranges[category] += f"\\U{start:08x}-\\U{end - 1:08x}"
        start = end
    return ranges


@lru_cache(256)
def _compile(pattern, size):
    """A regex of tokenizer.json (Oniguruma's dialect) as Python's, all of it in one group.

    Properties lose the code points from `size` on: `re` looks a set up fast below 0x10000 only, so
    ASCII texts get a regex of their own. Raises ValueError or re.error on what `re` cannot say.
    """
    def ranges(m):
        p, caret, name, short = m.groups()
        if not (name or short):
            return m[0]
        chosen = SETS[short.lower()] if short else (name,)
        negate = short.isupper() if short else (p == "P") != bool(caret)
        points = _code_points(size)
        if not any(c.startswith(chosen) for c in points):
            raise ValueError(f"unknown property {m[0]}")
        return "".join(points[c] for c in points if c.startswith(chosen) != negate)

    if UNLIKE_PYTHON.search(pattern):
        raise ValueError(f"it means something else in Python: {pattern}")
    out = []
    for m in TOKEN.finditer(pattern):
        text = PROPERTY.sub(ranges, m[0])
        if text == "[":  # not a whole class, so there is another one inside
            raise ValueError(f"a class in a class: {pattern}")
        if text != m[0] and m[0][0] == "\\":
            text = f"[{text}²³¹¼½¾]" if m[0] == r"\w" else f"[{text}]"  # in [\w] they are not
        elif m[2] == "+" or m[2] and "," not in m[1]:  # x{1,3}+ is (?:x{1,3})+ there
            text = f"(?:{out.pop()}{m[1]}){m[2]}"
        out.append("(?:" if text == "(" else text)
    return re.compile(f"({''.join(out)})", re.M)  # ^ and $ are those of lines


def _split(pattern, behavior, invert, text):
    """Cut `text` at the matches of `pattern`; `behavior` (GLUED) says where the matches go."""
    parts = _compile(pattern, 0x10000 if text.isascii() else 0x110000).split(text)
    if behavior == "Isolated":
        return [p for p in parts if p]
    words, before = [], None
    for n, part in enumerate(parts):  # no match, match, no match, ...
        match = n % 2 != invert
        if not part and not n % 2:
            continue
        if (before, match) in GLUED[behavior]:
            words[-1].append(part)
        elif behavior != "Removed" or not match:
            words.append([part])
        before = match
    return [w for w in map("".join, words) if w]


def _add_space(text):
    return [text if text.startswith(" ") else " " + text]


def _byte_chars(text):  # every byte as one printable character: " é" -> ["ĠÃ©"]
    return [text.encode("utf-8", "replace").decode("latin-1").translate(BYTE_TO_CHAR)]


def _steps(spec):
    """A pre-tokenizer of tokenizer.json as functions text -> pieces, a normalizer text -> text."""
    if spec is None:
        return []
    kind = spec["type"]
    if kind == "Sequence":
        parts = spec["pretokenizers"] if "pretokenizers" in spec else spec["normalizers"]
        return [step for part in parts for step in _steps(part)]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [partial(unicodedata.normalize, kind)]
    if kind == "ByteLevel":
        words = [partial(_split, GPT2_WORDS, "Isolated", False)] * spec.get("use_regex", True)
        return [_add_space] * spec["add_prefix_space"] + words + [_byte_chars]
    if kind == "Digits":
        pattern, behavior = r"\p{N}", "Isolated" if spec["individual_digits"] else "Contiguous"
    elif kind == "Split" and spec["behavior"] in GLUED:
        (form, pattern), = spec["pattern"].items()
        pattern, behavior = re.escape(pattern) if form == "String" else pattern, spec["behavior"]
    else:
        raise UserError(f"tokenizer.json: the normalizer or pre-tokenizer {kind} is not supported")
    _compile(pattern, 0x10000)  # tells now what is not supported, not at the first text
    return [partial(_split, pattern, behavior, spec.get("invert", False))]


# --- tokenizer: words -> ids ----------------------------------------------------------------------
class Tokenizer:
    """Byte-level BPE; ids and texts are those of Hugging Face's `tokenizers` on the same file.

    Text is cut into words, a word's UTF-8 bytes become 256 printable characters (" " is "Ġ"), and
    the neighbours whose merge was learned first are put together, again and again. For example

    >>> tok = Tokenizer.train(["ab abc ab"], vocab_size=1 + 256 + 3, special=["<end>"])
    >>> tok.spec["model"]["merges"]  # (a b) 3 times, then (Ġ ab) twice, then (Ġab c) once
    ['a b', 'Ġ ab', 'Ġab c']
    >>> [tok.decode([i]) for i in tok.encode("abc ab<end>")]
    ['ab', 'c', ' ab', '<end>']
    """

    def __init__(self, spec):
        """`spec` is a parsed tokenizer.json; `vocab` {token: id} has the added tokens too."""
        model, self.spec = spec["model"], spec
        odd = [option for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
               if model.get(option)]
        if model.get("type", "BPE") != "BPE" or odd:
            raise UserError("tokenizer.json: only plain BPE is supported, not "
                            + " ".join([str(model.get("type")), *odd]))
        self.pieces, self.merges = model["vocab"], {}  # merges: (id, id) -> (rank, id of the two)
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            both = self.pieces[left + right]
            self.merges[self.pieces[left], self.pieces[right]] = rank, both
        self.normalizer, self.steps = _steps(spec.get("normalizer")), _steps(spec["pre_tokenizer"])
        if _byte_chars not in self.steps:
            raise UserError("tokenizer.json: not supported without a ByteLevel pre-tokenizer")
        self.cache = [{} for _ in range(len(self.steps) + 1)]  # after each step: {piece: ids}

        self.added = {t["content"]: t for t in spec.get("added_tokens", ()) if t["content"]}
        self.vocab = {content: t["id"] for content, t in self.added.items()} | self.pieces
        self.finders = []  # added tokens are looked for in the raw text, then in the normalized
        for normalized in (False, True):
            tokens = [c for c, t in self.added.items() if t["normalized"] == normalized]
            longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
            self.finders.append(re.compile("|".join(longest_first) or "(?!)"))
        self.bytes = {}  # id -> what it decodes to
        for token, i in self.vocab.items():
            known = all(c in CHAR_TO_BYTE for c in token)
            self.bytes[i] = bytes(CHAR_TO_BYTE[c] for c in token) if known else token.encode()

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json. Raises UserError if it is missing, broken or not supported."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, LookupError, TypeError, AttributeError, ValueError, re.error) as e:
            raise UserError(f"cannot use the tokenizer {path}: {type(e).__name__} {e}") from e

    def save(self, path):
        """Write a tokenizer.json that Hugging Face's `tokenizers` opens too."""
        Path(path).write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")

    def __len__(self):
        return len(self.vocab)

    def token_to_id(self, token):
        """The id of a token, e.g. "<image>"; raises UserError if the vocabulary lacks it."""
        if token not in self.vocab:
            raise UserError(f"the tokenizer has no token {token}")
        return self.vocab[token]

    def encode(self, text):
        """str -> list of ids. Adds no begin or end token: the file's post-processor is not run."""
        ids = []
        for part in self._find_added(text, self.finders[0]):
            if isinstance(part, int):
                ids.append(part)
                continue
            for step in self.normalizer:
                part = step(part)
            for p in self._find_added(part, self.finders[1]):
                ids += [p] if isinstance(p, int) else self._ids(p, 0)
        return ids

    def decode(self, ids):
        """Ids -> str, special tokens too. Unknown ids are skipped; bad UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def _find_added(self, text, finder):
        """The text as a list of the added tokens' ids (int) and what is between them (str)."""
        out, end = [], 0
        space = _compile(r"\s", 0x10000).match
        for m in finder.finditer(text):
            token, (start, stop) = self.added[m[0]], m.span()
            if token["single_word"]:  # its neighbours must not be \w
                word = _compile("[\\w\u200c\u200d]", 0x110000).match
                if start and word(text, start - 1) or word(text, stop):
                    continue
            if token["lstrip"]:
                start = max(start, end)  # the token before may have taken this one's spaces
                while start > end and space(text, start - 1):
                    start -= 1
            while token["rstrip"] and space(text, stop):
                stop += 1
            out += [text[end:start]] + [self.vocab[m[0]]] * (start < stop)
            end = stop
        return [part for part in [*out, text[end:]] if part != ""]

    def _ids(self, piece, step):
        """Ids of a piece that has been through the first `step` steps; short pieces are cached."""
        cache = self.cache[step]
        if piece in cache:
            return cache[piece]
        if step == len(self.steps):
            ids = self._merge(piece)
        else:
            ids = [i for p in self.steps[step](piece) for i in self._ids(p, step + 1)]
        if len(cache) >= 50_000:
            cache.clear()
        if len(piece) <= 48:
            cache[piece] = ids
        return ids

    def _merge(self, word):
        """Ids of a word (byte characters): a heap of the possible merges, O(n log n)."""
        if self.spec["model"].get("ignore_merges") and word in self.pieces:
            return [self.pieces[word]]
        ids = [self.pieces[c] for c in word if c in self.pieces]
        n = len(ids)
        ids.append(None)  # ids[n] and ids[-1]: both ends' neighbour, which merges with nothing
        before, after = [*range(-1, n)], [*range(1, n + 1), n]

        def find(i):  # rank and id of the merge of symbol i with the next one
            return self.merges.get((ids[i], ids[after[i]]), (None, None))

        heap = [rank * n + i for i in range(n) if (rank := find(i)[0]) is not None]
        heapq.heapify(heap)  # the oldest merge first, of these the leftmost
        while heap:
            rank, i = divmod(heapq.heappop(heap), n)
            current, both = find(i)
            if current != rank:  # one of the two has been merged meanwhile
                continue
            gone = after[i]
            ids[i], ids[gone], after[i] = both, None, after[gone]
            before[after[i]] = i
            for k in (before[i], i):
                rank, _ = find(k)
                if rank is not None:
                    heapq.heappush(heap, rank * n + k)
        return [i for i in ids if i is not None]

    @classmethod
    def train(cls, texts, vocab_size, special=()):
        """Learn a tokenizer with GPT-2's words: ids are `special` tokens, 256 bytes, merges.

        The most frequent pair is merged first, of equal ones that with the smallest ids. Stops
        early when no pair is left. Raises UserError if `vocab_size` has no room for the bytes.
        """
        special = list(dict.fromkeys(special))
        tokens = special + [c for c in sorted(CHAR_TO_BYTE) if c not in special]
        vocab, merges = {t: i for i, t in enumerate(tokens)}, []
        if vocab_size < len(vocab):
            raise UserError(f"vocab_size must be at least {len(vocab)}: special tokens and bytes")
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": True}
        split, to_bytes = _steps(level)
        counts = Counter(word for text in texts for word in split(text))
        words = [([vocab[c] for c in to_bytes(w)[0]], count) for w, count in counts.items()]
        pairs, where = Counter(), defaultdict(set)  # how often, and in which words, a pair is
        heap, changed = [], set()

        def tally(n, sign):
            word, count = words[n]
            for pair in zip(word, word[1:]):
                pairs[pair] += sign * count
                where[pair].add(n)
                changed.add(pair)

        for n in range(len(words)):
            tally(n, 1)
        while len(vocab) < vocab_size:
            for pair in changed:
                heapq.heappush(heap, (-pairs[pair], pair))
            changed.clear()
            while heap and -heap[0][0] != pairs[heap[0][1]]:  # outdated: the new count is in too
                heapq.heappop(heap)
            if not heap or not heap[0][0]:
                break
            _, pair = heapq.heappop(heap)
            left, right = (tokens[i] for i in pair)
            new = vocab.setdefault(left + right, len(vocab))
            tokens[new:new + 1] = [left + right]
            merges.append(f"{left} {right}")
            for n in where.pop(pair):
                tally(n, -1)
                word = []
                for symbol in words[n][0]:
                    if word and (word[-1], symbol) == pair:
                        word[-1] = new
                    else:
                        word.append(symbol)
                words[n] = word, words[n][1]
                tally(n, 1)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": vocab[t], "content": t, **flags, "special": True} for t in special]
        return cls({"version": "1.0", "added_tokens": added, "pre_tokenizer": level,
                    "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}})


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
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(width, mlp, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> patch embeddings + positions (b, n, d)."""
        return rearrange(self.patch_embed["proj"](pixels), "b d h w -> b (h w) d") + self.pos_embed

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> features (b, n, d)."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def prepare(self, films: Tensor) -> Tensor:
        """uint8 films (b, h, w) of any size -> what forward takes."""
        return vit_pixels(resize(films, self.image))

    def patches(self, films: Tensor) -> Tensor:
        """uint8 films (b, h, w) -> a feature a patch (b, n, d): the teacher of stage 2."""
        return self(self.prepare(films))

    def summary(self, films: Tensor) -> Tensor:
        """uint8 films (b, h, w) -> one feature a film (b, d), for distances between sets."""
        return self.patches(films).mean(1)


def resize(films: Tensor, side: int) -> Tensor:
    """uint8 films (b, h, w) -> float (b, side, side) in [0, 255]."""
    if films.shape[1:] == (side, side):
        return films.float()
    return F.interpolate(films[:, None].float(), (side, side), mode="bicubic",
                         antialias=True).clamp(0, 255)[:, 0]


class RadDino(ViT):
    """RAD-DINO (a DINOv2 ViT-B/14): teacher of stage 2, features of the generation metrics.

    DINOv2 is our ViT with a class token in front and each residual scaled; the scales are folded
    into the projections. Any size that patches divide: the position table is resized.
    """

    def __init__(self, folder: Path, weights: dict[str, Tensor], about: dict, looks: dict):
        """`weights`: Hugging Face names, older or newer; `about`: its config.json; `looks`: its
        preprocessor_config.json, or {} for RAD-DINO's. Raises UserError."""
        w = {self.newer(k): v.float() for k, v in weights.items()}
        try:
            proj, places = (w[f"embeddings.{k}"] for k in ("patch_embeddings.projection.weight",
                                                           "position_embeddings"))
            width, patch = proj.shape[0], proj.shape[-1]
            super().__init__(patch * math.isqrt(places.shape[1] - 1), patch, width,
                             w["encoder.layer.0.mlp.fc1.weight"].shape[0],
                             about["num_attention_heads"], about["num_hidden_layers"])
            self.pos_embed = nn.Parameter(places)
            self.load_state_dict({
                "pos_embed": places, "patch_embed.proj.weight": proj,
                "patch_embed.proj.bias": w["embeddings.patch_embeddings.projection.bias"],
                "norm.weight": w["layernorm.weight"], "norm.bias": w["layernorm.bias"],
                **{f"blocks.{i}.{k}": v for i in range(len(self.blocks))
                   for k, v in self.block(w, f"encoder.layer.{i}.").items()}})
            self.cls = nn.Parameter(w["embeddings.cls_token"])
        except (KeyError, RuntimeError) as e:       # RuntimeError: a tensor of another shape
            raise UserError(f"{folder}: no DINOv2 model with plain MLPs; wrong is "
                            f"{str(e).splitlines()[-1].strip()}") from None
        self.side = (looks.get("crop_size") or {}).get("height", 518)
        self.mean, self.std = ((looks.get(k) or [d])[0] for k, d in (("image_mean", 0.5307),
                                                                     ("image_std", 0.2583)))
        self.requires_grad_(False).eval()

    @staticmethod
    def newer(name: str) -> str:
        """Older Hugging Face name of a tensor -> the newer one."""
        name = re.sub(r"^dinov2\.", "", name).replace("attention.attention.", "attention.")
        name = re.sub(r"\.(q|k|v)(?:uery|ey|alue)\.", r".\1_proj.", name)
        return name.replace("attention.output.dense.", "attention.o_proj.")

    @staticmethod
    def block(w: dict[str, Tensor], at: str) -> dict[str, Tensor]:
        """The tensors of our ViTBlock from those whose names begin with `at`."""
        found = {}
        for kind in ("weight", "bias"):
            one, two = (w[f"{at}layer_scale{j}.lambda1"] for j in (1, 2))
            if kind == "weight":
                one, two = one[:, None], two[:, None]
            for name in ("norm1", "norm2", "mlp.fc1"):
                found[f"{name}.{kind}"] = w[f"{at}{name}.{kind}"]
            found[f"mlp.fc2.{kind}"] = two * w[f"{at}mlp.fc2.{kind}"]
            found[f"attn.proj.{kind}"] = one * w[f"{at}attention.o_proj.{kind}"]
            found[f"attn.qkv.{kind}"] = torch.cat(
                [w[f"{at}attention.{n}_proj.{kind}"] for n in "qkv"])
        return found

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> class token and patches (b, 1 + n, d)."""
        x = self.patch_embed["proj"](pixels)
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=self.image // self.patch)
        if grid.shape[2:] != x.shape[2:]:
            grid = F.interpolate(grid, x.shape[2:], mode="bicubic")
        x = rearrange(x + grid, "b d h w -> b (h w) d")
        return torch.cat([(self.cls + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def prepare(self, films: Tensor) -> Tensor:
        pixels = (resize(films, self.side) / 255 - self.mean) / self.std
        return pixels[:, None].expand(-1, 3, -1, -1)

    def patches(self, films: Tensor) -> Tensor:
        return self(self.prepare(films))[:, 1:]

    def summary(self, films: Tensor) -> Tensor:
        return self(self.prepare(films))[:, 0]          # the class token


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
        self.lm_head = nn.Linear(sizes[0], vocab, bias=False)

    def read(self, tokens: Tensor, length: Tensor, image: Tensor | None = None):
        """Reads `[BOI image EOI]` (one RoPE id) and then text -> hidden of the text, Context.

        tokens (b, l) padded on the right, `length` (b,) of them count; image (b, m, d) embedded
        with its two markers. Without an image the text starts at RoPE id 0.
        """
        x, ids = self.embed_tokens(tokens), torch.arange(tokens.shape[1], device=tokens.device)
        n_image = 0
        if image is not None:
            n_image = image.shape[1]
            x = torch.cat([image, x], dim=1)
            ids = torch.cat([ids.new_zeros(n_image), ids + 1])
        hidden, context = self.tower.read(x, ids.expand(len(x), -1), length + n_image, n_image)
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
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(order.device)
    return order.gather(-1, drawn)[:, 0]


@torch.no_grad()
def decode(lm: LanguageModel, tokens: Tensor, length: Tensor, image: Tensor | None, eos: int,
           max_new: int, pick=lambda logits: logits.argmax(-1)):
    """Writes token by token. Yields (next ids (b,), logits (b, v)); a finished sample yields eos.

    Reads the context once, then feeds one token a step to a preallocated key/value cache. Ends
    when every sample has written eos, or after max_new tokens.
    """
    hidden, context = lm.read(tokens, length, image)
    b, rows = len(tokens), torch.arange(len(tokens), device=tokens.device)
    size = context.kv[0][0].shape[2]
    cache = [[F.pad(a, (0, 0, 0, max_new)) for a in pair] for pair in context.kv]
    at, ids, done = context.length, context.next_id, torch.zeros_like(length, dtype=torch.bool)
    hidden = hidden[rows, length - 1]
    for i in range(max_new):
        logits = lm.lm_head(hidden)
        token = torch.where(done, eos, pick(logits))
        yield token, logits
        done |= token == eos
        if done.all() or i + 1 == max_new:
            return
        hidden = lm.tower.step(lm.embed_tokens(token), ids + i, cache, at + i, size + i + 1,
                               context.ragged)
