"""The machinery of the course: it loads exercises, blanks functions, and judges answers.

An exercise is a file eNN.py. It names functions of the seven files of the project, its TARGETS
("diffusion.path", "joint_attn.Expert.qkv"). An answer is the source of those functions. It is
judged in a clean copy of the seven files: nothing else of a student's files is used.

A check is a function check_*(lib, seed) of an exercise. `lib` has the seven modules as attributes.
A check raises AssertionError with a message that names the rule.
"""

import ast
import functools
import importlib.util
import json
import linecache
import random
import re
import sys
import textwrap
import types
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SEALED = HERE / "sealed.bin"    # in a handout: the seven files as they were before blanking
FILES = ("data", "joint_attn", "diffusion", "ar", "unix", "train", "sample")    # import order
LABS = ("flow", "towers", "training")
NOT_WRITTEN = "not written yet"
READABLE = 1_000_000            # bytes; a larger file of a student is refused

MODULES = {"math", "torch", "einops", "numpy", "itertools", "functools", "typing", "collections",
           "copy", "random", "re", *FILES}
NAMES = {"exec", "eval", "compile", "globals", "locals", "vars", "setattr", "delattr", "open",
         "breakpoint", "input"}
ATTRIBUTES = {"sys", "os", "modules", "f_back", "f_globals", "f_locals", "f_builtins", "tb_frame",
              "gi_frame", "_getframe"}
DUNDERS = {"__init__", "__len__", "__name__", "__class__"}


class Refused(Exception):
    """A student's function that cannot be judged; the message says why."""


# ---------------------------------------------------------------- exercises


