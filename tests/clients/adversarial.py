"""Generative adversarial networks: two networks, two optimizers, taken in turn."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from .harness import OF_A_TRAINING_STEP, Client, Config, Refusal, Run, fit, instantiate

LATENT = 4


def block(inputs: int, outputs: int, normalize: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(inputs, outputs)]
    if normalize:
        layers.append(nn.BatchNorm1d(outputs, 0.8))
    layers.append(nn.LeakyReLU(0.2, inplace=True))
    return layers


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*block(LATENT, 16, normalize=False), *block(16, 16), nn.Linear(16, 36), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        img = self.model(z)
        return img.view(img.size(0), 1, 6, 6)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(36, 16),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(16, 16),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(16, 1),
            nn.Sigmoid(),
        )

    def forward(self, img: Tensor) -> Tensor:
        return self.model(img.view(img.size(0), -1))


def images() -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(24, 1, 6, 6), torch.zeros(24)), batch_size=8)


class GAN(pl.LightningModule):
    """`forward` is the generator; the discriminator is called beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Generator()
        self.discriminator = Discriminator()

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any) -> None:
        imgs, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(imgs.shape[0], LATENT).type_as(imgs)
        valid = torch.ones(imgs.size(0), 1).type_as(imgs)
        fake = torch.zeros(imgs.size(0), 1).type_as(imgs)

        self.toggle_optimizer(optimizer_g)
        self.generated_imgs = self(z)
        g_loss = binary_cross_entropy(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = binary_cross_entropy(self.discriminator(imgs), valid)
        fake_loss = binary_cross_entropy(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self) -> Any:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=0.01, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


def train_gan(callbacks: list[Config]) -> Run:
    return fit(GAN(), images(), instantiate(callbacks))


def train_fabric_gan(callbacks: list[Config]) -> Run:
    """The same networks in a loop of one's own."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.ModuleDict({"generator": Generator(), "discriminator": Discriminator()})
    optimizer_g = torch.optim.Adam(model["generator"].parameters(), lr=0.01)
    optimizer_d = torch.optim.Adam(model["discriminator"].parameters(), lr=0.01)
    generator, optimizer_g = fabric.setup(model["generator"], optimizer_g)
    discriminator, optimizer_d = fabric.setup(model["discriminator"], optimizer_d)
    loader = fabric.setup_dataloaders(images())
    methods = [method.attach(model, [optimizer_g, optimizer_d]) for method in instantiate(callbacks)]
    logged: dict[str, float] = {}

    for _ in range(2):
        for real, _ in loader:
            z = torch.randn(len(real), LATENT, device=fabric.device)
            valid, fake = torch.ones(len(real), 1), torch.zeros(len(real), 1)
            optimizer_g.zero_grad()
            fabric.backward(binary_cross_entropy(discriminator(generator(z)), valid))
            optimizer_g.step()
            for method in methods:
                method.step()
            optimizer_d.zero_grad()
            loss = binary_cross_entropy(discriminator(real), valid)
            loss = loss + binary_cross_entropy(discriminator(generator(z).detach()), fake)
            fabric.backward(loss)
            optimizer_d.step()
            for method in methods:
                logged |= method.step() or {}
    for method in methods:
        method.detach()
    return Run(model, [optimizer_g.optimizer, optimizer_d.optimizer], logged)


PARTS = ("generator", "discriminator")
CLIENTS = [
    Client("GAN, two optimizers by hand", train_gan, PARTS, refused={"DirectionAwareShrink": OF_A_TRAINING_STEP}),
    Client(
        "GAN in a Fabric loop",
        train_fabric_gan,
        PARTS,
        refused={
            "DirectionAwareShrink": Refusal(
                "needs data to pass over and their loss", "Both can be given, but not in a configuration file."
            ),
        },
    ),
]
