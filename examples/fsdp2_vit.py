"""Fine-tunes a vision transformer that is shared out among devices by FSDP2, with Continual Backprop.

    python examples/fsdp2_vit.py --devices 2 --accelerator cpu --steps 20

Beside a Trainer for one device there are two changes: `strategy=` and `configure_model`. The method is the same object.
"""

import argparse

import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import ContinualBackprop


class FineTuned(LightningModule):
    """Any vision transformer of timm."""

    def __init__(self, name: str, pretrained: bool, classes: int, image_size: int) -> None:
        super().__init__()
        self.network = timm.create_model(name, pretrained=pretrained, num_classes=classes, img_size=image_size)

    def configure_model(self) -> None:
        """Shares out each block by itself, so that one at a time is put together."""
        for part in (*self.network.blocks, self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """As on one device."""
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As on one device."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main(arguments: list[str] | None = None) -> tuple[FineTuned, ContinualBackprop]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="its name in timm")
    parser.add_argument("--pretrained", action="store_true", help="with the weights that timm downloads")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    options = parser.parse_args(arguments)

    size = options.image_size
    images, labels = torch.randn(64, 3, size, size), torch.randint(10, (64,))  # to be replaced by your own
    data = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    method = ContinualBackprop(replacement_rate=1e-4)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1),
        max_steps=options.steps,
        callbacks=[method],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = FineTuned(options.model, options.pretrained, classes=10, image_size=size)
    trainer.fit(model, data)
    return model, method


if __name__ == "__main__":
    main()
