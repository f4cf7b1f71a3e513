"""Exercise 3: the sampler, Euler's method from noise to an image."""

import numpy as np
import torch
from PIL import Image, ImageDraw

import pictures
from course import close, install, noise

TITLE = "Euler from noise to an image"
EQUATION = "Eq. 2, backwards"
LAB = "flow"
MINUTES = 30
DIFFICULTY = 2
TARGETS = ["diffusion.sample"]
TEXT = """
The network knows the velocity at each point and time. `sample` follows it from noise (t = 1) back
to an image (t = 0) in small straight steps. It is a generator: after each step it yields
`(t, v, x)`: the time **before** the step (one number: a float, or a tensor without dimensions), the
velocity that was used, `x` **after** the step.

- **Times**: `points` numbers evenly from 1 to 0, `torch.linspace(1, 0, points)`, then shifted with
  `shift_time(times, shift)`. They make `points - 1` steps; the last one ends at 0.
- **Step** from time `t` to the next time `after` (`after < t`): the velocity points from the image
  to the noise, and we walk the other way, by `t - after`.
- **The network** is the argument `velocity(x, t, guided)`. It takes the time as a `(b,)` tensor,
  the same for all samples: the (shifted) time `t` at which the step begins.
- **Guidance** is on at a step if `scale > 1` and `interval[0] < t <= interval[1]` (t after the
  shift: the lower end is out, the upper end is in). Then `velocity(x, t, True)` returns a *pair*
  (with the caption, without it), which `guide(cond, uncond, scale)` of exercise 4 makes one. Else
  `velocity(x, t, False)` returns one velocity. Yield the velocity after guidance.
- `x` that comes in belongs to the caller: do not change it in place.
- `eta` and `noise` (fresh noise in each step) are not judged. Leave them out at first. All checks
  have `eta = 0`. But generating images with `tiny` needs them: its default is `eta = 1`. With
  `eps = x + v (1 - after)` (x after the step) the rest of a step, if `after > 0`, is
  `x + after (new noise() - (1 - sqrt(1 - new^2)) eps)`, where
  `new = eta sqrt(1 - ((1 - t) after / ((1 - after) t))^2)`.

Worked example: `points = 3`, `shift = 1`, x = 1, and a network that always answers 0.5. Times are
1, 0.5, 0. The steps yield (1, 0.5, 0.75) and (0.5, 0.5, 0.5).
"""
HINTS = (
    "How many times are there, how many steps between them, and at which times is the network "
    "asked? Never at t = 0.",
    "Loop over pairs of neighbours in the shifted times: `zip(times[:-1], times[1:])`. Expand the "
    "time to `(b,)` for the network.",
    "`x = x - v * (t - after)` makes a new tensor, where `x -= ...` changes the caller's. Decide "
    "on guidance with the shifted `t`, before you call the network.",
)
SEES = ("A cloud of noise narrows and becomes the letters UniX; they are sharp only at the end. "
        "Below: the error falls as 1 / steps, which is what Euler's method can do.")


def slow_guide(cond, uncond, scale, renorm="global", least=0.0):
    v = uncond + scale * (cond - uncond)
    size_c, size_v = (a.square().flatten(1).sum(1).sqrt()[:, None, None] for a in (cond, v))
    return v * (size_c / size_v).clamp(least, 1)


def slow_sample(velocity, x, points=50, shift=3.0, scale=2.0, interval=(0.4, 1.0), eta=0.0,
                noise=None):
    even = [1 - i / (points - 1) for i in range(points)]
    times = [shift * t / (1 + (shift - 1) * t) for t in even]
    for i in range(points - 1):
        t = torch.full((len(x),), times[i])
        if scale > 1 and interval[0] < times[i] <= interval[1]:
            v = slow_guide(*velocity(x, t, True), scale)
        else:
            v = velocity(x, t, False)
        x = x - (times[i] - times[i + 1]) * v
        yield times[i], v, x


