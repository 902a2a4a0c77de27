"""NaN and infinity decide nothing and are never written: a training that would have survived survives with a method."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.multiprocessing as mp
from contract.cases import CASES, Case
from contract.training import Batches, LightningNetwork, Network, adam, assert_same, fit, seeded, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_plasticity import ContinualBackprop, ReDo
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.examining import is_examining

every_method = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
every_poison = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
LEFT_ALONE = "ignore:.* leaves .* alone where .* not finite:UserWarning"
pytestmark = pytest.mark.filterwarnings(LEFT_ALONE)


def without_norm() -> Network:
    """Running statistics of batch norm take NaN in, with or without a method."""
    model = seeded(Network)
    model.net.norm = nn.Identity()
    return model


def train(
    case: Case, spoil: Callable[[int, Tensor, nn.Module], Tensor], skipped: set[int], steps: int = 24, **settings: Any
) -> tuple[nn.Module, PlasticityCallback]:
    """A plain loop that checks its loss, and goes on with the next batch where it is not finite."""
    model, method = without_norm(), case.make(**settings)
    optimizer = adam(model.parameters())
    method.attach(model, optimizer)
    step = 0
    while step < steps:
        for x, y in Batches():
            step += 1
            optimizer.zero_grad()
            loss = cross_entropy(model(spoil(step, x, model)), y)
            if step in skipped:
                assert not loss.isfinite()
                continue
            loss.backward()
            optimizer.step()
            method.step()
    method.detach()
    return model, method


def numbers_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state] if state.is_floating_point() else []
    if isinstance(state, float):
        return [torch.tensor(state)]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [number for part in parts for number in numbers_of(part)]


def assert_healthy(model: nn.Module, method: PlasticityCallback) -> None:
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(number.isfinite().all() for number in numbers_of(method.state_dict()["method"]))


@every_poison
@every_method
def test_a_batch_that_is_skipped(case: Case, poison: float) -> None:
    skipped = {3, 4, 8, 9, 15, 16}

    def spoil(step: int, x: Tensor, _: nn.Module) -> Tensor:
        # Not all examples: where all pre-activations are -inf, a ReLU network answers finitely
        return torch.cat([torch.full_like(x[:1], math.nan), torch.full_like(x[1:], poison)]) if step in skipped else x

    assert_healthy(*train(case, spoil, skipped))


@every_method
def test_activations_that_are_not_finite_in_steps_that_count(case: Case) -> None:
    def spoil(step: int, x: Tensor, model: nn.Module) -> Tensor:
        def overflow(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            handle.remove()
            # the poisoned units are cleaned before the loss, as by a mask: gradients stay finite
            output = output.clone()
            output.data[:, :3] = math.inf
            return output

        def clean(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            cleaner.remove()
            return (args[0].nan_to_num(0.0, 0.0, 0.0),)

        if step % 3 == 0:
            handle = model.net.activation.register_forward_hook(overflow)
            cleaner = model.net.second.register_forward_pre_hook(clean)
        return x

    assert_healthy(*train(case, spoil, set()))


class SkipsWhatIsNotFinite(LightningNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.net.norm = nn.Identity()

    poisoned = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        if batch_idx in (1, 4):
            if self.poisoned:
                self(x * math.nan)
            return None
        return cross_entropy(self(x), y)


class SkipsInSilence(SkipsWhatIsNotFinite):
    poisoned = False


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning")
@every_method
def test_what_a_skipped_batch_of_a_trainer_gave_does_not_count(case: Case) -> None:
    """The course is to the last bit that of a run in which the skipped batches are not even looked at."""
    heard, silent = case.make(), case.make()
    assert_same(weights(fit(heard, module=SkipsWhatIsNotFinite)), weights(fit(silent, module=SkipsInSilence)))
    assert heard.optimizer_steps == silent.optimizer_steps
    assert_same(heard.state_dict(), silent.state_dict())


@every_method
def test_a_loop_that_leaves_a_batch_out_says_so(case: Case) -> None:
    """What was heard of it is forgotten at the call of `step` that no step of the optimizer comes before."""

    def run(looks_at_it: bool) -> Any:
        model, method = seeded(Network), case.make()
        model.net.norm = nn.Identity()
        optimizer = adam(model.parameters())
        method.attach(model, optimizer, (torch.zeros(2, 6),))
        for i, (x, y) in enumerate([*Batches(), *Batches()]):
            optimizer.zero_grad()
            if i % 4 == 1:
                if looks_at_it:
                    cross_entropy(model(3 * x), y).backward()
                    method.step()
                continue
            cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        method.detach()
        return weights(model), method.state_dict()

    assert_same(run(looks_at_it=True), run(looks_at_it=False))


def test_redo_leaves_a_layer_alone_and_says_so_once() -> None:
    model = without_norm()
    optimizer = adam(model.parameters())
    method = ReDo(0.5, 1).attach(model, optimizer, (torch.zeros(1, 6),))
    said: list[str] = []
    for _ in range(3):
        cross_entropy(model(torch.ones(8, 6)), torch.zeros(8, dtype=torch.long)).backward()
        model.net(torch.full((8, 6), math.nan))
        optimizer.step()
        before = weights(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method.step()
        said += [str(one.message) for one in caught]
        assert_same(weights(model), before)
    method.detach()
    assert method.replaced == 0
    assert len(said) == 2, "once for each of two layers"
    assert said[0].startswith("ReDo leaves 'net.first' alone where the activations of its units are not finite.")


@every_method
def test_a_network_that_has_diverged_in_one_layer(case: Case) -> None:
    """What is finite stays finite: one layer that is lost does not take the others with it."""
    model, method = without_norm(), case.make()
    optimizer = adam(model.parameters(), lr=0.0)
    method.attach(model, optimizer, (torch.zeros(1, 6),))
    with torch.no_grad():
        model.net.first.weight[0, 0] = math.nan
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        model.net(torch.randn(8, 6))
        method.step()
    method.detach()
    for name in ("first.bias", "second.weight", "second.bias", "head.weight", "head.bias"):
        assert model.net.get_parameter(name).isfinite().all(), name


@every_method
def test_a_start_from_weights_that_are_not_finite(case: Case) -> None:
    """Refused where the start is what the method goes back to; otherwise harmless to what is finite."""
    model, method = without_norm(), case.make()
    with torch.no_grad():
        model.net.head.weight[0, 0] = math.inf
        model.net.first.weight[0, 0] = math.nan
    optimizer = adam(model.parameters(), lr=0.0)
    try:
        method.attach(model, optimizer, (torch.zeros(1, 6),))
    except ValueError as error:
        assert "finite" in str(error)  # noqa: PT017 (some methods refuse, others do not)
        return
    for _ in range(12):
        model.net(torch.randn(8, 6))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        method.step()
    method.detach()
    for name in ("first.bias", "second.weight", "second.bias", "head.bias"):
        assert model.net.get_parameter(name).isfinite().all(), name


# ---- on one of several ranks


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        found = {}
        for case in CASES:
            model, method = without_norm(), case.make()
            ddp = nn.parallel.DistributedDataParallel(model)
            optimizer = adam(model.parameters())
            method.attach(ddp, optimizer)
            for step in range(24):
                x, y = list(Batches(rank))[step % 6]
                optimizer.zero_grad()
                if step % 4 == 1 and rank == 1:
                    with ddp.no_sync():
                        ddp(x * math.nan)  # one rank looks at a batch that is lost, and leaves it out
                cross_entropy(ddp(x), y).backward()
                optimizer.step()
                method.step()
            found[case.name] = weights(model)
            method.detach()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_rank_that_is_poisoned(tmp_path: Any) -> None:
    mp.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    assert all(tensor.isfinite().all() for found in first.values() for tensor in found.values())


# ---- an exception in the middle of a step


class Interrupted(LightningNetwork):
    at: int | None = None
    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        Interrupted.seen += self.training and not is_examining()
        if self.seen == self.at:
            raise ZeroDivisionError
        return result


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@every_method
def test_the_same_object_resumed_after_an_exception_in_a_forward_pass(case: Case, tmp_path: Any) -> None:
    Interrupted.at, Interrupted.seen = None, 0
    whole = case.make()
    expected = weights(fit(whole, module=Interrupted))
    Interrupted.at, Interrupted.seen = 10, 0
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1)
    method = case.make()
    with pytest.raises(ZeroDivisionError):
        fit(method, checkpoints, module=Interrupted)
    Interrupted.at = None
    (path,) = tmp_path.glob("*.ckpt")
    assert_same(weights(fit(method, checkpoints, module=Interrupted, ckpt_path=path)), expected)
    assert_same(method.state_dict(), whole.state_dict())


def test_ages_and_averages_after_a_skipped_batch() -> None:
    """A batch that is not finite is as if it had not been: with a scaler, the course is that without the batch."""
    courses = []
    for poisoned in (False, True):
        model = without_norm()
        optimizer = adam(model.parameters())
        method = ContinualBackprop(0.1, 2).attach(model, optimizer, (torch.zeros(1, 6),))
        for step, (x, y) in enumerate([*Batches()] * 4):
            if poisoned and step % 5 == 2:
                optimizer.zero_grad()
                cross_entropy(model(x * math.nan), y).backward()
                method.step()  # the scaler has not let the optimizer step
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        assert method.replaced > 0
        method.detach()
        courses.append(weights(model))
    assert_same(*courses)
