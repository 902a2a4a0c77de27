"""The study on permuted MNIST, with few images: its loop is the Trainer's, and it goes on where it stopped."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

SCRIPT = Path(__file__).parents[2] / "examples/benchmarks/permuted_mnist.py"


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("permuted_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Online(LightningModule):
    def __init__(self, study, network, arm):
        super().__init__()
        self.net = network
        self.study, self.arm = study, arm

    @override
    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    @override
    def configure_optimizers(self):
        return self.study.make_optimizer(self.net, self.arm)


@pytest.mark.parametrize(
    "name", ["L2", "ContinualBackprop", "ActivationReset relu", "SoftWeightRescaling", "L2Init", "LayerNorm, L2"]
)
def test_the_loop_gives_the_trainer_s_weights_bit_for_bit(study, tmp_path, name):
    arm, activations = study.ARMS[name], study.NETWORKS["relu"]
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(400, 784, generator=generator), torch.randint(10, (400,), generator=generator)
    looped, method = study.start(activations, arm, seed=0)
    optimizer = study.make_optimizer(looped, arm)
    if method is not None:
        method.attach(looped, optimizer, example_inputs=(images[:1],))
    initial = [p.detach().clone() for p in looped.parameters()]
    study.learn(looped, optimizer, method, images, labels)
    trained, callback = study.start(activations, arm, seed=0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Online(study, trained, arm), DataLoader(TensorDataset(images, labels)))
    for start, a, b in zip(initial, looped.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)
    if name == "ContinualBackprop":
        assert callback.replaced == method.replaced > 0


def run(study, folder, *arguments):
    study.main(["--data-dir", str(folder), "--results", str(folder / "results"), "--network", "relu", *arguments])
    return (folder / "results.csv").read_text().splitlines()


def test_a_second_call_runs_what_is_missing_and_the_table_holds_what_the_rows_say(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TASK", 60)
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (60, 28, 28), dtype=np.uint8), generator.integers(0, 10, 60)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels)
    arms = ["--arm", "plain", "ActivationReset auto", "ReDo", "--tasks", "6"]
    rows = run(study, tmp_path, *arms, "--seed", "0")
    assert len(rows) == 1 + 2 * 6  # with a ReLU network `auto` is left out
    assert (tmp_path / "results_relu.png").exists()
    assert (tmp_path / "results_covariance.png").exists()
    (tmp_path / "results.csv").write_text("\n".join(rows[:-2]) + "\n")  # ReDo was interrupted in task 5
    again = run(study, tmp_path, *arms, "--seed", "0", "1")
    assert len(again) == 1 + (2 * 6 - 2) + 6 + 2 * 6  # ReDo anew, and both with another seed
    assert run(study, tmp_path, *arms, "--seed", "0", "1") == again
    plain = [row.split(",") for row in again if row.startswith("relu,plain")]
    accuracy = np.array([float(row[4]) for row in plain]).reshape(2, 6) * 100
    line = next(line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| plain"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "2"
    assert cells[4] == f"{accuracy.mean():.2f} ± {accuracy.mean(1).std(ddof=1):.2f}"
