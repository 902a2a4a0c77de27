"""How strongly a network's own predictions would move its weights."""

from typing import Any, get_args

import torch
from torch import Tensor

from lightning_plasticity import checks
from lightning_plasticity.functional.churn import Outputs
from lightning_plasticity.functional.redundancy import local_redundancy
from lightning_plasticity.metrics.base import MeanOverUpdates


class LocalRedundancy(MeanOverUpdates):
    r"""Mean squared norm of the gradient of each example's loss, with a target drawn from the model's own prediction.

    :math:`\frac{1}{n} \sum_i \|\nabla_\theta \ell(f(x_i), \tilde y_i)\|^2`, the trace of the Fisher information; the
    mean over the updates. Inputs are enough. It went with later learning only weakly in its authors' experiments, so
    read it with care. The model runs in evaluation mode and is left as it was.

    Args:
        outputs: ``"classes"``: targets are drawn from the softmax; ``"values"``: normal noise is added to the outputs.
        noise: standard deviation of that noise.
        chunk_size: examples that are differentiated at once; fewer need less memory. None: all.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import LocalRedundancy
        >>> metric = LocalRedundancy()
        >>> metric.update(torch.nn.Linear(2, 3), torch.randn(8, 2))
        >>> bool(metric.compute() > 0)
        True

    Reference:
        Cheng, ICML 2026; arXiv 2607.13432.
    """

    plot_lower_bound: float | None = 0.0

    def __init__(
        self, outputs: Outputs = "classes", noise: float = 1.0, chunk_size: int | None = 16, **kwargs: Any
    ) -> None:
        super().__init__(outputs, noise, **kwargs)
        self.outputs: Outputs = checks.choice("outputs", outputs, get_args(Outputs))
        self.noise = checks.number("noise", noise, above=0)
        self.chunk_size = checks.optional(checks.count, "chunk_size", chunk_size, least=1)

    def update(self, model: torch.nn.Module, inputs: Tensor) -> None:
        """Measure the model on some inputs."""
        self._record(local_redundancy(model, inputs, self.outputs, self.noise, self.chunk_size))
