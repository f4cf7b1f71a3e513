"""What the README says is so: symbols, tests, figures, links, commands. And the reader's budget."""

import ast
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from data import phantom
from joint_attn import rope

FILES = {name: (ROOT / f"{name}.py").read_text() for name in (
    "joint_attn", "diffusion", "ar", "unix", "sample", "train", "data")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "tests/README.md": (ROOT / "tests" / "README.md").read_text()}

# Lines of each file; "all": of the seven together
BUDGETS = {"joint_attn": 230, "diffusion": 330, "ar": 500, "unix": 560, "sample": 560, "train": 640,
           "data": 900, "all": 3600}
OVER = {      # what is not yet held: the present lines
    "unix": 607, "sample": 697, "train": 1108, "data": 1203, "all": 4674}
MOST = {("diffusion", "__init__"): 9}   # arguments of a function, where it is not 8: the VAE
WORDS = (       # that a student of diffusion and language models would have to guess (DESIGN: Names)
    r"films?|tells?|excerpts?|lanes?|goes on|go on|stands? in|mend(s|ed|ing)?|of no matter|so many|"
    r"tap(s|ped)?|draws?|drawings?|velocity_to|predict_films?|look_near")
MAY = {"predict_film"}      # the older name of predict_x0 in config.json


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the tables of a section, without their headers."""
    lines = [x for x in section(title).splitlines() if x.startswith("|")]
    table = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines]
    return [row for row, next in zip(table, [*table[1:], None])
            if not set(row[0]) <= {"-"} and not (next and set(next[0]) == {"-"})] if table else []


# ---------------------------------------------------------------- what the README says


def test_every_symbol_of_the_paper_table_is_where_it_says():
    table = rows("The seven files")
    assert len(table) >= 18 and {f"Eq. {i}" for i in (1, 2, 3, 5)} <= {
        row[0].split(",")[0] for row in table}
    for _, file, symbols, _ in table:
        for symbol in re.findall(r"`([\w.]+)`", symbols):
            found = importlib.import_module(file.removesuffix(".py"))
            for part in symbol.split("."):
                found = getattr(found, part)


def test_every_row_of_the_paper_table_names_a_test_that_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, re.M))
    for row in rows("The seven files"):
        named = set(re.findall(r"`(test_\w+)`", row[3]))
        assert named and named <= defined, row


def test_the_arrows_of_the_figure_are_the_imports():
    figure, found = section("The seven files").split("```")[1], {}
    for line in figure.strip().splitlines():
        file, _, arrows = line.partition("->")
        found[file.split(".py")[0]] = set(arrows.split())
    real = {}
    for name, tree in TREES.items():
        nodes = list(ast.walk(tree))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        real[name] = set(names) & FILES.keys()
    assert found == real


@torch.no_grad()
def test_the_figure_of_the_mask_is_what_the_layer_does(model):
    """Measured: an input is moved, and the outputs that move with it attend to it."""
    pattern = r"^ +\w  W_u   ((?:[#.] ){6}[#.])|(\w)  W_([ug])  ((?:[#.] ){7}[#.])"
    lines = re.findall(pattern, section("The idea"), re.M)
    reads = [x[0].split() for x in lines if x[0]]
    generates, weights = [x[3].split() for x in lines if x[3]], "".join(x[2] for x in lines)
    layer = model.lm.tower.layers[0]

    def read(s):
        return layer.read(s, rope(torch.tensor([[0, 0, 0, 1, 2, 3, 4]]), 10), 3)[0]

    def generate(s):
        text, past = layer.read(s[:, :3], rope(torch.tensor([[0, 1, 2]]), 10), 0)
        boi_eoi, x = layer.denoise(s[:, [3, 7]], s[:, 4:7], rope(torch.tensor([[3]]), 10), past,
                                   None, False)
        return torch.cat([text, boi_eoi[:, :1], x, boi_eoi[:, 1:]], dim=1)

    def moved(function, s):
        """(l, l): True where output i moves with input j."""
        found = []
        for j in range(s.shape[1]):
            other = s.clone()
            other[:, j] += 1
            found.append((function(other) != function(s)).any(-1)[0])
        return torch.stack(found, dim=1).tolist()
    for function, picture in ((read, reads), (generate, generates)):
        s = torch.randn(1, len(picture), 32)
        assert moved(function, s) == [[cell == "#" for cell in row] for row in picture]
    s = torch.randn(1, len(generates), 32)
    before = generate(s)
    layer.gen.down_proj.weight += 1
    own = (generate(s) != before).any(-1)[0].tolist()
    assert [w == "g" for w in weights] == own


def test_what_to_read_has_the_lines_that_it_says():
    for _, what, _ in rows("What to read"):
        file, symbols, said = re.match(r"`(\w+)\.py`: (.+) \((\d+) lines\)", what).groups()
        count = 0
        for symbol in re.findall(r"`([\w.]+)`", symbols):
            node = TREES[file]
            for part in symbol.split("."):
                node = next(n for n in node.body if part in (
                    getattr(n, "name", ""), *(getattr(t, "id", "") for t in getattr(
                        n, "targets", []))))
            count += node.end_lineno - node.lineno + 1
        assert abs(int(said) - count) <= 0.15 * count, (file, symbols, count)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    headings = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-")
                for x in re.findall(r"^#+ (.+)$", PAGES[page], re.M)}
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
    for file in re.findall(r"\btests/[\w/]+\.\w+|\bassets/[\w/]+\.\w+", PAGES[page]):
        assert (ROOT / file).exists(), file


def test_the_chest_that_comes_with_it_is_painted():
    image = np.asarray(Image.open(ROOT / "assets" / "chest.png"))
    np.testing.assert_array_equal(image, phantom("val", 394, 256).image)


# ---------------------------------------------------------------- commands


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page, from the program's name on."""
    found = re.findall(r"`(?:python |torchrun )([^`]+)`", page.replace("```", ""))
    for block in re.findall(r"```bash\n(.*?)```", page, re.S):
        found += re.findall(r"^(?:python|torchrun) (.*)$", block, re.M)
    words = [shlex.split(command, comments=True) for command in found]
    return [w[next(i for i, x in enumerate(w) if x.endswith(".py")):] for w in words
            if any(x.endswith(".py") for x in w)]