def run(lib, velocity, x, *args, **how) -> list:
    steps = list(lib.diffusion.sample(velocity, x, *args, **how))
    assert steps and all(len(s) == 3 for s in steps), "sample() must yield (t, v, x) at each step"
    return steps


def check_straight(lib, seed):
    """With the true velocity the sampler ends at the image, in one step or in many."""
    x0, eps = noise(seed, 2, 5, 3), noise(seed + 1, 2, 5, 3)
    for points in (2, 9):
        end = run(lib, lambda x, t, g: eps - x0, eps, points, scale=1.0)[-1][2]
        away = end.shape == x0.shape and torch.allclose(end, 2 * eps - x0, atol=1e-3)
        assert not away, ("sample() walks away from the image: the velocity points to the noise, "
                          "so a step subtracts v dt")
        close(end, x0, "with the constant velocity eps - x0, sample() must end at x0")


def check_number_of_steps(lib, seed):
    """`points` times make points - 1 steps."""
    for points in (2, 7):
        asked = []

        def velocity(x, t, guided):
            asked.append(t)
            return x
        steps = run(lib, velocity, noise(seed, 1, 2, 2), points, scale=1.0)
        assert len(steps) == points - 1 == len(asked), (
            f"{points} points must make {points - 1} steps, each with one call of the network; "
            f"there are {len(steps)} steps and {len(asked)} calls")
        assert min(float(torch.as_tensor(t).min()) for t in asked) > 0, (
            "the network must never be asked at t = 0: there the walk has ended")


def check_times(lib, seed):
    """The network is asked at the shifted times at which the steps begin."""
    asked = []

    def velocity(x, t, guided):
        asked.append(t)
        return torch.zeros_like(x)
    for points, shift in ((5, 1.0), (9, 3.0), (6, 0.5)):
        asked.clear()
        steps = run(lib, velocity, noise(seed, 3, 2, 2), points, shift, scale=1.0)
        want = [s[0] for s in slow_sample(velocity, torch.zeros(3, 2, 2), points, shift, 1.0)]
        asked = asked[:points - 1]
        assert all(isinstance(t, torch.Tensor) and t.shape == (3,) for t in asked), (
            "velocity() must get the time as a tensor (b,), the same for all samples")
        got = torch.stack(asked)
        assert abs(float(got[0, 0]) - 1) < 1e-5, "the first step begins at t = 1, noise"
        close(got, torch.tensor(want)[:, None].expand(-1, 3), "velocity() must be asked at the "
              f"shifted times where steps begin (shift {shift:g})", 1e-5)
        close(torch.tensor([float(s[0]) for s in steps]), torch.tensor(want), "sample() must yield "
              "the shifted time before each step", 1e-5)


def check_step_length(lib, seed):
    """A step is as long as the difference of its two shifted times."""
    x = noise(seed, 2, 3, 2)

    def velocity(x, t, guided):
        return (1 + t[:, None, None]) * x.sin() + t[:, None, None]
    for points, shift in ((2, 3.0), (6, 1.0), (8, 3.0)):
        steps = run(lib, velocity, x, points, shift, scale=1.0)
        for (_, v, after), (_, want_v, want) in zip(steps, slow_sample(
                velocity, x, points, shift, 1.0)):
            close(v, want_v, "sample() must yield the velocity at the beginning of the step: at "
                  "the current x and time")
            close(after, want, "a step must be v times the difference of the two shifted times, "
                  f"and x after it is yielded (shift {shift:g})")


def check_guided_interval(lib, seed):
    """Guidance is on while lo < t <= hi."""
    asked = {}

    def velocity(x, t, guided):
        asked[round(float(t[0]), 4)] = guided
        return (x, x) if guided else x
    run(lib, velocity, noise(seed, 2, 4, 2), 9, 1.0, 2.0, (0.25, 0.75))
    on = {t for t, guided in asked.items() if guided}
    assert on, "no step is guided although scale is 2"
    assert 0.25 not in on, "guidance must be off at the lower end of the interval: lo < t"
    assert 0.75 in on, "guidance must be on at the upper end of the interval: t <= hi"
    assert on == {0.375, 0.5, 0.625, 0.75}, (
        f"with interval (0.25, 0.75], guidance must be on at .375 .5 .625 .75, not at {sorted(on)}")


