"""What the clients have in common: the callbacks with their settings, what a run gives back, and what it wrote."""

from __future__ import annotations

import inspect
import pkgutil
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from contract.training import hooks
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plasticity.editing.edits import Editor

Config = dict[str, Any]

# As configuration files name them, so that each client can take them in its own way. All act within six steps.
CALLBACKS: dict[str, Config] = {
    "ContinualBackprop": {"replacement_rate": 0.1, "maturity_threshold": 1},
    "ActivationReset": {
        "strategy": {
            "_target_": "lightning_plasticity.ActivationStrategy",
            "low_rate": 0.1,
            "high_rate": 0.1,
            "low_scale": -0.5,
            "high_scale": 0.5,
        },
        "maturity_threshold": 1,
    },
    "ReDo": {"threshold": 1.0, "every_n_train_steps": 2},
    "PartialReset": {"strength": 0.5, "every_n_train_steps": 2},
    "SelfNormalizedReset": {"min_silence": 1, "max_silence": 1},
    "SelectiveReinit": {"fraction": 0.2, "reinit": "mean_noise"},
    "SoftWeightRescaling": {"coefficient": 0.1},
    "ShrinkAndPerturb": {"shrink": 0.8, "perturb": 0.2, "every_n_train_steps": 2},
    "L2Init": {"coefficient": 0.1},
    "LayerReset": {"layers": 1, "every_n_train_steps": 2},
    "HareAndTortoise": {"decay": 0.9, "every_n_train_steps": 2},
    "IsometryReinit": {"every_n_train_steps": 2},
    "DirectionAwareShrink": {"every_n_train_steps": 2},
    "OptimizerReset": {"every_n_train_steps": 2},
    "ParsevalRegularization": {"coefficient": 0.1},
    "SpectralRegularization": {"coefficient": 0.1},
    "WeightClipping": {"kappa": 0.1},
    "PlasticityMonitor": {
        "metrics": [
            {"_target_": "lightning_plasticity.metrics.EffectiveRank"},
            {"_target_": "lightning_plasticity.metrics.WeightMagnitude"},
        ],
        "every_n_train_steps": 2,
        "figures": False,
    },
}
MONITOR = "PlasticityMonitor"
OF_UNITS = ("ContinualBackprop", "ActivationReset", "ReDo", "PartialReset", "SelfNormalizedReset")


def configs(*names: str) -> list[Config]:
    return [{"_target_": f"lightning_plasticity.{name}", **CALLBACKS[name]} for name in names]


def instantiate(config: Any, **more: Any) -> Any:
    """Makes what a configuration describes: ``_target_`` names a class, ``_partial_`` asks for a function of it."""
    if isinstance(config, Mapping):
        values = {key: instantiate(value) for key, value in config.items() if key not in ("_target_", "_partial_")}
        if "_target_" not in config:
            return values
        target = pkgutil.resolve_name(config["_target_"])
        return partial(target, **values) if config.get("_partial_") else target(**values, **more)
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [instantiate(value) for value in config]
    return config


@dataclass
class Run:
    """What a client's training ended with."""

    model: nn.Module
    optimizers: Sequence[Optimizer] = ()
    logged: dict[str, float] = field(default_factory=dict)

    @property
    def hooks(self) -> int:
        return hooks(self.model, *self.optimizers)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name.replace("_orig_mod.", ""): value for name, value in self.model.state_dict().items()}


@dataclass(frozen=True)
class Refusal:
    """That a callback cannot work somewhere: what its error says, in part, and why that is right."""

    message: str
    reason: str


OF_A_TRAINING_STEP = Refusal(
    "must return the loss of the batch it is given, but with manual optimization",
    "It makes steps of its own; `loss=` would say what a batch's loss is, but not in a configuration file.",
)


@dataclass(frozen=True, eq=False)
class Client:
    """A program that somebody could have written, and what callbacks are to do in it.

    Attributes:
        name: what kind of program it is.
        train: builds and trains it with these callbacks.
        parts: the parts of the model that are trained. Each method has to write to each of them, and to nothing else.
        without_units: those parts in which no hidden units can be shown.
        leaves: by name of a callback, the parts that it leaves alone, besides.
        refused: by name of a callback, how it refuses to work.
        needs: packages that are not always installed.
    """

    name: str
    train: Callable[[list[Config]], Run]
    parts: tuple[str, ...]
    without_units: tuple[str, ...] = ()
    leaves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def run(self, *names: str) -> Run:
        """Trains with these callbacks, from the same random state each time."""
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Lightning about tiny runs; ours are tested elsewhere
            return self.train(configs(*names))

    def parts_of(self, names: set[str]) -> set[str]:
        """The parts that these parameters belong to; the name itself where there is none."""
        return {next((p for p in self.parts if name.startswith(f"{p}.")), name) for name in names}

    def parts_for(self, callback: str) -> set[str]:
        """The parts that a method has to write to."""
        left = self.without_units if callback in OF_UNITS else ()
        return {*self.parts} - {*left, *self.leaves.get(callback, ())}


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    name = property(lambda self: "memory")
    version = property(lambda self: 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logged.update(metrics)


QUIET: Config = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 2,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def fit(module: Any, data: Any, callbacks: Sequence[Any], **options: Any) -> Run:
    """Trains a LightningModule, quietly, with a logger that is read afterwards."""
    logger = Memory()
    trainer = pl.Trainer(callbacks=list(callbacks), logger=logger, **{**QUIET, **options})
    trainer.fit(module, data)
    return Run(getattr(module, "_orig_mod", module), trainer.optimizers, logger.logged)


@contextmanager
def watched_edits() -> Iterator[set[str]]:
    """The names of the parameters that methods change meanwhile, whoever else changes them between."""
    changed: set[str] = set()
    original = {name: edit for name, edit in inspect.getmembers(Editor, inspect.isfunction) if name[0] != "_"}
    own = {name for name in original if name in vars(Editor)}

    def watch(method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Editor, *args: Any, **kwargs: Any) -> Any:
            before = {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}
            result = method(self, *args, **kwargs)
            after = dict(self._model.named_parameters())
            changed.update(n.replace("_orig_mod.", "") for n in before if not torch.equal(before[n], after[n]))
            return result

        return watched

    try:
        for name, method in original.items():
            setattr(Editor, name, watch(method))
        yield changed
    finally:
        for name, method in original.items():
            if name in own:
                setattr(Editor, name, method)
            else:  # of its base
                delattr(Editor, name)
