"""What the README promises: symbols, files, links and flags exist."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_every_symbol_of_the_paper_table_is_where_it_says():
    rows = re.findall(r"^\| (.+?) \| (\w+)\.py \| (.+?) \|$", TEXT, re.M)
    assert len(rows) >= 18 and {f"Eq. {i}" for i in (1, 2, 3, 5)} <= {r[0].split(",")[0] for r in rows}
    for _, module, symbols in rows:
        for symbol in re.findall(r"`([\w.]+)`", symbols):
            found = importlib.import_module(module)
            for part in symbol.split("."):
                found = getattr(found, part)


def test_every_linked_file_exists():
    links = [x for x in re.findall(r"\]\(([^)]+)\)", TEXT) if not x.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_flag_of_a_command_is_known():
    def help_of(*words):
        return subprocess.run([sys.executable, *words, "--help"], text=True, capture_output=True,
                              check=True, cwd=ROOT).stdout
    helps = {"train.py": help_of("train.py"), "data.py": help_of("data.py"), "sample.py": "".join(
        help_of("sample.py", c) for c in ("report", "generate", "evaluate"))}
    checked = 0
    for line in re.findall(r"^.*\b(?:train|sample|data)\.py.*$", TEXT, re.M):
        name = re.search(r"(train|sample|data)\.py", line)[0]
        if "torchrun" in line:
            line = line.split("train.py")[1]
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", line.split("#")[0]):
            assert flag in helps[name], (flag, name)
            checked += 1
    assert checked > 8


@pytest.mark.parametrize("name", ["train.py", "sample.py", "data.py"])
def test_help_comes_without_importing_torch(name):
    code = ("import sys, runpy; sys.argv = [%r, '--help']\ntry: runpy.run_path(%r, run_name='__main__')\n"
            "except SystemExit: pass\nassert 'torch' not in sys.modules" % (name, str(ROOT / name)))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_only_the_allowed_packages_are_imported():
    allowed = {"torch", "numpy", "PIL", "einops", "tqdm"} | set(sys.stdlib_module_names) | {
        p.stem for p in ROOT.glob("*.py")}
    assert {p.stem for p in ROOT.glob("*.py")} == {
        "unix", "ar", "diffusion", "joint_attn", "data", "train", "sample"}
    for p in ROOT.glob("*.py"):
        nodes = list(ast.walk(ast.parse(p.read_text())))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        assert {n.split(".")[0] for n in names} <= allowed, p.name
        assert max(map(len, p.read_text().splitlines())) <= 100, p.name
