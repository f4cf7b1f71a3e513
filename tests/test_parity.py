"""The official code's numbers, and that the comparison can fail."""

import json
import math

import numpy as np
import pytest
import torch

import parity
from ar import RadDino
from conftest import GOLDEN
from unix import load_rad_dino


@pytest.fixture(scope="module")
def golden() -> parity.Parity:
    return parity.compare(GOLDEN / "A")


def test_every_covered_array_agrees(golden):
    assert golden.bad == [] and len(golden.seen) > 130
    for group in ("vit/", "pos/", "time/", "vae/", "und/", "und_text/", "gen/", "train/gen/freeze0",
                  "train/gen/freeze1", "train/und/freeze0", "train/pack_gu/", "train/pack_gg/"):
        assert any(k.startswith(group) for k in golden.seen), group


def test_a_wrong_array_is_found(golden):
    golden.bad = []
    golden.check("vae/decoded", golden.want["vae/decoded"] + 2e-3)
    golden.check("time/emb", np.zeros(3))
    assert [line.split(":")[0] for line in golden.bad] == ["vae/decoded", "time/emb"]


def test_rad_dino_equals_the_reference_at_two_sizes():
    """Position embeddings are interpolated at the second one."""
    model, want = load_rad_dino(GOLDEN / "dinov2"), np.load(GOLDEN / "dinov2" / "expected.npz")
    for size in (70, 98):
        got = model(torch.from_numpy(want[f"image_{size}"]))
        torch.testing.assert_close(got, torch.from_numpy(want[f"last_hidden_state_{size}"]),
                                   atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rad_dino_tells_the_image_from_its_patches():
    """The class token comes first: it is the summary, the patches in raster order are the rest."""
    model = load_rad_dino(GOLDEN / "dinov2")
    images = torch.randint(0, 256, (2, 30, 30), dtype=torch.uint8)
    states = model(model.prepare(images))
    assert torch.equal(model.summary(images), states[:, 0])
    assert torch.equal(model.patches(images), states[:, 1:])
    assert math.isqrt(states.shape[1] - 1) ** 2 == states.shape[1] - 1


def test_rad_dino_reads_older_names(tmp_path):
    """Folders written by older libraries say attention.attention.query and output.dense."""
    new = load_rad_dino(GOLDEN / "dinov2")
    from unix import read_safetensors
    old = {}
    for k, v in read_safetensors(GOLDEN / "dinov2" / "model.safetensors").items():
        for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
            k = k.replace(f"attention.{a}_proj", f"attention.attention.{b}")
        old[k.replace("attention.o_proj", "attention.output.dense")] = v
    about = json.loads((GOLDEN / "dinov2" / "config.json").read_text())
    again = RadDino(tmp_path, old, about["num_attention_heads"])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in new.state_dict().items())
