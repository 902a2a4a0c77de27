"""How far a network's outputs on the same inputs have moved."""

from typing import Any, get_args

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional.churn import Outputs, churn
from lightning_plasticity.functional.gradients import measuring
from lightning_plasticity.metrics.base import MeanOverUpdates, extra_state


class Churn(MeanOverUpdates):
    r"""How far a network's outputs on the same inputs have moved from one update to the next.

    For ``"classes"`` the divergence :math:`\sum_c p_c \log (p_c / q_c)` of the probabilities :math:`q` now from those
    before, given logits along the last dimension; for ``"values"`` the mean squared difference.

    Update before and after an optimizer step, with inputs other than the batch of the step: the published churn is that
    of a single step. The first update of an instance only takes the outputs in: until the second the value is NaN. In
    ``PlasticityMonitor`` it needs a ``probe_batch``, and tells how far outputs have moved since the last measurement.
    The model runs in evaluation mode and is left as it was. Inputs and outputs are kept by ``reset``.

    Args:
        outputs: what the outputs are.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`, except ``dist_sync_on_step``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import Churn
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> metric, x = Churn("values"), torch.ones(3, 1)
        >>> _ = model.weight.data.fill_(1.0)
        >>> metric.update(model, x)
        >>> _ = model.weight.data.fill_(3.0)
        >>> metric.update(model, x)
        >>> metric.compute()
        tensor(4., dtype=torch.float64)

    Reference:
        Tang et al., "Mitigating plasticity loss in continual reinforcement learning by reducing churn", ICML 2025;
        arXiv 2506.00592.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, outputs: Outputs = "classes", **kwargs: Any) -> None:
        if kwargs.get("dist_sync_on_step"):
            raise ValueError(
                "Churn needs dist_sync_on_step=False, got True, where `forward` updates twice and sees no change: "
                "leave it out; `compute` synchronises."
            )
        super().__init__(outputs, **kwargs)
        self.outputs: Outputs = checks.choice("outputs", outputs, get_args(Outputs))
        self._reference: tuple[Tensor, Tensor] | None = None  # inputs and outputs of the last update

    def update(self, model: torch.nn.Module, inputs: Tensor) -> None:
        """Compare the outputs with those of the last update, on the same inputs."""
        checks.module("model", model)
        checks.tensor("inputs", inputs)
        with measuring(model), torch.no_grad():
            now = model(inputs.detach().clone())
        if not isinstance(now, Tensor):
            raise ValueError(f"The model must give a tensor, got {checks.shown(now)}: wrap it in one that does.")
        if self._reference is not None:
            if not torch.equal(self._reference[0].to(inputs.device), inputs):
                raise ValueError(
                    "All updates must have the same inputs, got others than the last time: outputs on others cannot be "
                    "compared. Give the monitor a probe_batch, or pass the same batch."
                )
            self._record(churn(self._reference[1].to(now.device), now, self.outputs))
        self._reference = inputs.detach().clone(), now.detach().clone()

    def get_extra_state(self) -> dict[str, tuple[Tensor, Tensor] | None]:
        """Inputs and outputs of the last update, for ``state_dict``."""
        return {"reference": self._reference}

    def set_extra_state(self, state: dict[str, tuple[Tensor, Tensor] | None]) -> None:
        """Put them back, from ``load_state_dict``."""
        self._reference = extra_state(self, state, "reference")
