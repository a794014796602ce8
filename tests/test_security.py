"""What the package never does: unpickle, evaluate text, start a shell, run somebody's code, load unsafe weights."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "snlp_zoo"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
SAFE_LOADERS = {"_Yaml", "SafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}
WEIGHTLESS = {"AutoTokenizer", "AutoConfig"}
# Whose from_pretrained needs no use_safetensors: our classes set it; of a wrapper, the callers are looked at.
OURS = {"model_class", "super()", "auto"}


def complaints(source):
    """(line, what) for everything in a source text that is not allowed."""
    body = ast.parse(source)
    full = {
        alias.asname or alias.name: alias.name for n in ast.walk(body) if isinstance(n, ast.Import) for alias in n.names
    }
    for node in ast.walk(body):
        if isinstance(node, ast.ImportFrom):
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {name}") for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in of_call(node, full))
        if isinstance(node, ast.Attribute | ast.Name):
            name = resolved(node, full)
            if name in SHELLS or name.startswith(("os.exec", "os.spawn")):
                yield node.lineno, f"uses {name}"
        if names_remote_code(node):
            yield node.lineno, "sets trust_remote_code"


def resolved(function, full):
    """The dotted name of what is called, aliases of imports undone."""
    head, dot, rest = ast.unparse(function).partition(".")
    return full.get(head, head) + dot + rest


def of_call(node, full):
    name, given = resolved(node.func, full), {word.arg: ast.unparse(word.value) for word in node.keywords}
    last = name.rpartition(".")[2]
    if name in BUILTINS or name in {f"builtins.{builtin}" for builtin in BUILTINS}:
        yield f"calls {name}"
    if given.get("shell", "False") != "False":
        yield f"{name} with a shell"
    if name.startswith("yaml.") and last in {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all"}:
        loader = given.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else None)
        if last not in {"load", "load_all"} or loader not in SAFE_LOADERS:
            yield f"{name} with {loader}"
    if name in {"torch.load", "torch.serialization.load"} and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in {"numpy.load", "pandas.read_pickle"} and given.get("allow_pickle", "False") != "False":
        yield f"{name} of pickles"
    if last.endswith("from_pretrained") and given.get("use_safetensors") != "True":
        owner = ast.unparse(node.func.value if last == "from_pretrained" else node.args[0])
        if owner not in WEIGHTLESS | OURS:
            yield f"{name} without use_safetensors=True"


def names_remote_code(node):
    if isinstance(node, ast.keyword):
        return node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any("trust_remote_code" in ast.unparse(target) for target in targets)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return any(key and ast.unparse(key) == "'trust_remote_code'" and ast.unparse(v) != "False" for key, v in pairs)
    return False


@pytest.mark.parametrize("file", FILES)
def test_nothing_unsafe(file):
    found = list(complaints((ROOT / file).read_text(encoding="utf-8")))
    assert not found, f"{file}: {found}"


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("train/")])
def test_only_runs_read_their_own_state(file):
    """accelerate keeps optimizer and random state in pickles: a run reads those it wrote itself, nothing else does."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and node.attr == "load_state"), f"{file}:{node.lineno}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import shelve as s",
        "eval('1')",
        "import builtins as b\nb.exec('1')",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
        "from os import system as s\nrun = s",
        "import os\nos.execvp('ls', [])",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.load(text, yaml.FullLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load as read\nread(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "options['trust_remote_code'] = True",
        "AutoModel.from_pretrained(name)",
        "_from_pretrained(AutoModel, part)",
        "AutoModel.from_pretrained(name, use_safetensors=None)",
    ],
)
def test_the_check_finds(source):
    assert list(complaints(source))


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(['ls'])",
        "import re\nre.compile('a')",
        "import torch\ntorch.compile(model)\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_load(text)",
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)",
        "model.eval()",
    ],
)
def test_the_check_leaves_alone(source):
    assert not list(complaints(source))
