"""Kills training again and again, and checks that nothing is lost.

    python tests/kill.py                        20 kills over stages 0 to 3, some minutes
    python tests/kill.py --stage 1 --kills 5

Every stage runs once undisturbed. Then the same command runs on a copy of what it began with, is
killed with SIGKILL, started again, killed again, until it comes to its end (and from the start, if
kills are left). By turns the kills come while a file is being written, at a random step, and at a
random moment of the first third (start-up); the first of stages 2 and 3 comes while latents are
computed. After each, the weights folder must open and the next start must resume from the last
checkpoint; at the end all weights must be the undisturbed run's, bit for bit.
One thread, so that sums are always taken in one order. Exit code 0: all held; 1: something did not.
"""

import argparse
import math
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from phantoms import write_phantoms

ROOT = Path(__file__).resolve().parent.parent
TICK = 0.003        # seconds between two looks at a run
WEIGHTS = ("model.safetensors", "config.json", "tokenizer.json", "vae/model.safetensors",
           "vae/config.json")


class Attempt(NamedTuple):
    code: int       # exit code; -9: killed
    ticks: int      # how long it ran
    said: str       # its bars and messages
    files: list     # names of files it was writing when it was killed

    def place(self) -> str:
        """Where it was, from its files and its last bar."""
        if self.files:
            return "writing " + ", ".join(self.files)
        bars = re.findall(r"(stage|latents).*?(\d+)/(\d+) \[", self.said)
        return "{} {} of {}".format(*bars[-1]) if bars else "start-up"


def attempt(command: list, out: Path, moment=math.inf, step=math.inf, bar="stage",
            writing=False) -> Attempt:
    """Runs a command, and kills it after `moment` ticks or when `bar` is at `step`; `writing`: then
    waits until it writes a file."""
    said, (master, slave) = out.with_suffix(".txt"), pty.openpty()     # bars need a terminal
    termios.tcsetwinsize(slave, (24, 200))      # a bar in a terminal of no width is empty
    said.write_text("")
    run = subprocess.Popen(command, stderr=slave, stdout=subprocess.DEVNULL, cwd=ROOT,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(slave)
    listener = threading.Thread(target=listen, args=(master, said))
    listener.start()
    ticks, due = 0, False
    while run.poll() is None:
        ticks += 1
        due = due or ticks > moment or step < math.inf and at_step(said.read_text(), bar) >= step
        if due and (not writing or parts(out, run.pid)):
            time.sleep(random.random() * (0.03 if writing else 0.3))
            run.kill()
            break
        time.sleep(TICK)
    code = run.wait()
    listener.join()
    return Attempt(code, ticks, said.read_text(), parts(out, run.pid))


def listen(master: int, file: Path):
    """Copies what a terminal shows to a file, until its program ends."""
    with open(file, "ab", buffering=0) as f:
        while True:
            try:
                shown = os.read(master, 4096)
            except OSError:         # the other end is closed
                break
            if not shown:
                break
            f.write(shown)
    os.close(master)


def at_step(said: str, bar: str, which=-1) -> int:
    """The step that a run's bar shows last (or first: 0); -1: none yet."""
    bars = re.findall(bar + r".*?(\d+)/\d+ \[", said)
    return int(bars[which]) if bars else -1


def parts(out: Path, pid: int) -> list[str]:
    """Files that a process has begun to write under temporary names."""
    found = [*out.glob(f".*.{pid}.part"), *out.glob(f"vae/.*.{pid}.part")]
    return [p.name[1:].removesuffix(f".{pid}.part") for p in found]


def usable(out: Path, stage: int) -> int:
    """Opens what a killed run has left -> step of its checkpoint (0: none). Raises UserError."""
    sys.path.insert(0, str(ROOT))
    from train import read_checkpoint
    from unix import UniX, load_vae
    if (out / "model.safetensors").exists():
        model = UniX.load(out)
        assert model.tokenizer is not None, "the weights have lost their tokenizer"
    if (out / "vae" / "model.safetensors").exists():
        load_vae(out / "vae" / "model.safetensors")
    file = out / f"stage{stage}.pt"
    return read_checkpoint(file)["step"] if file.exists() else 0


def differences(a: Path, b: Path) -> list[str]:
    return [name for name in WEIGHTS if (a / name).exists() != (b / name).exists()
            or (a / name).exists() and (a / name).read_bytes() != (b / name).read_bytes()]


def torture(stage: int, kills: int, folder: Path, flags: list, hit: Counter) -> list[str]:
    """Kills one stage; its undisturbed run is left in folder/whole -> what went wrong."""
    whole, base, out = (folder / name for name in ("whole", "base", "killed"))
    shutil.copytree(whole, base)
    command = [sys.executable, "train.py", "--stage", str(stage), *flags, "--out"]
    calm = attempt([*command, str(whole)], whole)
    if calm.code:
        return [f"stage {stage} does not run: {calm.said[-300:]}"]
    print(f"stage {stage}: undisturbed run done, {calm.ticks} ticks", flush=True)
    wrong, done, expected = [], 0, 0
    while True:
        if not out.exists():
            shutil.copytree(base, out)
            expected = 0
        soon = expected + random.randint(0, 6)
        how = ({"step": soon, "writing": True}, {"step": soon},
               {"moment": random.uniform(0, calm.ticks / 3)})[done % 3] if done < kills else {}
        if how and stage > 1 and done == 0:
            how = {"step": random.randint(0, 300), "bar": "latents"}
        run = attempt([*command, str(out)], out, **how)
        if at_step(run.said, "stage", 0) not in (-1, expected):
            wrong.append(f"stage {stage} did not resume from step {expected}")
        if run.code == 0:                   # it came to its end
            wrong += [f"stage {stage}: {name} differs" for name in differences(whole, out)]
            print(f"stage {stage}: the end is reached, " + (wrong[-1] if wrong else "all equal"))
            shutil.rmtree(out)
            if done == kills:
                shutil.rmtree(base)
                return wrong
        elif run.code != -9:
            return [*wrong, f"stage {stage} failed: {run.said[-300:]}"]
        else:
            done += 1
            try:
                expected = usable(out, stage)
            except Exception as e:          # whatever it is, a user would meet it
                return [*wrong, f"kill {done} of stage {stage}, {run.place()}: {e!r}"]
            hit[re.sub(r" \d+ of.*|-\d+", "", run.place())] += 1
            print(f"kill {done:2} of stage {stage}: {run.place()}; checkpoint of step {expected}",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all (default: %(default)s)")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="one only (default: all)")
    parser.add_argument("--steps", type=int, default=24, help="of a stage (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the moments (default: another each time)")
    args = parser.parse_args()
    random.seed(args.seed)
    wrong, hit = [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_phantoms(folder / "images", 320, 8)
        (folder / "whole").mkdir()
        for stage in range(4 if args.stage is None else args.stage + 1):
            flags = ["--data", str(data), "--steps", str(args.steps), "--batch-size", "4",
                     "--save-every", "3", "--sheet-every", "1000"]
            share = args.kills // 4 + (stage < args.kills % 4)
            if args.stage is not None:
                share = args.kills if stage == args.stage else 0
            wrong += torture(stage, share, folder, flags, hit)
            if wrong:
                break
    print("kills by place: " + ", ".join(f"{k} {n}" for k, n in hit.most_common()))
    print("\n".join(wrong) or f"{hit.total()} kills: every start resumed from the last checkpoint, "
          "and all weights are those of the undisturbed runs, bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
