"""State of methods in a checkpoint."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lightning_plasticity.engine import state
from lightning_plasticity.engine.state import VERSION, check_state, copied, for_checkpoint


@pytest.mark.parametrize(("own", "given", "fits"), [(1, 4, True), (2, 4, True), (3, 4, False), (4, 4, True)])
def test_what_ranks_hold_may_be_of_another_number_of_ranks(
    own: int, given: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "world_size", lambda: 2)

    def of_ranks(count: int) -> dict[str, object]:
        return {"optimizer_steps": 3, "draws": {}, "method": {"sums": torch.zeros(count, 5)}, "version": VERSION}

    if fits:
        check_state("ReDo", of_ranks(given), of_ranks(own))
    else:
        with pytest.raises(ValueError, match=r"'sums' must be of shape \(3, 5\), got \(4, 5\)"):
            check_state("ReDo", of_ranks(given), of_ranks(own))


@pytest.fixture
def shared_out() -> Iterator[DTensor]:
    """As the only rank of a group has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(torch.arange(3.0), init_device_mesh("cpu", (1,)), [Replicate()])
    dist.destroy_process_group()


def test_the_first_rank_has_whole_copies_in_a_checkpoint_and_others_have_none(
    shared_out: DTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.ones(2)
    given = {"a": [shared_out], "b": plain, "c": 3}
    first = for_checkpoint(given)
    assert type(first["a"][0]) is torch.Tensor
    assert first["a"][0].tolist() == [0, 1, 2]
    assert first["b"] is plain
    assert first["c"] == 3
    first["a"][0].add_(1)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert for_checkpoint(given) == {"a": [None], "b": plain, "c": 3}
    twin = copied(given)
    assert twin["b"] is plain
    twin["a"][0].add_(1)
    assert shared_out.full_tensor().tolist() == [0, 1, 2]
