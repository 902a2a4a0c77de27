"""What holds for all tests: one thread, repeatable property tests, and a reason for everything that is skipped."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the ranks that tests start inherit it

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The tensors here are too small to gain from threads, and a sum in a fixed order is the same bit for bit.
torch.set_num_threads(1)

# No deadline: how long one example takes on a busy machine says nothing. In CI always the same examples.
settings.register_profile("plasticity", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("plasticity")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


def pytest_runtest_setup() -> None:
    # Code that `torch.compile` has built may flush the smallest numbers to 0 from when it is loaded, in the whole
    # process, and then hypothesis refuses to draw them.
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def plasticity_data() -> Path:
    """The folder with data sets and weights that PLASTICITY_DATA names; without it the test is skipped."""
    name = os.environ.get("PLASTICITY_DATA")
    if not name:
        pytest.skip("needs real data: set PLASTICITY_DATA to a folder that holds it")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"PLASTICITY_DATA is {name!r}, which is not a folder: correct it, or unset it to skip these tests")
    return folder
