import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snlp_zoo import doctor
from snlp_zoo.ops.backend import KERNELS

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Function: pretend that these versions are installed, and nothing else."""

    def pretend(**versions):
        monkeypatch.setattr(doctor, "_version", versions.get)

    return pretend


def test_report_of_this_machine():
    report = doctor.examine()
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(report["packages"]) == set(doctor.PACKAGES)
    assert all(report["packages"][name] for name in ("torch", "transformers", "spikingjelly", "accelerate"))
    assert report["problems"] == []
    assert report["devices"]["cpu_threads"] >= 1
    assert json.loads(json.dumps(report)) == report


def test_every_op_gets_a_backend_and_a_reason():
    report, ops = doctor.examine(), REPOSITORY / "snlp_zoo" / "ops"
    assert set(report["backends"]) == {path.parent.name for path in ops.glob("*/reference.py")}
    for choice in report["backends"].values():
        assert choice["backend"] in ("torch", *KERNELS)
        assert choice["reason"]
        if choice["device"] == "cpu":
            assert choice["backend"] == "torch"
            assert all(kernel in choice["reason"] for kernel in KERNELS)


def test_a_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-here"))
    assert doctor.examine()["packages"]["no-such-package-here"] is None


def test_torch_that_cannot_be_imported_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = doctor.examine()
    assert len(report["problems"]) == 1
    assert "torch cannot be imported" in report["problems"][0]
    assert report["packages"]["transformers"]


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.14.1", "torchvision": "0.29.1", "torchaudio": "2.11.0"},
        {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu", "torchaudio": "2.11.0+cpu"},
        {"torch": "2.13.0+cpu"},
        {"torch": "2.13.0+cu130", "torchvision": "0.28.0+cu130"},
        {},
    ],
)
def test_builds_that_fit_together(installed, versions):
    installed(**versions)
    assert doctor.torchvision_mismatch() is None


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"torchvision": "0.28.0"}, "but torchvision 0.28.0 beside it is not,"),
        ({"torchvision": "0.28.0+cu130"}, "but torchvision 0.28.0+cu130 beside it is not,"),
        ({"torchaudio": "2.11.0"}, "but torchaudio 2.11.0 beside it is not,"),
        ({"torchvision": "0.28.0+cpu", "torchaudio": "2.11.0"}, "but torchaudio 2.11.0 beside it is not,"),
        (
            {"torchvision": "0.28.0", "torchaudio": "2.11.0"},
            "but torchvision 0.28.0 and torchaudio 2.11.0 beside it are not,",
        ),
    ],
)
def test_builds_that_do_not_fit_together(installed, versions, expected):
    installed(torch="2.13.0+cpu", **versions)
    sentence = doctor.torchvision_mismatch()
    assert sentence.startswith(f"torch 2.13.0+cpu is a CPU build {expected}")
    assert "pip uninstall -y torchvision torchaudio" in sentence
    assert doctor.examine()["problems"] == [sentence]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Environment of a machine whose CPU-only torch has a torchvision for CUDA beside it."""
    folder = tmp_path_factory.mktemp("site")
    for name, version in (("torch", "2.13.0+cpu"), ("torchvision", "0.28.0"), ("torchaudio", "2.13.0+cpu")):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    paths = [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def python(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_doctor_speaks_where_transformers_cannot_be_imported(broken):
    done = python(broken, "-m", "snlp_zoo", "doctor", "--json")
    assert done.returncode == 1
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert len(report["problems"]) == 1
    assert "torchvision 0.28.0 beside it is not" in report["problems"][0]
    assert report["packages"]["torch"] == "2.13.0+cpu"


def test_the_package_says_why_it_cannot_load_models(broken):
    program = """
import snlp_zoo
for name in ("load", "build", "list_entries"):
    try:
        getattr(snlp_zoo, name)
    except ImportError as error:
        assert "torchvision 0.28.0 beside it is not" in str(error), error
    else:
        raise SystemExit(f"{name} is there")
"""
    done = python(broken, "-c", program)
    assert done.returncode == 0, done.stderr


def test_other_commands_say_why_they_cannot_run(broken):
    done = python(broken, "-m", "snlp_zoo", "list")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "torchvision 0.28.0 beside it is not" in done.stderr


@pytest.mark.parametrize("missing", ["torch", "transformers", "spikingjelly"])
def test_doctor_speaks_where_a_package_is_missing(missing):
    start = f"import sys; sys.modules[{missing!r}] = None; from snlp_zoo.cli import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = python(environment, "-c", start, "doctor", "--json")
    assert done.returncode == 1, done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert missing in problem
    done = python(environment, "-c", start, "info", "spikelm_tiny")
    assert done.returncode != 0
    assert missing in done.stderr
