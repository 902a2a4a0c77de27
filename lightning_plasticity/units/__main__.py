"""Prints the hidden units of a model of timm or torchvision: ``python -m lightning_plasticity.units resnet50``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_plasticity.units.find import find_units


def _named_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model of timm or torchvision by its name, untrained, and the shape of its input."""
    try:
        import timm

        if timm.is_model(name):
            model = timm.create_model(name, pretrained=False)
            config: Any = model.pretrained_cfg
            return model, (1, *config["input_size"])
    except ImportError:
        pass
    try:
        import torchvision

        if name in torchvision.models.list_models(module=torchvision.models):
            size = 299 if name == "inception_v3" else 224
            return torchvision.models.get_model(name, weights=None), (1, 3, size, size)
    except ImportError:
        pass
    raise SystemExit(
        f"A model name of timm or torchvision is required, got {name!r}. Install both with "
        "`pip install lightning-plasticity[vision]`; `timm.list_models()` lists timm's names."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table for a model of timm or torchvision."""
    parser = argparse.ArgumentParser(prog="python -m lightning_plasticity.units", description=main.__doc__)
    parser.add_argument("model", help="a timm or torchvision model name, for instance resnet50")
    parser.add_argument("--size", type=int, help="height and width of the input image (default: the model's own)")
    options = parser.parse_args(arguments)
    model, shape = _named_model(options.model)
    if options.size:
        shape = (*shape[:2], options.size, options.size)
    find_units(model, torch.zeros(shape).normal_(), explain=True)


if __name__ == "__main__":
    main()
