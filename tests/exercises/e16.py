"""Exercise 16: the Frechet distance of two sets of images."""

import math
import warnings

import numpy as np
import torch

import pictures
from course import install

TITLE = "How far are drawn images from true ones?"
EQUATION = "Table 3"
LAB = "training"
MINUTES = 25
DIFFICULTY = 2
TARGETS = ["sample.frechet_distance"]
TEXT = """
FD in Table 3 compares two sets of images by features of a pretrained encoder, one vector an image.
Each set is described by its mean `m` and covariance `S`, as if it were Gaussian. The distance of
two Gaussians is

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

`frechet_distance(real, fake)` gets two arrays `(n, d)` and `(m, d)` and returns a float. The
covariance is the usual estimate, with `n - 1` below. Compute in float64: features are fp32, and a
difference of large numbers remains. There may be fewer images than dimensions; the covariance is
then singular, and the formula still holds. (`as_features` in the same file makes arrays of what it
is given. Two sets need at least 2 images each.)

Only the trace of the matrix root is needed, and it is the sum of the square roots of the
eigenvalues of `S1 S2`. That product is not symmetric, but its eigenvalues are those of
`R S2 R`, where `R` is the symmetric root of `S1`: real, and not negative up to rounding.

Worked example in one dimension: the sets {0, 2} and {5, 5, 8} have means 1 and 6, variances 2 and
3. FD = 25 + 2 + 3 - 2 sqrt(6) = 25.101.
"""
HINTS = (
    "Begin with one dimension: what is left of the formula, and what is it for equal means?",
    "`np.linalg.eigh` of a symmetric matrix gives its root. Which matrix is symmetric here?",
    "R from eigh(S1): `vectors * sqrt(max(values, 0)) @ vectors.T`. Then the trace of the root is "
    "`sqrt(max(eigvalsh(R @ S2 @ R), 0)).sum()`.",
)
SEES = ("Three bars: validation images are near the training images, healthy chests alone are far, "
        "and mirrored chests are farthest, though each of them looks well.")


def slow_frechet_distance(real, fake):
    """By eigenvalues, with torch."""
    a, b = (torch.from_numpy(np.array(x, np.float64)) for x in (real, fake))
    (m1, s1), (m2, s2) = ((x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1)) for x in (a, b))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def distance(lib, a, b) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # few samples: biased, but not wrong
        found = lib.sample.frechet_distance(a, b)
    assert np.ndim(found) == 0 and isinstance(float(found), float), (
        "frechet_distance() must return one number")
    assert not np.iscomplexobj(found), "frechet_distance() must return a real number"
    return float(found)


def near(a, b, rel=1e-6, least=1e-6) -> bool:
    return math.isclose(a, b, rel_tol=rel, abs_tol=least)


