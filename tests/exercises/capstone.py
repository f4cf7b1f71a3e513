"""The capstone: trains stage 2 with your functions, and draws eight chests.

    python tests/exercises/capstone.py OUT           600 steps, about two minutes on two cores

It takes the three functions of exercise 15 from this folder and all else from a clean copy. The
reader, the autoencoder and the tokenizer are those of the shipped weights; the generation branch
begins anew, as a copy of the reader's tower. OUT gets eight.png, loss.png, and a weights folder
that sample.py opens.
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
IMAGES = 1024               # that it learns from


def loss_picture(rows: list[dict]):
    """The flow loss by tenth of t, at four times of the run; and both losses by step."""
    import pictures
    rows = [r for r in rows if "flow_by_t" in r]
    lines = {}
    for i in sorted({0, len(rows) // 6, len(rows) // 2, len(rows) - 1}):
        found = [(0.05 + k / 10, v) for k, v in enumerate(rows[i]["flow_by_t"]) if v is not None]
        lines[f"step {rows[i]['step']}"] = tuple(zip(*found))
    steps = [r["step"] for r in rows]
    parts = [pictures.titled(pictures.curves(lines, ("t (0: image, 1: noise)", "flow loss"),
                                             (380, 260)), "loss by tenth of t")]
    for name in ("flow", "repa"):
        if name in rows[0]:
            line = {name: (steps, [r[name] for r in rows])}
            parts.append(pictures.titled(pictures.curves(line, ("step", name), (300, 260)), name))
    return pictures.beside(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; a new one")
    parser.add_argument("--steps", type=int, default=600, help="(default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=ROOT / "assets" / "tiny",
                        help="folder to start from (default: the shipped weights)")
    args = parser.parse_args()
    if (args.out / "stage2.pt").exists():
        parser.error(f"{args.out} has a run already: give another folder")
    sys.path.insert(0, str(HERE))
    import course
    begin, module = time.perf_counter(), course.exercise(15)
    try:
        answer = course.student_answer(ROOT, module)
    except course.Refused as e:
        sys.exit(f"exercise 15 cannot be used: {e}")
    lib = course.load(course.assemble(course.clean_sources(), answer), keep=True)
    options = lib.train.Options(stage=2, weights=str(args.weights), out=str(args.out),
                                steps=args.steps, batch_size=16, images=IMAGES,
                                sheet_every=10**6, save_every=10**6)
    try:
        lib.train.run(options)
    except lib.data.UserError as e:
        sys.exit(f"capstone.py: {e}")
    except NotImplementedError as e:
        sys.exit(f"not written yet: {e}")
    model, prompts = lib.unix.UniX.load(args.out), list(lib.train.PROMPTS)
    drawn = model.generate(prompts, 64)[:, 0].numpy()
    lib.data.sheet(list(drawn), prompts, 4, args.out / "eight.png")
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    loss_picture(log).save(args.out / "loss.png")
    print(f"{args.out}/eight.png, loss.png: {time.perf_counter() - begin:.0f} s, "
          f"{time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    main()
