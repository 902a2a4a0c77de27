"""Methods that look at examples or at data see those of all ranks: two ranks do what one does with the data of both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from callbacks.streams import mlp
from lightning_plasticity import DirectionAwareShrink, SelfNormalizedReset


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator).double(), torch.randint(3, (count,), generator=generator)


def self_normalized_reset(share: slice) -> SelfNormalizedReset:
    return SelfNormalizedReset(0.3, every_n_train_steps=10, min_silence=2, max_silence=4, seed=0)


def direction_aware_shrink(share: slice) -> DirectionAwareShrink:
    data = [tuple(x[share] for x in examples(8, seed)) for seed in (100, 101, 102)]
    return DirectionAwareShrink(least=0.01, data=data, loss=loss, every_n_train_steps=15)


METHODS: list[Callable[[slice], Any]] = [self_normalized_reset, direction_aware_shrink]


def run(make: Callable[[slice], Any], share: slice, ranks: int) -> dict[str, Any]:
    model = mlp()
    for i in (0, 2) if make is self_normalized_reset else ():
        nn.init.constant_(model[i].bias, -0.7)  # units that rarely fire
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = make(share).attach(model, optimizer, example_inputs=(torch.zeros(1, 6).double(),))
    for step in range(40):
        x, y = examples(8, step)
        optimizer.zero_grad()
        loss(model, (x[share], y[share])).backward()
        for parameter in model.parameters() if ranks > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()
        method.step()
    state = method.state_dict()["method"]
    return {"weights": model.state_dict(), "replaced": getattr(method, "replaced", 0), "sets": state.get("sets", {})}


def on_one(rank: int) -> list[dict[str, Any]]:
    return [run(make, slice(4 * rank, 4 * rank + 4), 2) for make in METHODS]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return on_ranks(2, on_one, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
def test_two_ranks_do_what_one_does_with_the_data_of_both(make, two_ranks) -> None:
    whole = run(make, slice(None), 1)
    of_ranks = [rank[METHODS.index(make)] for rank in two_ranks]
    for name, weight in whole["weights"].items():
        assert torch.equal(of_ranks[0]["weights"][name], of_ranks[1]["weights"][name])
        torch.testing.assert_close(of_ranks[0]["weights"][name], weight, rtol=1e-9, atol=1e-11)
    assert of_ranks[0]["replaced"] == whole["replaced"]
    for name, kept in whole["sets"].items():
        for what in ("silences", "thresholds", "histogram"):
            assert torch.equal(of_ranks[1]["sets"][name][what], kept[what])
    assert whole["replaced"] > 3 or make is direction_aware_shrink
