"""Metrics against reference libraries' numbers (golden/metrics) and closed forms."""
import json
import pathlib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from data import HEART, Finding, paint, phantom, sample_scene

GOLDEN = pathlib.Path(__file__).parent / "golden" / "metrics"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def features():
    return np.load(GOLDEN / "features.npz")


def test_image_metrics_equal_the_references(features):
    real, fake = features["real"], features["fake"]
    assert sample.frechet_distance(real, fake) == pytest.approx(float(features["fd"]), rel=1e-6)
    assert sample.kernel_distance(real, fake) == pytest.approx(float(features["kd"]), abs=1e-6)
    for name, value in sample.prdc(real, fake, k=5).items():
        assert value == pytest.approx(float(features[name]), abs=1e-9), name


def test_text_metrics_equal_nltk_and_rouge_score():
    text = json.loads((GOLDEN / "text.json").read_text())
    assert sample.bleu(text["refs"], text["hyps"]) == pytest.approx(text["bleu"], abs=1e-9)
    each = [sample.rouge_l([r], [h]) for r, h in zip(text["refs"], text["hyps"])]
    assert each == pytest.approx(text["rouge_l"], abs=1e-9)
    assert sample.rouge_l(text["refs"], text["hyps"]) == pytest.approx(np.mean(text["rouge_l"]))


def test_f1_equals_scikit_learn():
    golden = np.load(GOLDEN / "f1.npz")
    scores = sample.f1_scores(golden["gt"], golden["pred"])
    assert scores["micro"] == pytest.approx(float(golden["micro"]), abs=1e-9)
    assert scores["macro"] == pytest.approx(float(golden["macro"]), abs=1e-9)
    assert scores["per_class"] == pytest.approx(golden["per_class"], abs=1e-8)


def gaussian(mean, deviation, n=64):
    """Samples whose mean and covariance are exactly what is asked for."""
    x = RNG.normal(size=(n, len(mean)))
    x -= x.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ whiten * np.asarray(deviation) + np.asarray(mean)


def test_frechet_distance_of_diagonal_gaussians():
    # |m1 - m2|^2 + sum (s1 - s2)^2 = (9 + 16) + (1 + 4 + 0)
    a, b = gaussian([0, 0, 1], [1, 2, 3]), gaussian([3, 4, 1], [2, 4, 3])
    assert sample.frechet_distance(a, b) == pytest.approx(30, rel=1e-9)
    assert sample.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions():
    a, b = RNG.normal(size=(7, 20)), RNG.normal(size=(9, 20)) + 1
    s1, s2 = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ s2 @ root), 0, None)).sum()
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    with pytest.warns(UserWarning, match="biased"):
        assert sample.frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample.frechet_distance(gaussian([0, 0], [1, 1]), gaussian([0, 0], [1, 2]))


def test_kernel_distance_of_two_points_a_set_by_hand():
    # k(x, y) = (xy + 1)^3 in 1-D: k(0, 1) = 1 in each set, k(2, 3) = 343;
    # across: k(0, .) = 1, 1 and k(1, 2) = 27, k(1, 3) = 64
    real, fake = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    assert sample.kernel_distance(real, fake) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


def test_kernel_distance_does_not_depend_on_whether_the_arrays_are_one_object():
    x = RNG.normal(size=(30, 4))
    assert sample.kernel_distance(x, x) == sample.kernel_distance(x, x.copy()) < 0


def test_prdc_of_identical_and_of_distant_sets():
    x = RNG.normal(size=(600, 8))           # more than one chunk
    same = sample.prdc(x, x.copy())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] >= 1
    assert set(sample.prdc(x, x + 100).values()) == {0.0}


def test_prdc_where_every_sample_is_one_point():
    """Duplicates have balls of radius 0, which hold nothing: rounding must not decide."""
    x = np.repeat(RNG.normal(size=(1, 300)), 20, axis=0)
    assert set(sample.prdc(x, x).values()) == {0.0}


def test_prdc_by_hand():
    # k = 1: balls of real (0, 1, 5) have radii 1, 1, 4; of fake (0.5, 20) radii 19.5, 19.5
    scores = sample.prdc(np.array([[0.0], [1], [5]]), np.array([[0.5], [20]]), k=1)
    assert scores == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 2 / 3}


@pytest.mark.parametrize("metric", [sample.frechet_distance, sample.kernel_distance, sample.prdc])
def test_bad_features_are_named(metric):
    one, many = np.zeros((1, 4)), np.zeros((9, 4))
    for real, fake in ((one, many), (many, one), (many, np.zeros((9, 5))), (many[0], many)):
        with pytest.raises(ValueError, match="samples|features"):
            metric(real, fake)


