"""What methods cost where a network is shared out: messages, bytes, memory; and nobody waits for the dead."""

import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from contract.shared_out import FSDP_2, NETS, batch
from lightning_plasticity import (
    ActivationReset,
    ContinualBackprop,
    HareAndTortoise,
    L2Init,
    PartialReset,
    ReDo,
    SelectiveReinit,
    SoftWeightRescaling,
    SpectralRegularization,
)
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.kernels import use_kernels
from lightning_plasticity.units.find import find_units

METHODS: dict[str, Callable[[Any], PlasticityCallback]] = {
    "ContinualBackprop": lambda units: ContinualBackprop(1e-9, units=units),
    "ContinualBackprop, replacing": lambda units: ContinualBackprop(0.003, 1, units=units),
    "ActivationReset": lambda units: ActivationReset(units=units),
    "ReDo": lambda units: ReDo(units=units),
    "PartialReset": lambda units: PartialReset(units=units),
    "SoftWeightRescaling": lambda units: SoftWeightRescaling(),
    "SpectralRegularization": lambda units: SpectralRegularization(),
    "L2Init": lambda units: L2Init(),
    "HareAndTortoise": lambda units: HareAndTortoise(every_n_train_steps=1),
    "SelectiveReinit, acting": lambda units: SelectiveReinit(0.1, every_n_train_steps=3),
}
# In an ordinary step: how many messages, and of what size in bytes.
ORDINARY: dict[str, tuple[int, Callable[[Any], int]]] = {
    "ContinualBackprop": (1, lambda method: 4 * method._population.columns),
    "ActivationReset": (0, lambda method: 0),
    "ReDo": (0, lambda method: 0),
    "PartialReset": (1, lambda method: 4 * method._population.columns),
    "SoftWeightRescaling": (1, lambda method: 8 * len(method._weights)),
    "L2Init": (0, lambda method: 0),
    "HareAndTortoise": (0, lambda method: 0),
    # Two vectors for each matrix, and a number for each bias and norm.
    "SpectralRegularization": (2, lambda method: 4 * (_rows_and_columns(method) + len(method._targets))),
}


def _rows_and_columns(method: Any) -> int:
    return sum(len(weight) + weight.numel() // len(weight) for weight in method._left)


_OF_FSDP = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single")


class Traffic:
    """How many messages and bytes FSDP2 and a method hand over, which sends with `all_reduce` only."""

    def __init__(self) -> None:
        self.fsdp, self.method = [0, 0], [0, 0]
        for name in _OF_FSDP:
            if hasattr(dist, name):
                self._count(name, self.fsdp)
        self._count("all_reduce", self.method)

    def _count(self, name: str, sums: list[int]) -> None:
        original = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            sums[0] += 1
            # of a gathering the output, of a scattering the input: the larger one
            sums[1] += max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def vit_tiny() -> nn.Module:
    """On small images, so that a step is quick; its layers have their full size."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def traffic(rank: int) -> dict[str, Any]:
    """Of the third step of each method."""
    counted, sent = Traffic(), {}
    units = find_units(vit_tiny(), torch.zeros(1, 3, 32, 32))
    for name, make in METHODS.items():
        model = vit_tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        method = make(units).attach(model, optimizer)
        for _ in range(3):
            counted.fsdp[:], counted.method[:] = [0, 0], [0, 0]
            before = getattr(method, "replaced", 0)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 32, 32)).square().mean().backward()
            optimizer.step()
            method.step()
        replaced = getattr(method, "replaced", 0) - before
        sent[name] = {"fsdp": [*counted.fsdp], "method": [*counted.method], "replaced": replaced}
        if name in ORDINARY:
            messages, size = ORDINARY[name]
            sent[name]["expected"] = [messages, size(method)]
    return sent


def test_a_step_adds_one_small_message_or_none(tmp_path: Path) -> None:
    for sent in on_ranks(2, traffic, tmp_path, seconds=1200):
        for name in ORDINARY:
            of_method, of_fsdp = sent[name]["method"], sent[name]["fsdp"]
            assert of_method == sent[name]["expected"], name
            assert of_method[1] < 0.01 * of_fsdp[1]
            assert of_fsdp[1] > 3 * 5_000_000 * 4  # parameters are gathered twice, and gradients scattered
        replacing = sent["ContinualBackprop, replacing"]
        assert replacing["replaced"] > 20
        assert replacing["method"][1] < 0.01 * replacing["fsdp"][1]
        # Of each tensor whether all is finite, what is equal in four digits, and the mean; of all together the counts.
        messages, size = sent["SelectiveReinit, acting"]["method"]
        assert messages == 50 * 6 + 1
        assert size < 0.01 * replacing["fsdp"][1]


def peak(rank: int, make: Callable[[], PlasticityCallback] | None) -> float:
    """By how much the process grew in a run in which parameters and what belongs to them are most of it."""
    torch.manual_seed(0)
    use_kernels(False)  # Numba alone takes more than all of this network
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2048, 2048), nn.ReLU()) for _ in range(8)], nn.Linear(2048, 2))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters())
    method = None if make is None else make().attach(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 2048)).square().mean().backward()
        optimizer.step()
        if method is not None:
            method.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_a_rank_needs_hardly_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The C library takes every tensor from the system and gives it back, and keeps no pieces: else the peak is chance.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    results = {}
    for name, make in {"none": None, "method": partial(ContinualBackprop, 1e-3, 1)}.items():
        (tmp_path / name).mkdir()
        results[name] = on_ranks(2, peak, tmp_path / name, make)
    assert max(results["method"]) < 1.05 * max(results["none"]), results


def left_alone(rank: int, result: str) -> str:
    """What a rank sees after the other one has ended without a word in the middle of training."""
    model = FSDP_2.share_out(NETS["MLP"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ContinualBackprop(0.02, 1).attach(model, optimizer)
    began = time.monotonic()
    try:
        for step in range(1000):
            x, y = batch(step, rank)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            if rank == 1 and step == 5:
                torch.save("ended", result)
                os._exit(0)
            method.step()
    except RuntimeError as error:
        return f"{time.monotonic() - began < 100} {error}"
    return "went on"


def test_the_others_end_with_an_error_when_a_rank_dies(tmp_path: Path) -> None:
    survivor = on_ranks(2, left_alone, tmp_path, str(tmp_path / "1.result"))[0]
    assert survivor.startswith("True")
    assert "Connection" in survivor
