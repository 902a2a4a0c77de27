"""Trainer and Fabric with `ModelParallelStrategy`, and checkpoints that any number of ranks can go on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from contract.shared_out import batch, perceptron
from contract.training import assert_same
from lightning_plasticity import ContinualBackprop
from lightning_plasticity.shards import whole

STEPS = 8  # in each of two epochs


class Stream(Dataset[tuple[Tensor, Tensor]]):
    """The batches of some parts, step by step."""

    def __init__(self, parts: list[int]) -> None:
        self.items = [batch(step, part) for step in range(STEPS) for part in parts]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.items[place]


class Classifier(LightningModule):
    """The MLP; shared out where there is a mesh of devices."""

    def __init__(self, parts: list[int]) -> None:
        super().__init__()
        self.parts = parts
        torch.manual_seed(0)
        self.net = perceptron().double()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, examples: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(examples[0]), examples[1])

    def validation_step(self, examples: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.net(examples[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-6)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(self.parts), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """After it FSDP2 leaves the outermost parameters whole: before the first step, and between epochs."""
        return DataLoader(Stream(self.parts[:1]), batch_size=None)


class Saves(Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def cbp() -> ContinualBackprop:
    return ContinualBackprop(0.05, 3, seed=1)


def trained(parts: list[int], *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    method = cbp()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[method, *callbacks], **quiet, **options)
    module = Classifier(parts)
    trainer.fit(module, ckpt_path=ckpt_path)
    weights = {name: whole(p).detach() for name, p in module.named_parameters()}
    return {"weights": weights, "state": method.state_dict(), "replaced": method.replaced}


def on_each(rank: int, folder: Path) -> dict[str, Any]:
    def run(*callbacks: Callback, distributed: bool = False, **options: Any) -> dict[str, Any]:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
        )
        return trained([rank], *callbacks, devices=2, strategy=strategy, use_distributed_sampler=False, **options)

    return {
        "full": run(Saves(folder / "full.ckpt")),
        "resumed full": run(ckpt_path=folder / "full.ckpt"),
        "distributed": run(Saves(folder / "distributed"), distributed=True),
        "resumed distributed": run(ckpt_path=folder / "distributed", distributed=True),
        "fabric": fabric_run(rank),
    }


def fabric_run(rank: int) -> dict[str, Any]:
    def share_out(model: nn.Module, mesh: Any) -> nn.Module:
        return fully_shard(model, mesh=mesh["data_parallel"])

    strategy = FabricModelParallelStrategy(share_out, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    inner = perceptron().double()
    model = fabric.setup(inner)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-6))
    method = cbp().attach(model, optimizer)
    for _ in range(2):
        for x, y in Stream([rank]):
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(x), y))
            optimizer.step()
            method.step()
    method.detach()
    return {"weights": {f"net.{name}": whole(p).detach() for name, p in inner.named_parameters()}}


def start(rank: int, folder: Path) -> dict[str, Any]:
    torch.distributed.destroy_process_group()  # Lightning makes its own
    return on_each(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, start, tmp_path_factory.mktemp("ranks"), folder, seconds=900)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() < 1e-9 * tensor.abs().max(), name


def test_a_trainer_and_fabric_share_out_as_a_plain_loop(ranks: list[Any]) -> None:
    alone = trained([0, 1], devices=1, accumulate_grad_batches=2)
    assert alone["replaced"] > 3
    for rank in ranks:
        assert rank["full"]["replaced"] == alone["replaced"]
        for run in ("full", "distributed", "fabric"):
            assert_close(rank[run]["weights"], alone["weights"])


def test_the_same_number_of_ranks_resumes_to_the_last_bit(ranks: list[Any]) -> None:
    for rank in ranks:
        for kind in ("full", "distributed"):
            assert_same(rank[f"resumed {kind}"]["weights"], rank[kind]["weights"])
            assert_same(rank[f"resumed {kind}"]["state"], rank[kind]["state"])
    assert_same(ranks[0]["full"]["state"], ranks[1]["full"]["state"])


def test_one_device_goes_on_from_the_checkpoint_of_two(ranks: list[Any], folder: Path) -> None:
    resumed = trained([0, 1], devices=1, accumulate_grad_batches=2, ckpt_path=folder / "full.ckpt")
    assert resumed["replaced"] == ranks[0]["full"]["replaced"]
    assert_close(resumed["weights"], ranks[0]["full"]["weights"])
