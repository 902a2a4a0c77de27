"""Pictures of what was measured show all of it."""

import pytest
import torch

from lightning_plasticity import metrics as M
from lightning_plasticity.monitoring.pictures import picture


def test_curves_go_from_the_first_step_to_the_last() -> None:
    (axes,) = picture("DeadUnits", M.DeadUnits(), [(100, {"": 0.1}), (900, {"": 0.2})]).axes
    assert list(axes.lines[0].get_xdata()) == [100, 900]
    left, right = axes.get_xlim()
    assert 0 < left <= 100 < 900 <= right < 1000


@pytest.mark.parametrize("matrix", [None, torch.eye(3)])
def test_what_has_no_steps_is_shown_as_it_is_drawn(matrix: torch.Tensor | None) -> None:
    metric = M.GradientCovariance() if matrix is not None else M.DeadUnits()
    axes = picture("measured", metric, [(5, {"": 0.5})], matrix).axes[0]
    expected = (-0.5, 2.5) if matrix is not None else (-0.03, 1.03)
    assert axes.get_xlim() == pytest.approx(expected)
