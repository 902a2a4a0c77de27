"""State that is as large as the parameters: shared out as they are, whole in a checkpoint, cut by whoever loads it."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contract.shared_out import BOTH, FSDP_2, NETS, TENSORS_2, Way, batch, of_rank_0
from contract.training import assert_same
from lightning_plasticity import HareAndTortoise, L2Init, ShrinkAndPerturb
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import is_shared_out, local, whole

STEPS = 8  # before the checkpoint, and after it
WAYS = {2: [FSDP_2, TENSORS_2], 4: [BOTH]}
METHODS: dict[str, partial[PlasticityCallback]] = {
    "HareAndTortoise": partial(HareAndTortoise, 0.8, every_n_train_steps=5),
    "L2Init": partial(L2Init, 0.5),
    "L2Init, sorted": partial(L2Init, 0.5, match="sorted", every_n_train_steps=2),
    "ShrinkAndPerturb": partial(ShrinkAndPerturb, 0.8, 0.2, init="start", every_n_train_steps=3),
}
HALF = "L2Init in half precision"  # which keeps what rounding takes away


class Run:
    """A plain loop, and a checkpoint of the kind that users write: what rank 0 has, whole."""

    def __init__(self, name: str, model: nn.Module, parts: list[int]) -> None:
        self.model, self.parts = model.bfloat16() if name == HALF else model, parts
        self.dtype = torch.bfloat16 if name == HALF else torch.float64
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.make = METHODS["L2Init" if name == HALF else name]
        self.method = self.make().attach(model, self.optimizer)
        self.step = 0

    def go_on(self) -> dict[str, Tensor]:
        """The weights after so many more steps."""
        for step in range(self.step, self.step + STEPS):
            self.optimizer.zero_grad()
            for part in self.parts:
                x, y = batch(step, part)
                (cross_entropy(self.model(x.to(self.dtype)), y) / len(self.parts)).backward()
            self.optimizer.step()
            self.method.step()
        self.step += STEPS
        return self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p).detach().clone() for name, p in self.model.named_parameters()}

    def checkpoint(self) -> dict[str, Any]:
        return {"weights": self.weights(), "method": self.method.state_dict()}

    def resume(self, checkpoint: dict[str, Any]) -> "Run":
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                local(parameter).copy_(part_of(parameter).take(checkpoint["weights"][name]))
        self.method.load_state_dict(checkpoint["method"])
        self.step = STEPS
        return self


def on_each(rank: int, ways: list[Way], of_one: dict[str, Any]) -> dict[Any, Any]:
    got: dict[Any, Any] = {}
    for way in ways:
        part = [rank // way.tensors]
        for name in [*METHODS, HALF]:
            run = Run(name, way.share_out(NETS["MLP"]), part)
            run.go_on()
            checkpoint = run.checkpoint()
            saved = of_rank_0(copy.deepcopy(checkpoint))
            never_stopped = run.go_on()
            resumed = Run(name, way.share_out(NETS["MLP"]), part).resume(saved).go_on()
            got[str(way), name] = {
                "checkpoint": checkpoint,
                "state": run.method.state_dict(),
                "never stopped": never_stopped,
                "resumed": resumed,
                "again": again(run),
                "logged": {key: float(value) for key, value in run.method._numbers().items()},
            }
            if name in of_one:
                resumed_run = Run(name, way.share_out(NETS["MLP"]), part).resume(of_one[name])
                got[str(way), name]["of one"] = resumed_run.go_on()
            refused = pytest.raises(ValueError, match="must be of rank 0, where it is whole, got that of another rank")
            with nullcontext() if rank == 0 else refused:
                run.method.load_state_dict(checkpoint["method"])
    return got


def again(run: Run) -> bool:
    """Whether a method that was detached, and one that was copied, know what they knew."""
    known = run.method._own_state()
    run.method.detach()
    run.method.attach(run.model, run.optimizer)
    copied = copy.deepcopy(run.method)
    run.method.detach()
    copied.attach(run.model, run.optimizer)
    same = _held(copied._own_state()) == _held(known)
    copied.detach()
    run.method.attach(run.model, run.optimizer)
    return same and _held(run.method._own_state()) == _held(known)


def _held(value: Any) -> Any:
    """State as plain data, of this rank's parts."""
    if isinstance(value, dict):
        return {key: _held(item) for key, item in value.items()}
    return local(value).tolist() if isinstance(value, Tensor) else value


def alone(name: str, way: Way) -> Run:
    return Run(name, NETS["MLP"].seeded(), list(range(way.data)))


@pytest.fixture(scope="module", params=WAYS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    ways = WAYS[request.param]
    of_one = {}
    for name in METHODS:
        run = alone(name, FSDP_2)
        run.go_on()
        of_one[name] = copy.deepcopy(run.checkpoint())
    results = on_ranks(request.param, on_each, tmp_path_factory.mktemp("ranks"), ways, of_one, seconds=600)
    return ways, of_one, results


def test_the_same_ranks_go_on_to_the_last_bit(ranks: Any) -> None:
    ways, _, results = ranks
    for rank in results:
        for way in ways:
            for name in [*METHODS, HALF]:
                got = rank[str(way), name]
                assert_same(got["resumed"], got["never stopped"])
                assert got["again"], (way, name)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() < 1e-9 * tensor.abs().max(), name


def test_one_device_and_others_go_on_from_each_other(ranks: Any) -> None:
    ways, of_one, results = ranks
    for way in ways:
        for name in METHODS:
            first = results[0][str(way), name]
            assert_close(alone(name, way).resume(first["checkpoint"]).go_on(), first["never stopped"])
            wanted = alone(name, way).resume(of_one[name]).go_on()
            for rank in results:
                assert_close(rank[str(way), name]["of one"], wanted)


def test_what_is_logged_is_of_all_parts(ranks: Any) -> None:
    ways, _, results = ranks
    for way in ways:
        for name in METHODS:
            if name == "HareAndTortoise" and way.data > 1:
                continue  # it counts the statistics of batches, and each rank has others
            run = alone(name, way)
            run.go_on()
            run.go_on()
            wanted = {key: float(value) for key, value in run.method._numbers().items()}
            for rank in results:
                assert rank[str(way), name]["logged"] == pytest.approx(wanted, rel=1e-9)


def test_only_rank_0_has_it_whole(ranks: Any) -> None:
    ways, of_one, results = ranks
    for way in ways:
        for name in METHODS if way.data > 1 else ():  # with tensor parallelism alone some parameters are whole
            first, *others = [_largest(rank[str(way), name]["checkpoint"]["method"]) for rank in results]
            assert first == _largest(of_one[name]["method"]), "whole, as of one device"
            assert max(others) <= 12  # entries, of batch norm's statistics


def _largest(value: Any) -> int:
    """The number of entries of the largest tensor of floating-point numbers; a state of random numbers is none."""
    if isinstance(value, dict):
        return max(map(_largest, value.values()), default=0)
    assert not is_shared_out(value)
    return value.numel() if isinstance(value, Tensor) and value.is_floating_point() else 0
