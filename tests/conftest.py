"""What several tests need: paths, a small model with random weights, its inputs."""

import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from unix import Config, UniX  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)    # `pytest &` ignores it, as children do


def small_config(**changes) -> Config:
    """Grouped-query attention, three layers, sizes that are all different."""
    return Config(**{**dict(
        vit_image=32, vit_patch=8, vit_width=24, vit_mlp=40, vit_heads=2, vit_layers=2, vocab=97,
        layers=3, width=32, heads=4, kv_heads=2, head_dim=10, mlp=44, max_tokens=64, latent_side=8,
        latent_channels=16, bos=90, eos=91, boi=92, eoi=93, resolution=32), **changes})


@pytest.fixture
def model() -> UniX:
    """A small UniX whose every weight is random: nothing is zero, no two experts are equal."""
    torch.manual_seed(0)
    model = UniX(small_config())
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() > 1 else 0.2)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
