"""A pass over data where ranks share parameters out: they count batches together, and nothing of it remains."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.shared_out import FSDP_2, NETS, TENSORS_2, batch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_plasticity.engine.training_pass import average_gradients
from lightning_plasticity.shards.tensors import is_shared_out, local, shared_out_as, whole

WAYS = {"FSDP2": FSDP_2, "tensor parallel": TENSORS_2}


def loss_of(model: nn.Module, examples: tuple[Tensor, Tensor] | None) -> Tensor | None:
    return None if examples is None else cross_entropy(model(examples[0]), examples[1])


def batches(kind: str, part: int) -> list[Any]:
    """Three batches, of which those in the middle may count for none."""
    data: list[Any] = [batch(step, part) for step in range(3)]
    if kind == "not finite":
        data[1][0][2, 3] = math.nan
    elif kind == "without loss":
        data[1] = None
    return data


def on_each(rank: int) -> dict[str, Any]:
    got: dict[str, Any] = {}
    for name, way in WAYS.items():
        part = rank // way.tensors
        model = way.share_out(NETS["MLP"])
        parameters = list(model.parameters())
        cross_entropy(model(batch(9, part)[0]), batch(9, part)[1]).backward()
        gradients = [local(p.grad).clone() for p in parameters]
        heard: list[Tensor] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(heard.append)
        for kind in ("plain", "not finite", "without loss"):
            # what is not finite is so on one rank only
            data = batches(kind if kind != "not finite" or rank == 0 else "plain", part)
            averages, count = average_gradients(model, parameters, data, loss_of, 0.3)
            together = [whole(shared_out_as(p, average)) for p, average in zip(parameters, averages, strict=True)]
            got[f"{name}, {kind}"] = together, count
        assert all(torch.equal(local(p.grad), before) for p, before in zip(parameters, gradients, strict=True))
        assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
        assert any(map(is_shared_out, parameters))
        assert not heard
        with pytest.raises(RuntimeError, match="the same number of batches, but after 2 batches some ranks have anoth"):
            average_gradients(model, parameters, [batch(step, part) for step in range(2 + rank)], loss_of, 0.3)
        cross_entropy(model(batch(9, part)[0]), batch(9, part)[1]).backward()
        assert heard  # again
    return got


def test_ranks_count_batches_together_and_nothing_remains(tmp_path: Path) -> None:
    ranks = on_ranks(2, on_each, tmp_path)
    for name, way in WAYS.items():
        for kind in ("plain", "not finite", "without loss"):
            model = NETS["MLP"].seeded()
            parts = [batches(kind, part) for part in range(way.data)]
            data = [None if of_step[0] is None else of_step for of_step in zip(*parts, strict=True)]

            def mean(model: nn.Module, of_step: Any) -> Tensor | None:
                losses = [] if of_step is None else [loss_of(model, examples) for examples in of_step]
                return torch.stack(losses).mean() if losses else None

            wanted, count = average_gradients(model, list(model.parameters()), data, mean, 0.3)
            assert count == (3 if kind == "plain" else 2)
            for rank in ranks:
                got, counted = rank[f"{name}, {kind}"]
                assert counted == count
                for own, of_one in zip(got, wanted, strict=True):
                    torch.testing.assert_close(own, of_one, rtol=1e-9, atol=1e-12)
