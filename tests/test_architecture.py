"""Who may import whom, who may import which third party, and how long things get."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "snlp_zoo"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# Each level imports only from the levels above it in this list; parts of one level do not know each other.
LEVELS = [
    {"errors", "pretrained"},
    {"checked"},
    {"ops", "results"},
    {"layers"},
    {"models"},
    {"registry", "data"},
    {"hub"},
    {"distill", "energy", "convert"},
    {"train", "plots", "predict", "generate", "pareto"},
    # these may import anything of ours, each other too
    {"doctor", "bench", "cli", "cli_convert", "cli_energy", "cli_generate", "__main__", "__init__"},
]
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}
MODELS_SHARE = [
    "models/base.py",
    "models/encoder.py",
    "models/decoder.py",
    "models/configuration.py",
    "models/checkpoint.py",
    "models/transfer.py",
    "models/cache.py",
    "models/converted.py",
    "models/converted_loading.py",
]  # besides these, a model knows only its own configuration

# Third party -> the only files that import it.
DOORS = {
    "spikingjelly": ["layers/neurons/*", "energy/*", "bench.py"],
    "triton": ["ops/*/triton.py"],
    "cupy": ["ops/*/cupy.py"],
    "accelerate": ["train/loop.py", "train/checkpoints.py", "train/evaluation.py"],
    "huggingface_hub": ["hub/*.py", "models/configuration.py", "models/configuration_*.py"],
    "matplotlib": ["plots.py"],
    "yaml": ["checked.py", "train/recipe.py"],
    "tokenizers": ["data/tokenizers.py"],
}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120


def tree(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports(file, *, types=True):
    """Dotted names a file imports anywhere; without `types`, not those under `if TYPE_CHECKING:`."""
    body = tree(file)
    guarded = [n for n in ast.walk(body) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = set() if types else {inner for node in guarded for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(body):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports out in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(file):
    """The package's own parts and modules a file imports, as ("models", "models/base.py")."""
    for name in imports(file):
        _, *path = name.split(".")
        if name.startswith("snlp_zoo.") and path[0] in RANK:
            yield path[0], "/".join(path[:2]) + ".py"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    part = file.partition("/")[0].removesuffix(".py")
    assert part in RANK, f"{part} has no place in LEVELS"
    for imported, _ in ours(file):
        below = RANK[imported] < RANK[part] or imported == part or RANK[part] == len(LEVELS) - 1
        assert below, f"{file} imports {imported}"


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.startswith("models/") and file != "models/__init__.py"]
)
def test_models_do_not_know_each_other(file):
    family = file.partition("_")[2]
    for part, module in ours(file):
        if part == "models":
            assert module in [*MODELS_SHARE, f"models/configuration_{family}"], f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_third_parties_have_one_door(file):
    for name in imports(file, types=False):
        doors = DOORS.get(name.partition(".")[0])
        assert doors is None or any(fnmatch(file, door) for door in doors), f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    limit = KERNEL_LINES if file.endswith(("/triton.py", "/cupy.py")) else FUNCTION_LINES
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{file}: {node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES)
def test_no_prints_bare_excepts_or_cuda_calls(file):
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{file}:{node.lineno}: bare except"
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            assert called != "cuda", f"{file}:{node.lineno}: .cuda()"
            assert not (isinstance(node.func, ast.Name) and called == "print"), f"{file}:{node.lineno}: print"
