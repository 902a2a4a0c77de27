"""Methods do the same with kernels and without."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract import test_resume
from contract.cases import CASES
from contract.training import Batches, Network, assert_same, train_plainly, weights
from ranks import on_ranks
from torch import Tensor

from lightning_plasticity.kernels import kernels_on, use_kernels

pytestmark = pytest.mark.skipif(kernels_on("cpu") is None, reason="needs Numba")
# What they do after every step is done by kernels.
WITH_KERNELS = [
    "ContinualBackprop",
    "ActivationReset",
    "ReDo over steps",
    "SelectiveReinit by gradient",
    "SoftWeightRescaling",
    "L2Init",
    "WeightClipping",
]
NAMES = ("column_sums", "average_in", "average_utilities", "contributions", "clamp")
NAMES += ("rescaling_factors", "scale", "pull")
OF_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def on_again():
    yield
    use_kernels(True)


def sgd(parameters) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.05)  # Adam turns the rounding of a gradient of 0 into steps


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that are called."""
    kernels, called = kernels_on("cpu"), []
    for name in NAMES:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, kernel=kernel: called.append(name) or kernel(*args))
    return called


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_same_training(name: str, calls: list[str]) -> None:
    found = train_plainly(OF_NAME[name].make(seed=0), sgd)
    assert calls
    calls.clear()
    use_kernels(False)
    expected = train_plainly(OF_NAME[name].make(seed=0), sgd)
    assert not calls
    for key, weight in weights(expected).items():
        torch.testing.assert_close(
            weights(found)[key], weight, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_resume_without(name: str, tmp_path: Path) -> None:
    use_kernels(False)
    test_resume.test_resume_a_plain_loop(OF_NAME[name], "load, attach", tmp_path)


def train_on_ranks(make, rank: int) -> dict[str, Tensor]:
    """Weights after steps with the mean gradients of all ranks, each of which has batches of its own."""
    model, batches = Network(), [*Batches(rank)] * 3
    optimizer = sgd(model.parameters())
    method = make(seed=0).attach(model, optimizer, example_inputs=(batches[0][0],))
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        method.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def on_one(rank: int) -> dict[bool, dict[str, dict[str, Tensor]]]:
    found = {}
    for are_on in (True, False):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        of_methods = {}
        for name in WITH_KERNELS:
            torch.set_rng_state(state)
            use_kernels(are_on)
            of_methods[name] = train_on_ranks(OF_NAME[name].make, rank)
            assert (kernels_on("cpu") is not None) == are_on
        found[are_on] = of_methods
    return found


def test_two_ranks_with_kernels_and_without(tmp_path: Path) -> None:
    first, second = on_ranks(2, on_one, tmp_path)
    for are_on in (True, False):
        for name in WITH_KERNELS:
            assert_same(first[are_on][name], second[are_on][name])
            torch.testing.assert_close(first[are_on][name], first[True][name], rtol=1e-3, atol=1e-5)
    assert any(
        not torch.equal(weight, first[False][name][key])
        for name in WITH_KERNELS
        for key, weight in first[True][name].items()
    ), "kernels round otherwise in some method, or they were not used"


def on_one_that_may_lack_them(rank: int) -> tuple[bool, dict[str, Tensor]]:
    torch.manual_seed(0)
    use_kernels(rank == 0)
    weights = train_on_ranks(OF_NAME["ContinualBackprop"].make, rank)
    return kernels_on("cpu") is None, weights


def test_where_one_rank_lacks_kernels_none_has_them(tmp_path: Path) -> None:
    (is_off, weights), (_, others) = on_ranks(2, on_one_that_may_lack_them, tmp_path)
    assert is_off
    assert_same(weights, others)