def sets(seed, n, m, d):
    """Two sets whose covariances do not commute."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d),
            rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


def check_one_dimension(lib, seed):
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2, with n - 1 in the variance."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(6, 1)) * 3, rng.normal(size=(4, 1)) + 1
    got = distance(lib, a, b)

    def formula(ddof, cross=2):
        x, y = a.std(ddof=ddof), b.std(ddof=ddof)
        return float((a.mean() - b.mean()) ** 2 + x * x + y * y - cross * x * y)
    assert not near(got, formula(0)), "the covariance is divided by n - 1, not by n"
    assert not near(got, formula(1, 0)), "the cross term -2 tr (S1 S2)^(1/2) is missing"
    assert not near(got, formula(1, 1)), "the cross term counts twice: -2 tr (S1 S2)^(1/2)"
    assert not near(got, formula(1) ** 0.5), "Table 3 has the squared distance: no root at the end"
    assert not near(got, formula(1) - float((a.mean() - b.mean()) ** 2)), (
        "the means are missing: |m1 - m2|^2")
    assert near(got, formula(1)), ("in one dimension the distance must be (m1 - m2)^2 + "
                                   f"(s1 - s2)^2 = {formula(1):.6g}, not {got:.6g}")
    got = distance(lib, np.array([[0.], [2.]]), np.array([[5.], [5.], [8.]]))
    assert near(got, 30 - 2 * math.sqrt(6)), ("the worked example, {0, 2} and {5, 5, 8}, must give "
                                              f"25.101, not {got:.5g}")


def check_same(lib, seed):
    """A set has distance 0 from itself; the distance is symmetric."""
    a, b = sets(seed, 40, 25, 4)
    got = distance(lib, a, a.copy())
    assert near(got, 0, least=1e-5), f"a set must have distance 0 from itself, not {got:.5g}"
    one, other = distance(lib, a, b), distance(lib, b, a)
    assert near(one, other), f"the distance must be symmetric: {one:.6g} and {other:.6g}"


def check_means(lib, seed):
    """A shift of all features by u adds |u|^2."""
    a, _ = sets(seed, 40, 25, 4)
    u = np.random.default_rng(seed + 1).normal(size=4)
    got, want = distance(lib, a, a + u), float(u @ u)
    assert not near(got, want ** 0.5), ("the means count with the squared distance |m1 - m2|^2, "
                                        "not its root")
    assert not near(got, 0), "the means are missing: |m1 - m2|^2"
    assert not near(got, want / 4), "the means count with the sum over dimensions, not the mean"
    assert near(got, want), (f"a set and the same set moved by u must have distance |u|^2 = "
                             f"{want:.5g}, not {got:.5g}")


def check_many_dimensions(lib, seed):
    """The formula with covariances that do not commute."""
    for d in (2, 5, 8):
        a, b = sets(seed + d, 60, 35, d)
        got, want = distance(lib, a, b), slow_frechet_distance(a, b)
        (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.T)) for x in (a, b))
        mean = (m1 - m2) @ (m1 - m2)
        diagonal = mean + ((np.sqrt(np.diag(s1)) - np.sqrt(np.diag(s2))) ** 2).sum()
        element = mean + np.trace(s1 + s2) - 2 * np.sqrt(np.abs(np.diag(s1 @ s2))).sum()
        alone = mean + np.trace(s1 + s2)
        none = np.trace(s1 + s2) + want - alone
        assert not near(got, diagonal), "covariances are matrices, not only their diagonals"
        assert not near(got, element), ("(S1 S2)^(1/2) is the root of the matrix, not of its "
                                        "elements: its trace sums roots of eigenvalues")
        assert not near(got, alone), "the cross term -2 tr (S1 S2)^(1/2) is missing"
        assert not near(got, none), "the means are missing: |m1 - m2|^2"
        assert not near(got, want ** 0.5), "Table 3 has the squared distance: no root at the end"
        assert near(got, want, 1e-5), (f"for d = {d} the distance must be |m1 - m2|^2 + tr(S1 + S2 "
                                       f"- 2 (S1 S2)^(1/2)) = {want:.6g}, not {got:.6g}")


def check_rotation(lib, seed):
    """A rotation of all features changes nothing; a factor counts squared."""
    a, b = sets(seed, 50, 40, 5)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))
    one = distance(lib, a, b)
    assert near(one, distance(lib, a @ q, b @ q), 1e-5), (
        "a rotation of all features must not change the distance")
    assert near(9 * one, distance(lib, 3 * a, 3 * b), 1e-5), (
        "features three times as large must have nine times the distance")


def check_few(lib, seed):
    """With fewer images than dimensions it still holds, and stays finite."""
    a, b = sets(seed, 5, 7, 12)
    got, want = distance(lib, a, b), slow_frechet_distance(a, b)
    assert math.isfinite(got), "with fewer images than dimensions the distance must be finite"
    assert near(got, want, 1e-4), ("with fewer images than dimensions (singular covariances) the "
                                   f"distance must be {want:.5g}, not {got:.5g}")


def check_precision(lib, seed):
    """fp32 features with a large mean: the computation is in float64."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(64, 3)).astype(np.float32) + np.float32(2048) for _ in range(2))
    got, want = distance(lib, a, b), slow_frechet_distance(a, b)
    assert near(got, want, 1e-4), ("fp32 features with a mean of 2048 lose the difference: compute "
                                   f"in float64 ({got:.6g}, not {want:.6g})")


