"""Representation learning: a model of several parts that `training_step` calls one by one."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cosine_similarity, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from .harness import Client, Config, Run, fit, instantiate


def vectors() -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(24, 12)), batch_size=8)


class VAE(pl.LightningModule):
    """`forward` is there and not used in training, which calls encoder, heads and decoder one by one."""

    def __init__(self, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.fc_mu = nn.Linear(16, latent)
        self.fc_var = nn.Linear(16, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.decoder(self.sample(self.fc_mu(x), self.fc_var(x))[2])

    def sample(self, mu: Tensor, log_var: Tensor) -> tuple[Normal, Normal, Tensor]:
        std = torch.exp(log_var / 2)
        p = Normal(torch.zeros_like(mu), torch.ones_like(std))
        q = Normal(mu, std)
        return p, q, q.rsample()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        hidden = self.encoder(x)
        p, q, z = self.sample(self.fc_mu(hidden), self.fc_var(hidden))
        x_hat = self.decoder(z)
        loss = mse_loss(x_hat, x) + 0.1 * kl_divergence(q, p).mean()
        self.log_dict({"train_loss": loss})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class SiameseArm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.projector = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.predictor = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.encoder(x)
        z = self.projector(y)
        return y, z, self.predictor(z)


class MovingAverage(pl.Callback):
    """Draws the target network after the online network."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pairs = zip(pl_module.online_network.parameters(), pl_module.target_network.parameters(), strict=True)
        for online, target in pairs:
            target.data = 0.9 * target.data + 0.1 * online.data


class BYOL(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.online_network = SiameseArm()
        self.target_network = copy.deepcopy(self.online_network)
        self.target_network.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.online_network(x)[0]

    def one_way(self, img_1: Tensor, img_2: Tensor) -> Tensor:
        _, _, h1 = self.online_network(img_1)
        with torch.no_grad():
            _, z2, _ = self.target_network(img_2)
        return -2 * cosine_similarity(h1, z2.detach()).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        img_1, img_2 = x + 0.1 * torch.randn_like(x), x.flip(-1)
        loss = self.one_way(img_1, img_2) + self.one_way(img_2, img_1)
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=1e-4)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


class Curriculum(pl.LightningModule):
    """Two tasks, one after the other: the head of the second is first called in the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        return mse_loss(self.heads[min(self.current_epoch, 1)](self(x)), x[:, :3])

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=0.01)


def train_vae(callbacks: list[Config]) -> Run:
    return fit(VAE(), vectors(), instantiate(callbacks))


def train_byol(callbacks: list[Config]) -> Run:
    views = DataLoader(TensorDataset(torch.rand(24, 3, 6, 6)), batch_size=8)
    return fit(BYOL(), views, [MovingAverage(), *instantiate(callbacks)])


def train_curriculum(callbacks: list[Config]) -> Run:
    return fit(Curriculum(), vectors(), instantiate(callbacks), max_epochs=3)


CLIENTS = [
    Client(
        "VAE, parts called one by one",
        train_vae,
        ("encoder", "fc_mu", "fc_var", "decoder"),
        without_units=("fc_mu", "fc_var"),
        leaves={"ParsevalRegularization": ("fc_mu", "fc_var")},  # each is the last layer of what is called
    ),
    Client("Curriculum, a head that joins in epoch 2", train_curriculum, ("body", "heads.0", "heads.1")),
    Client("BYOL, online and target network", train_byol, ("online_network",)),
]
