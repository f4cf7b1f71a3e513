"""Generation: rectified flow, latent embeddings and the autoencoder (Sec. 3.3, Eq. 2).

Time runs from t = 0, the image, to t = 1, noise: x_t = (1 - t) x0 + t eps. The network predicts the
velocity v = eps - x0 (in `tiny` it predicts x0, and v follows: `velocity_from_x0`). The sampler
walks from t = 1 to 0 and SUBTRACTS v dt.

Letters: b batch, c latent channels, h w latent rows and columns, n = h w tokens, d width, H W
pixels. Latent tokens are row-major, (b, n, c); latent images are (b, c, h, w). In `tiny` a token is
a square of p x p latents: n = h w / p^2, and c stands for p p c.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joint_attn import attend

# ---------------------------------------------------------------- rectified flow, without a model


def broadcast(t: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ..., 1), to be multiplied with `like`."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def path(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Point x_t on the straight line from image x0 (t = 0) to noise eps (t = 1); t (b,)."""
    t = broadcast(t, x0)
    return (1 - t) * x0 + t * eps


def target(x0: Tensor, eps: Tensor) -> Tensor:
    """Velocity u_t of that line (Eq. 2); the same at every t."""
    return eps - x0


def velocity_from_x0(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Velocity (x_t - x0) / t from a predicted x0 (after arXiv 2511.13720). Below t = 0.5 we divide
    by 0.5, so there the network learns x_t - v / 2 instead of x0."""
    return (x_t - x0) / broadcast(t, x_t).clamp(min=0.5)


def shift_time(t: Tensor, s: float) -> Tensor:
    """Moves times in [0, 1] towards noise for s > 1: s t / (1 + (s - 1) t) (released code)."""
    return s * t / (1 + (s - 1) * t)


def sample_time(b: int, generator=None, shift: float = 1.0) -> Tensor:
    """b training times, logit-normal: t = sigmoid(z), z ~ N(0, 1) (released code) -> (b,)."""
    return shift_time(torch.sigmoid(torch.randn(b, generator=generator)), shift)


def velocity_loss(v: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Eq. 2: mean squared error of the velocity, one value a sample -> (b,)."""
    return (v.float() - target(x0, eps)).square().flatten(1).mean(1)


def repa_loss(states: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """REPA (Sec. 3.4): negative cosine between projected states (b, n, d) and a teacher's features
    (b, m, d) of the clean image, one value a sample -> (b,). The states lie on `grid` = (h, w), the
    features on a square that is resized to it in 2-D (the released code stretches the raster)."""
    side = math.isqrt(features.shape[1])
    features = rearrange(features, "b (h w) d -> b d h w", h=side)
    if (side, side) != grid:
        features = F.interpolate(features, grid, mode="area" if grid[0] < side else "bilinear")
    features = rearrange(features, "b d h w -> b (h w) d")
    return -F.cosine_similarity(states.float(), features, dim=-1).mean(1)


def guide(cond: Tensor, uncond: Tensor, scale: float, renorm="global", least=0.0) -> Tensor:
    """Classifier-free guidance, all (b, n, c): uncond + scale (cond - uncond), then scaled down to
    be no longer than cond: over a sample ("global"), over each token ("channel"), or not (None).
    `least` is the smallest factor allowed (released code)."""
    v = uncond + scale * (cond - uncond)
    if renorm is None:
        return v
    dims = (-2, -1) if renorm == "global" else -1
    norm_c, norm_v = (torch.linalg.vector_norm(a, dim=dims, keepdim=True) for a in (cond, v))
    return v * (norm_c / (norm_v + 1e-8)).clamp(least, 1)


def sample(velocity, x: Tensor, points=50, shift=3.0, scale=2.0, interval=(0.4, 1.0), eta=0.0,
           noise=None):
    """Euler from noise x (b, n, c) at t = 1 to an image at t = 0. Yields (t, v, x after the step).

    velocity(x, t, guided) -> v, or if guided (v with the caption, v without): one pass may do both.
    `points` times on linspace(1, 0) make points - 1 steps.
    Guidance is on while lo < t <= hi, t taken after the shift; elsewhere a step costs half.
    `eta` in [0, 1] (ours; DDIM's, Song et al. 2021): fresh noise in each step, 0 none, 1 as much as
    DDPM; noise() gives noise like x. With it, later steps correct earlier ones.
    """
    times = shift_time(torch.linspace(1, 0, points), shift).clamp(max=1)    # rounding
    for t, after in zip(times[:-1], times[1:]):
        at = t.to(x.device).expand(len(x))
        guided = scale > 1 and bool(interval[0] < t <= interval[1])
        v = velocity(x, at, guided)
        v = guide(*v, scale) if guided else v
        x = x - v * (t - after).item()
        if eta and after > 0:
            eps = x + v * (1 - after).item()        # where the line through x ends, at t = 1
            new = eta * (1 - ((1 - t) * after / ((1 - after) * t)).item() ** 2) ** 0.5
            x = x + after.item() * (new * noise() - (1 - (1 - new ** 2) ** 0.5) * eps)
        yield t, v, x


# ---------------------------------------------------------------- latents and tokens


def vae_pixels(images: Tensor) -> Tensor:
    """uint8 (b, h, w) -> float (b, 3, h, w) in [-1, 1], the VAE's input (released code)."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> uint8 of the same shape, by truncation (released code)."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """Latents (b, c, h, w) -> tokens (b, n, patch patch c), squares of them row by row (the
    released code's order; its own `latent_patch_size` is 1)."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def to_latents(tokens: Tensor, rows: int, patch: int) -> Tensor:
    """The inverse, for tokens in `rows` rows."""
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)


# ---------------------------------------------------------------- what is added to latent tokens


def time_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids of t (b,) in [0, 1], unscaled: [cos | sin] -> (b, dim) (released code)."""
    rate = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10000) / (dim // 2)))
    angle = t[:, None].float() * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """t (b,) -> (b, d), added to every latent token (no AdaLN)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_features(t).to(self.mlp[0].weight.dtype))


def position_table(side: int, width: int) -> Tensor:
    """Frozen 2-D sin-cos table (side * side, d), row * side + column: the first half of the
    channels is the column, the second the row, each as [sin | cos] (released code)."""
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                 # (side, d / 2)
    column, row = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


def position_ids(h: int, w: int, side: int, interpolate=False) -> Tensor:
    """Table rows of h x w tokens -> (h w,). A larger image reads more of the table, so 512 px
    (stage 3) adds no weights: rows and columns from the table's top left corner or, with
    `interpolate` (released code: off), spread evenly over all of it."""
    row, column = torch.arange(h), torch.arange(w)
    if interpolate:
        row, column = row * side // h, column * side // w
    return (row[:, None] * side + column).flatten()


# ---------------------------------------------------------------- autoencoder (CompVis kl-f16)


class ResBlock(nn.Module):
    def __init__(self, i: int, o: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, i, 1e-6), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, o, 1e-6), nn.Conv2d(o, o, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """One head over all pixels of a feature map (b, c, h, w)."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        y = rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(y)


class Level(nn.Module):
    """Residual blocks of one resolution, each with attention or not, then the change of size."""

    def __init__(self, widths: list[int], attn: bool, down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(i, o) for i, o in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(o) for o in widths[1:] if attn)
        c, self.downsample, self.upsample = widths[-1], None, None
        if down:
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, stride=2)})
        if up:
            self.upsample = nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, padding=1)})

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        if self.downsample is not None:
            return self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))     # only right and below
        if self.upsample is not None:
            return self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def middle(c: int) -> nn.ModuleDict:
    return nn.ModuleDict({"block_1": ResBlock(c, c), "attn_1": AttnBlock(c),
                          "block_2": ResBlock(c, c)})


class Encoder(nn.Module):
    """Pixels (b, 3, H, W) in [-1, 1] -> features (b, 2 z, H / f, W / f)."""

    def __init__(self, ch: int, mult: list[int], blocks: int, attn: list[int], z: int):
        super().__init__()
        w, top = [ch] + [ch * m for m in mult], len(mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level([w[i]] + [w[i + 1]] * blocks, i in attn, down=i < top) for i in range(top + 1))
        self.mid = middle(w[-1])
        self.norm_out = nn.GroupNorm(32, w[-1], 1e-6)
        self.conv_out = nn.Conv2d(w[-1], 2 * z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.down, *self.mid.values()):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (b, z, h, w) -> pixels (b, 3, f h, f w), about [-1, 1] (not clamped)."""

    def __init__(self, ch: int, mult: list[int], blocks: int, attn: list[int], z: int):
        super().__init__()
        w, top = [ch * m for m in mult], len(mult) - 1
        self.conv_in = nn.Conv2d(z, w[-1], 3, padding=1)
        self.mid = middle(w[-1])
        self.up = nn.ModuleList(
            Level([w[min(i + 1, top)]] + [w[i]] * (blocks + 1), i in attn, up=i > 0)
            for i in range(top + 1))
        self.norm_out = nn.GroupNorm(32, w[0], 1e-6)
        self.conv_out = nn.Conv2d(w[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.mid.values(), *reversed(self.up)):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """KL autoencoder with CompVis parameter names. `attn` lists the levels with attention. `groups`
    of the norms: fewer than 32 for few channels: a norm of one channel removes its mean."""

    def __init__(self, ch=128, mult=(1, 1, 2, 2, 4), blocks=2, attn=(4,), z=16, embed=16,
                 scale=0.238092, latent_mean=-0.201906, groups=32):
        super().__init__()
        self.encoder = Encoder(ch, mult, blocks, attn, z)
        self.decoder = Decoder(ch, mult, blocks, attn, z)
        self.quant_conv = nn.Conv2d(2 * z, 2 * embed, 1)
        self.post_quant_conv = nn.Conv2d(embed, z, 1)
        self.factor, self.channels = 2 ** (len(mult) - 1), embed
        self.scale, self.latent_mean, self.groups = scale, latent_mean, groups
        if ch % groups:
            raise ValueError(f"{groups} groups of {ch} channels")
        for norm in (m for m in self.modules() if isinstance(m, nn.GroupNorm)):
            norm.num_groups = groups
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Starts training well (ours): orthogonal convolutions, so that more of the latents'
        channels are used, every residual adds nothing, latents have little noise."""
        for name, p in self.named_parameters():
            if "conv2" in name or "proj_out" in name:
                p.zero_()
            elif p.dim() == 4:
                nn.init.orthogonal_(p)
        self.quant_conv.bias[self.channels:] = -8

    @staticmethod
    def sizes(weights: dict[str, Tensor]) -> dict:
        """The arguments for a state dict. Raises LookupError, ValueError, ArithmeticError."""
        ch = weights["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.down."))
        out = [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        attn = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in weights]
        return {"ch": ch, "mult": [o // ch for o in out], "attn": attn,
                "blocks": sum(f"encoder.down.0.block.{j}.conv1.weight" in weights
                              for j in range(9)),
                "z": weights["decoder.conv_in.weight"].shape[1],
                "embed": weights["post_quant_conv.weight"].shape[1]}

    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (b, 3, H, W) -> [mean | log variance] of the posterior (b, 2 c, h, w)."""
        return self.quant_conv(self.encoder(pixels))

    def latents(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """A sample of the posterior, by noise eps (None: its mean) -> latents in the model's units
        (b, c, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if eps is None else mean + eps * (0.5 * logvar.clamp(-30, 20)).exp()
        return self.scale * (z - self.latent_mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) in the model's units -> pixels (b, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scale + self.latent_mean))
