"""The course tests itself: blank is red, right answers pass, each wrong one breaks a named rule."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "exercises"))

import course  # noqa: E402

CLEAN = course.clean_sources()
ALL = course.exercises()
DATA = course.load(CLEAN).data
WRONG = [(n, name) for n, module in ALL.items() for name in module.WRONG]
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
