"""What the weights of a model have become. Each update measures the model as it is; the value is their mean.

``update`` takes a module or named tensors. Of a module, "weights" are the parameters with two dimensions or more,
"parameters" are all; named tensors are used as they are.
"""

from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_plasticity import checks
from lightning_plasticity.functional import weights
from lightning_plasticity.functional.weights import Source
from lightning_plasticity.metrics.base import MeanOverUpdates, ReferencedMetric, copied, extra_state
from lightning_plasticity.metrics.plotting import Plotted


class WeightMagnitude(MeanOverUpdates):
    """Mean absolute value of the weights, over all entries of all layers.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import WeightMagnitude
        >>> metric = WeightMagnitude()
        >>> metric.update({"weight": torch.tensor([[1.0, -3.0]])})
        >>> metric.compute()
        tensor(2., dtype=torch.float64)

    Reference:
        S. Dohare et al., "Loss of plasticity in deep continual learning", Nature 632, 2024.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, model: Source) -> None:
        """Measure a module or named tensors."""
        self._record(weights.weight_magnitude(model))


class WeightNorm(MeanOverUpdates):
    """Frobenius norm of all weights together; ``per_layer`` gives that of each, and ``plot`` draws these.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import WeightNorm
        >>> metric = WeightNorm()
        >>> metric.update({"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([12.0])})
        >>> metric.compute()
        tensor(13., dtype=torch.float64)
        >>> metric.per_layer()
        {'first': tensor(5., dtype=torch.float64), 'second': tensor(12., dtype=torch.float64)}
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._layers: list[str] = []

    def update(self, model: Source) -> None:
        """Measure a module or named tensors."""
        norms = weights.weight_norms(model)
        if self._layers and self._layers != list(norms):
            raise ValueError(
                f"All updates must measure the same weights, {', '.join(self._layers)}, got {', '.join(norms)}: "
                "use one metric for each model."
            )
        self._layers = list(norms)
        self._record(weights.joint_norm(norms.values()), *norms.values())

    def per_layer(self) -> dict[str, Tensor]:
        """Norm of each weight by its name, the mean over updates and ranks; empty before the first update."""
        return self.synchronized(lambda: dict(zip(self._layers, self._means()[1:], strict=False)))

    def get_extra_state(self) -> dict[str, list[str]]:
        """The names of the weights, for ``state_dict``."""
        return {"layers": self._layers}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """Put back the names, from ``load_state_dict``."""
        self._layers = list(checks.words("the names of the weights", extra_state(self, state, "layers")))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take in what another metric has measured of the same weights."""
        names = incoming_state._layers if isinstance(incoming_state, WeightNorm) else self._layers
        if self._layers and names and self._layers != names:
            raise ValueError(
                f"Both metrics must measure the same weights, {', '.join(self._layers)}, got {', '.join(names)}: use "
                "one metric for each model."
            )
        super().merge_state(incoming_state)
        self._layers = list(self._layers or names)

    def _plotted(self) -> Plotted:
        norms = self.per_layer()
        if not norms:
            raise ValueError("WeightNorm draws the norm of each weight, got none yet: update it with a model first.")
        return norms


class DistanceFromInit(ReferencedMetric):
    r"""Euclidean distance of all parameters from those at the first update.

    .. math:: \|\theta - \theta_0\|, \qquad \text{relative: } \|\theta - \theta_0\| / \|\theta_0\|

    Update once when training starts; that value is 0. The parameters of that moment are kept by ``reset`` and in
    ``state_dict``, on the model's device.

    Args:
        relative: divide by the norm of the initial parameters; if that is 0, infinity (or NaN, where nothing moved).
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import DistanceFromInit
        >>> metric = DistanceFromInit()
        >>> metric.update({"w": torch.tensor([0.0, 2.0])})
        >>> metric.reset()
        >>> metric.update({"w": torch.tensor([3.0, 6.0])})
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    plot_lower_bound: float | None = 0.0

    def __init__(self, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.relative = checks.flag("relative", relative)

    def update(self, model: Source) -> None:
        """Measure a module or named tensors; the first update is the reference."""
        parameters = weights.named_parameters(model)
        self._place_reference(parameters)
        if self._reference is None:
            self._reference = copied(parameters)
        distance = weights.distance_from_init(parameters, self._reference)
        self._record(distance, distance / weights.weight_norm(self._reference).to(distance.device))

    def compute(self) -> Tensor:
        """Mean over the updates since the last reset; NaN without any."""
        return self._means()[-1 if self.relative else 0]


class UpdateRatio(ReferencedMetric):
    r"""Size of the last step relative to the parameters before it; a step is from one update to the next.

    .. math:: \|\theta_{t+1} - \theta_t\| / \|\theta_t\|

    Update before and after an optimizer step, or after each. The first update of an instance only takes the parameters
    in: until the second the value is NaN.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`, except ``dist_sync_on_step``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import UpdateRatio
        >>> metric = UpdateRatio()
        >>> metric.update({"w": torch.tensor([3.0, 4.0])})
        >>> metric.update({"w": torch.tensor([3.0, 4.5])})
        >>> metric.compute()
        tensor(0.1000, dtype=torch.float64)
    """

    plot_lower_bound: float | None = 0.0

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("dist_sync_on_step"):
            raise ValueError(
                "UpdateRatio needs dist_sync_on_step=False, got True, where `forward` updates twice and sees no step: "
                "leave it out; `compute` synchronises."
            )
        super().__init__(**kwargs)

    def update(self, model: Source) -> None:
        """Measure the step of a module or of named tensors since the last update."""
        parameters = weights.named_parameters(model)
        self._place_reference(parameters)
        if self._reference is not None:
            self._record(weights.update_ratio(parameters, self._reference))
        self._reference = copied(parameters)


class IsometryDeviation(MeanOverUpdates):
    r"""Deviation of the weights from isometry, the mean over weights and updates.

    .. math:: \|W^\top W - I\|_F^2

    with :math:`W W^\top` in place of :math:`W^\top W` where a matrix has fewer rows than columns. Kernels are flattened
    to one row for each output.

    Args:
        any_scale: divide each matrix by the root mean square of its singular values first, so that a multiple of an
            isometry counts as one.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import IsometryDeviation
        >>> metric = IsometryDeviation()
        >>> metric.update({"w": torch.diag(torch.tensor([1.0, 2.0]))})
        >>> metric.compute()
        tensor(9., dtype=torch.float64)

    Reference:
        Han et al., ICLR 2026; arXiv 2602.08040.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, any_scale: bool = False, **kwargs: Any) -> None:
        super().__init__(any_scale, **kwargs)
        self.any_scale = checks.flag("any_scale", any_scale)

    def update(self, model: Source) -> None:
        """Measure a module or named tensors."""
        self._record(weights.isometry_deviation(model, self.any_scale))


class Balancedness(ReferencedMetric):
    r"""Largest change of the ratio of two layers' norms since the first update.

    .. math:: \max_{i \ne j} \Bigl| \frac{\|W_i\|}{\|W_j\|} - \frac{\|W_i^0\|}{\|W_j^0\|} \Bigr|

    Both orders of each pair count. The norms of the first update are kept by ``reset`` and in ``state_dict``.

    Args:
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.metrics import Balancedness
        >>> metric = Balancedness()
        >>> metric.update({"first": torch.tensor([1.0]), "second": torch.tensor([1.0])})
        >>> metric.reset()
        >>> metric.update({"first": torch.tensor([1.0]), "second": torch.tensor([2.0])})
        >>> metric.compute()
        tensor(1., dtype=torch.float64)

    Reference:
        S. Oh, S. Park, S. Han, S. Kim, "Soft weight rescaling", arXiv 2507.04683, 2025, definition 2.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def update(self, model: Source) -> None:
        """Measure a module or named tensors; the first update is the reference."""
        norms = weights.weight_norms(model)
        if self._reference is None:
            self._reference = norms
        self._record(weights.balancedness(norms, self._reference))
