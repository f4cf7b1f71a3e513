"""Exercise 2: the times at which the network is trained."""

import math

import torch

import pictures
from course import close, install

TITLE = "Which times to train on"
EQUATION = "Eq. 2, its times"
LAB = "flow"
MINUTES = 15
DIFFICULTY = 1
TARGETS = ["diffusion.shift_time", "diffusion.sample_time"]
TEXT = """
At t near 0 and near 1 there is little to learn: the image is all there, or nothing of it is. So
training times are *logit-normal*: `t = sigmoid(z)` with `z` from a normal distribution, which
favours the middle. A *shift* `s` then moves times towards noise (for `s > 1`), where the
composition of an image is decided. The paper says neither; both are in the released code.

- `shift_time(t, s)` maps each time `t` in [0, 1] to `s t / (1 + (s - 1) t)`.
- `sample_time(b, generator, shift)` returns `b` times, `(b,)`: one `sigmoid(z)` for each image,
  then shifted. All random numbers come from `generator` (if it is None, from torch's global one),
  so that a run can be repeated.

Worked example: `shift_time(0.5, 3) = 1.5 / (1 + 2 * 0.5) = 0.75`. The ends 0 and 1 stay, and
s = 1 changes nothing.
"""
HINTS = (
    "Look at what a shift does to the odds t / (1 - t).",
    "`torch.randn` takes `generator=`. Is the shift applied to `z` or to the time?",
    "The shift multiplies the odds by s, so it adds ln s to `z = logit(t)`.",
)
SEES = ("Three histograms: a hill around 0.5 for s = 1, which moves to the right for s = 3 and "
        "s = 8.")


def slow_shift(t, s):
    odds = s * t.double() / (1 - t.double())
    return torch.where(t == 1, 1.0, odds / (1 + odds)).float()


def slow_sample(b, generator=None, shift=1.0):
    z = torch.randn(b, generator=generator)
    return 1 / (1 + torch.exp(-(z + math.log(shift))))


def check_shift_ends(lib, seed):
    """shift_time() keeps 0 and 1, and s = 1 changes nothing."""
    ends = torch.tensor([0.0, 1.0])
    for s in (1.0, 3.0, 8.0):
        close(lib.diffusion.shift_time(ends, s), ends, f"shift_time() must keep t = 0 and t = 1 "
              f"where they are (s = {s:g})")
    t = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    close(lib.diffusion.shift_time(t, 1.0), t, "shift_time() with s = 1 must change nothing")


def check_shift_direction(lib, seed):
    """A shift s > 1 moves times towards noise, t = 1."""
    t = 0.1 + 0.8 * torch.rand(9, generator=torch.Generator().manual_seed(seed))
    got = lib.diffusion.shift_time(t, 3.0)
    assert not bool((got < t).any()), ("shift_time() with s > 1 must move times towards noise, "
                                       "t = 1: it moves them towards the image")
    close(lib.diffusion.shift_time(torch.tensor([0.5]), 3.0), torch.tensor([0.75]),
          "shift_time(0.5, 3) must be 0.75, that is s / (1 + s)")


def check_shift_odds(lib, seed):
    """A shift multiplies the odds t / (1 - t) by s."""
    t = 0.05 + 0.9 * torch.rand(50, generator=torch.Generator().manual_seed(seed))
    for s in (0.5, 2.0, 3.0, 8.0):
        close(lib.diffusion.shift_time(t, s), slow_shift(t, s), "shift_time() must multiply the "
              f"odds t / (1 - t) by s: s t / (1 + (s - 1) t), here s = {s:g}", 1e-5)
    twice = lib.diffusion.shift_time(lib.diffusion.shift_time(t, 2.0), 4.0)
    close(twice, slow_shift(t, 8.0), "shifts by 2 and then by 4 must make a shift by 8", 1e-5)


def check_sample_shape(lib, seed):
    """sample_time() returns one time an image, (b,), inside (0, 1)."""
    t = lib.diffusion.sample_time(7, torch.Generator().manual_seed(seed))
    assert t.shape == (7,), f"sample_time() must return shape (b,), not {tuple(t.shape)}"
    assert t.is_floating_point(), "sample_time() must return floating-point times"
    assert bool(((t > 0) & (t < 1)).all()), "sample_time() must return times inside (0, 1)"
    assert len(set(t.tolist())) > 5, "sample_time() must draw a new time for each image"
    assert lib.diffusion.sample_time(3).shape == (3,), "sample_time(b) must work with no generator"


