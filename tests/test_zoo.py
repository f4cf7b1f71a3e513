"""The bug zoo: every patch applies, and the test named for it goes red under it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "exercises"))

import course  # noqa: E402
import zoo  # noqa: E402
from conftest import ROOT  # noqa: E402

CLEAN = course.clean_sources()
ILL = [p for p in zoo.PATIENTS if p.patches]
# Runs a test in each of several folders, each in a fork that has the packages already.
RUNNER = """
import json, os, sys
import einops, numpy, PIL.Image, pytest, torch, tqdm
torch.set_num_threads(1)
codes, null = [], os.open(os.devnull, os.O_RDWR)
for folder, tests in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def copy(folder: Path, sources: dict[str, str]) -> str:
    """A copy of the project with other sources of the seven files."""
    (folder / "tests").mkdir(parents=True)
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    for file in (ROOT / "tests").glob("*.py"):
        shutil.copy(file, folder / "tests")
    for name in ("assets", "tests/golden"):
        (folder / name).symlink_to(ROOT / name)
    return str(folder)


@pytest.mark.parametrize("patient", zoo.PATIENTS, ids=lambda p: p.name)
def test_a_patient_is_complete(patient):
    sources = zoo.patched(CLEAN, patient.patches)
    assert (sources == CLEAN) == (not patient.patches)
    assert patient.stage in zoo.HEALTHY and patient.test and len(patient.sees.split()) > 15
    for name, text in sources.items():
        compile(text, name, "exec")


def test_a_patch_that_does_not_apply_fails_loudly():
    for old in ("no such text", "x"):
        with pytest.raises(ValueError, match="applies .* times, not once"):
            zoo.patched(CLEAN, [("diffusion", old, "y")])


def test_there_are_ten_and_a_seed_shuffles_them():
    names = {p.name for p in zoo.PATIENTS}
    assert len(names) == 10 and {p.name for p in zoo.order(1)} == names
    assert zoo.order(1) == zoo.order(1) != zoo.order(2)
    assert all(name in zoo.answers(1) for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="one process with the packages, then forks")
def test_the_test_named_for_a_patch_goes_red(tmp_path):
    """That it is green without the patch, the test itself says where it stands."""
    named = [p for p in ILL if p.test.startswith("test_")]
    jobs = [[copy(tmp_path / str(i), zoo.patched(CLEAN, p.patches)), [f"tests/{p.test}"]]
            for i, p in enumerate(named)]
    done = subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps(jobs), text=True,
                          capture_output=True, check=True)
    codes = json.loads(done.stdout.splitlines()[-1])
    assert {p.name: c for p, c in zip(named, codes)} == {p.name: 1 for p in named}    # 1: red


@pytest.mark.parametrize("patient", [p for p in ILL if not p.test.startswith("test_")],
                         ids=lambda p: p.name)
def test_the_check_of_an_exercise_goes_red(patient):
    number, name = patient.test[1:].split(".")
    check = getattr(course.exercise(int(number)), name)
    assert course.run_check(check, course.load(CLEAN), 5) == ""
    assert course.run_check(check, course.load(zoo.patched(CLEAN, patient.patches)), 5)


def test_a_flag_that_makes_ill_is_legal():
    """No patch: what is wrong is what one asks for. The test named for it is green."""
    found = [p for p in zoo.PATIENTS if not p.patches]
    assert [p.flags for p in found] == [{"train": "both", "mix": "0:1"}]
    for p in found:
        assert course.load(CLEAN).train.Options(stage=p.stage, **p.flags).problem() == ""
        file, name = p.test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8")
