"""Lab 3: training both branches, writing, measuring."""

import math

import torch

import oracles_training as oracle

INTRO = """Lab 3. Training: two branches, three stages

Six exercises. Two on the reader: how it writes with a cache, and the loss that teaches it. Two on
what stage 2 needs: a copied tower, a frozen reader, and REPA. The capstone puts a whole training
step together and trains with it: **eight chests in two minutes**. The last exercise measures how
far they are from true ones. Then your teacher may hand out the bug zoo: ten runs with one
bug each, and you say which.
"""


def first_loss(lib) -> float:
    """Loss of a token before the first step: a new model of a vocabulary of 679."""
    config = lib.unix.Config(**(oracle.SIZES | {"vocab": 679}))
    torch.manual_seed(0)
    model = lib.unix.UniX(config, oracle.Words())
    reports, pixels = oracle.token_lists(0, (40, 60)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        total, count = model.understanding_loss(pixels, reports, reports)
    return round(float(total / count), 1)


def kept(lib) -> float:
    """After how many steps the warmed-up average has the weight of .99 for its past."""
    return next(k for k in range(1, 10**5) if k / (k + 9) >= 0.99)


QUESTIONS = [
    {"ask": "A new model with a vocabulary of 679 tokens reads its first report. What is the loss "
            "of a token, before any step? (One decimal.)",
     "run": first_loss,
     "why": f"All tokens are about equally likely, and ln 679 = {math.log(679):.2f}. A first loss "
            "far from ln V is a bug."},
    {"ask": "The averaged weights take the decay min(0.99, step / (step + 9)). At which step does "
            "it reach 0.99? (Before that, the average is younger than you asked for.)",
     "run": kept,
     "why": "k / (k + 9) = 0.99 at k = 9 * 0.99 / 0.01 = 891. So in a short run the average "
            "follows the weights closely; with 0.99 from the start, 37% of it would still be the "
            "random beginning after 100 steps."},
]