def expected(lib):
    return install(lib, {"sample.frechet_distance": slow_frechet_distance})


def show(lib):
    """Distances of phantoms, with coarse grey values as features."""
    def features(numbers, split="train", mirrored=False):
        made = np.stack([lib.data.phantom(split, i, 64).image for i in numbers]).astype(np.float64)
        made = made[:, :, ::-1] if mirrored else made
        return made.reshape(len(made), 4, 16, 4, 16).mean((2, 4)).reshape(len(made), 16) / 16
    known = [lib.data.phantom_scene("train", i)[1] for i in range(400)]
    normal = [i for i, found in enumerate(known) if not found][:60]
    train = features(range(120))
    found = {"validation": features(range(120), "val"), "healthy alone": features(normal),
             "mirrored": features(range(120, 240), mirrored=True)}
    found = {k: distance(lib, train, v) for k, v in found.items()}
    return pictures.titled(pictures.bars(found, max(max(found.values()), 1e-9)),
                           "Frechet distance from 120 training images")


RIGHT = {"sample.frechet_distance": """
def frechet_distance(real, fake):
    x, y = (np.asarray(a, dtype=np.float64) for a in (real, fake))
    m1, m2 = x.mean(axis=0), y.mean(axis=0)
    s1, s2 = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s2 @ root), 0)).sum()
    return float(np.dot(m1 - m2, m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * cross)
"""}


def _wrong(mean="(m1 - m2) @ (m1 - m2)", traces="np.trace(s1) + np.trace(s2)",
           cross="2 * np.sqrt(np.maximum(np.linalg.eigvals(s1 @ s2).real, 0)).sum()", ddof=1,
           kind="np.float64", end="float(found)") -> dict:
    return {"sample.frechet_distance": f"""
def frechet_distance(real, fake):
    x, y = (np.asarray(a, dtype={kind}) for a in (real, fake))
    m1, m2 = x.mean(axis=0), y.mean(axis=0)
    s1, s2 = ((a - m).T @ (a - m) / (len(a) - {ddof}) for a, m in ((x, m1), (y, m2)))
    found = {mean} + {traces} - {cross}
    return {end}
"""}


WRONG = {
    "n for n - 1": _wrong(ddof=0),
    "no cross term": _wrong(cross="0"),
    "the cross term once": _wrong(cross="np.sqrt(np.maximum(np.linalg.eigvals(s1 @ s2).real, "
                                        "0)).sum()"),
    "a root of elements": _wrong(cross="2 * np.trace(np.sqrt(np.abs(s1 @ s2)))"),
    "diagonals alone": _wrong(cross="2 * np.sqrt(np.diag(s1) * np.diag(s2)).sum()"),
    "the distance of means, not its square": _wrong(mean="np.linalg.norm(m1 - m2)"),
    "no means": _wrong(mean="0"),
    "the mean over dimensions": _wrong(mean="((m1 - m2) ** 2).mean()"),
    "product of roots": _wrong(cross="2 * np.sqrt(np.trace(s1) * np.trace(s2))"),
    "a root at the end": _wrong(end="float(np.sqrt(max(found, 0)))"),
    "in float32": _wrong(kind="np.float32"),
    "second moments for covariances": _wrong(traces="np.trace(x.T @ x / (len(x) - 1)) + "
                                                    "np.trace(y.T @ y / (len(y) - 1))"),
    "eigenvalues, not their roots": _wrong(cross="2 * np.linalg.eigvals(s1 @ s2).real.sum()"),
    "cholesky": _wrong(cross="2 * np.trace(np.linalg.cholesky(s1) @ np.linalg.cholesky(s2).T)"),
}
