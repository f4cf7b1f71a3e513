"""Understanding: tokenizer, image encoder, connector, language model (Sec. 3.2, Eq. 1)."""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data import UserError
from joint_attn import Tower, attend


class Tokenizer: pass


class ViTBlock(nn.Module):
    """Pre-norm transformer block with timm's parameter names; x (b, n, d) -> (b, n, d)."""

    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
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
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Connector(nn.Module):
    """Two-layer MLP from image features to the language model's width: (b, n, d_v) -> (b, n, d).

    tanh GELU, as released inference computes; the module used in training had the exact one.
    """

    def __init__(self, vit_width: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(vit_width, width), nn.GELU("tanh"), nn.Linear(width, width))

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
        hidden = lm.tower.step(lm.embed_tokens(token), ids + i, cache, at + i, size + i + 1, context.ragged)