def check_guided_after_shift(lib, seed):
    """Whether a step is guided is decided with the time after the shift."""
    asked = []

    def velocity(x, t, guided):
        asked.append((float(t[0]), guided))
        return (x, x) if guided else x
    run(lib, velocity, noise(seed, 1, 4, 2), 50)
    assert len(asked) == 49, "a guided step must call the network once, for the pair"
    wrong = [round(t, 3) for t, guided in asked if guided != (t > 0.4) and abs(t - 0.4) > 1e-3]
    assert not wrong, (f"guidance must be decided on t after the shift: wrong at t = {wrong[:4]} "
                       "for the interval (0.4, 1]")


def check_scale_one(lib, seed):
    """Without guidance (scale 1) no step asks for a pair."""
    asked = []

    def velocity(x, t, guided):
        asked.append(bool(guided))
        return (x, x) if guided else x
    for scale in (1.0, 0.5):
        run(lib, velocity, noise(seed, 1, 4, 2), 6, scale=scale)
    assert not any(asked), "guidance must be off at every step where scale <= 1"


def check_guided_values(lib, seed):
    """A guided step takes guide(with caption, without, scale)."""
    x, a, b = (noise(seed + i, 2, 4, 3) for i in range(3))

    def velocity(x, t, guided):
        cond, uncond = (x * t[:, None, None] + a).cos(), 0.7 * (x + b).sin()
        return (cond, uncond) if guided else cond
    for scale in (1.5, 4.0):
        want = list(slow_sample(velocity, x, 9, 3.0, scale, (0.2, 0.8)))
        for (t, v, got), (_, want_v, want_x) in zip(
                run(lib, velocity, x, 9, 3.0, scale, (0.2, 0.8)), want):
            close(v, want_v, "at a guided step v must be guide(cond, uncond, scale), in this order")
            close(got, want_x, "a guided step must walk with the guided velocity")


def check_noise_stays(lib, seed):
    """The noise that comes in is not changed."""
    x = noise(seed, 2, 3, 2)
    before = x.clone()
    seen = [s[2] for s in run(lib, lambda x, t, g: x, x, 5, scale=1.0)]
    assert torch.equal(x, before), "sample() must not change the caller's x in place"
    assert len({s.data_ptr() for s in seen}) == 4, ("each step must yield a new x: a caller may "
                                                    "keep those before")


def expected(lib):
    return install(lib, {"diffusion.sample": slow_sample})


def letters(n: int = 900) -> torch.Tensor:
    """Points that make up the word UniX, within about 2 of the origin."""
    image = Image.new("L", (200, 80))
    ImageDraw.Draw(image).text((100, 40), "UniX", 255, pictures.font(76), "mm")
    ys, xs = np.nonzero(np.asarray(image) > 128)
    keep = np.random.default_rng(0).choice(len(xs), n, replace=False)
    return torch.tensor(np.stack([xs[keep] - 100, 40 - ys[keep]], 1) / 34.0).float()


def show(lib):
    words, frames = letters(), []

    def velocity(x, t, guided):         # the exact one, if images were these points
        s = t[0].item()
        far = torch.cdist(x[0], (1 - s) * words).square()
        x0 = (-far / (2 * s * s)).softmax(-1) @ words
        return (x - x0) / s
    start = noise(0, 1, 900, 2)
    steps = [(1.0, start)]
    found = list(lib.diffusion.sample(velocity, start, 41, 3.0, 1.0))
    ends = [float(t) for t, _, _ in found[1:]] + [0.0]
    steps += [(t, x) for t, (_, _, x) in zip(ends, found)]
    for i in (0, 8, 16, 24, 32, 36, 40):
        t, x = steps[min(i, len(steps) - 1)]
        frames.append(pictures.points(x[0], 2.8, f"t = {t:.2f}"))

    def gaussian(x, t, guided):         # exact for images from N(0, 0.4^2): noise ends at 0.4 eps
        s = t[:, None, None]
        return x * (s - (1 - s) * 0.16) / (s * s + (1 - s) ** 2 * 0.16)
    eps, errors = noise(1, 1, 500, 1), {}
    for shift in (1.0, 3.0):
        counts = (4, 8, 16, 32, 64, 128)
        error = [(list(lib.diffusion.sample(gaussian, eps, n + 1, shift, 1.0))[-1][2]
                  - 0.4 * eps).abs().mean().item() for n in counts]
        errors[f"shift {shift:g}"] = counts, error
    errors["1 / steps"] = counts, [0.3 / n for n in counts]
    plot = pictures.curves(errors, ("steps", "error"), (430, 210), (True, True), (1e-4, 1))
    return pictures.stack([pictures.beside(frames, 4), plot])


