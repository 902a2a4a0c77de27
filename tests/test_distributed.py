"""Sums over ranks and equal draws: in one process, and in two that have different random states."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_plasticity.distributed import (
    EqualDraws,
    agree_on_seed,
    all_ranks_have,
    any_rank_has,
    gather_over_ranks,
    largest_over_ranks,
    share_of_this_rank,
    sum_over_ranks,
    world_size,
)
from lightning_plasticity.editing.edits import Editor


@dataclass(frozen=True)
class Record:
    name: str
    sizes: list[int]


# What the first rank has, and what the second.
DIFFERENT = [
    (1, 2),
    ([1], (1,)),
    ([[1], 2], [[1, 2]]),
    ({"a": 1}, {"b": 1}),
    ({"a": 1}, {"a": 2}),
    ({0}, {8}),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(1), torch.zeros(1, dtype=torch.int32)),
    (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])),
    (Record("a", [1]), Record("a", [2])),
]
SAME = [
    *((number, number) for number in range(8)),
    ({0, 8}, {8, 0}),  # which a set gives in the order in which they came
    (frozenset([0, 8]), frozenset([8, 0])),
    (torch.eye(2)[0], torch.eye(2).t()[0]),
    (Record("a", [1]), Record("a", [1])),
]


def tensors_of(rank: int) -> list[Tensor]:
    return [
        torch.tensor([0.1, 0.2]) + rank,
        torch.tensor(3 + rank),
        torch.arange(6, dtype=torch.float64).view(2, 3).t() * (rank + 1),
        torch.empty(0),
        nn.Parameter(torch.tensor([[1e-8], [5.0 + rank]])),
    ]


def everything(rank: int) -> dict[str, Any]:
    """One spawn serves all, because starting a process takes seconds."""
    torch.manual_seed(100 + rank)
    messages: list[torch.dtype] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor) -> None:
        messages.append(tensor.dtype)
        all_reduce(tensor)

    state = torch.get_rng_state()
    given, kept = tensors_of(rank), tensors_of(rank)
    dist.all_reduce = counted  # type: ignore[assignment]
    sums = sum_over_ranks(given)
    dist.all_reduce = all_reduce
    seeds = [
        agree_on_seed(None, "cpu"),
        agree_on_seed(7 + rank, "cpu"),
        agree_on_seed(5 if rank == 0 else None, "cpu"),
        agree_on_seed(2**64 - 1 - rank, "cpu"),
    ]
    draws = EqualDraws(seeds[0])
    first = torch.rand(3, generator=draws.generator("cpu"))
    torch.rand(1 + rank)  # the user's own draws differ
    second = torch.randn(3, generator=draws.generator(torch.device("cpu")))
    torch.set_rng_state(state)
    return {
        "world size": world_size(),
        "sums": sums,
        "inputs kept": all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)),
        "nothing to sum": sum_over_ranks([]),
        "messages": messages,
        "seeds": seeds,
        "draws": [first, second],
        "user": torch.rand(1),
        "told apart": [all_ranks_have(values[rank], "cpu") for values in DIFFERENT],
        "same": [all_ranks_have(values[rank], "cpu") for values in SAME],
        "largest": largest_over_ranks(3 - rank, "cpu"),
        "any": [any_rank_has(flag, "cpu") for flag in (rank == 0, rank == 1, False)],
        "gathered": gather_over_ranks(given),
        "own again": [share_of_this_rank(gathered) for gathered in gather_over_ranks(given)],
        "sharded optimizer": state_after_edit_of_a_sharded_optimizer(),
    }


def state_after_edit_of_a_sharded_optimizer() -> dict[str, Tensor]:
    """ZeroRedundancyOptimizer keeps each parameter's state on one rank: on that one it must be reset."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    optimizer = ZeroRedundancyOptimizer(layer.parameters(), optimizer_class=torch.optim.Adam, lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    Editor(layer, [optimizer]).redraw_rows("", torch.tensor([1]), torch.ones(1, 3))
    names = {parameter: name for name, parameter in layer.named_parameters()}
    return {names[parameter]: state["exp_avg"] for parameter, state in optimizer.optim.state.items()}


