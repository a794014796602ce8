"""What is read from YAML files: safely, checked, and with errors that say what to mend."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from snlp_zoo.errors import RecipeError


class Checked(BaseModel):
    """Unknown keys are errors, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3 and would keep a string), and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key.value in (k.value for k in keys[:i])]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0].value!r} stands twice", twice[0].start_mark)
        return super().construct_mapping(node, deep=deep)


class _YamlDumper(yaml.SafeDumper):
    """Its counterpart: quotes text that `_Yaml` would read as a number."""


for _side in (_Yaml, _YamlDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """YAML without any way to make Python objects; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Yaml)  # noqa: S506  (a SafeLoader)


def dump_yaml(content: Any, **layout: Any) -> str:
    """YAML that `parse_yaml` reads back to an equal value; `layout` as of `yaml.dump`."""
    return yaml.dump(content, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True, **layout)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RecipeError: missing file, not YAML, or not a mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path} is not valid YAML: {error.problem} at line {line}") from error
    except yaml.YAMLError as error:  # a character that cannot stand in YAML
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold 'key: value' lines at the top, found {type(content).__name__}")
    return content


def explain_validation(where: str, error: ValidationError, model: type[BaseModel]) -> RecipeError:
    """All of pydantic's complaints in one sentence each, with the nearest valid key for unknown ones."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            nearest = get_close_matches(str(problem["loc"][-1]), _keys_at(model, problem["loc"][:-1]), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            lines.append(f"{path}: unknown key{hint}")
        else:
            scalar = isinstance(problem["input"], str | int | float | None) and problem["type"] != "missing"
            value = f" (got {problem['input']!r})" if scalar else ""
            lines.append(f"{path + ': ' if path else ''}{problem['msg'].removeprefix('Value error, ')}{value}")
    return RecipeError(f"{where}: " + "; ".join(lines))


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in path:
        node = node.get("properties", {}).get(part) or node.get("additionalProperties") or node.get("items") or {}
        options = [node, *node.get("anyOf", []), *node.get("allOf", [])]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        node = schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
    return list(node.get("properties", {}))