def check_sample_law(lib, seed):
    """The logit of a training time is normal, with mean ln(shift) and deviation 1."""
    rng = torch.Generator().manual_seed(seed)
    for shift in (1.0, 4.0):
        t = lib.diffusion.sample_time(60_000, rng, shift).double()
        z = torch.logit(t)
        mean, std = z.mean().item(), z.std().item()
        assert not abs(mean + math.log(shift)) < 0.05 < abs(mean), (
            "sample_time() must shift towards noise: it shifts towards the image")
        assert abs(mean - math.log(shift)) < 0.03, (
            f"with shift {shift:g} the mean of logit(t) must be ln(shift) = {math.log(shift):.2f}, "
            f"it is {mean:.2f}")
        flat = abs((z.exp() / (1 + z.exp())).std().item() - 12 ** -0.5) < 0.01 and std > 1.5
        assert not flat, "training times must not be uniform: t = sigmoid(z), z normal"
        assert abs(std - 1) < 0.03, (
            f"t must be sigmoid(z) with z ~ N(0, 1): logit(t) has deviation {std:.2f}, not 1")
        tail = ((z - mean).abs() > 1.96).double().mean().item()
        assert abs(tail - 0.05) < 0.01, "z must be normal: t = sigmoid(z), z ~ N(0, 1)"


def check_generator(lib, seed):
    """All random numbers come from the generator, so that a run can be repeated."""
    def times(n):
        return lib.diffusion.sample_time(n, torch.Generator().manual_seed(seed))
    assert torch.equal(times(5), times(5)), ("two generators of one seed must give the same times: "
                                             "use `generator`")
    rng, before = torch.Generator().manual_seed(seed), torch.random.get_rng_state()
    first, second = (lib.diffusion.sample_time(5, rng) for _ in range(2))
    assert not torch.equal(first, second), "each call must move the generator on: times repeat"
    same = torch.equal(before, torch.random.get_rng_state())
    assert same, "with a generator, sample_time() must not use torch's global random numbers"
    torch.manual_seed(seed)
    one = lib.diffusion.sample_time(5)
    assert not torch.equal(one, lib.diffusion.sample_time(5)), (
        "without a generator, times must come from torch's global random numbers")


def expected(lib):
    return install(lib, {"diffusion.shift_time": slow_shift, "diffusion.sample_time": slow_sample})


def show(lib):
    rng = torch.Generator().manual_seed(0)
    found = [pictures.titled(pictures.histogram(lib.diffusion.sample_time(40_000, rng, s), 0, 1,
             "t (0: image, 1: noise)", top=6.0), f"shift {s:g}") for s in (1.0, 3.0, 8.0)]
    t = torch.linspace(0, 1, 50)
    lines = {f"s = {s:g}": (t, lib.diffusion.shift_time(t, s)) for s in (1.0, 3.0, 8.0)}
    found.append(pictures.titled(pictures.curves(lines, ("t", "t after"), (230, 190),
                                                 low=True), "shift_time"))
    return pictures.beside(found, 6)


RIGHT = {
    "diffusion.shift_time": """
def shift_time(t, s):
    return 1 - (1 - t) / (1 + (s - 1) * t)
""",
    "diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    z = torch.empty(b).normal_(mean=math.log(shift), std=1.0, generator=generator)
    return 1 / (1 + (-z).exp())
""",
}
WRONG = {
    "shifts towards the image": {"diffusion.shift_time": """
def shift_time(t, s):
    return t / (s - (s - 1) * t)
"""},
    "forgets the denominator": {"diffusion.shift_time": """
def shift_time(t, s):
    return (s * t).clamp(max=1)
"""},
    "a power for a shift": {"diffusion.shift_time": """
def shift_time(t, s):
    return t ** (1 / s)
"""},
    "s where s - 1 belongs": {"diffusion.shift_time": """
def shift_time(t, s):
    return s * t / (1 + s * t)
"""},
    "uniform": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    return shift_time(torch.rand(b, generator=generator), shift)
"""},
    "shifts the normal number": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    return torch.sigmoid(shift * torch.randn(b, generator=generator))
"""},
    "no shift": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    return torch.sigmoid(torch.randn(b, generator=generator))
"""},
    "adds s, not ln s": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    return torch.sigmoid(torch.randn(b, generator=generator) + shift - 1)
"""},
    "ignores the generator": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    return shift_time(torch.sigmoid(torch.randn(b)), shift)
"""},
    "one time for the batch": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    return shift_time(torch.sigmoid(torch.randn(1, generator=generator)), shift).expand(b)
"""},
    "a fixed seed": {"diffusion.sample_time": """
def sample_time(b, generator=None, shift=1.0):
    generator = torch.Generator().manual_seed(0)
    return shift_time(torch.sigmoid(torch.randn(b, generator=generator)), shift)
"""},
}
