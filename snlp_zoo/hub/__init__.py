"""The Hugging Face Hub: models from it, and models to it. Tokens come from `hf auth login` or HF_TOKEN alone."""

from snlp_zoo.hub.download import find_checkpoint, load
from snlp_zoo.hub.upload import PublishReport, publish

__all__ = ["PublishReport", "find_checkpoint", "load", "publish"]
