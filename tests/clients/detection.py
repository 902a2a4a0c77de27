"""Object detection with torchvision: lists of images go in, and in training a dict of losses comes out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from .harness import Client, Config, Run, fit, instantiate


class Scenes(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.images = torch.rand(8, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        corner = float(i % 4)
        boxes = torch.tensor([[corner, corner, corner + 12, corner + 12], [16.0, 16.0, 28.0, 28.0]])
        return self.images[i], {"boxes": boxes, "labels": torch.tensor([1, 2])}


class Backbone(nn.Sequential):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()
        )


class Detector(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = FasterRCNN(
            Backbone(),
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=1),
            min_size=32,
            max_size=32,
            rpn_pre_nms_top_n_train=50,
            rpn_post_nms_top_n_train=20,
            box_batch_size_per_image=16,
            box_head=nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
            box_predictor=FastRCNNPredictor(16, num_classes=3),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        self.log_dict(losses, batch_size=len(images))
        return sum(losses.values())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train_detector(callbacks: list[Config]) -> Run:
    scenes = DataLoader(Scenes(), batch_size=2, collate_fn=lambda items: tuple(zip(*items, strict=True)))
    return fit(Detector(), scenes, instantiate(callbacks), max_epochs=2)


CLIENTS = [
    Client(
        "Faster R-CNN of torchvision, a dict of losses",
        train_detector,
        ("model.backbone", "model.rpn", "model.roi_heads"),
    )
]
