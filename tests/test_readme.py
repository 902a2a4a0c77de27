"""The README's Python blocks run, one after the other, and its numbers are those of the results files."""

import re
import warnings
from functools import partial
from pathlib import Path

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

README = (Path(__file__).parents[1] / "README.md").read_text()


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    @override
    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    @override
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def loader(*shape, size):
    return DataLoader(TensorDataset(torch.rand(size, *shape), torch.randint(10, (size,))), batch_size=8)


def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    without_download = partial(timm.create_model)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: without_download(name, **options | OFFLINE))
    network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    names = {
        "torch": torch,
        "Classifier": Classifier,
        "model": Classifier(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))),
        "data": loader(64, size=128),
        "images": loader(3, 224, 224, size=8),
        "logger": CSVLogger(tmp_path),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.01),
        "x": torch.zeros(1, 64),
    }
    with warnings.catch_warnings():
        # Lightning's advice about loader workers and intervals, which do not matter for so few batches
        warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
        for block in blocks:
            assert len(block.strip().splitlines()) < 10
            exec(block, names)
    assert names["method"].optimizer_steps == 16
    [metrics] = tmp_path.rglob("metrics.csv")
    assert "plasticity/DeadUnits" in metrics.read_text()


OFFLINE = {"pretrained": False}
