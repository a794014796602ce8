"""The README does what it says: its Python runs, its commands exist, its table and its test command are current."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from snlp_zoo import cli, registry
from snlp_zoo.train.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts]


@pytest.mark.parametrize("code", [code for code in blocks("python") if "runs/" not in code])
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (our own file)


def test_commands_exist_and_take_these_options():
    known = set(get_command(cli.app).commands)
    ours = [words[1:] for words in commands() if words[0] == "snlp-zoo"]
    assert {words[0] for words in ours} == known
    for words in ours:
        help_text = CliRunner().invoke(cli.app, [words[0], "--help"], env={"COLUMNS": "200"}).output
        assert all(word in help_text for word in words if word.startswith("--")), words
        for word in words[1:]:
            if re.match("spik[a-z]*_", word):
                assert word in registry.list_entries()


def test_python_m_is_the_same_program():
    listed = subprocess.run([sys.executable, "-m", "snlp_zoo", "list"], capture_output=True, text=True, check=True)
    assert "spikelm_tiny_tweets" in listed.stdout


@pytest.mark.parametrize("recipe", blocks("yaml"), ids=lambda recipe: yaml.safe_load(recipe)["name"])
def test_recipe_block_is_a_recipe(tmp_path, recipe):
    path = tmp_path / "my.yaml"
    path.write_text(recipe)
    loaded = load_recipe(str(path))
    assert loaded.name == yaml.safe_load(recipe)["name"]
    assert loaded.model.model_type == yaml.safe_load(recipe).get("model", {}).get("model_type", "spikelm")


def test_continuous_integration_runs_the_readme_test_command():
    command = next(block for block in blocks("bash") if "pytest" in block).strip()
    install, test = (part.strip() for part in command.split("&&"))
    script = (ROOT / ".ci" / "run").read_text()
    assert install.removeprefix("pip install ") in script
    assert re.search(rf"&& {test}$", script, flags=re.MULTILINE)


def test_zoo_table_is_current():
    checked = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_demo_command_and_pipeline_block(tmp_path, monkeypatch):
    """The demo's own path, real tweets and real teacher, with a handful of examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNLP_ZOO_CACHE", str(tmp_path / "cache"))
    small = ["data.train_size=64", "data.validation_size=16", "data.test_size=32", "train.max_steps=2"]
    small += ["teacher.train.max_steps=2", "baseline=false"]
    words = next(words for words in commands() if words[:2] == ["snlp-zoo", "distill"])
    result = CliRunner().invoke(cli.app, words[1:] + [w for s in small for w in ("--set", s)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "firing rate" in result.output
    (code,) = (code for code in blocks("python") if "runs/" in code)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (our own file)