def help_of(*words) -> str:
    return subprocess.run([sys.executable, *words, "--help"], text=True, capture_output=True,
                          check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page):
    import sample
    import train
    parse = {"train.py": train.parse, "sample.py": sample.parse}
    for name, *words in commands(PAGES[page]):
        if name in parse:
            if words:
                parse[name](words)      # SystemExit on a flag or value that is not known
        elif flags := {w for w in words if w[:2] == "--"}:
            assert flags <= set(re.findall(r"--[a-z][\w-]+", help_of(name))), words
        else:
            assert (ROOT / name).exists(), name


def test_every_flag_of_the_readme_is_known():
    helps = "".join(map(help_of, ("train.py", "data.py"))) + "".join(
        help_of("sample.py", c) for c in ("report", "generate", "look", "evaluate"))
    known = set(re.findall(r"--[a-z][\w-]+", helps)) | {"--help", "--index-url", "--nproc_per_node"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README))
    assert len(flags) > 12 and flags <= known, flags - known


@pytest.mark.parametrize("name", ["train.py", "sample.py", "data.py"])
def test_help_comes_without_importing_torch(name):
    code = ("import sys, runpy; sys.argv = [%r, '--help']\ntry: runpy.run_path(%r, run_name='__main__')\n"
            "except SystemExit: pass\nassert 'torch' not in sys.modules" % (name, str(ROOT / name)))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tests share two processes on Linux alone")
def test_pytest_tells_why_it_skips(tmp_path):
    """Reports of two processes arrive whole: pytest -v stops where a reason has become a list."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(
            "import pytest\n\n\ndef test_it():\n    pytest.skip('no such chest')\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-v", "-rs", tmp_path], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "2 skipped" in done.stdout
    assert "no such chest" in done.stdout


# ---------------------------------------------------------------- the seven files


def test_only_the_allowed_packages_are_imported():
    allowed = {"torch", "numpy", "PIL", "einops", "tqdm", *sys.stdlib_module_names, *FILES}
    assert {p.stem for p in ROOT.glob("*.py")} == FILES.keys()
    for file, tree in TREES.items():
        nodes = list(ast.walk(tree))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        assert {n.split(".")[0] for n in names} <= allowed, file


@pytest.mark.parametrize("name", BUDGETS)
def test_lines_of_a_file(name):
    count = {k: len(text.splitlines()) for k, text in FILES.items()}
    count["all"] = sum(count.values())
    assert count[name] <= max(BUDGETS[name], OVER.get(name, 0))


def test_lines_of_the_readme_and_their_lengths():
    assert len(README.splitlines()) <= 190
    for name, text in FILES.items():
        for n, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 100, (name, n)


def test_no_function_is_long_or_takes_many_arguments():
    for name, tree in TREES.items():
        for f in ast.walk(tree):
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert f.end_lineno - f.lineno < 60, (name, f.name)
                a = f.args
                names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                many = len(set(names) - {"self", "cls"})
                assert many <= MOST.get((name, f.name), 8), (name, f.name)


@pytest.mark.parametrize("name", FILES)
def test_words_that_a_reader_would_have_to_guess(name):
    """In names, comments and strings, but not in attributes of libraries (ImageDraw.Draw)."""
    for token in tokenize.generate_tokens(io.StringIO(FILES[name]).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, tokenize.COMMENT):
            for m in re.finditer(rf"\b({WORDS})\b", token.string):
                assert m[0] in MAY, (name, token.start[0], m[0])
