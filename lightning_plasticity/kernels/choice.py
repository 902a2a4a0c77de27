"""Which kernels there are: Numba's on the CPU, Triton's on CUDA, none where these are missing or turned off."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

_VARIABLE = "LIGHTNING_PLASTICITY_KERNELS"
_is_on: bool | None = None  # None until it is asked for


def kernels_are_on() -> bool:
    """Whether kernels may be used: unless ``LIGHTNING_PLASTICITY_KERNELS=off`` is in the environment."""
    global _is_on
    if _is_on is None:
        value = os.environ.get(_VARIABLE, "on")
        if value not in ("on", "off"):
            raise ValueError(f"The environment variable {_VARIABLE} must be 'on' or 'off', got {value!r}.")
        _is_on = value == "on"
    return _is_on


def use_kernels(is_on: bool) -> None:
    """Turns kernels on or off, in all of the process, for methods that are attached from now on.

    Without them everything is done by PyTorch's operations, with the same results up to rounding.
    """
    global _is_on
    _is_on = is_on


def kernels_on(device: str) -> ModuleType | None:
    """The kernels for a kind of device, such as ``"cpu"``; None where there are none."""
    return _found(device) if kernels_are_on() else None


@cache
def _found(kind: str) -> ModuleType | None:
    module = {"cpu": "on_cpu", "cuda": "on_gpu"}.get(kind)
    if module is None:
        return None
    try:
        return importlib.import_module(f"lightning_plasticity.kernels.{module}")
    except ImportError:  # Numba or Triton is not there, or not for this version of Python or NumPy
        return None