def test_bleu_edges():
    text = ["the heart is normal in size", "no effusion or pneumothorax seen"]
    assert sample.bleu(text, text) == pytest.approx([1] * 4)
    assert sample.bleu(text, ["", ""]) == [0] * 4
    assert sample.bleu(["a b c d"], ["e f g h"]) == [0] * 4
    # 2 of 2 words match, and half the length costs exp(1 - 4 / 2)
    assert sample.bleu(["a b c d"], ["a b"])[0] == pytest.approx(np.exp(-1))


def test_rouge_l_by_hand():
    # a c d is the longest common subsequence: precision 3/4, recall 3/5
    assert sample.rouge_l(["a b c x d"], ["A, c. D z"]) == pytest.approx(2 * .75 * .6 / 1.35)
    assert sample.rouge_l(["a b"], ["a b"]) == 1
    assert sample.rouge_l(["a b", "a"], ["", "a"]) == 0.5
    assert sample.rouge_l([""], [""]) == 0


def test_rouge_l_equals_the_table_of_dynamic_programming():
    for _ in range(50):
        a, b = (list(RNG.choice(list("abcde"), size=RNG.integers(1, 80))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = (table[i, j] + 1 if x == y else
                                       max(table[i, j + 1], table[i + 1, j]))
        want = 2 * table[-1, -1] / (len(a) + len(b))
        assert sample.rouge_l([" ".join(a)], [" ".join(b)]) == pytest.approx(want)


@pytest.mark.parametrize("metric", [sample.bleu, sample.rouge_l])
def test_lists_of_unequal_length_are_an_error(metric):
    for refs, hyps in ((["a", "b"], ["a"]), ([], [])):
        with pytest.raises(ValueError, match="one length"):
            metric(refs, hyps)


def test_f1_counts_a_class_without_positives_as_zero():
    truth = np.array([[1, 0, 0], [1, 1, 0]])
    scores = sample.f1_scores(truth, truth)
    assert scores["per_class"].tolist() == [1, 1, 0]
    assert (scores["micro"], scores["macro"]) == (1, pytest.approx(2 / 3))
    with pytest.raises(ValueError):
        sample.f1_scores(truth, truth[:1])


def test_intervals_cover_the_mean_and_repeat():
    x = RNG.normal(loc=3, size=400)

    def figures(i):
        return {"mean": x[i].mean(), "highest": x[i].max()}
    found = sample.with_intervals(figures, len(x), rounds=1000)
    value, low, high = found["mean"]
    assert low < x.mean() == value < high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=.15)
    assert found == sample.with_intervals(figures, len(x), rounds=1000)
    assert found["highest"][0] == found["highest"][2] == x.max()


def test_intervals_of_biased_figures_are_moved_to_the_value():
    """The number of different samples: all 100, but resamples hold about 63."""
    def figures(i):
        return {"different": len(set(i.tolist()))}
    value, low, high = sample.with_intervals(figures, 100)["different"]
    assert value == 100 and high < 75
    value, low, high = sample.with_intervals(figures, 100, centred=True)["different"]
    assert low < value == 100 < high and high - low < 20


class Shift(torch.nn.Module):
    """An autoencoder whose images come back brighter by some grey levels, one an image."""

    def __init__(self, levels):
        super().__init__()
        self.levels = iter(levels)

    def moments(self, pixels):
        return pixels

    def latents(self, moments):
        return moments

    def decode(self, latents):
        by = torch.tensor([next(self.levels) for _ in latents])
        return latents + (by[:, None, None, None] + 0.5) / 127.5      # to_uint8 truncates


@pytest.mark.filterwarnings("ignore:invalid value")     # the interval of infinities
def test_psnr_by_hand():
    """10 log10(255^2 / error^2), the mean over images; in chunks; no error is infinite."""
    images = np.full((40, 4, 4), 100, np.uint8)
    levels = [1] * 10 + [3] * 30
    model = SimpleNamespace(vae=Shift(levels), device="cpu")
    ((name, (value, low, high)),) = sample.reconstruction(model, images).items()
    each = [20 * np.log10(255 / d) for d in levels]
    assert name == "PSNR at 4 px, 40 images" and value == pytest.approx(np.mean(each))
    assert low < value < high
    model.vae = Shift([0] * 2)
    assert sample.reconstruction(model, images[:2])["PSNR at 4 px, 2 images"][0] == np.inf


# ---- the heart on an image -----------------------------------------------------------------------
def test_heart_width_grows_with_severity():
    for seed in range(10):
        scene = sample_scene(np.random.default_rng(seed))
        grades = [(), *((Finding("Cardiomegaly", severity=s),) for s in HEART)]
        seen = [sample.heart_width(paint(scene, g, 64)) for g in grades]
        assert all(a < b for a, b in zip(seen, seen[1:])), (seed, seen)


@pytest.mark.parametrize("size", [64, 128])
def test_heart_width_follows_the_true_ratio(size):
    images = [phantom("val", i, size) for i in range(300)]
    seen = np.array([sample.heart_width(p.image) for p in images])
    true = np.array([p.heart_ratio for p in images])
    assert np.isfinite(seen).all() and np.corrcoef(seen, true)[0, 1] > .9
    assert abs(seen - true).mean() < .03
    flat = [sample.heart_width(np.full((64, 64), v, np.uint8)) for v in (0, 128, 255)]
    assert np.isfinite(flat).all()


def test_hearts_are_measured_from_normal_to_severe():
    """Two of three seeds rise all the way; texts say what is painted; images have a folder."""
    def images(kind, wanted):
        assert kind == "hearts" and len({seed for _, seed in wanted.values()}) == 3
        painted = []
        for text, seed in wanted.values():
            level = ("normal", "mild", "severe").index(next(
                w for w in ("normal", "mild", "severe") if w in text))
            level = (0, 2, 1)[level] if seed == 1001 else level         # falls at the end
            grade = Finding("Cardiomegaly", severity=("", "mild", "severe")[level])
            scene = sample_scene(np.random.default_rng(seed))
            painted.append(paint(scene, (grade,) if level else (), 64))
        return np.stack(painted)
    found = sample.Evaluation.hearts(SimpleNamespace(images=images), count=3)
    assert found["normal < mild < severe, share of seeds"][0] == pytest.approx(2 / 3)


# ---- tables of details ---------------------------------------------------------------------------
def test_details_of_report_scores_by_hand():
    """Sides count where effusion, pneumothorax or opacity are in both reports and the true side is
    known; severities count for every class."""
    truth = ["Small left effusion.", "Large right pneumothorax.", "Severe cardiomegaly.",
             "Left rib fracture.", "Effusion.", "Possible pneumonia. Consolidation."]
    written = ["Small right effusion. Edema.", "Small right pneumothorax.", "Mild cardiomegaly.",
               "Right rib fracture.", "Small left effusion.", "Pneumonia."]
    found = {k: v[0] for k, v in sample.report_scores(truth, written).items()}
    assert found["sides right"] == 1 / 2                        # left/right wrong, right/right
    assert found["severity right"] == 1 / 3                     # small/small, two wrong
    # positive: 5 of 6 are found, two are invented (edema, pneumonia for a consolidation)
    assert found["micro F1-14"] == pytest.approx(2 * 5 / (6 + 7))
    assert found["micro F1-14, uncertain as positive"] == pytest.approx(2 * 6 / (7 + 7))
    # of the five: effusion twice, cardiomegaly; consolidation missed, edema invented
    assert found["micro F1-5"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["macro F1-5"] == pytest.approx((1 + 1) / 5)
    assert found["BLEU-1"] == pytest.approx(sample.bleu(truth, written)[0])
    assert found["ROUGE-L"] == pytest.approx(sample.rouge_l(truth, written))
    assert "sides right" not in sample.report_scores(["Edema."], ["Edema."])
    for c, text in (("Atelectasis", "Atelectasis."), ("Cardiomegaly", "Cardiomegaly."),
                    ("Consolidation", "Consolidation."), ("Edema", "Pulmonary edema."),
                    ("Pleural Effusion", "Effusion."), ("Pneumonia", "Pneumonia."),
                    ("Fracture", "Rib fracture.")):
        found = sample.report_scores([text], [text])
        five = c not in ("Pneumonia", "Fracture")           # CheXpert's five
        assert found["micro F1-5"][0] == five and found[f"F1 {c} (1)"] == [1.0, 1.0, 1.0]


def test_details_of_image_scores():
    real, fake = RNG.normal(size=(40, 3)), RNG.normal(size=(40, 3)) / 3
    found = sample.image_scores(real, fake)
    for name, value in sample.prdc(real, fake).items():
        assert found[name][0] == value, name
    assert found["precision"][0] > found["recall"][0] and found["precision"][2] <= 1
    assert found["FD"][0] == sample.frechet_distance(real, fake)
    assert list(sample.image_scores(real[:5], fake[:5])) == ["FD", "KD"]
    assert sample.image_scores(real[:1], fake[:1]) == {}
