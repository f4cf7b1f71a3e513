"""The course tests itself: blank is red, right answers pass, each wrong one breaks a named rule."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "exercises"))

import course  # noqa: E402
import grade  # noqa: E402
import handout  # noqa: E402
import labs  # noqa: E402
import plan  # noqa: E402

CLEAN = course.clean_sources()
ALL = course.exercises()
DATA = course.load(CLEAN).data
EACH = None if os.environ.get("ALL_WRONG") else 3       # the rest takes two minutes more
WRONG = [(n, name) for n, module in ALL.items() for name in [*module.WRONG][:EACH]]
NO_RULE = re.compile(r"^$|it raised|Tensor-likes|^assert|^\W*$")


def judge(n: int, answer: dict[str, str], seed: int = 11) -> str:
    return course.judge(ALL[n], course.load(course.assemble(CLEAN, answer), data=DATA), seed)


@pytest.mark.parametrize("n", ALL)
def test_an_exercise_is_complete(n):
    m = ALL[n]
    assert m.LAB in course.LABS and m.MINUTES > 0 and m.DIFFICULTY in (1, 2, 3)
    assert len(m.HINTS) == 3 and len(m.WRONG) >= 3 and len(course.checks(m)) >= 2
    assert all(isinstance(getattr(m, k), str) for k in ("TITLE", "EQUATION", "TEXT", "SEES"))
    for target in m.TARGETS:
        file, name = course.split_target(target)
        assert course.count_lines(CLEAN[file], name) > 0
    assert set(m.RIGHT) <= set(m.TARGETS)
    assert all(set(w) <= set(m.TARGETS) for w in m.WRONG.values())


@pytest.mark.parametrize("n", ALL)
def test_blank_is_red_for_the_right_reason(n):
    """Blanked one by one, each function makes a check fail, by NotImplementedError."""
    for target in ALL[n].TARGETS:
        file, name = course.split_target(target)
        sources = dict(CLEAN)
        sources[file] = course.blank(CLEAN[file], name, f"exercise {n}: blank")
        why = course.judge(ALL[n], course.load(sources, data=DATA), 11)
        assert why.startswith(course.NOT_WRITTEN), f"{target}: {why!r}"


@pytest.mark.parametrize("n", ALL)
def test_the_reference_passes(n):
    lib = course.load(CLEAN, data=DATA)
    for seed in (n, 20_260):
        assert course.judge(ALL[n], lib, seed) == ""


@pytest.mark.parametrize("n", ALL)
def test_another_right_answer_passes(n):
    assert judge(n, ALL[n].RIGHT) == ""
    for target, text in ALL[n].RIGHT.items():
        file, name = course.split_target(target)
        assert text.split() != course.extract(CLEAN[file], name).split()


@pytest.mark.parametrize("n, name", WRONG)
def test_a_wrong_answer_breaks_a_named_rule(n, name):
    why = judge(n, ALL[n].WRONG[name])
    assert why, f"exercise {n} accepts the wrong answer: {name}"
    assert not NO_RULE.search(why) and len(why.split()) >= 6, why


# ---------------------------------------------------------------- labs, handout, grades


def test_questions_of_the_labs_are_answered_by_running_them():
    lib = course.load(CLEAN, data=DATA)
    for lab, module in labs.LABS.items():
        assert len(module.QUESTIONS) == 2
        for question in module.QUESTIONS:
            measured = question["run"](lib)
            assert labs.same(measured, measured) and not labs.same(measured * 1.02 + 1, measured)
            assert len(question["why"].split()) > 10
        assert labs.text(lab).count("predict.py") == 2


@pytest.fixture(scope="module")
def only_9(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "out"
    handout.make(out, only={9})
    return out


def test_a_handout_is_blank_where_it_should_be_and_hides_the_answers(only_9):
    assert 'raise NotImplementedError("exercise 9: Eq. 3-5, about ' in (
        only_9 / "joint_attn.py").read_text("utf-8")
    for name in set(course.FILES) - {"joint_attn"}:
        assert (only_9 / f"{name}.py").read_text("utf-8") == CLEAN[name]
    for n in ALL:
        text = (only_9 / "tests" / "exercises" / f"e{n:02d}.py").read_text("utf-8")
        assert not re.search(r"^(RIGHT|WRONG|PLAIN)\b", text, re.M)
        assert "def check_" in text and "TEXT = " in text
    for helper in ("lab_flow", "lab_towers", "oracles", "predict", "show"):
        assert (only_9 / "tests" / "exercises" / f"{helper}.py").exists()
    assert not (only_9 / "tests" / "exercises" / "grade.py").exists()
    sheet = (only_9 / "EXERCISES.md").read_text("utf-8")
    for n, m in ALL.items():
        assert f"### Exercise {n}. {m.TITLE}" in sheet and f"test_exercise_{n:02d}.py" in sheet
    assert sheet.count("<details>") == 3 * len(ALL)


def test_pytest_in_a_handout_is_red_for_the_blank_functions_alone(only_9):
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_exercise_01.py",
                           "tests/test_exercise_09.py"], cwd=only_9, capture_output=True, text=True)
    assert done.returncode == 1
    rest = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(rest) == len(course.checks(ALL[9]))
    assert all("exercise_09" in line and "NotImpl" in line for line in rest)


HOSTILE = {     # target: (an answer, what the grade says of its exercise; "" where it passes)
    "diffusion.path": ("def path(x0, eps, t):\n    while True:\n        pass", "longer than"),
    "diffusion.sample_time": ("def sample_time(b, generator=None, shift=1.0):\n    exit(0)",
                              "exit"),
    "diffusion.guide": ("def guide(cond, uncond, scale, renorm='global', least=0.0):\n    return (",
                        "syntax error"),
    "diffusion.position_ids": (ALL[5].RIGHT["diffusion.position_ids"].replace(
        "    n =", "    print('passed')\n    n ="), ""),
    "joint_attn.rope": ("def rope(ids, dim):\n    t = torch\n"
                        "    t.isfinite = lambda *a: t.ones(1)\n"
                        "    return t.ones(1), t.ones(1)", "changes isfinite"),
    "joint_attn.Expert.qkv": ("def qkv(self, x, cos_sin):\n    import os\n    os._exit(0)",
                              "imports os"),
    "joint_attn.Layer.read": ("def read(self, x, cos_sin, n_image):\n    return open('/x')",
                              "uses open"),
    "joint_attn.Layer.denoise": (ALL[9].RIGHT["joint_attn.Layer.denoise"], ""),
    "joint_attn.Context.mask": ("def mask(self, extra):\n    torch.Tensor.all = None",
                                "changes torch.Tensor.all"),
}


def test_a_hostile_handin_costs_only_its_own_exercises(tmp_path, monkeypatch):
    """Loops, exits, prints, syntax errors, changed tests, and attempts at the checks themselves."""
    monkeypatch.setattr(grade, "SECONDS", 3)
    syntax, sources = "diffusion.guide", dict(CLEAN)
    for target in [*(t for t in HOSTILE if t != syntax), syntax]:   # breaks its file, so last
        file, name = course.split_target(target)
        sources[file] = course.replace(sources[file], name, HOSTILE[target][0])
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
    (tmp_path / "tests" / "exercises").mkdir(parents=True)
    for name in ("course", "oracles", "e07", "judge"):
        (tmp_path / "tests" / "exercises" / f"{name}.py").write_text("raise SystemExit(0)")
    about = {n: HOSTILE[t][1] for n, m in ALL.items() for t in m.TARGETS if t in HOSTILE}
    found = {f["exercise"]: f for f in grade.grade(tmp_path, only=set(about) | {3})}
    assert found[3] == {"exercise": 3, "passed": True, "why": ""}
    for n, said in about.items():
        assert found[n]["passed"] == (not said) and said in found[n]["why"], (n, found[n])


@pytest.mark.parametrize("body, said", [
    ("import subprocess", "imports subprocess"), ("from os import path", "imports os"),
    ("__import__('os')", "uses __import__"), ("torch.os._exit(0)", "uses .os"),
    ("torch.allclose = 1", "changes torch.allclose"), ("x.__class__.__eq__ = 1", "uses .__eq__"),
    ("F.silu, y = 1, 2", "changes F.silu"), ("global x0", "global"), ("eval('1')", "uses eval"),
    ("class T(torch.Tensor): pass", "class"), ("return (yield", "syntax error"),
    ("x0.grad = None", ""), ("import numpy as np\n    return np.zeros(3)", "")])
def test_what_a_judged_function_may_not_use(body, said):
    source = CLEAN["diffusion"].replace("def target(x0", f"def path(x0, x):\n    {body}\n\n\n"
                                        "def target(x0", 1)
    if not said:
        assert body in course.student_function(source, "path")
        return
    with pytest.raises(course.Refused, match=re.escape(said)):
        course.student_function(source, "path")


@pytest.mark.parametrize("write, said", [
    (lambda p: None, "missing"), (lambda p: p.mkdir(), "missing"),
    (lambda p: p.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    (lambda p: p.write_text("x = 1\n"), "no function path"),
    (lambda p: p.write_text("x" * 2_000_000), "larger"),
    (lambda p: p.write_text("def path(x):\n  return " + "(" * 5000), "path")])
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, write, said):
    write(tmp_path / "diffusion.py")
    found = grade.grade_one(tmp_path, 1, ALL[1], CLEAN, 0, grade.Judge())
    assert not found["passed"] and said in found["why"] and "\n" not in found["why"]


def test_the_plan_names_what_exists():
    """Six sittings, each exercise once, and every function to read is in the files."""
    numbers = [n for _, _, numbers, _ in plan.SITTINGS for n in numbers]
    assert len(plan.SITTINGS) == 6 and sorted(numbers) == numbers and set(ALL) <= set(numbers)
    for _, targets, _, _ in plan.SITTINGS:
        for target in targets:
            first, last = plan.lines(target, CLEAN)
            assert 0 < first <= last, target
