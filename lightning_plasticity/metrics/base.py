"""What the metrics share: state that meets on several ranks, plots, and the three ways of being fed."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from zlib import crc32

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_plasticity import checks
from lightning_plasticity.functional.activity import Reduce, check_layout, unit_rows
from lightning_plasticity.functional.weights import check_same_tensors, named_parameters
from lightning_plasticity.metrics.plotting import Plotted, draw
from lightning_plasticity.shards.parts import held_of
from lightning_plasticity.shards.tensors import shared_out_as

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Value = TypeVar("Value")


def gather_padded(state: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a state of sums from all ranks, with zeros where a rank has seen no data or fewer tasks than another."""
    return padded(gather_all_tensors(state, group))


def padded(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors with zeros behind, where another one is larger."""
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    wholes = []
    for part in parts:
        whole = part.new_zeros(shape)
        whole[tuple(slice(size) for size in part.shape)] = part
        wholes.append(whole)
    return wholes


def agreed_size(sizes: Tensor) -> Tensor:
    """The number of units that all parts of the data have, where 0 stands for no data yet."""
    known = sorted({int(size) for size in sizes if size > 0})
    if len(known) > 1:
        raise ValueError(
            "All features given to one metric must have the same number of units, "
            f"got {' and '.join(map(str, known))}: use one metric for each layer, or check `unit_dim`."
        )
    return sizes.max()


class PlasticityMetric(Metric):
    """Base of all measures of plasticity.

    Without data the value is NaN. States are replaced rather than written to, so that float64 sums stay float64 also
    after a cast of the module that owns the metric.

    Args:
        settings: what changes how data are accumulated. A state remembers them, so that no ``MetricCollection`` joins
            metrics whose other states are equal after the first batch by chance.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.
    """

    is_differentiable: bool | None = False
    full_state_update: bool | None = False
    settings: Tensor
    plot_x_label: ClassVar[str] = "step"

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        # Sums start as a single zero and take their size from the first data.
        kwargs.setdefault("dist_sync_fn", gather_padded)
        super().__init__(**kwargs)
        # 16 bits: the tolerance with which collections compare states tells whole numbers below 1e5 apart.
        self.add_state("settings", torch.tensor(crc32(repr(settings).encode()) % 2**16), dist_reduce_fx="max")

    @property
    def _nan(self) -> Tensor:
        return torch.tensor(float("nan"), dtype=torch.float64, device=self.device)

    def synchronized(self, value: Callable[[], Value]) -> Value:
        """Evaluate a function of the states of all ranks, as ``compute`` is; every rank must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return value()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take in what another metric of this kind has counted, as if this one had.

        Args:
            incoming_state: the other metric, or a dict of its states.
        """
        if isinstance(incoming_state, Metric):
            if type(incoming_state) is not type(self):
                raise ValueError(
                    f"A {type(self).__name__} takes in the state of another, got {checks.shown(incoming_state)}."
                )
            states = {name: getattr(incoming_state, name) for name in self._defaults}
        else:
            states = incoming_state
        if not isinstance(states, dict) or not self._defaults.keys() <= states.keys():
            raise ValueError(
                f"A metric or a dict with its states {', '.join(self._defaults)} is required, got "
                f"{checks.shown(states)}. Give the metric itself."
            )
        if int(states["settings"]) != int(self.settings):
            raise ValueError(
                f"Both metrics must have the same settings, got {type(self).__name__} with others. Make them alike."
            )
        merged = {name: self._merged(name, getattr(self, name), states[name]) for name in self._defaults}
        for name, state in merged.items():
            setattr(self, name, state)
        self._computed = None
        self._update_count += 1

    def _merged(self, name: str, own: Tensor | list[Tensor], other: Tensor | list[Tensor]) -> Any:
        if isinstance(self._defaults[name], list):
            return [part for parts in (own, other) for part in ([parts] if isinstance(parts, Tensor) else parts)]
        reduce: Callable[[Tensor], Tensor] = self._reductions[name]  # type: ignore[assignment]
        return reduce(torch.stack(padded([own, checks.tensor(name, other).to(self.device)])))  # type: ignore[list-item]

    def _plotted(self) -> Plotted:
        """What ``plot`` draws if it is given no values."""
        value: Plotted = self.compute()
        return value

    def plot(self, val: Plotted | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw values of the metric.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of such values in the order of time: one value is
                drawn as a bar, several as a curve, values by name as bars or curves, a matrix as a heat map.
                None: the present value.
            ax: where to draw; None makes a new figure.

        Returns:
            The figure and the axes.
        """
        return draw(
            self._plotted() if val is None else val,
            ax,
            name=type(self).__name__,
            x_label=self.plot_x_label,
            low=self.plot_lower_bound,
            high=self.plot_upper_bound,
        )


class UnitMetric(PlasticityMetric):
    """Base of the measures of a layer's features: ``update(features)``, one instance for each layer.

    Args:
        settings: see :class:`PlasticityMetric`.
        unit_dim: the dimension of the features that counts the units: 1 for convolutions, -1 for tokens; not needed for
            a matrix.
        reduce: ``None`` counts positions and tokens as samples, ``"mean"`` averages them first.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.
    """

    samples: Tensor
    num_units: Tensor

    def __init__(self, *settings: object, unit_dim: int | None = None, reduce: Reduce = None, **kwargs: Any) -> None:
        check_layout(unit_dim, reduce)
        super().__init__(unit_dim, reduce, *settings, **kwargs)
        self.unit_dim = unit_dim
        self.reduce: Reduce = reduce
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_units", torch.tensor(0), dist_reduce_fx=agreed_size)

    def update(self, features: Tensor) -> None:
        """Take in the features of some samples."""
        rows = unit_rows(features, self.unit_dim, self.reduce)
        self.num_units = agreed_size(torch.stack([self.num_units, torch.full_like(self.num_units, rows.shape[1])]))
        self.samples = self.samples + len(rows)
        self._accumulate(rows)

    def compute(self) -> Tensor:
        """Value over all samples since the last reset; NaN without samples."""
        return self._value() if self.samples > 0 else self._nan

    @abstractmethod
    def _accumulate(self, rows: Tensor) -> None:
        """Add a matrix, samples by units, to the states."""

    @abstractmethod
    def _value(self) -> Tensor:
        """Value of the states."""


class MeanOverUpdates(PlasticityMetric):
    """Base of the measures of a model at one moment: ``update(model)`` measures, ``compute`` averages the updates.

    Args:
        settings: see :class:`PlasticityMetric`.
        kwargs: keyword arguments of :class:`~torchmetrics.Metric`.
    """

    totals: Tensor
    updates: Tensor

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        super().__init__(type(self).__name__, *settings, **kwargs)
        self.add_state("totals", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("updates", torch.tensor(0), dist_reduce_fx="sum")

    def _record(self, *values: Tensor) -> None:
        self.totals = self.totals + torch.stack(values).double()
        self.updates = self.updates + 1

    def _means(self) -> Tensor:
        return self.totals / self.updates

    def compute(self) -> Tensor:
        """Mean over the updates since the last reset; NaN without any."""
        return self._means()[0]


class ReferencedMetric(MeanOverUpdates):
    """Base of the measures that compare a model with an earlier moment of itself.

    The reference is kept when the metric is reset, is on the model's device, and is always part of ``state_dict``,
    because it cannot be measured again. A new instance takes a new reference. Of parameters that are shared out among
    ranks each keeps its part; a state may have them put together.
    """

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        super().__init__(*settings, **kwargs)
        self._reference: dict[str, Tensor] | None = None

    def get_extra_state(self) -> dict[str, dict[str, Tensor] | None]:
        """The reference, for ``state_dict``."""
        return {"reference": self._reference}

    def set_extra_state(self, state: dict[str, dict[str, Tensor] | None]) -> None:
        """Put back the reference, from ``load_state_dict``."""
        reference = extra_state(self, state, "reference")
        self._reference = None if reference is None else named_parameters(reference)

    def _place_reference(self, parameters: Mapping[str, Tensor]) -> None:
        """Shares the reference out as the parameters are, where it was loaded whole."""
        if self._reference is not None:
            check_same_tensors(parameters, self._reference)
            held = {name: held_of(start, parameters[name]) for name, start in self._reference.items()}
            self._reference = {name: shared_out_as(p, held[name].to(p.device)) for name, p in parameters.items()}


def extra_state(metric: PlasticityMetric, state: Any, key: str) -> Any:
    """One part of the extra state of a metric; raises where it is that of another."""
    if not isinstance(state, Mapping) or key not in state:
        raise ValueError(
            f"The state of {type(metric).__name__} must hold {key!r}, got {checks.shown(state)}: load what "
            "state_dict() of such a metric gave."
        )
    return state[key]


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that later changes do not reach."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
