"""Methods do the same with kernels and without."""

from pathlib import Path

import pytest
import torch
from contract import test_resume
from contract.cases import CASES
from contract.training import train_plainly, weights

from lightning_plasticity.kernels import kernels_on, use_kernels

pytestmark = pytest.mark.skipif(kernels_on("cpu") is None, reason="needs Numba")
# What they do after every step is done by kernels.
WITH_KERNELS = [
    "ContinualBackprop",
    "ActivationReset",
    "ReDo over steps",
    "SoftWeightRescaling",
    "L2Init",
    "WeightClipping",
]
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
    for name in ("column_sums", "average_in", "contributions", "clamp", "rescaling_factors", "scale", "pull"):
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
