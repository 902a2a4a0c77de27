"""Kernels for GPUs on tensors of the CPU: run by `test_on_gpu.py` in a process of its own, by Triton's interpreter."""

from unittest.mock import patch

import torch

from lightning_plasticity.editing.edits import Editor
from lightning_plasticity.engine.population import average_in
from lightning_plasticity.kernels import Tensors, choice, on_gpu


def some(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((70, 50), (3,), (1,), (2, 3, 4, 4))]


def check() -> None:
    values, targets, factors = some(0), some(1), torch.tensor([0.3, -2.0, 5.0, 1.0])
    targets[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    averages = [value.clone() for value in values]
    for average, target in zip(averages, targets, strict=True):
        average_in(average, slice(None), target, 0.01)
    scaled = [value * factor for value, factor in zip(values, factors, strict=True)]
    targets[0][0, :3] = 0.0
    drawn = [value - 0.013 * (value - target) for value, target in zip(values, targets, strict=True)]
    clamped = [value.clamp(-0.5, 0.5) for value in values]
    editor = Editor(torch.nn.Module(), (), "keep")
    with patch.object(choice, "_found", lambda kind: on_gpu):
        found = [value.clone() for value in values]
        editor.scale(found, factors)
        torch.testing.assert_close(found, scaled, rtol=0, atol=0)
        found = [value.clone() for value in values]
        editor.draw_towards(found, targets, 0.013)
        torch.testing.assert_close(found, drawn)
        found = [value.clone() for value in values]
        editor.clamp(found, 0.5)
        torch.testing.assert_close(found, clamped, rtol=0, atol=0)
        targets[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        found = [value.clone() for value in values]
        group = Tensors(found, targets)
        assert group.kernels() is on_gpu
        on_gpu.average_in(group, 0.01)
        torch.testing.assert_close(found, averages)
        assert Tensors([torch.ones(2, dtype=torch.float64)]).kernels() is None


if __name__ == "__main__":
    check()
    print("all agree")
