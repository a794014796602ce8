"""Joules that an NVIDIA GPU really took, from its own counter (NVML), beside the estimate."""

import ctypes
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snlp_zoo.errors import EnergyError

_SECONDS = 3.0  # the counter moves in steps of some 20 to 100 ms


def measure(model: nn.Module, batch: Mapping[str, Any], seconds: float = _SECONDS) -> dict[str, Any]:
    """Run the whole batch again and again and read the GPU's energy counter before and after.

    Args:
        model, batch: on a CUDA device, with the padding the batch has.
        seconds: how long to run.
    Returns:
        joules_per_token (real tokens), idle_watts (drawn before, with nothing running), watts, seconds, forwards,
        device. The energy is that of the whole GPU, idle power included.
    Raises:
        EnergyError: no NVIDIA GPU, or its driver has no energy counter.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise EnergyError("measured energy needs an NVIDIA GPU and a CUDA build of torch, none was found here")
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise EnergyError(f"measured energy needs the model on a GPU, it is on {device}; call model.to('cuda')")
    counter = _Counter(device)
    torch.cuda.synchronize(device)
    before, started = counter.joules(), time.monotonic()
    time.sleep(1.0)
    idle = (counter.joules() - before) / (time.monotonic() - started)
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    forwards = 0
    with torch.no_grad():
        model(**inputs)  # compiled and loaded
        torch.cuda.synchronize(device)
        before, started = counter.joules(), time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            model(**inputs)
            torch.cuda.synchronize(device)
            forwards += 1
    joules = counter.joules() - before
    mask = inputs.get("attention_mask")
    tokens = int(mask.sum()) if mask is not None else next(iter(inputs.values())).shape[:2].numel()
    return {
        "joules_per_token": joules / (forwards * tokens),
        "idle_watts": idle,
        "watts": joules / elapsed,
        "seconds": elapsed,
        "forwards": forwards,
        "device": torch.cuda.get_device_name(device),
    }


class _Counter:
    """NVML's total energy counter of one device."""

    def __init__(self, device: torch.device) -> None:
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise EnergyError(
                "measured energy needs NVIDIA's libnvidia-ml.so.1, which comes with the driver"
            ) from error
        self._call("nvmlInit_v2")
        self.handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.handle))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise EnergyError(f"NVML: {name} failed with status {status}; this GPU or driver does not count its energy")

    def joules(self) -> float:
        """Since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.handle, ctypes.byref(millijoules))
        return millijoules.value / 1000
