"""What a layer reads, arranged by units, against a loop; and what a batch is taken for."""

import pytest
import torch
from torch import nn

from lightning_plasticity.monitoring.features import _fits, by_unit, call_with, inputs_and_targets_of, inputs_of


@pytest.mark.parametrize("entries", [[[0, 1], [2, 3]], [[2], [0], [1]], [[3, 1, 5], [0, 4, 2]]])
@pytest.mark.parametrize("places", [(), (3,), (2, 3)], ids=["vectors", "sequences", "images"])
def test_units_are_last_and_each_sample_has_its_positions(entries: list[list[int]], places: tuple[int, ...]) -> None:
    """Channels come first, as for convolutions; without places they are the last dimension, too."""
    batch = torch.randn(4, 6, *places, generator=torch.Generator().manual_seed(0))
    wanted = [
        [[sample[channels[k]] for channels in entries] for sample in each for k in range(len(entries[0]))]
        for each in batch.view(4, 6, -1).movedim(1, -1).tolist()
    ]
    found = by_unit(batch, torch.tensor(entries), -1 - len(places))
    assert (found.unsqueeze(1) if found.ndim == 2 else found).tolist() == wanted
    assert found.ndim == (2 if len(wanted[0]) == 1 else 3)
    for one, its in zip(batch, found, strict=True):  # without a batch it is one sample
        assert torch.equal(by_unit(one, torch.tensor(entries), -1 - len(places)), its.unsqueeze(0))


def test_tokens_are_positions() -> None:
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(by_unit(tokens, torch.tensor([[2], [0], [1]]), -1), tokens[..., [2, 0, 1]])


def test_the_inputs_of_a_batch_are_the_first_of_a_pair() -> None:
    x, y, z = torch.zeros(1), torch.ones(1), torch.ones(2)
    for batch in ((x, y), [x, y]):
        assert inputs_of(batch) is x
        assert inputs_and_targets_of(batch) == (x, y)
    for batch in (x, (x,), (x, y, z), {"a": x, "b": y}):
        assert inputs_of(batch) is batch
        with pytest.raises(ValueError, match=f"batches that are pairs of them, got {type(batch).__name__}. Give such"):
            inputs_and_targets_of(batch)


def test_inputs_become_the_arguments_of_a_call() -> None:
    module, x, y = nn.Identity(), torch.zeros(1), torch.ones(1)
    for batch, args, kwargs in (
        (x, (x,), {}),
        ((x, None), (x,), {}),
        (((x, y), None), (x, y), {}),
        (([x, y], None), (x, y), {}),
        ({"a": x}, (), {"a": x}),
        (({"a": x}, None), (), {"a": x}),
    ):
        call = call_with(module, "net.", batch)
        assert (call.module, call.prefix) == (module, "net.")
        assert (tuple(call.args), dict(call.kwargs)) == (args, kwargs)


def test_a_pattern_fits_a_set_or_the_layer_whose_units_fall_into_several() -> None:
    fitting = [
        pattern for pattern in ("net.0:1", "net.0", "net.*", "net.0:2", "0", "1", "") if _fits("net.0:1", pattern)
    ]
    assert fitting == ["net.0:1", "net.0", "net.*"]
