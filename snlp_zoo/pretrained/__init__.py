"""Trained models that travel with the package: one folder for each such zoo entry, written by `tools/ship.py`."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
METRICS = "metrics.json"  # beside the weights: their checksum, scores and sample predictions


def shipped() -> list[str]:
    """Names of the zoo entries whose trained weights are part of the package, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def metrics(entry: str) -> dict[str, Any]:
    """What metrics.json of a shipped entry says; empty where none is shipped."""
    return json.loads((FOLDER / entry / METRICS).read_text(encoding="utf-8")) if entry in shipped() else {}
