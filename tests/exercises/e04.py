"""Exercise 4: classifier-free guidance, with a limit to its length."""

import torch

import pictures
from course import ROOT, close, differs, install, noise

TITLE = "Guidance that does not burn"
EQUATION = "Eq. 2, guided"
LAB = "flow"
MINUTES = 20
DIFFICULTY = 2
TARGETS = ["diffusion.guide"]
TEXT = """
Guidance makes an image follow its caption more closely. The network predicts the velocity twice,
with the caption (`cond`) and without (`uncond`), both `(b, n, c)`: samples, tokens, channels. The
result starts at `uncond` and goes `scale` times the way to `cond`:

    v = uncond + scale * (cond - uncond)

So scale 0 is no caption, 1 is the caption as it is, 2 goes as far again beyond it. A `v` that grows
too long burns an image: black and white, no gray. So the released code makes `v` shorter: it is
multiplied by the factor `|cond| / |v|`, **clamped to [least, 1]**. It never grows. The lengths are
Euclidean norms:

- `renorm="global"`: of a whole sample, over its tokens and channels, so one factor **a sample**;
- `renorm="channel"`: of each token, over its channels, so one factor a token;
- `renorm=None`: no factor at all, `v` as it is (`least` has no effect then).

Worked example, one sample with one token: `cond = [3, 4]`, `uncond = [3, 0]`, scale 2.
v = [3, 8], |cond| = 5, |v| = 8.544, factor 0.585, result [1.756, 4.682]. With `least=0.8` the
factor is 0.8. If |v| is 0, the result must be 0, not NaN.
"""
HINTS = (
    "What must come out at scale 1? And at scale 0 without renorm?",
    "`torch.linalg.vector_norm` takes `dim=` and `keepdim=True`. Which axes belong to a sample?",
    "The factor is `(norm_c / (norm_v + 1e-8)).clamp(least, 1)`, norms over axes (-2, -1) for "
    "\"global\" and over the last for \"channel\".",
)
SEES = ("One caption, \"Large right pleural effusion.\", at scales 1, 3, 8 and 20. The effusion "
        "grows with the scale. At 20 the image burns without renorm (below); with it (above) it stays "
        "a chest.")


def slow_guide(cond, uncond, scale, renorm="global", least=0.0):
    out = torch.zeros_like(cond)
    for i in range(len(cond)):
        v = uncond[i] + scale * (cond[i] - uncond[i])
        for j in range(len(v)):
            a, b = (cond[i], v) if renorm == "global" else (cond[i][j], v[j])
            size_a, size_b = ((x * x).sum().sqrt().item() for x in (a, b))
            factor = min(1.0, max(least, size_a / size_b)) if size_b else 1.0
            out[i, j] = v[j] if renorm is None else v[j] * factor
    return out


def pair(seed):
    return noise(seed, 3, 5, 4), noise(seed + 1, 3, 5, 4)


def check_formula(lib, seed):
    """Without renorm: uncond + scale (cond - uncond)."""
    c, u = pair(seed)
    close(lib.diffusion.guide(c, u, 1.0, None), c, "at scale 1 guide() must return cond, the "
          "velocity with the caption")
    close(lib.diffusion.guide(c, u, 0.0, None), u, "at scale 0 without renorm guide() must return "
          "uncond")
    for scale in (2.0, 3.5):
        got = lib.diffusion.guide(c, u, scale, None)
        away = not differs(got, c + scale * (u - c)) or not differs(got, u - scale * (c - u))
        assert not away, "guide() goes away from the caption: the sign of cond - uncond is wrong"
        close(got, u + scale * (c - u), "without renorm guide() must be uncond + scale (cond - "
              "uncond)")


def check_scale_one(lib, seed):
    """At scale 1 the result is cond, whatever the renorm."""
    c, u = pair(seed)
    for renorm in ("global", "channel"):
        close(lib.diffusion.guide(c, u, 1.0, renorm), c, f"at scale 1 guide() must return cond, "
              f"also with renorm={renorm!r}")
    close(lib.diffusion.guide(c, u, 1.0), c, "at scale 1 guide() must return cond")


def check_never_grows(lib, seed):
    """A velocity that is shorter than cond stays as it is."""
    c = noise(seed, 3, 5, 4)
    u = c * 1.5
    for renorm in ("global", "channel"):
        close(lib.diffusion.guide(c, u, 2.0, renorm), u + 2 * (c - u), "guide() must not make a "
              f"velocity longer that is shorter than cond: the factor is at most 1 ({renorm})")


def check_global(lib, seed):
    """"global": no sample is longer than its cond, and each sample has its own factor."""
    c, u = pair(seed)
    c = c * torch.tensor([0.2, 1.0, 3.0])[:, None, None]
    got = lib.diffusion.guide(c, u, 5.0)
    alone = torch.cat([lib.diffusion.guide(c[i:i + 1], u[i:i + 1], 5.0) for i in range(3)])
    close(got, alone, "each sample must have a factor of its own: the norm is over a sample, not "
          "over the batch")
    longer = got.flatten(1).norm(dim=1) > c.flatten(1).norm(dim=1) * 1.001
    assert not bool(longer.any()), "with renorm=\"global\" no sample may be longer than its cond"
    close(got, slow_guide(c, u, 5.0), "with renorm=\"global\" v must be scaled by |cond| / |v| "
          "over all tokens and channels of a sample")


