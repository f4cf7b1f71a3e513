"""The labs of the course: what each is about, and two questions to predict before running.

A lab is a file lab_NAME.py with INTRO (markdown) and QUESTIONS, two of {"ask": markdown, "run":
function of a `lib` that measures the answer, a number, "why": the explanation}.
"""

import math

import course

LABS = {name: course.import_file(course.HERE / f"lab_{name}.py") for name in course.LABS
        if (course.HERE / f"lab_{name}.py").exists()}


def same(answer: float, measured: float) -> bool:
    """Whether an answer is right, up to half a percent."""
    return math.isclose(answer, measured, rel_tol=5e-3, abs_tol=1e-9)


def text(name: str) -> str:
    """The opening of a lab in EXERCISES.md."""
    if name not in LABS:
        return f"## Lab: {name}\n"
    lab = LABS[name]
    asked = "\n".join(
        f"{i}. {q['ask'].strip()}\n   Answer, then run: "
        f"`python tests/exercises/predict.py {name} {i} YOUR_NUMBER`"
        for i, q in enumerate(lab.QUESTIONS, 1))
    return f"## {lab.INTRO.strip()}\n\n**Predict, then run.**\n\n{asked}\n"
