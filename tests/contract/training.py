"""The small training runs of the contract tests: one network, one stream of data, a loop of each kind."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from contract.cases import CASES, Case
from lightning_plasticity.engine.base import PlasticityCallback

BATCHES, EPOCHS = 6, 3
SCENARIOS: set[str] = set()
adam = partial(torch.optim.Adam, lr=0.03)


def every_case(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test for each method, except where the method's case says why it makes no sense."""
    SCENARIOS.add(test.__name__)

    def parameter(case: Case) -> Any:
        reason = case.leaves_out.get(test.__name__)
        return pytest.param(case, id=case.name, marks=[pytest.mark.skip(reason=reason)] if reason else [])

    return pytest.mark.parametrize("case", [parameter(case) for case in CASES])(test)


def with_rate_zero(case: Case) -> PlasticityCallback:
    if isinstance(case.rate_zero, str):
        pytest.skip(case.rate_zero)
    return case.rate_zero()


def layers() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(6, 12),
            norm=nn.BatchNorm1d(12),
            activation=nn.ReLU(),
            second=nn.Linear(12, 12),
            gate=nn.ReLU(),
            head=nn.Linear(12, 3),
        )
    )


class Network(nn.Module):
    """The network, with the same names inside as the LightningModules below."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Batches:
    """Six batches, the last one ragged, different on each rank; a Trainer goes on in the middle of it."""

    def __init__(self, rank: int = 0) -> None:
        generator = torch.Generator().manual_seed(1 + rank)
        x = torch.randn(8 * BATCHES - 4, 6, generator=generator) + rank
        y = torch.randint(3, (len(x),), generator=generator)
        self._batches = list(zip(x.split(8), y.split(8), strict=True))
        self._next = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for position in range(self._next, BATCHES):
            self._next = (position + 1) % BATCHES
            yield self._batches[position]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


class Training:
    """What makes a LightningModule of the network."""

    make_optimizer: Callable[..., Optimizer] = staticmethod(adam)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0] + 5.0)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank)

    def val_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank)


class LightningNetwork(Training, Network, lightning.pytorch.LightningModule):
    pass


class PytorchLightningNetwork(Training, Network, pytorch_lightning.LightningModule):
    pass


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


def trainer(*callbacks: Any, package: Any = lightning.pytorch, **options: Any) -> Any:
    """A quiet Trainer on the CPU, without validation."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(*callbacks: Any, module: Any = LightningNetwork, ckpt_path: Any = None, **options: Any) -> Any:
    """Trains a new module (or a given one) with these callbacks and returns it."""
    if not isinstance(module, nn.Module):
        module = seeded(module)
    trainer(*callbacks, **options).fit(module, ckpt_path=ckpt_path)
    return module


def train_plainly(
    method: PlasticityCallback | None,
    make_optimizer: Callable[..., Optimizer] = adam,
    epochs: int = EPOCHS,
    accumulate: int = 1,
) -> Network:
    """Does in a plain loop what the Trainer does."""
    model = seeded(Network)
    optimizer = make_optimizer(model.parameters())
    if method:
        method.attach(model, optimizer)
    for _ in range(epochs):
        for i, (x, y) in enumerate(Batches()):

            def closure(x: Tensor = x, y: Tensor = y, first: bool = i % accumulate == 0) -> Tensor:
                if first:
                    optimizer.zero_grad()
                loss = cross_entropy(model(x), y) / accumulate
                loss.backward()
                return loss

            if (i + 1) % accumulate and i + 1 < BATCHES:
                closure()
                continue
            optimizer.step(closure)
            if method:
                method.step()
    if method:
        method.detach()
    return model


def train_with_fabric(method: PlasticityCallback) -> nn.Module:
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = seeded(Network)
    model, optimizer = fabric.setup(inner, adam(inner.parameters()))
    method.attach(model, optimizer)
    for _ in range(EPOCHS):
        for x, y in Batches():
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(x), y))
            optimizer.step()
            method.step()
    method.detach()
    return inner


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by their names in the network that was not compiled."""
    return {name.replace("_orig_mod.", ""): tensor.detach().clone() for name, tensor in model.state_dict().items()}


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two nested structures are not equal to the last bit; None if there is none."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        return None if same else f"{where}: {a} and {b}"
    pairs: Iterable[tuple[Any, Any, Any]]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return f"{where}: {set(a) ^ set(b)} is in one of them"
        pairs = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} items"
        pairs = [(i, *items) for i, items in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else f"{where}: {a!r} and {b!r}"
    return next(filter(None, (difference(x, y, f"{where}.{key}") for key, x, y in pairs)), None)


def assert_same(a: Any, b: Any) -> None:
    found = difference(a, b)
    assert found is None, found


def assert_acted(model: nn.Module, without: nn.Module) -> None:
    """The method has changed the course of training, and nothing broke."""
    assert difference(weights(model), weights(without)) is not None
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def hooks(model: nn.Module, *optimizers: Optimizer) -> int:
    """How many hooks there are on a model and on optimizers."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    of_tensors = sum(len(p._backward_hooks or ()) for p in model.parameters())
    of_optimizers = sum(
        len(getattr(optimizer, kind))
        for optimizer in optimizers
        for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    )
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds) + of_tensors + of_optimizers
