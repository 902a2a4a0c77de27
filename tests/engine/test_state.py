"""State of methods in a checkpoint."""

import pytest
import torch

from lightning_plasticity.engine import state
from lightning_plasticity.engine.state import VERSION, check_state


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
