"""Makes a student's working folder from the seven files as they are.

    python tests/exercises/handout.py OUT                 all exercises are blank
    python tests/exercises/handout.py OUT --only 9        only exercise 9 is; all else works
    python tests/exercises/handout.py OUT --reveal 9      all but exercise 9 are
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import course  # noqa: E402
import labs  # noqa: E402

HELPERS = ("course.py", "labs.py", "lab_*.py", "predict.py", "show.py", "pictures.py",
           "oracles*.py", "capstone.py")
HIDDEN = ("RIGHT", "WRONG")         # an exercise's answers stay with the lecturer
PARTS = {"TITLE", "EQUATION", "LAB", "MINUTES", "DIFFICULTY", "TARGETS", "TEXT", "HINTS", "SEES",
         "show", "expected"}
CONFTEST = '''"""For pytest: the course's files can be imported, and a failure is short."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "exercises"))
'''
TEST = '''"""Exercise {n}: {title} ({equation}). Judge it: pytest {file}"""
import pytest

import course

module = course.exercise({n})


@pytest.mark.parametrize("check", course.checks(module), ids=course.rule_id)
def test_exercise_{n:02d}(check):
    course.public({n}, check)
'''
INTRO = """# UniX from scratch: the exercises

You have a small implementation of UniX (arXiv 2601.11522) in seven files. Some functions are
blank: they have their signature and their docstring, and raise `NotImplementedError`. Write them.

You need the paper, Python and PyTorch; a processor is enough. No exercise needs a download.

- **Start** by installing what is needed: `pip install -r requirements.txt`.
- **Judge** an exercise with the command under it, in this folder. A red line names the rule that
  is broken. `pytest` judges all; blank functions are red.
- **See** your answer beside the expected one: `python tests/exercises/show.py 3` writes
  `exercise03.png`, in seconds. What is expected comes from slow formulas, not from the real code.
- **Try** your function by hand, with all else working, in `tests/exercises`:
  `python -i -c "import course; lib = course.mine(3)"`, then `lib.diffusion.sample(...)`.
- **Hints** are folded, from vague to nearly there. Open one at a time.

Rules of the game:

- Exercises are independent. Each is judged in a clean copy of the seven files where all other
  functions work, so you may begin anywhere, and a mistake costs one exercise.
- Only the functions named under an exercise are judged. A helper function or an import that you
  add elsewhere in a file is not taken along: define helpers inside the function. What a file
  imports at its top is there. Inside, you may also import
  {modules}.
- Refused are other imports, `open`, `eval`, `exec`, `vars`, `setattr`, names with two underscores,
  a class or `global` inside, and assignments to what is not the function's own (`torch.x = ...`).
- Write each function for any shapes its docstring allows. Loops are fine, and so are other
  ways than the ones in the hints; small differences of rounding do not matter.
- Do not change what you are given (an argument, in place), unless the docstring asks for it.
- Your teacher grades with other random numbers than the tests in this folder.

Letters in shapes: b batch, l tokens, n latent tokens, c channels, d width, h heads, k head width,
g key/value heads, v vocabulary, m patches of an encoder; in `(b, c, h, w)` and in a grid, h and w
are rows and columns. `Tensor` is torch.Tensor. *Lines* says how long the real function's body is,
without docstring and comments: a size to expect, not a limit.
"""


def strip_answers(text: str) -> str:
    """An exercise file without its right and wrong answers, and without what only they use."""
    kept, lines = ast.parse(text).body, text.split("\n")

    def names(node) -> set[str]:
        """What a top-level statement defines, if it is a function or an assignment."""
        if isinstance(node, ast.FunctionDef):
            return {node.name}
        return {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}

    gone, size = set(HIDDEN), 0
    while size != len(gone):
        size, kept = len(gone), [node for node in kept if not names(node) & gone]
        used = {n.id for node in kept for n in ast.walk(node) if isinstance(n, ast.Name)
                and isinstance(n.ctx, ast.Load)}
        gone |= {name for node in kept for name in names(node) - used
                 if name not in PARTS and not name.startswith("check_")}
    for node in reversed(ast.parse(text).body):
        if names(node) & gone:
            lines[course.span(node)[0] if isinstance(node, ast.FunctionDef)
                  else node.lineno - 1:node.end_lineno] = []
    return "\n".join(lines).rstrip() + "\n"


def sheet_entry(n: int, module, sources: dict[str, str]) -> str:
    """An exercise in EXERCISES.md."""
    lines = {t: course.count_lines(sources[course.split_target(t)[0]], course.split_target(t)[1])
             for t in module.TARGETS}
    names = ", ".join(f"`{name}` in `{file}.py` ({count})" for (file, name), count in
                      ((course.split_target(t), k) for t, k in lines.items()))
    level = ("easy", "medium", "hard")[module.DIFFICULTY - 1]
    hints = "\n\n".join(f"<details><summary>Hint {i}</summary>\n\n{hint.strip()}\n\n</details>"
                        for i, hint in enumerate(module.HINTS, 1))
    see = module.SEES.strip()
    if hasattr(module, "show"):
        see += f"\n\nSee it: `python tests/exercises/show.py {n}`"
    return (f"### Exercise {n}. {module.TITLE}\n\n"
            f"*{module.EQUATION} · {module.MINUTES} minutes · {level} "
            f"({module.DIFFICULTY} of 3) · about {sum(lines.values())} lines*\n\n"
            f"**Write** (lines): {names}\n\n{module.TEXT.strip()}\n\n{hints}\n\n"
            f"**Judge it:** `pytest tests/test_exercise_{n:02d}.py`\n\n"
            f"**When it works:** {see}\n")


def sheet(sources: dict[str, str]) -> str:
    """EXERCISES.md: labs, each with its two questions, then its exercises."""
    all_found = course.exercises()
    modules = ", ".join(sorted(f"`{m}`" for m in course.MODULES - set(course.FILES)))
    parts = [INTRO.replace("{modules}", modules)]
    total = sum(m.MINUTES for m in all_found.values())
    parts.append("| | exercise | equation | minutes | level |\n|---|---|---|---|---|\n" + "\n".join(
        f"| {n} | {m.TITLE} | {m.EQUATION} | {m.MINUTES} | {m.DIFFICULTY} |"
        for n, m in all_found.items()) + f"\n\nIn all: {total / 60:.1f} hours.\n")
    for lab in course.LABS:
        mine = {n: m for n, m in all_found.items() if m.LAB == lab}
        if mine:
            parts.append(labs.text(lab))
            parts += [sheet_entry(n, m, sources) for n, m in mine.items()]
    return "\n".join(parts)


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make(out: Path, only: set[int] = frozenset(), reveal: set[int] = frozenset()):
    """Writes the handout. Raises FileExistsError if the folder has files in it."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; give a new folder")
    clean, modules = course.clean_sources(), course.exercises()
    blanked = clean
    for n, module in modules.items():
        if n not in reveal and (not only or n in only):
            blanked = course.blank_all(blanked, n, module)
        file = f"tests/test_exercise_{n:02d}.py"
        write(out / file, TEST.format(n=n, title=module.TITLE, equation=module.EQUATION, file=file))
        answerless = strip_answers((course.HERE / f"e{n:02d}.py").read_text(encoding="utf-8"))
        write(out / "tests" / "exercises" / f"e{n:02d}.py", answerless)
    for name, text in blanked.items():
        write(out / f"{name}.py", text)
    write(out / "tests" / "conftest.py", CONFTEST)
    write(out / "pytest.ini", "[pytest]\naddopts = --tb=short -q\ntestpaths = tests\n")
    write(out / "EXERCISES.md", sheet(clean))
    for path in (path for name in HELPERS for path in course.HERE.glob(name)):
        shutil.copy(path, out / "tests" / "exercises" / path.name)
    (out / "tests" / "exercises" / course.SEALED.name).write_bytes(course.seal(clean))
    for name in ("requirements.txt", "LICENSE"):
        shutil.copy(course.ROOT / name, out / name)
    shutil.copytree(course.ROOT / "assets", out / "assets")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    for flag, text in (("--only", "blank these alone"), ("--reveal", "leave these as they are")):
        parser.add_argument(flag, type=int, nargs="+", default=[], metavar="N", help=text)
    args = parser.parse_args()
    unknown = {*args.only, *args.reveal} - course.exercises().keys()
    if unknown:
        parser.error(f"there is no exercise {', '.join(map(str, sorted(unknown)))}")
    try:
        make(args.out, {*args.only}, {*args.reveal})
    except OSError as e:
        parser.error(str(e))
    print(f"{args.out}: the seven files, the tests and EXERCISES.md. Next: cd {args.out} && pytest")


if __name__ == "__main__":
    main()