def import_file(path: Path):
    """Imports a file under its own name, which need not be a package's."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))       # exercises import `course` and `oracles`
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercises() -> dict:
    """{number: module} of all exercises, in order."""
    return {int(p.stem[1:]): import_file(p) for p in sorted(HERE.glob("e[0-9][0-9].py"))}


def exercise(n: int):
    return import_file(HERE / f"e{n:02d}.py")


def checks(module) -> list:
    """The checks of an exercise, in the order of the file."""
    return [f for name, f in vars(module).items() if name.startswith("check_")]


def rule(check) -> str:
    """The rule that a check is about: the first line of its docstring, or its name."""
    text = (check.__doc__ or check.__name__[6:].replace("_", " ")).strip()
    return text.splitlines()[0].rstrip(".")


def rule_id(check) -> str:
    """A check's name in pytest's output."""
    return check.__name__.removeprefix("check_")


# ---------------------------------------------------------------- functions in source text


def clean_sources() -> dict[str, str]:
    """The seven files by name: those of the project, or in a handout the sealed ones."""
    if SEALED.exists():
        return json.loads(zlib.decompress(SEALED.read_bytes()))
    return {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FILES}


def seal(sources: dict[str, str]) -> bytes:
    return zlib.compress(json.dumps(sources).encode())


def split_target(target: str) -> tuple[str, str]:
    """"joint_attn.Expert.qkv" -> "joint_attn", "Expert.qkv"."""
    file, _, name = target.partition(".")
    return file, name


parse = functools.lru_cache(64)(ast.parse)      # the same files are parsed for each target


def find(source: str, name: str) -> ast.FunctionDef:
    """The node of a function ("path") or method ("Expert.qkv"). Raises LookupError, SyntaxError."""
    body = parse(source).body
    *classes, function = name.split(".")
    for c in classes:
        found = [n for n in body if isinstance(n, ast.ClassDef) and n.name == c]
        if not found:
            raise LookupError(f"there is no class {c}")
        body = found[-1].body
    found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == function]
    if not found:
        raise LookupError(f"there is no function {name}")
    return found[-1]


def span(node: ast.FunctionDef) -> tuple[int, int]:
    """First line of a function, with its decorators, and the line after it; from 0."""
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno


def extract(source: str, name: str) -> str:
    """The text of a function, not indented."""
    start, end = span(find(source, name))
    return textwrap.dedent("\n".join(source.split("\n")[start:end]))


def replace(source: str, name: str, new: str) -> str:
    """Puts a function, given as text that is not indented, in place of one of the file."""
    node, lines = find(source, name), source.split("\n")
    start, end = span(node)
    text = textwrap.indent(textwrap.dedent(new).strip("\n"), " " * node.col_offset)
    return "\n".join([*lines[:start], text, *lines[end:]])


def has_docstring(node: ast.FunctionDef) -> bool:
    return ast.get_docstring(node) is not None


def count_lines(source: str, name: str) -> int:
    """Lines of a function's body: no docstring, no blank lines, no lines of comment."""
    node = find(source, name)
    body = node.body[has_docstring(node):]
    lines = source.split("\n")[body[0].lineno - 1:node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def blank(source: str, name: str, message: str) -> str:
    """Signature and docstring stay; the body becomes `raise NotImplementedError(message)`."""
    node, lines = find(source, name), source.split("\n")
    keep = node.body[0].end_lineno if has_docstring(node) else node.body[0].lineno - 1
    line = f'{" " * (node.col_offset + 4)}raise NotImplementedError("{message}")'
    return "\n".join([*lines[:keep], line, *lines[node.end_lineno:]])


def blank_all(sources: dict[str, str], n: int, module) -> dict[str, str]:
    """Blanks the targets of one exercise; the message has the counted number of lines."""
    sources = dict(sources)
    for target in module.TARGETS:
        file, name = split_target(target)
        lines = count_lines(sources[file], name)
        about = f"exercise {n}: {module.EQUATION}, about {lines} line{'s' * (lines > 1)}"
        sources[file] = blank(sources[file], name, about)
    return sources


def assemble(sources: dict[str, str], answer: dict[str, str]) -> dict[str, str]:
    """A clean copy of the seven files with an answer {target: source} put in."""
    sources = dict(sources)
    for target, text in answer.items():
        file, name = split_target(target)
        sources[file] = replace(sources[file], name, text)
    return sources


# ---------------------------------------------------------------- a student's files


def read_student(folder: Path, file: str) -> str:
    """The text of a student's file. Raises Refused."""
    path = Path(folder) / f"{file}.py"
    try:
        if not path.is_file():
            raise Refused(f"{file}.py is missing")
        if path.stat().st_size > READABLE:
            raise Refused(f"{file}.py is larger than {READABLE:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise Refused(f"{file}.py cannot be read: {e}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "")


def chunk(source: str, name: str) -> str:
    """The text of a function in a file that Python cannot parse, found by its indentation."""
    lines, (*classes, function) = source.split("\n"), name.split(".")
    start, end, depth = 0, len(lines), "    " * len(classes)
    for c in classes:
        start = next((i for i, s in enumerate(lines) if re.match(rf"class {c}\b", s)), None)
        if start is None:
            raise Refused(f"there is no class {c}")
        end = next((i for i in range(start + 1, len(lines)) if re.match(r"[\w@]", lines[i])), end)
    heads = [i for i in range(start, end) if re.match(rf"{depth}def {function}\(", lines[i])]
    if not heads:
        raise Refused(f"there is no function {name}")
    first = heads[-1]
    stop = re.compile(rf"\s{{0,{len(depth)}}}[^\s)#\]}}]")
    last = next((i for i in range(first + 1, end) if stop.match(lines[i])), end)
    while first and lines[first - 1].startswith(depth + "@"):
        first -= 1
    return textwrap.dedent("\n".join(lines[first:last]))


def student_function(source: str, name: str) -> str:
    """The text of one function of a student's file, even if another one has a syntax error.
    Raises Refused."""
    function = name.split(".")[-1]
    try:
        try:
            text = extract(source, name)
        except SyntaxError:
            text = chunk(source, name)
        tree = ast.parse(text)
    except LookupError as e:
        raise Refused(str(e)) from None
    except SyntaxError as e:
        raise Refused(f"syntax error in {name}: {e.msg}, line {e.lineno} of it") from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise Refused(f"{name} cannot be parsed: {e}") from None
    if len(tree.body) != 1 or getattr(tree.body[0], "name", "") != function:
        raise Refused(f"syntax error near {name}")
    screen(tree.body[0], name)
    return text


def screen(function: ast.FunctionDef, name: str):
    """Refuses what a function of this course has no use for and a cheat has. Raises Refused."""
    def refuse(what: str):
        raise Refused(f"{name} {what}: a judged function may not")
    own = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
    called = [a.func for a in ast.walk(function) if isinstance(a, ast.Call)]
    own |= {a.id for a in ast.walk(function)
            if isinstance(a, ast.Name) and isinstance(a.ctx, ast.Store)}
    for node in ast.walk(function):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for module in names:
            if module.split(".")[0] not in MODULES:
                refuse(f"imports {module}")
        if isinstance(node, (ast.Global, ast.ClassDef)):
            refuse("has a class or a global statement inside")
        if isinstance(node, ast.Name) and (node.id in NAMES or is_dunder(node.id)):
            refuse(f"uses {node.id}")
        if isinstance(node, ast.Attribute):
            layers = node.attr == "modules" and node in called      # nn.Module's, not sys.modules
            if node.attr in ATTRIBUTES and not layers or is_dunder(node.attr):
                refuse(f"uses .{node.attr}")
            root = node
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if not isinstance(node.ctx, ast.Load) and getattr(root, "id", None) not in own:
                refuse(f"changes {ast.unparse(node)}")


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name not in DUNDERS


def student_answer(folder: Path, module) -> dict[str, str]:
    """{target: source} of an exercise from a student's folder. Raises Refused."""
    return {target: student_function(read_student(folder, file), name)
            for target in module.TARGETS for file, name in [split_target(target)]}


# ---------------------------------------------------------------- modules


_compiled = {}


class Lib:
    """The seven files as fresh modules, for nobody else to see: lib.diffusion, lib.unix, ... A
    module is imported when it is first asked for, with those before it in FILES."""

    def __init__(self, sources: dict[str, str], data=None):
        self.__dict__.update({"_sources": sources}, **({"data": data} if data else {}))

    def __getattr__(self, name: str):
        if name not in FILES:
            raise AttributeError(name)
        before = {other: sys.modules.get(other) for other in FILES}
        try:
            for file in FILES[:FILES.index(name) + 1]:
                if file in vars(self):
                    sys.modules[file] = vars(self)[file]
                else:
                    setattr(self, file, self._import(file))
        finally:
            for other, module in before.items():
                if module is None:
                    sys.modules.pop(other, None)
                else:
                    sys.modules[other] = module
        return vars(self)[name]

    def _import(self, name: str) -> types.ModuleType:
        source, at, module = self._sources[name], f"{ROOT}/{name}.py", types.ModuleType(name)
        if (name, source) not in _compiled:
            _compiled[name, source] = compile(source, at, "exec")
        module.__file__, sys.modules[name] = at, module
        exec(_compiled[name, source], vars(module))
        linecache.cache[at] = len(source), None, source.splitlines(True), at
        return module


def load(sources: dict[str, str], keep: bool = False, data=None) -> Lib:
    """A `lib` of seven sources. With `keep`, all are imported now, and later imports find them too
    (in a process that judges one answer). `data`: that module, where it need not be fresh."""
    lib = Lib(sources, data)
    if keep:
        sys.modules.update({name: getattr(lib, name) for name in reversed(FILES)})
    return lib


def install(lib, functions: dict):
    """Puts other functions, {target: function}, into a `lib`, wherever they were imported to."""
    for target, new in functions.items():
        file, name = split_target(target)
        *classes, function = name.split(".")
        if classes:
            setattr(getattr(getattr(lib, file), classes[0]), function, new)
            continue
        old = getattr(getattr(lib, file), function)
        for module in [vars(lib)[name] for name in FILES if name in vars(lib)]:
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
    return lib


# ---------------------------------------------------------------- judging


def close(got, want, text: str, atol=1e-4, rtol=1e-4):
    """Raises AssertionError(text) unless `got` is a plain tensor with the shape and the values of
    `want` (small differences are allowed)."""
    want = torch.as_tensor(want)
    assert type(got) in (torch.Tensor, torch.nn.Parameter), f"{text}: got {type(got).__name__}"
    assert got.shape == want.shape, f"{text}: got shape {tuple(got.shape)}, not {tuple(want.shape)}"
    a, b = (x.detach().to(torch.float64) for x in (got, want))
    assert bool(torch.isfinite(a).all()), f"{text}: got NaN or infinity"
    far = bool(((a - b).abs() > atol + rtol * b.abs()).any())
    assert not far, f"{text} (off by {(a - b).abs().max().item():.3g})"


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers that depend on the seed and the shape alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differs(a, b, tolerance=1e-3) -> bool:
    """Whether two tensors of one shape differ by more than rounding."""
    return a.shape == b.shape and bool(((a - b).abs() > tolerance).any())


def run_check(check, lib, seed: int) -> str:
    """Runs one check -> "" if it passes, else which rule broke and how."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        check(lib, seed)
    except AssertionError as e:
        said = str(e).strip()
        return said if said else rule(check)
    except NotImplementedError as e:
        return f"{NOT_WRITTEN} ({e})" if str(e).startswith("exercise ") else f"{rule(check)}: {e!r}"
    except Exception as e:          # of the student's function, which may raise anything
        said = (str(e).strip().splitlines() or [""])[0][:200]
        return f"{rule(check)}: it raised {type(e).__name__}: {said}"
    return ""


def judge(module, lib, seed: int) -> str:
    """Runs the checks of an exercise -> "" or the first rule that broke."""
    return next(filter(None, (run_check(check, lib, seed) for check in checks(module))), "")




@functools.lru_cache(None)
def mine(n: int) -> Lib:
    """In a handout: its functions of exercise n in a clean copy of all else, as they are graded."""
    return load(assemble(clean_sources(), student_answer(ROOT, exercise(n))), keep=True)


def public(n: int, check):
    """For the handout's pytest: one check of exercise n, of the functions in the handout."""
    lib = mine(n)
    random.seed(n)
    torch.manual_seed(n)
    check(lib, n)
