"""Trainer and Fabric with `ModelParallelStrategy`, and checkpoints that any number of ranks can go on from."""

import os
from collections.abc import Callable
from functools import partial
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
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from contract.shared_out import NETS, batch, perceptron
from contract.training import assert_same
from lightning_plasticity import ContinualBackprop, HareAndTortoise, L2Init, PlasticityMonitor, ShrinkAndPerturb
from lightning_plasticity.engine import unit_callback
from lightning_plasticity.shards.tensors import whole

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
        self.validated: list[float] = []
        torch.manual_seed(0)
        self.net = perceptron().double()

    def configure_model(self) -> None:
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            styles = {name: style() for name, style in NETS["MLP"].plan.items()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], styles)
        elif self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, examples: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(examples[0]), examples[1])

    def validation_step(self, examples: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(self.net(examples[0]).sum().item())

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


class SavesInValidation(Saves):
    """Saves a checkpoint in the middle of the first epoch's validation."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not then."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def cbp() -> ContinualBackprop:
    return ContinualBackprop(0.05, 3, seed=1)


def trained(parts: list[int], *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    method, monitor = cbp(), PlasticityMonitor(every_n_train_steps=4)
    module = fitted(parts, method, monitor, *callbacks, ckpt_path=ckpt_path, **options)
    state = {"method": method.state_dict(), "monitor": monitor.state_dict()["metrics"]}
    return {"weights": weights_of(module), "state": state, "replaced": method.replaced, "measured": monitor.history}


def trained_by_keepers(parts: list[int], *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """With methods that keep something of every weight; one of them validates with what it keeps."""
    keepers = [
        HareAndTortoise(0.8, every_n_epochs=1),
        L2Init(0.3),
        ShrinkAndPerturb(0.8, 0.2, init="start", every_n_epochs=1),
    ]
    module = fitted(parts, *keepers, *callbacks, val_check_interval=STEPS // 2, **options)
    return {"weights": weights_of(module), "validated": module.validated}


def trained_between_epochs(parts: list[int], **options: Any) -> dict[str, Any]:
    """By a method that acts after validation, when FSDP2 has whole parameters in the place of the model's own."""
    method = ShrinkAndPerturb(0.8, 0.2, every_n_epochs=1, optimizer_state="reset", seed=1)
    return {"weights": weights_of(fitted(parts, method, **options))}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).detach() for name, p in module.named_parameters()}


