"""How well a network can still learn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.functional.trainability import Measure, check_probe, trainability
from lightning_plasticity.metrics.base import MeanOverUpdates


class TrainabilityProbe(MeanOverUpdates):
    r"""How a copy of the network fits fresh random targets, as a ratio to a fresh network; the mean over the updates.

    .. math:: \mathrm{steps}(\text{model}) / \mathrm{steps}(\text{fresh}) \quad\text{or}\quad
              \mathrm{loss}(\text{model}) / \mathrm{loss}(\text{fresh})

    Above 1 the network learns worse than a fresh one. Rank and dormancy only hint at that: this measures it. See
    :func:`~lightning_plasticity.functional.trainability` for how it is done. Neither the model nor the random state is
    changed, and every update uses the same targets.

    Args:
        fresh: makes a fresh network. None: a copy of the model on which every module's ``reset_parameters`` was called.
        measure: ``"steps"``, the steps until the loss is at most ``target_loss``, or ``"loss"``, that after ``budget``.
        budget: optimizer steps at most.
        target_loss: loss to reach by ``"steps"``; always answering 0 has an expected loss of 1.
        learning_rate: Adam's.
        seed: of the targets, the fresh network and dropout.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import TrainabilityProbe
        >>> metric = TrainabilityProbe(measure="loss", budget=20)
        >>> metric.update(torch.nn.Linear(4, 2), torch.randn(8, 4))
        >>> bool(metric.compute() > 0)
        True

    Reference:
        C. Lyle, Z. Zheng, E. Nikishin, B. Avila Pires, R. Pascanu, W. Dabney, "Understanding plasticity in neural
        networks", ICML 2023.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(
        self,
        fresh: Callable[[], torch.nn.Module] | None = None,
        measure: Measure = "steps",
        *,
        budget: int = 200,
        target_loss: float = 0.1,
        learning_rate: float = 1e-3,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_probe(fresh, measure, budget, target_loss, learning_rate, seed)
        super().__init__(measure, budget, target_loss, learning_rate, seed, **kwargs)
        # In a dict: a module assigned as an attribute would become a part of the metric, and be trained along.
        self._arguments: dict[str, Any] = {
            "fresh": fresh,
            "measure": measure,
            "budget": budget,
            "target_loss": target_loss,
            "learning_rate": learning_rate,
            "seed": seed,
        }

    def update(self, model: torch.nn.Module, inputs: Tensor) -> None:
        """Measure the model on some inputs."""
        self._record(trainability(model, inputs, **self._arguments))
