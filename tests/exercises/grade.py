"""Grades hand-ins of the course.

    python tests/exercises/grade.py HANDIN [HANDIN ...]      folders with the seven files
    python tests/exercises/grade.py FOLDER_OF_HANDINS        one folder a student
    python tests/exercises/grade.py HANDIN --json            for a gradebook

Only the functions of the exercises are taken from a hand-in; each exercise puts its own into a
clean copy of the seven files. So an exercise does not depend on the others, and other changes to
files or tests have no effect. Each runs in its own process, with limits of time and memory.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import course  # noqa: E402

SECONDS = 20        # of processor time for one exercise, after the imports
WALL = 120          # seconds of wall clock for one exercise, in which other programs may run
MEMORY = 3 << 30    # bytes that an answer may use beyond what torch takes
SEED = 20_260       # the public tests have other seeds


def start(job: dict):
    """Runs judge.py on a job -> (its output, whether it ran too long)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMP_"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([sys.executable, str(course.HERE / "judge.py")], env=env,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        out, _ = process.communicate(json.dumps(job).encode(), timeout=WALL)
        return out, process.returncode in (-getattr(signal, "SIGXCPU", 0), -9)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        return b"", True


def grade_one(folder: Path, n: int, module, clean: dict, seed: int) -> dict:
    """One exercise of one hand-in -> {"exercise", "passed", "why"}."""
    try:
        answer = course.student_answer(folder, module)
        if any(blank(text) for text in answer.values()):
            return {"exercise": n, "passed": False, "why": course.NOT_WRITTEN}
        sources = course.assemble(clean, answer)
    except course.Refused as e:
        return {"exercise": n, "passed": False, "why": str(e)}
    nonce = secrets.token_hex(16)
    out, late = start({"exercise": n, "sources": sources, "seed": seed, "nonce": nonce,
                       "seconds": SECONDS, "memory": MEMORY})
    why = f"it ran longer than the limit ({SECONDS} s of the processor); does a loop end?" if late else (
        "it ended the process: exit(), or too much memory")
    try:
        said = json.loads(out)
        why = said["why"] if secrets.compare_digest(said["nonce"], nonce) else why
    except (ValueError, KeyError, TypeError):
        pass
    return {"exercise": n, "passed": not why, "why": why}


def blank(text: str) -> bool:
    """Whether a function is still as it was handed out."""
    return 'raise NotImplementedError("exercise ' in text


def grade(folder: Path, seed: int = SEED, only=None, jobs: int | None = None) -> list[dict]:
    """All exercises of one hand-in, in order."""
    clean = course.clean_sources()
    todo = {n: m for n, m in course.exercises().items() if not only or n in only}
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda item: grade_one(folder, *item, clean, seed), todo.items()))


def handins(folders: list[str]) -> list[Path]:
    """The hand-ins in some folders: a folder with one of the seven files is one, else its
    subfolders are."""
    def is_one(folder: Path) -> bool:
        return any((folder / f"{name}.py").exists() for name in course.FILES)
    found = []
    for folder in map(Path, folders):
        inside = [p for p in sorted(folder.glob("*")) if p.is_dir() and is_one(p)]
        found += [folder] if is_one(folder) or not inside else inside
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("handin", nargs="+", help="folder of a hand-in, or of many")
    parser.add_argument("--json", action="store_true", help="for a gradebook")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these exercises")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the checks ({SEED})")
    parser.add_argument("--jobs", type=int, help="processes at a time (default: one a core)")
    args = parser.parse_args()
    folders, all_found = handins(args.handin), {}
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    for folder in folders:
        found = all_found[str(folder)] = grade(folder, args.seed, args.only, args.jobs)
        passed = sum(f["passed"] for f in found)
        if args.json:
            print(f"{folder}: {passed} of {len(found)}", file=sys.stderr)
            continue
        print(folder)
        for f in found:
            print(f"  {f['exercise']:>2}  {'passed' if f['passed'] else 'failed: ' + f['why']}")
        print(f"  total: {passed} of {len(found)}", flush=True)
    if args.json:
        one = len(folders) == 1
        print(json.dumps(all_found[str(folders[0])] if one else all_found, indent=1))


if __name__ == "__main__":
    main()
