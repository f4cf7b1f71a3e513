"""Lab 1: rectified flow without a network."""

import torch

INTRO = """Lab 1. Flow: from noise to an image

Five exercises on `diffusion.py`: the path from image to noise, the times at which a network is
trained, the walk back, guidance, and what a latent token knows of its place and time. None needs a
trained network (the picture of exercise 4 uses the shipped one). Convention: **t = 0 is the image, t = 1 is noise**, and the velocity points from
the image to the noise. So the sampler walks against it.
"""


def passes(lib) -> int:
    """Counts passes of a network, one for each caption that it reads, for one image."""
    count = 0

    def velocity(x, t, guided):
        nonlocal count
        count += 2 if guided else 1
        return (x, x) if guided else x
    for _ in lib.diffusion.sample(velocity, torch.zeros(1, 4, 2), 50, 3.0, 2.0, (0.4, 1.0)):
        pass
    return count


def first_step(lib) -> float:
    """How much of the way from t = 1 to 0 the last of 9 steps covers at shift 3."""
    seen = [float(t) for t, _, _ in lib.diffusion.sample(
        lambda x, t, guided: x, torch.zeros(1, 4, 2), 10, 3.0, 1.0)]
    return round(seen[-1], 3)


QUESTIONS = [
    {"ask": "The sampler has 50 points in time, shift 3, and guidance for t in (0.4, 1]. A guided "
            "step evaluates the network twice, once with the caption and once without; other "
            "steps evaluate it once. How many evaluations does one image take?",
     "run": passes,
     "why": "50 points make 49 steps. After the shift, t > 0.4 means t > 0.4 / (0.4 + 3 * 0.6) = "
            "0.18 before it, which is true at 41 of them: 41 * 2 + 8 = 90."},
    {"ask": "With 10 points (9 steps) and shift 3, how long is the last step, the one that ends "
            "at t = 0? (Without a shift it is 1/9 = 0.111. Three decimals.)",
     "run": first_step,
     "why": "The last step begins at 1/9, which the shift moves to 3/9 / (1 + 2/9) = 0.273: the "
            "steps near the image are long, those near noise short."},
]