def check_channel(lib, seed):
    """"channel": no token is longer than its cond."""
    c, u = pair(seed)
    got = lib.diffusion.guide(c, u, 5.0, "channel")
    longer = got.norm(dim=2) > c.norm(dim=2) * 1.001
    assert not bool(longer.any()), "with renorm=\"channel\" no token may be longer than its cond"
    close(got, slow_guide(c, u, 5.0, "channel"), "with renorm=\"channel\" each token must be "
          "scaled by its own |cond| / |v|, over its channels")


def check_least(lib, seed):
    """The factor is never below `least`."""
    c, u = pair(seed)
    for renorm in ("global", "channel"):
        for least in (0.5, 0.9):
            close(lib.diffusion.guide(c, u, 6.0, renorm, least),
                  slow_guide(c, u, 6.0, renorm, least),
                  f"the factor must be clamped to [least, 1], here least={least} ({renorm})")
    close(lib.diffusion.guide(c, u, 6.0, None, 0.9), u + 6 * (c - u), "with renorm=None nothing is "
          "scaled, whatever `least` is")


def check_zero(lib, seed):
    """A velocity of length 0 stays 0."""
    u = noise(seed, 2, 3, 4)
    for renorm in ("global", "channel"):
        close(lib.diffusion.guide(u / 2, u, 2.0, renorm), torch.zeros(2, 3, 4), "a velocity of "
              "length 0 must stay 0: do not divide 0 by 0")


def check_arguments_stay(lib, seed):
    """guide() does not change its arguments."""
    c, u = pair(seed)
    before = c.clone(), u.clone()
    lib.diffusion.guide(c, u, 3.0)
    assert torch.equal(c, before[0]) and torch.equal(u, before[1]), (
        "guide() must not change cond or uncond in place")


def expected(lib):
    return install(lib, {"diffusion.guide": slow_guide})


def show(lib):
    weights = ROOT / "assets" / "tiny"
    if not (weights / "model.safetensors").exists():
        return pictures.message("the picture needs the trained weights in assets/tiny")
    model, found, names = lib.unix.UniX.load(weights), [], []
    guide = lib.diffusion.guide
    for renorm in ("global", None):
        install(lib, {"diffusion.guide": lambda c, u, s: guide(c, u, s, renorm)})
        for scale in (1.0, 3.0, 8.0, 20.0):
            image = model.generate(["Large right pleural effusion."], seeds=[3], scale=scale,
                                   points=12, eta=0.0)
            found.append(image[0, 0])
            names.append(f"{scale:g}, renorm {'on' if renorm else 'off'}")
    install(lib, {"diffusion.guide": guide})
    return pictures.images(found, names, 4, 128)


def plain(line: str) -> str:
    return f"""
def guide(cond, uncond, scale, renorm="global", least=0.0):
    v = uncond + scale * (cond - uncond)
    if renorm is None:
        return v
    dims = (1, 2) if renorm == "global" else (2,)
    a, b = (x.square().sum(dims, keepdim=True).sqrt() for x in (cond, v))
    {line}
"""


RIGHT = {"diffusion.guide": """
def guide(cond, uncond, scale, renorm="global", least=0.0):
    v = torch.lerp(uncond, cond, float(scale))
    if renorm == "global":
        size = [torch.einsum("bnc,bnc->b", a, a).sqrt().view(-1, 1, 1) for a in (cond, v)]
    elif renorm == "channel":
        size = [a.norm(dim=-1, keepdim=True) for a in (cond, v)]
    else:
        return v
    factor = torch.where(size[1] > 0, size[0] / size[1], 1.0)
    return v * torch.minimum(factor, torch.ones_like(factor)).clamp(min=least)
"""}
WRONG = {
    "norm over the batch": {"diffusion.guide": plain(
        "return v * (cond.norm() / (v.norm() + 1e-8)).clamp(least, 1)")},
    "may grow": {"diffusion.guide": plain("return v * (a / (b + 1e-8)).clamp(min=least)")},
    "always as long as cond": {"diffusion.guide": plain("return v * a / (b + 1e-8)")},
    "the ratio upside down": {"diffusion.guide": plain(
        "return v * (b / (a + 1e-8)).clamp(least, 1)")},
    "wrong sign": {"diffusion.guide": plain("return v").replace("(cond - uncond)",
                                                                "(uncond - cond)")},
    "starts at cond": {"diffusion.guide": plain(
        "return v * (a / (b + 1e-8)).clamp(least, 1)").replace("v = uncond +", "v = cond +")},
    "no renorm": {"diffusion.guide": plain("return v")},
    "`least` has no effect": {"diffusion.guide": plain("return v * (a / (b + 1e-8)).clamp(max=1)")},
    "norm over the tokens": {"diffusion.guide": plain(
        "return v * (a / (b + 1e-8)).clamp(least, 1)").replace("else (2,)", "else (1,)")},
    "global is by token": {"diffusion.guide": plain(
        "return v * (a / (b + 1e-8)).clamp(least, 1)").replace("(1, 2) if", "(2,) if")},
    "global is by channel": {"diffusion.guide": plain(
        "return v * (a / (b + 1e-8)).clamp(least, 1)").replace("(1, 2) if", "(1,) if")},
    "divides by 0": {"diffusion.guide": plain("return v * (a / b).clamp(least, 1)").replace(
        "v = uncond", "v = uncond").replace("(a / b)", "((a - a) / b + a / b)")},
    "length of uncond": {"diffusion.guide": plain(
        "return v * (a / (b + 1e-8)).clamp(least, 1)").replace("(cond, v))", "(uncond, v))")},
    "squared lengths": {"diffusion.guide": plain(
        "return v * (a / (b + 1e-8)).square().clamp(least, 1)")},
}