def fitted(parts: list[int], *callbacks: Callback, ckpt_path: Path | None = None, **options: Any) -> Classifier:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[*callbacks], **quiet, **options)
    module = Classifier(parts)
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def on_ranks_of_a_trainer(
    rank: int, *callbacks: Callback, tensors: int = 1, train: Callable[..., dict[str, Any]] = trained, **options: Any
) -> dict[str, Any]:
    ranks = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(
        data_parallel_size=ranks // tensors,
        tensor_parallel_size=tensors,
        save_distributed_checkpoint=options.pop("distributed", False),
    )
    options |= {"devices": ranks, "strategy": strategy, "use_distributed_sampler": False}
    return train([rank // tensors], *callbacks, **options)


def on_each_of_two(rank: int, folder: Path) -> dict[str, Any]:
    run = partial(on_ranks_of_a_trainer, rank)
    results = {
        "full": run(Saves(folder / "full.ckpt")),
        "resumed full": run(ckpt_path=folder / "full.ckpt"),
        "distributed": run(Saves(folder / "distributed"), distributed=True),
        "resumed distributed": run(ckpt_path=folder / "distributed", distributed=True),
        "tensors": run(tensors=2),
        "fabric": fabric_run(rank),
    }
    results |= {f"keepers, {name}": run_with_keepers for name, run_with_keepers in keepers_on_two(folder).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_callback, "_FEW", 1)  # as if these were more than few ranks
        return results | {
            "means": run(Saves(folder / "means.ckpt")),
            "resumed means": run(ckpt_path=folder / "means.ckpt"),
        }


def keepers_on_two(folder: Path) -> dict[str, Any]:
    """All ranks have the same data, so that batch norm's statistics are those of one device."""
    run, results = partial(on_ranks_of_a_trainer, 0, train=trained_by_keepers), {}
    ways: dict[str, dict[str, Any]] = {"full": {}, "distributed": {"distributed": True}, "tensors": {"tensors": 2}}
    for name, way in ways.items():
        saves = Saves(folder / f"keepers {name}"), SavesInValidation(folder / f"keepers {name}, in validation")
        results[name] = run(*saves, **way)
        results[f"resumed {name}"] = run(ckpt_path=folder / f"keepers {name}", **way)
    return results | {"none": on_ranks_of_a_trainer(0, train=trained_between_epochs)}


def on_each_of_four(rank: int, folder: Path) -> dict[str, Any]:
    run = partial(on_ranks_of_a_trainer, rank)
    return {"resumed from two": run(ckpt_path=folder / "full.ckpt"), "four": run(Saves(folder / "four.ckpt"))}


def from_four_to_two(rank: int, folder: Path) -> dict[str, Any]:
    return on_ranks_of_a_trainer(rank, ckpt_path=folder / "four.ckpt")


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


def start(rank: int, function: Callable[[int, Path], Any], folder: Path) -> Any:
    torch.distributed.destroy_process_group()  # Lightning makes its own
    return function(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, start, tmp_path_factory.mktemp("ranks"), on_each_of_two, folder, seconds=900)


@pytest.fixture(scope="module")
def four_ranks(ranks: list[Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(4, start, tmp_path_factory.mktemp("ranks"), on_each_of_four, folder, seconds=900)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() < 1e-9 * tensor.abs().max(), name


def assert_measured_alike(got: Any, wanted: Any) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert [step for step, _ in got[name]] == [step for step, _ in wanted[name]] != []
        for (_, values), (_, others) in zip(got[name], wanted[name], strict=True):
            assert values == pytest.approx(others, rel=1e-9, abs=1e-12), name


def alone(parts: list[int], **options: Any) -> dict[str, Any]:
    return trained(parts, devices=1, accumulate_grad_batches=len(parts), **options)


def assert_same_course(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["replaced"] == wanted["replaced"] > 3
    assert_close(got["weights"], wanted["weights"])
    assert_measured_alike(got["measured"], wanted["measured"])


def test_a_trainer_and_fabric_share_out_as_a_plain_loop(ranks: list[Any]) -> None:
    of_both, of_one = alone([0, 1]), alone([0])
    for rank in ranks:
        assert_same_course(rank["full"], of_both)
        assert_same_course(rank["distributed"], of_both)
        assert_same_course(rank["tensors"], of_one)
        assert_close(rank["fabric"]["weights"], of_both["weights"])


def test_the_same_number_of_ranks_resumes_to_the_last_bit(ranks: list[Any]) -> None:
    for rank in ranks:
        for kind in ("full", "distributed"):
            for what in ("weights", "state", "measured"):
                assert_same(rank[f"resumed {kind}"][what], rank[kind][what])
    assert_same(ranks[0]["full"]["state"]["method"], ranks[1]["full"]["state"]["method"])


def test_with_many_ranks_a_checkpoint_holds_the_means_alone(ranks: list[Any], folder: Path) -> None:
    few, many = (torch.load(folder / f"{name}.ckpt", weights_only=False) for name in ("full", "means"))
    shapes = [shapes_in(checkpoint["callbacks"][cbp().state_key]) for checkpoint in (few, many)]
    assert len(shapes[0]) == len(shapes[1])
    assert sum(a == (2, *b[1:]) and b[0] == 1 for a, b in zip(*shapes, strict=True)) > 1
    assert all(a == b or a == (2, *b[1:]) for a, b in zip(*shapes, strict=True))
    for rank in ranks:
        assert_same_course(rank["means"], rank["full"])
        assert_same_course(rank["resumed means"], rank["full"])


def saved_weights(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        dcp_to_torch_save(path, path / "full.ckpt")
        path = path / "full.ckpt"
    weights: dict[str, Tensor] = torch.load(path, weights_only=False)["state_dict"]
    return weights


def test_what_is_kept_of_every_weight_is_shared_out_and_saved(ranks: list[Any], folder: Path) -> None:
    of_one = trained_by_keepers([0], devices=1)
    for rank in ranks:
        for name in ("full", "distributed", "tensors"):
            got, resumed = rank[f"keepers, {name}"], rank[f"keepers, resumed {name}"]
            assert_close(got["weights"], of_one["weights"])
            assert got["validated"] == pytest.approx(of_one["validated"], rel=1e-9)
            assert_same(resumed["weights"], got["weights"])
            assert resumed["validated"][-STEPS:] == got["validated"][-STEPS:]
        assert_close(rank["keepers, none"]["weights"], trained_between_epochs([0], devices=1)["weights"])
    resumed = trained_by_keepers([0], devices=1, ckpt_path=folder / "keepers full")
    assert_close(resumed["weights"], of_one["weights"])
    for name in ("full", "distributed", "tensors"):  # in validation the model has the slow weights
        path = folder / f"keepers {name}"
        assert_same(saved_weights(Path(f"{path}, in validation")), saved_weights(path))


def shapes_in(state: Any) -> list[tuple[int, ...]]:
    if isinstance(state, dict):
        return [shape for value in state.values() for shape in shapes_in(value)]
    if isinstance(state, (list, tuple)):
        return [shape for value in state for shape in shapes_in(value)]
    return [tuple(state.shape)] if isinstance(state, Tensor) else []


def test_one_device_goes_on_from_the_checkpoint_of_two(ranks: list[Any], folder: Path) -> None:
    assert_same_course(alone([0, 1], ckpt_path=folder / "full.ckpt"), ranks[0]["full"])


def test_another_number_of_ranks_goes_on(four_ranks: list[Any], folder: Path, tmp_path: Path) -> None:
    """The second epoch from the checkpoint of two ranks on four, and the other way round, is that of one device."""
    from_two = alone([0, 1, 2, 3], ckpt_path=folder / "full.ckpt")
    for rank in four_ranks:
        assert_same_course(rank["resumed from two"], from_two)
    from_four = alone([0, 1], ckpt_path=folder / "four.ckpt")
    for got in on_ranks(2, start, tmp_path, from_four_to_two, folder, seconds=600):
        assert_same_course(got, from_four)
