"""Fine-tuning: parts that are frozen at first, or for ever."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from .harness import Client, Config, Run, fit, instantiate


class Thaw(BaseFinetuning):
    """Trains the head alone at first, and the backbone too from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)


class Transfer(pl.LightningModule):
    """A backbone and a head that `training_step` calls one after the other; there is no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(12, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.01)


def train_thawing(callbacks: list[Config]) -> Run:
    photos = DataLoader(TensorDataset(torch.rand(32, 3, 6, 6), torch.arange(32) % 3), batch_size=4)
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    return fit(Transfer(), photos, [Thaw(), *instantiate(callbacks)], **options)


CLIENTS = [
    Client(
        "Fine-tuning callback that thaws in epoch 2",
        train_thawing,
        ("backbone", "head"),
        without_units=("head",),
        leaves={
            "SelectiveReinit": ("backbone",),  # it acts when fitting starts
            "ParsevalRegularization": ("head",),  # the last layer
        },
    )
]