RIGHT = {"diffusion.sample": """
def sample(velocity, x, points=50, shift=3.0, scale=2.0, interval=(0.4, 1.0), eta=0.0, noise=None):
    lo, hi = interval
    times = [1 - i / (points - 1) for i in range(points)]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    x = x.clone()
    i = 0
    while i + 1 < points:
        t = times[i]
        now = torch.zeros(x.shape[0]) + t
        if scale > 1 and t > lo and not t > hi:
            cond, uncond = velocity(x, now, True)
            v = guide(cond, uncond, scale)
        else:
            v = velocity(x, now, False)
        x = torch.add(x, v, alpha=times[i + 1] - t)
        i += 1
        yield t, v, x
"""}


def variant(old: str, new: str) -> dict:
    """The plain sampler with one line changed."""
    assert PLAIN.count(old) == 1
    return {"diffusion.sample": PLAIN.replace(old, new)}


PLAIN = """
def sample(velocity, x, points=50, shift=3.0, scale=2.0, interval=(0.4, 1.0), eta=0.0, noise=None):
    plain = torch.linspace(1, 0, points)
    times = shift_time(plain, shift)
    for i in range(points - 1):
        t, after = times[i], times[i + 1]
        at = t.expand(len(x))
        guided = scale > 1 and bool(interval[0] < t <= interval[1])
        v = velocity(x, at, guided)
        v = guide(*v, scale) if guided else v
        x = x - v * (t - after)
        yield t, v, x
"""
WRONG = {
    "adds v": variant("x - v * (t - after)", "x + v * (t - after)"),
    "one step too many": variant("1, 0, points)\n    times = shift_time(plain, shift)\n    for i "
                                 "in range(points - 1)", "1, 0, points + 1)\n    times = shift_time"
                                 "(plain, shift)\n    for i in range(points)"),
    "ends one step early": variant("range(points - 1)", "range(points - 2)"),
    "guided at the lower end": variant("interval[0] < t", "interval[0] <= t"),
    "not guided at the upper end": variant("t <= interval[1]", "t < interval[1]"),
    "guidance before the shift": variant("interval[0] < t <= interval[1]",
                                         "interval[0] < plain[i] <= interval[1]"),
    "no shift": variant("shift_time(plain, shift)", "plain"),
    "the network is given the time before the shift": variant("t.expand", "plain[i].expand"),
    "the network is given the time after the step": variant("t.expand", "after.expand"),
    "a step of 1 / points": variant("(t - after)", "(1 / points)"),
    "guided at scale 1": variant("scale > 1 and ", ""),
    "always guided": variant("bool(interval[0] < t <= interval[1])", "True"),
    "with and without swapped": variant("guide(*v, scale)", "guide(v[1], v[0], scale)"),
    "yields the time after the step": variant("yield t,", "yield after,"),
    "yields x before the step": variant("x = x - v * (t - after)\n        yield t, v, x",
                                        "yield t, v, x\n        x = x - v * (t - after)"),
    "in place": variant("x = x - v * (t - after)", "x -= v * (t - after)"),
    "the time is a number": variant("t.expand(len(x))", "t"),
    "from the image to noise": variant("linspace(1, 0, points)", "linspace(0, 1, points)"),
}
