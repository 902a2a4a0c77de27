"""Small networks, and the ways in which torch shares them out among ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


class Residual(nn.Module):
    """A block of a ResNet, between a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.second = nn.Conv2d(10, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 4, 4))
        x = x + self.second(torch.relu(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


class SmallViT(VisionTransformer):
    """A vision transformer of two blocks."""

    def __init__(self) -> None:
        size = {"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
        super().__init__(**size, mlp_ratio=2, num_classes=3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 1, 4, 4))


class TorchTransformer(nn.Module):
    """Torch's own block, whose attention holds three layers in one parameter: cut between its rows, by four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x.view(-1, 4, 4))).mean(1))


class Recurrent(nn.Module):
    """A recurrent network of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 10, num_layers=2, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 4, 4))[0].mean(1))


def perceptron() -> nn.Sequential:
    """Widths that four ranks cannot share evenly."""
    return nn.Sequential(
        nn.Linear(16, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3)
    )


@dataclass(frozen=True)
class Net:
    """How to make a network for examples of 16 numbers, and how its layers are split by tensor parallelism."""

    make: Callable[[], nn.Module]
    plan: Mapping[str, Callable[[], ParallelStyle]]

    def seeded(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()


NETS = {
    "MLP": Net(perceptron, {"3": ColwiseParallel, "5": RowwiseParallel}),
    "ViT": Net(SmallViT, {"blocks.*.mlp.fc1": ColwiseParallel, "blocks.*.mlp.fc2": RowwiseParallel}),
    "ResNet": Net(Residual, {"head": lambda: RowwiseParallel(input_layouts=Replicate())}),
}

# Of modules that hold several layers.
COMBINED = {"transformer": Net(TorchTransformer, {}), "RNN": Net(Recurrent, {})}


@dataclass(frozen=True)
class Way:
    """How many ranks share the batch, how many each of its layers, and whether FSDP2 shards what is left."""

    data: int
    tensors: int
    copies: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.tensors * self.copies

    def __str__(self) -> str:
        return "x".join(str(size) for size in (self.copies, self.data, self.tensors))

    def share_out(self, net: Net) -> nn.Module:
        """The network, on this rank."""
        names = ("copies", "data", "tensors")
        mesh = init_device_mesh("cpu", (self.copies, self.data, self.tensors), mesh_dim_names=names)
        model = net.seeded()
        if self.tensors > 1:
            model = parallelize_module(model, mesh["tensors"], {name: style() for name, style in net.plan.items()})
        if self.data > 1:
            fsdp_mesh = mesh["copies", "data"] if self.copies > 1 else mesh["data"]
            for block in getattr(model, "blocks", ()):
                fully_shard(block, mesh=fsdp_mesh)
            fully_shard(model, mesh=fsdp_mesh)
        return model


FSDP_2, FSDP_4, TENSORS_2, BOTH, HSDP = Way(2, 1), Way(4, 1), Way(1, 2), Way(2, 2), Way(2, 1, copies=2)


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Eight examples, others in each step and for each rank that shares the batch."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    return x + part, torch.randint(3, (8,), generator=generator)


def of_rank_0(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a method that a checkpoint has, on every rank that goes on from it."""
    message = [state]
    if dist.is_initialized():
        dist.broadcast_object_list(message)
    return message[0]
