"""tests/gpu.py on the CPU, where it can run: the same code on a small model, so that it works on
the day when there is a GPU. What it measures there is in tests/README.md."""

import json
import math
import subprocess
import sys

import pytest
import torch

import gpu
from conftest import ROOT, unix_only

pytestmark = unix_only
NAMES = [section.__name__ for section, _ in gpu.SECTIONS]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """All sections but the comparison with tests/golden, which test_parity.py runs."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    names = [name for name in NAMES if name != "agrees"]
    gpu.main(["--small", "--seconds", "900", "--json", str(file), "--only", *names])
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "agrees"])
def test_a_section_runs_on_the_cpu(found, name):
    assert found[name]["ok"], found[name]


def test_every_kind_of_attention_call_was_tried(found):
    assert all(v["calls"] >= 10 and v["math"] == [] for k, v in found["kernels"].items()
               if isinstance(v, dict))


def test_resumed_runs_equal_runs_without_a_stop(found):
    assert all(found["stages"][f"stage {k}"]["bit_identical"] for k in range(4))


def test_losses_of_new_weights_are_what_chance_gives(found):
    """Random weights of 0.02: nearly every token is as likely as any other."""
    first = found["stage1"]["batch 2 in 2 parts"]["losses"][0]["text"]
    assert abs(first - math.log(gpu.PRESETS["tiny"].vocab)) < 0.2


def test_a_section_that_fails_or_takes_too_long_is_reported():
    lab = gpu.Lab(True)

    def fails(lab):
        raise RuntimeError("no kernel")

    def hangs(lab):
        while True:
            pass
    assert "no kernel" in gpu.guarded(fails, lab, 9)["error"]
    assert "more than 3 s" in gpu.guarded(hangs, lab, 3)["error"]
    assert "no time" in gpu.guarded(fails, lab, 1)["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu.py"], text=True,
                          capture_output=True)
    assert done.returncode == 0
    assert done.stdout == "gpu.py: there is no CUDA device here, so nothing was checked\n"