def test_two_ranks(tmp_path: Path) -> None:
    ranks = on_ranks(2, everything, tmp_path)
    expected = [a + b for a, b in zip(tensors_of(0), tensors_of(1), strict=True)]
    for result in ranks:
        assert result["world size"] == 2
        assert result["inputs kept"]
        assert result["nothing to sum"] == []
        assert result["messages"] == [torch.float32, torch.int64, torch.float64]
        for total, right in zip(result["sums"], expected, strict=True):
            assert torch.equal(total, right)
            assert total.dtype == right.dtype
        assert result["seeds"] == [100, 7, 5, 2**63 - 1]
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["draws"], ranks[1]["draws"], strict=True))
    for rank, result in enumerate(ranks):
        assert not any(result["told apart"])
        assert all(result["same"])
        assert result["largest"] == 3
        assert result["any"] == [True, True, False]
        both = [torch.stack(pair) for pair in zip(tensors_of(0), tensors_of(1), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(result["gathered"], both, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(result["own again"], tensors_of(rank), strict=True))
        torch.manual_seed(100 + rank)
        assert torch.equal(result["user"], torch.rand(1))
    sharded = {**ranks[0]["sharded optimizer"], **ranks[1]["sharded optimizer"]}
    assert sharded.keys() == {"weight", "bias"}
    for state in sharded.values():
        assert not state[1].any()
        assert state[[0, 2]].all()


def test_one_process() -> None:
    assert world_size() == 1
    state = torch.get_rng_state()
    given = [torch.tensor([1.0, 2.0]), nn.Parameter(torch.tensor(3.0))]
    sums = sum_over_ranks(given)
    assert [total.tolist() for total in sums] == [[1.0, 2.0], 3.0]
    sums[0].add_(1)
    assert given[0].tolist() == [1.0, 2.0]
    assert not sums[1].requires_grad
    assert agree_on_seed(3, "cpu") == 3
    assert agree_on_seed(None, "cpu") == torch.initial_seed() & (2**63 - 1)
    torch.rand(1, generator=EqualDraws(0).generator("cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_share_has_memory_of_its_own() -> None:
    gathered = torch.tensor([[1.0, 2.0]])
    share_of_this_rank(gathered).add_(1)
    assert gathered.tolist() == [[1.0, 2.0]]


def test_different_seeds_draw_differently() -> None:
    draws = [torch.rand(4, generator=EqualDraws(seed).generator("cpu")) for seed in (0, 1)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("drawn_before_loading", [False, True])
def test_draws_continue_from_a_checkpoint(tmp_path: Path, drawn_before_loading: bool) -> None:
    draws = EqualDraws(3)
    torch.rand(5, generator=draws.generator("cpu"))
    torch.save(draws.state_dict(), tmp_path / "state.pt")
    expected = torch.rand(5, generator=draws.generator("cpu"))
    for _ in range(2):  # a checkpoint can be loaded more than once
        resumed = EqualDraws(4)
        if drawn_before_loading:
            torch.rand(1, generator=resumed.generator("cpu"))
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed.load_state_dict(state)
        again = EqualDraws(5)
        again.load_state_dict(resumed.state_dict())  # saved again before anything was drawn
        assert torch.equal(torch.rand(5, generator=resumed.generator("cpu")), expected)
        assert torch.equal(torch.rand(5, generator=again.generator("cpu")), expected)
        assert len(state["states"]["cpu"]) == 1


def test_a_checkpoint_of_another_device_starts_from_the_seed_and_is_not_lost() -> None:
    draws = EqualDraws(3)
    state = draws.generator("cpu").get_state()
    fresh = torch.rand(5, generator=draws.generator("cpu"))
    resumed = EqualDraws(0)
    resumed.load_state_dict({"seed": 3, "states": {"cuda": [state, state]}})
    assert torch.equal(torch.rand(5, generator=resumed.generator("cpu")), fresh)
    assert {kind: len(states) for kind, states in resumed.state_dict()["states"].items()} == {"cpu": 1, "cuda": 2}


def test_a_state_of_no_generator_is_refused_and_leaves_the_draws_as_they_are() -> None:
    draws = EqualDraws(3)
    with pytest.raises(RuntimeError, match="RNG"):
        draws.load_state_dict({"seed": 0, "states": {"cpu": [torch.zeros(3, dtype=torch.uint8)]}})
    assert draws.state_dict() == {"seed": 3, "states": {}}


class NumberedGenerator:
    """Stands in for generators on several accelerators, of which only device and state matter here."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device if ":" in device else f"{device}:0")
        self._state = torch.tensor([-1])

    def manual_seed(self, seed: int) -> None:
        self._state = torch.tensor([seed])

    def get_state(self) -> Tensor:
        return self._state.clone()

    def set_state(self, state: Tensor) -> None:
        self._state = state


def test_another_rank_continues_on_devices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", NumberedGenerator)
    draws = EqualDraws(3)
    assert draws.generator("cuda") is draws.generator("cuda:0")
    assert draws.generator("cuda:0").get_state().tolist() == [3]
    draws.generator("cuda:0").set_state(torch.tensor([10]))
    draws.generator("cuda:1").set_state(torch.tensor([11]))
    resumed = EqualDraws(4)
    resumed.load_state_dict(draws.state_dict())
    continued = [resumed.generator(device).get_state().item() for device in ("cuda:2", "cuda:3", "cuda:4")]
    assert continued == [10, 11, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_device_has_one_generator() -> None:
    draws = EqualDraws(3)
    assert draws.generator("cuda") is draws.generator(f"cuda:{torch.cuda.current_device()}")
    expected = torch.rand(2, device="cuda", generator=draws.generator("cuda"))
    again = EqualDraws(3)
    assert torch.equal(torch.rand(2, device="cuda", generator=again.generator("cuda")), expected)
