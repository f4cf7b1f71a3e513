"""Draws an answer beside the expected one.

    python tests/exercises/show.py 3              the answer in this folder -> exercise03.png
    python tests/exercises/show.py 3 HANDIN       the answer in another folder
    python tests/exercises/show.py --all          all pictures on one sheet -> exercises.png

What is expected comes from the slow formulas of the exercise's file, not from the real functions.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import course  # noqa: E402
import pictures  # noqa: E402


def draw(module, lib):
    """The picture of a `lib`, or a panel that says why there is none."""
    import torch
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return module.show(lib)
    except NotImplementedError as e:
        return pictures.message(f"{course.NOT_WRITTEN}: {e}")
    except Exception as e:          # of a student's function, which may raise anything
        return pictures.message(f"no picture: {type(e).__name__}: {str(e)[:200]}")


def expected(module):
    """A lib with the slow formulas of the exercise in place of its targets."""
    lib = course.load(course.clean_sources(), keep=True)
    return module.expected(lib) if hasattr(module, "expected") else lib


def show(n: int, folder: Path):
    """The picture of exercise n: yours and what is expected."""
    module = course.exercise(n)
    want = draw(module, expected(module))
    try:
        answer = course.student_answer(folder, module)
        lib = course.load(course.assemble(course.clean_sources(), answer), keep=True)
        mine = draw(module, lib)
    except course.Refused as e:
        mine = pictures.message(f"no picture: {e}")
    together = pictures.stack if want.width > 1.2 * want.height else pictures.beside
    both = together([pictures.titled(mine, "yours"), pictures.titled(want, "expected")])
    return pictures.titled(both, f"Exercise {n}. {module.TITLE} ({module.EQUATION})", 16)


def contact_sheet(columns: int = 3, width: int = 560):
    """The expected picture of every exercise that has one."""
    found = []
    for n, module in course.exercises().items():
        if hasattr(module, "show"):
            picture = draw(module, expected(module))
            picture.thumbnail((width, width))
            found.append(pictures.titled(picture, f"{n}. {module.TITLE}", 16))
    heights, stacks = [0] * columns, [[] for _ in range(columns)]
    for picture in found:           # the shortest column takes the next
        i = heights.index(min(heights))
        heights[i] += picture.height + 20
        stacks[i].append(picture)
    return pictures.beside([pictures.stack(s, 20) for s in stacks if s], 24)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", type=int, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?", default=course.ROOT)
    parser.add_argument("--out", type=Path, help="PNG file (default: exerciseNN.png here)")
    parser.add_argument("--all", action="store_true", help="one sheet of all expected pictures")
    args = parser.parse_args()
    having = [n for n, m in course.exercises().items() if hasattr(m, "show")]
    if not args.all and args.exercise not in having:
        parser.error(f"give an exercise that has a picture: {', '.join(map(str, having))}")
    out = args.out or Path("exercises.png" if args.all else f"exercise{args.exercise:02d}.png")
    picture = contact_sheet() if args.all else show(args.exercise, args.folder)
    picture.quantize(128).save(out, optimize=True) if args.all else picture.save(out)
    print(out)


if __name__ == "__main__":
    main()
