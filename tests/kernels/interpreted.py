"""Kernels for GPUs on tensors of the CPU: run by `test_on_gpu.py` in a process of its own, by Triton's interpreter."""

from unittest.mock import patch

import torch

from lightning_plasticity import ContinualBackprop
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


class ReadTwice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.again = torch.nn.Linear(5, 70), torch.nn.Linear(70, 6)
        self.first, self.second = torch.nn.Linear(70, 6), torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.make(x).relu()
        return self.second((self.first(hidden) + self.again(hidden)).relu())


def check_contributions() -> None:
    convolutional = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 3, groups=2), torch.nn.ReLU()),
        *(torch.nn.ConvTranspose2d(8, 4, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 25, 40)),
        *(torch.nn.ReLU(), torch.nn.Linear(40, 3)),
    )

    def of(found: object, network: torch.nn.Module, *shape: int) -> list[torch.Tensor]:
        with patch.object(choice, "_found", lambda kind: found):
            method = ContinualBackprop(seed=0).attach(network, example_inputs=(torch.zeros(1, *shape),))
            population = method._population
            sizes = torch.rand(population.columns, generator=torch.Generator().manual_seed(0))
            every = range(len(population.sets))
            assert population._read_weights is not None
            assert population._read_weights.kernels() is found
            with torch.no_grad():
                return [population.contribution(every, sizes).clone(), population.contribution(every).clone()]

    twice = ReadTwice()
    torch.testing.assert_close(of(on_gpu, convolutional, 3, 8, 8), of(None, convolutional, 3, 8, 8))
    torch.testing.assert_close(of(on_gpu, twice, 5), of(None, twice, 5))


if __name__ == "__main__":
    check()
    check_contributions()
    print("all agree")
