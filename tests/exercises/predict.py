"""Predict, then run: the two questions that open each lab.

    python tests/exercises/predict.py flow 1 49      your answer to question 1 of the lab "flow"

The question is answered by running the code, not by looking it up.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import course  # noqa: E402
import labs  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", choices=list(labs.LABS))
    parser.add_argument("question", type=int, choices=(1, 2))
    parser.add_argument("answer", type=float)
    args = parser.parse_args()
    question = labs.LABS[args.lab].QUESTIONS[args.question - 1]
    measured = question["run"](course.load(course.clean_sources(), keep=True))
    right = labs.same(args.answer, measured)
    print(f"{'Right' if right else 'Not so'}: the run says {measured:g}. {question['why']}")


if __name__ == "__main__":
    main()
