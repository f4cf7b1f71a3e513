"""Exercise 1: the straight line from image to noise, its velocity, and the loss (Eq. 2)."""

import torch

import pictures
from course import close, install, noise

TITLE = "A straight line from image to noise"
EQUATION = "Eq. 2"
LAB = "flow"
MINUTES = 15
DIFFICULTY = 1
TARGETS = ["diffusion.path", "diffusion.target", "diffusion.velocity_loss"]
TEXT = """
Flow matching moves an image `x0` to noise `eps` on a straight line. Time `t` runs from 0 (the
image) to 1 (noise). The network learns the velocity of that motion; Eq. 2 is its loss.

- `path(x0, eps, t)` is the point at time `t`. `x0` and `eps` have one shape, `(b, n, c)` or
  `(b, c, h, w)` or another that begins with `b`. `t` is `(b,)`: **each sample has its own time**.
- `target(x0, eps)` is the velocity `u_t`, the derivative of `path` with respect to `t`.
- `velocity_loss(v, x0, eps)` is the mean of the squared error over all numbers *of a sample*.
  It returns **one value a sample, `(b,)`**, so that a caller can weight samples.

A worked example with one sample of two numbers:

```
x0 = [2, 0]    eps = [0, 4]    t = 0.25
path   = 0.75 * [2, 0] + 0.25 * [0, 4] = [1.5, 1]
target = [0, 4] - [2, 0] = [-2, 4]
velocity_loss(v=[-2, 2]) = ((0)^2 + (-2)^2) / 2 = 2
```

A slow specification of `path`: `out[i] = (1 - t[i]) * x0[i] + t[i] * eps[i]` for each `i < b`.
`broadcast` in the same file makes a `(b,)` tensor fit.
"""
HINTS = (
    "Where must `path` be at t = 0, and where at t = 1? Then differentiate your line.",
    "`t` of shape `(b,)` times `x0` of shape `(b, n, c)` pairs the wrong axes; `(b, 1, 1)` does "
    "not. The number of axes varies, so do not write it down as a constant.",
    "`flatten(1)` of the squared error has shape `(b, everything else)`; average over axis 1.",
)
SEES = "Nine chests dissolve into noise, evenly, from left to right."


def slow_path(x0, eps, t):
    return torch.stack([(1 - s) * a + s * e for a, e, s in zip(x0, eps, t)])


def slow_target(x0, eps):
    return eps - x0


def slow_loss(v, x0, eps):
    return torch.stack([sum(x * x for x in (a - (e - b)).flatten()) / a.numel()
                        for a, b, e in zip(v, x0, eps)])


def check_ends(lib, seed):
    """path() is the image at t = 0 and the noise at t = 1."""
    x0, eps = noise(seed, 4, 4, 4), noise(seed + 1, 4, 4, 4)
    got = lib.diffusion.path(x0, eps, torch.zeros(4))
    swapped = got.shape == eps.shape and torch.allclose(got, eps, atol=1e-4)
    assert not swapped, "at t = 0 path() must return the image: image and noise are swapped"
    close(got, x0, "at t = 0 path() must return the image")
    close(lib.diffusion.path(x0, eps, torch.ones(4)), eps, "at t = 1 path() must return the noise")


def check_straight(lib, seed):
    """path() moves evenly, on a straight line, and each sample has its own time."""
    x0, eps = noise(seed, 4, 4, 4), noise(seed + 1, 4, 4, 4)
    for s in (0.25, 0.5, 0.9):
        got = lib.diffusion.path(x0, eps, torch.full((4,), s))
        close(got, x0 + s * (eps - x0), f"at t = {s} path() must be {s} of the way from image to "
              "noise: the line is straight and t is its share")
    t = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    close(lib.diffusion.path(x0, eps, t), slow_path(x0, eps, t), "path() must use t[i] for sample "
          "i, and for all numbers of it: t of shape (b,) goes with the first axis")


def check_shapes(lib, seed):
    """path() takes samples of any number of axes."""
    t = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    for shape in ((3,), (3, 7), (3, 2, 4, 5), (3, 3, 3, 3)):
        x0, eps = noise(seed, *shape), noise(seed + 1, *shape)
        close(lib.diffusion.path(x0, eps, t), slow_path(x0, eps, t),
              f"path() must work for any number of axes, here for shape {shape}")


def check_target(lib, seed):
    """target() is the derivative of the line: from image to noise."""
    x0, eps = noise(seed, 2, 5, 3), noise(seed + 1, 2, 5, 3)
    got = lib.diffusion.target(x0, eps)
    opposite = got.shape == x0.shape and torch.allclose(got, x0 - eps, atol=1e-4)
    assert not opposite, ("target() points from noise to image; the velocity is the derivative of "
                          "the path, eps - x0")
    close(got, eps - x0, "target() must be the derivative of the path with respect to t, eps - x0")


def check_loss(lib, seed):
    """velocity_loss() is the mean squared error, one value a sample."""
    v, x0, eps = (noise(seed + i, 3, 6, 4) for i in range(3))
    got = lib.diffusion.velocity_loss(v, x0, eps)
    assert got.shape == (3,), ("velocity_loss() must return one value a sample, shape (b,): it has "
                               f"shape {tuple(got.shape)}")
    want = slow_loss(v, x0, eps)
    assert not torch.allclose(got, want * 24, rtol=1e-3), (
        "velocity_loss() must be a mean over a sample's numbers, not their sum")
    close(got, want, "velocity_loss() must be the mean of the squared difference to eps - x0")
    v4, x4, e4 = (noise(seed + i, 2, 3, 2, 2) for i in range(3))
    close(lib.diffusion.velocity_loss(v4, x4, e4), slow_loss(v4, x4, e4),
          "velocity_loss() must average over all axes but the first, also of (b, c, h, w)")


