"""The files and programs of `docs/configuration.md` work as they stand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import yaml
from contract.training import PytorchLightningNetwork

from lightning_plasticity import ContinualBackprop, L2Init, PlasticityMonitor, SelectiveReinit

from .configured import train_by_file
from .harness import CALLBACKS, QUIET, instantiate

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
FOR_LIGHTNING_CLI, FOR_HYDRA = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
TRAINER_OF_PYTORCH_LIGHTNING, CLI_OF_PYTORCH_LIGHTNING = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
OPTIMIZER = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on tiny runs, SoftWeightRescaling's on networks


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a configuration file."""
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, which comes with the extra `dev`")

    def write(config: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def test_all_callbacks_in_one_file(write: Callable[[dict[str, Any]], Path]) -> None:
    config = yaml.safe_load(FOR_LIGHTNING_CLI)
    named = [callback["class_path"].split(".")[-1] for callback in config["trainer"]["callbacks"]]
    assert set(named) == {*CALLBACKS}
    config["trainer"] |= QUIET | {"limit_val_batches": 0}
    run = train_by_file(write({**config, "optimizer": OPTIMIZER}))
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert {"plasticity/EffectiveRank", "plasticity/DeadUnits"} <= run.logged.keys()
    assert {name.split("/")[1] for name in run.logged if "/" in name} >= {"ContinualBackprop", "SelectiveReinit"}


def test_what_hydra_would_make() -> None:
    made = instantiate(yaml.safe_load(FOR_HYDRA))
    assert isinstance(made["monitor"], PlasticityMonitor)
    assert isinstance(made["reinit"], SelectiveReinit)
    assert (made["reinit"].fraction, made["reinit"].reinit) == (0.1, "mean")


def test_the_trainer_of_pytorch_lightning_takes_callbacks() -> None:
    names: dict[str, Any] = {}
    exec(TRAINER_OF_PYTORCH_LIGHTNING, names)
    [method] = (c for c in names["trainer"].callbacks if isinstance(c, ContinualBackprop))
    assert not isinstance(method, pytorch_lightning.Callback)


def test_the_cli_of_pytorch_lightning(write: Callable[[dict[str, Any]], Path]) -> None:
    names: dict[str, Any] = {}
    exec(CLI_OF_PYTORCH_LIGHTNING, names)
    listed = [
        {"class_path": "lightning_plasticity.L2Init", "init_args": {"coefficient": 0.1}},
        {"class_path": "lightning_plasticity.SelectiveReinit", "init_args": {"case": "25N"}},
    ]
    path = write({"trainer": QUIET | {"logger": False}, "plasticity": listed, "optimizer": OPTIMIZER})
    arguments = {"save_config_callback": None, "seed_everything_default": False}
    cli = names["CLI"](PytorchLightningNetwork, args=["fit", "--config", str(path)], **arguments)
    first, second = cli.trainer.callbacks[:2]
    assert isinstance(first, L2Init)
    assert isinstance(second, SelectiveReinit)
    assert first.optimizer_steps > 0
    assert second.std == 1.0
