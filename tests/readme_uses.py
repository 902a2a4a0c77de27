"""The uses that the README shows, run one after the other: by the tests, and by `make dist` in a bare environment.

python tests/readme_uses.py README.md
"""

from __future__ import annotations

import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_plasticity


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def loader(*shape: int, size: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(size, *shape), torch.randint(10, (size,))), batch_size=8)


def run(readme: Path, folder: Path, create_model: Callable[..., nn.Module]) -> None:
    """Runs them in a folder; `create_model` stands in for that of timm, which would download weights."""
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    names = {
        "torch": torch,
        "Classifier": Classifier,
        "model": Classifier(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))),
        "data": loader(64, size=128),
        "images": loader(3, 224, 224, size=8),
        "logger": CSVLogger(folder),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.01),
        "x": torch.zeros(1, 64),
    }
    timm = types.ModuleType("timm")
    vars(timm)["create_model"] = create_model
    before = sys.modules.get("timm")
    sys.modules["timm"] = timm
    try:
        with warnings.catch_warnings():
            # Lightning's advice about loader workers and intervals, which do not matter for so few batches
            warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
            for block in blocks:
                assert len(block.strip().splitlines()) < 10
                exec(block, names)
    finally:
        sys.modules.pop("timm") if before is None else sys.modules.update(timm=before)
    assert names["method"].optimizer_steps == 16  # type: ignore[attr-defined]
    [metrics] = folder.rglob("metrics.csv")
    assert "plasticity/DeadUnits" in metrics.read_text()


def small_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, num_classes))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run(Path(sys.argv[1]), Path(folder), small_model)
    print(f"The uses of the README ran with {Path(lightning_plasticity.__file__).parent}.")
