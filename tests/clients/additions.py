"""Programs that put something around the training: checkpointed activations, averaged weights, a compiler."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from .harness import Client, Config, Run, fit, instantiate


def vectors() -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(24, 12), torch.arange(24) % 3), batch_size=8)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class CheckpointedBlocks(nn.Module):
    """Residual blocks whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def train_checkpointed(callbacks: list[Config]) -> Run:
    return fit(Classifier(CheckpointedBlocks()), vectors(), instantiate(callbacks))


def train_with_ema(callbacks: list[Config]) -> Run:
    average = EMAWeightAveraging(decay=0.9, update_starting_at_step=2)
    return fit(Classifier(mlp()), vectors(), [average, *instantiate(callbacks)])


def train_with_swa(callbacks: list[Config]) -> Run:
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    return fit(Classifier(mlp()), vectors(), [average, *instantiate(callbacks)], max_epochs=3)


def train_compiled(callbacks: list[Config]) -> Run:
    torch.compiler.reset()
    return fit(torch.compile(Classifier(mlp()), backend="eager"), vectors(), instantiate(callbacks))


def train_with_compiled_net(callbacks: list[Config]) -> Run:
    torch.compiler.reset()
    return fit(Classifier(torch.compile(mlp(), backend="eager")), vectors(), instantiate(callbacks))


CLIENTS = [
    Client(
        "Gradient checkpointing",
        train_checkpointed,
        ("net.stem", "net.blocks", "net.head"),
        without_units=("net.stem", "net.head"),
        leaves={"ParsevalRegularization": ("net.head",)},  # the last layer
    ),
    Client("EMA of the weights", train_with_ema, ("net",)),
    Client("Stochastic weight averaging", train_with_swa, ("net",)),
    Client("`torch.compile` of the whole module", train_compiled, ("net",)),
    Client("`torch.compile` inside the module", train_with_compiled_net, ("net",)),
]
