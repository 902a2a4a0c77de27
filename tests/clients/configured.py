"""Programs that are put together by configuration files: in the way of Hydra, and by LightningCLI."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy

from .harness import QUIET, Client, Config, Memory, Run, instantiate


class DenseNet(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1))


class Digits(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def loader(self) -> DataLoader:
        digits = torch.rand(24, 1, 3, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(digits, torch.arange(24) % 3), batch_size=self.batch_size)

    train_dataloader = val_dataloader = loader


class Classifier(pl.LightningModule):
    """Takes network, optimizer and scheduler; calls `self.forward`, so that its own hooks hear nothing."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=3)
        self.train_loss = MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def model_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), logits.argmax(dim=1), y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_acc_best((preds == targets).float().mean())
        self.log("val/loss", loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


EXPERIMENT = """
data:
  _target_: clients.configured.Digits
  batch_size: 8
model:
  _target_: clients.configured.Classifier
  net: {_target_: clients.configured.DenseNet, inputs: 12, hidden: 16, classes: 3}
  optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.01, weight_decay: 0.0}
  scheduler: {_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, _partial_: true, factor: 0.1, patience: 10}
trainer:
  _target_: lightning.pytorch.Trainer
"""


def train_by_hydra(callbacks: list[Config]) -> Run:
    config = yaml.safe_load(EXPERIMENT)
    config["callbacks"] = {f"callback_{i}": callback for i, callback in enumerate(callbacks)}
    config["trainer"] |= QUIET
    datamodule, model = instantiate(config["data"]), instantiate(config["model"])
    logger = Memory()
    objects = [instantiate(callback) for callback in config["callbacks"].values()]
    trainer = instantiate(config["trainer"], callbacks=objects, logger=logger)
    trainer.fit(model=model, datamodule=datamodule)
    return Run(model, trainer.optimizers, logger.logged)


class SmallClassifier(pl.LightningModule):
    """What LightningCLI makes: the optimizer is chosen in the file."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.net = DenseNet(12, hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss


def class_paths(config: Any) -> Any:
    """The same configuration as LightningCLI writes it: `class_path` and `init_args` instead of `_target_`."""
    if isinstance(config, dict):
        values = {key: class_paths(value) for key, value in config.items() if key != "_target_"}
        return {"class_path": config["_target_"], "init_args": values} if "_target_" in config else values
    return [class_paths(value) for value in config] if isinstance(config, list) else config


def train_by_file(path: Path) -> Run:
    cli = LightningCLI(
        SmallClassifier,
        Digits,
        args=["fit", "--config", str(path)],
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"logger": {"class_path": "clients.harness.Memory"}},
    )
    return Run(cli.model, cli.trainer.optimizers, cli.trainer.logger.logged)


def train_by_cli(callbacks: list[Config]) -> Run:
    config = {
        "model": {"hidden": 16},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        "trainer": {**QUIET, "limit_val_batches": 0, "callbacks": class_paths(callbacks)},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return train_by_file(path)


CLIENTS = [
    Client("Configuration in the way of Hydra", train_by_hydra, ("net",)),
    Client("LightningCLI, callbacks in the YAML file", train_by_cli, ("net",), needs=("jsonargparse",)),
]