def check_perfect(lib, seed):
    """The loss of the true velocity is 0, and of one that is off by 0.5 it is 0.25."""
    x0, eps = noise(seed, 2, 5, 3), noise(seed + 1, 2, 5, 3)
    text = "the loss of a velocity that is off by 0.5 everywhere must be 0.25"
    close(lib.diffusion.velocity_loss(eps - x0 + 0.5, x0, eps), torch.full((2,), 0.25), text)
    zero = lib.diffusion.velocity_loss(eps - x0, x0, eps)
    close(zero, torch.zeros(2), "the loss of the true velocity must be 0")


def check_gradient(lib, seed):
    """The network can learn from the loss: its gradient is 2 (v - u) / size."""
    v, x0, eps = (noise(seed + i, 2, 4, 3) for i in range(3))
    v.requires_grad_(True)
    loss = lib.diffusion.velocity_loss(v, x0, eps)
    assert loss.requires_grad, "velocity_loss() must pass a gradient to v: the network learns by it"
    loss.sum().backward()
    close(v.grad, 2 * (v - (eps - x0)) / 12, "the gradient of velocity_loss() with respect to v "
          "must be 2 (v - u) / size")


def check_arguments_stay(lib, seed):
    """No function changes its arguments."""
    v, x0, eps, t = *(noise(seed + i, 2, 5, 3) for i in range(3)), torch.tensor([0.3, 0.6])
    before = [a.clone() for a in (v, x0, eps, t)]
    lib.diffusion.path(x0, eps, t)
    lib.diffusion.target(x0, eps)
    lib.diffusion.velocity_loss(v, x0, eps)
    assert all(torch.equal(a, b) for a, b in zip((v, x0, eps, t), before)), (
        "an argument was changed in place; x0 and eps are used again by the caller")


def expected(lib):
    return install(lib, {"diffusion.path": slow_path, "diffusion.target": slow_target,
                         "diffusion.velocity_loss": slow_loss})


def show(lib):
    image = torch.from_numpy(lib.data.phantom("train", 4, 128).image.copy()).float()
    x0 = (image / 127.5 - 1)[None].expand(9, -1, -1)
    eps = noise(0, 128, 128)[None].expand(9, -1, -1)
    t = torch.linspace(0, 1, 9)
    x = (lib.diffusion.path(x0, eps, t) / 2 + 0.5) * 255
    strip = pictures.images(list(x), [f"t = {s:.3g}" for s in t], 9, 100)
    loss = lib.diffusion.velocity_loss(torch.zeros(9, 128, 128), x0, eps)
    line = f"loss of a network that predicts 0: {loss.mean():.2f}"
    return pictures.stack([strip, pictures.titled(pictures.message("", 1, 1), line, 13)])


RIGHT = {
    "diffusion.path": """
def path(x0, eps, t):
    out = torch.empty_like(x0)
    for i in range(len(x0)):
        torch.lerp(x0[i], eps[i], t[i], out=out[i])
    return out
""",
    "diffusion.target": """
def target(x0, eps):
    return torch.sub(eps, x0)
""",
    "diffusion.velocity_loss": """
def velocity_loss(v, x0, eps):
    each = F.mse_loss(v, eps - x0, reduction="none")
    return each.mean(dim=tuple(range(1, each.dim())))
""",
}
WRONG = {
    "time backwards": {"diffusion.path": """
def path(x0, eps, t):
    t = broadcast(t, x0)
    return t * x0 + (1 - t) * eps
"""},
    "one time for all": {"diffusion.path": """
def path(x0, eps, t):
    return (1 - t[0]) * x0 + t[0] * eps
"""},
    "t goes with the last axis": {"diffusion.path": """
def path(x0, eps, t):
    return (1 - t) * x0 + t * eps
"""},
    "only three axes": {"diffusion.path": """
def path(x0, eps, t):
    t = t[:, None, None]
    return (1 - t) * x0 + t * eps
"""},
    "a curve, not a line": {"diffusion.path": """
def path(x0, eps, t):
    t = broadcast(t, x0) * math.pi / 2
    return t.cos() * x0 + t.sin() * eps
"""},
    "adds noise, keeps the image": {"diffusion.path": """
def path(x0, eps, t):
    return x0 + broadcast(t, x0) * eps
"""},
    "in place": {"diffusion.path": """
def path(x0, eps, t):
    t = broadcast(t, x0)
    return x0.mul_(1 - t).add_(t * eps)
"""},
    "velocity towards the image": {"diffusion.target": """
def target(x0, eps):
    return x0 - eps
"""},
    "the noise is the target": {"diffusion.target": """
def target(x0, eps):
    return eps
"""},
    "mean over the batch": {"diffusion.velocity_loss": """
def velocity_loss(v, x0, eps):
    return (v - target(x0, eps)).square().mean()
"""},
    "sum for mean": {"diffusion.velocity_loss": """
def velocity_loss(v, x0, eps):
    return (v - target(x0, eps)).square().flatten(1).sum(1)
"""},
    "absolute error": {"diffusion.velocity_loss": """
def velocity_loss(v, x0, eps):
    return (v - target(x0, eps)).abs().flatten(1).mean(1)
"""},
    "mean over the last axis": {"diffusion.velocity_loss": """
def velocity_loss(v, x0, eps):
    return (v - target(x0, eps)).square().mean(-1)
"""},
    "no gradient": {"diffusion.velocity_loss": """
def velocity_loss(v, x0, eps):
    return (v.detach() - target(x0, eps)).square().flatten(1).mean(1)
"""},
}
