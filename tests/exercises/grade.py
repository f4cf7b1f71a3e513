"""Grades hand-ins of the course.

    python tests/exercises/grade.py HANDIN [HANDIN ...]      folders with the seven files
    python tests/exercises/grade.py FOLDER_OF_HANDINS        one folder a student
    python tests/exercises/grade.py HANDIN --json            for a gradebook

Only the functions of the exercises are taken from a hand-in; each exercise puts its own into a
clean copy of the seven files. So an exercise does not depend on the others, and other changes to
files or tests have no effect. Each runs in its own process, with limits of time and memory.
"""

import argparse
import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import course  # noqa: E402

SECONDS = 20        # of processor time for one exercise, after the imports
WALL = 120          # seconds of wall clock for one exercise, in which other programs may run
MEMORY = 3 << 30    # bytes that an answer may use beyond what torch takes
SEED = 20_260       # the public tests have other seeds
SIGXCPU, SIGKILL = getattr(signal, "SIGXCPU", 99), getattr(signal, "SIGKILL", -1)


class Judge:
    """A process with judge.py, which is started anew when it has ended."""

    def __init__(self):
        self.process = None

    def ask(self, job: dict) -> tuple[dict, bool]:
        """The verdict of a job, {} if there is none, and whether it ran too long."""
        if self.process is None:
            env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMP_"))}
            self.process = subprocess.Popen(
                [sys.executable, str(course.HERE / "judge.py")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                env=env | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        late = threading.Event()
        timer = threading.Timer(WALL, lambda: (late.set(), self.stop()))
        timer.start()
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            said = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            said = {}
        timer.cancel()
        ended = None
        if not said or sys.platform != "linux":
            self.stop()
            ended, self.process = self.process.returncode, None
        return said, (late.is_set() or said.get("signal") in (SIGXCPU, SIGKILL)
                      or not said and ended == -SIGXCPU)    # macOS: judge.py itself was ended

    def stop(self):
        """Ends the process and its children."""
        if self.process:
            if hasattr(os, "killpg") and self.process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(self.process.pid, SIGKILL)
            self.process.kill()
            self.process.wait()


def grade_one(folder: Path, n: int, module, clean: dict, seed: int, judge: Judge) -> dict:
    """One exercise of one hand-in -> {"exercise", "passed", "why"}."""
    try:
        answer = course.student_answer(folder, module)
        if any(blank(text) for text in answer.values()):
            return {"exercise": n, "passed": False, "why": course.NOT_WRITTEN}
        sources = course.assemble(clean, answer)
    except course.Refused as e:
        return {"exercise": n, "passed": False, "why": str(e)}
    nonce = secrets.token_hex(16)
    said, late = judge.ask({"exercise": n, "sources": sources, "seed": seed, "nonce": nonce,
                            "seconds": SECONDS, "memory": MEMORY})
    why = "it ended the process, by exit() or by too much memory"
    if late:
        why = f"it ran longer than the limit ({SECONDS} s of the processor): does a loop not end?"
    if said.get("nonce") == nonce:
        why = said["why"]
    return {"exercise": n, "passed": not why, "why": why}


def blank(text: str) -> bool:
    """Whether a function is still as it was handed out."""
    return 'raise NotImplementedError("exercise ' in text


def grade(folder: Path, seed: int = SEED, only=None, judges: list | None = None) -> list[dict]:
    """All exercises of one hand-in, in order."""
    clean = course.clean_sources()
    todo = {n: m for n, m in course.exercises().items() if not only or n in only}
    free = queue.Queue()
    for judge in judges or [Judge() for _ in range(os.cpu_count() or 1)]:
        free.put(judge)

    def one(item):
        judge = free.get()
        try:
            return grade_one(folder, *item, clean, seed, judge)
        finally:
            free.put(judge)
    with ThreadPoolExecutor(free.qsize()) as pool:
        found = list(pool.map(one, todo.items()))
    if judges is None:
        while not free.empty():
            free.get().stop()
    return found


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
    sys.stdout.reconfigure(errors="backslashreplace")       # a name that a console cannot print
    folders, all_found = handins(args.handin), {}
    judges = [Judge() for _ in range(args.jobs or os.cpu_count() or 1)]
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    for folder in folders:
        found = all_found[str(folder)] = grade(folder, args.seed, args.only, judges)
        passed = sum(f["passed"] for f in found)
        if args.json:
            print(f"{folder}: {passed} of {len(found)}", file=sys.stderr)
            continue
        print(folder)
        for f in found:
            print(f"  {f['exercise']:>2}  {'passed' if f['passed'] else 'failed: ' + f['why']}")
        print(f"  total: {passed} of {len(found)}", flush=True)
    for judge in judges:
        judge.stop()
    if args.json:
        one = len(folders) == 1
        print(json.dumps(all_found[str(folders[0])] if one else all_found, indent=1))


if __name__ == "__main__":
    main()
