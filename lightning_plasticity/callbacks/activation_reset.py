"""Activation-adapted reset: scale the incoming weights of units with extreme mean activation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from torch import Tensor
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.maturity import whole_and_rest
from lightning_plasticity.engine.unit_callback import UnitCallback
from lightning_plasticity.engine.unit_sets import UnitSet
from lightning_plasticity.functional.activation_reset import RELU, TANH, ActivationStrategy, strategy_for
from lightning_plasticity.functional.continual_backprop import bias_corrected, least
from lightning_plasticity.shards.layers import own_here
from lightning_plasticity.units.find import HiddenUnits

Strategy: TypeAlias = Literal["auto", "relu", "tanh"] | ActivationStrategy


class ActivationReset(UnitCallback):
    r"""Activation-adapted reset: scales the incoming weights and biases of units with extreme mean activation.

    For each unit an exponential average :math:`u` of its signed mean activation is kept, :math:`\hat u = u / (1 -
    \eta^a)` at age :math:`a`. In each step a set of units with :math:`n` units older than ``maturity_threshold`` earns
    :math:`\rho_{low} n` resets at the low end of the ranking by :math:`\hat u`, and then :math:`\rho_{high} n` at the
    high end; fractions are saved up. A reset multiplies a unit's incoming weights and bias by a number, and the unit
    starts again at age 0. Outgoing weights stay.

    Where a normalisation layer follows, it takes back the size of the scale, and leaves only its sign.

    Args:
        strategy: ``"relu"``, ``"tanh"``, an ``ActivationStrategy``, or ``"auto"``: for each layer the one that suits
            the activation function that follows it (that for tanh where it is bounded on both sides). A dict gives
            strategies by name or pattern of names of layers; the others are treated as ``"auto"``.
        decay_rate: :math:`\eta`, of the running averages.
        maturity_threshold: the age in steps up to which a unit is protected.
        max_weight: after every step the weights and biases that make hidden units are clamped to this size; None:
            never. The author clamps before he scales, too.
        module: the name of the module inside the model to work on; None for all of it.
        units: the sets of units, given by hand; None to find them.
        exclude: patterns of names of sets of units to leave alone.
        optimizer_state: what the optimizer remembers of weights that are scaled: ``"survivors"``, ``"reset"``, as
            published, or ``"keep"``, as in ``ContinualBackprop``.
        seed: part of every method; this one draws nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> strategy = ActivationStrategy(low_rate=0.01, high_rate=0.0, low_scale=0.5, high_scale=0.5)
        >>> method = ActivationReset(strategy, maturity_threshold=10)
        >>> method = method.attach(model, optimizer, example_inputs=(torch.zeros(1, 4),))
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     method.step()
        >>> method.scaled_low, method.scaled_high
        (1, 0)

    Reference:
        Purice, thesis at TU Delft, 2025.
    """

    per_unit = ("utility",)

    def __init__(
        self,
        strategy: Strategy | Mapping[str, Strategy] = "auto",
        decay_rate: float = 0.99,
        maturity_threshold: int = 100,
        max_weight: float | None = 10.0,
        *,
        module: str | None = None,
        units: Sequence[HiddenUnits] | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "survivors",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            units=units,
            exclude=exclude,
            maturity_threshold=maturity_threshold,
            reads_sizes=False,
            module=module,
            optimizer_state=optimizer_state,
            seed=seed,
        )
        if isinstance(strategy, Mapping):
            checks.words("strategy", strategy.keys())
        for one in strategy.values() if isinstance(strategy, Mapping) else (strategy,):
            if not isinstance(one, ActivationStrategy):
                checks.choice("strategy", one, ("auto", "relu", "tanh"), other="an ActivationStrategy or ")
        self.strategy = strategy
        self.decay_rate = checks.number("decay_rate", decay_rate, least=0, below=1)
        self.max_weight = checks.optional(checks.number, "max_weight", max_weight, above=0)
        self.scaled_low = 0
        self.scaled_high = 0

    @override
    def _reset(self) -> None:
        self._strategies: list[ActivationStrategy] = []
        self._earned: list[list[float]] = []  # resets of low and of high activations
        self.scaled_low = self.scaled_high = 0

    @override
    def _add_sets(self, sets: Sequence[UnitSet]) -> None:
        self._strategies = self._choose_strategies(self._population.sets)
        self._earned += [[0.0, 0.0] for _ in sets]
        self._clamped: dict[tuple[int, ...], list[Tensor]] = {}

    def _choose_strategies(self, sets: Sequence[UnitSet]) -> list[ActivationStrategy]:
        by_name = self.strategy if isinstance(self.strategy, Mapping) else {"*": self.strategy}
        for pattern in by_name:
            if not any(fnmatchcase(s.name, pattern) for s in sets):
                names = ", ".join(s.name for s in sets)
                raise ValueError(
                    f"strategy= names {pattern!r}, which is no layer with hidden units. They are: {names}."
                )
        strategies = []
        for unit_set in sets:
            named = next((s for pattern, s in by_name.items() if fnmatchcase(unit_set.name, pattern)), "auto")
            if isinstance(named, ActivationStrategy):
                strategies.append(named)
            else:
                automatic = strategy_for(unit_set.units.activation)
                strategies.append({"relu": RELU, "tanh": TANH}.get(named, automatic))
        return strategies

    @override
    def _earn(self, index: int, eligible: int) -> tuple[int, int] | None:
        strategy, earned = self._strategies[index], self._earned[index]
        low = high = 0
        earned[0] += strategy.low_rate * eligible
        if earned[0] >= 1:
            low, earned[0] = self._take(index, earned[0])
        earned[1] += strategy.high_rate * (eligible - low)
        if earned[1] >= 1:
            high, earned[1] = self._take(index, earned[1])
        return (low, high) if low or high else None

    def _take(self, index: int, earned: float) -> tuple[int, float]:
        """How many resets of a set are due, and what it has earned besides."""
        count, rest = whole_and_rest(earned)
        count = min(count, self._maturity.eligible(index))
        self._maturity.replaced(index, count)
        return count, rest

    @override
    def _measure(self, sets: Sequence[int]) -> None:
        population = self._population
        activation = population.mean_over_consumers(population.take_means(sets)[0], sets)
        self._average_in(sets, {"utility": activation}, 1 - self.decay_rate)

    @override
    def _finish(self, sets: Sequence[int]) -> None:
        if self.max_weight is not None:
            self.editor.clamp(self._incoming(sets), self.max_weight)

    @override
    def _act(self, due: Mapping[int, tuple[int, int]]) -> None:
        [utility] = self._means_over_ranks(due)
        values = bias_corrected(utility, self._ages.now(), self.decay_rate)
        for i, (low, high) in due.items():
            unit_set, strategy = self._population.sets[i], self._strategies[i]
            of_set = values[unit_set.span]
            for count, ranking, factor in ((low, of_set, strategy.low_scale), (high, -of_set, strategy.high_scale)):
                if count:
                    units = least(ranking, self._ages.of(i) > self.maturity_threshold, count)
                    for table in unit_set.added_up:
                        self.editor.scale_rows(table.module, table.of_units(units), factor)
                    self._ages.reset(i, units)
                    self._averages["utility"][unit_set.span].index_fill_(0, units, 0.0)
            self.scaled_low += low
            self.scaled_high += high

    def _incoming(self, sets: Sequence[int]) -> list[Tensor]:
        """The weights and biases that make the units of the sets."""
        key = tuple(sets)
        if key not in self._clamped:
            layers = {t.module: t.layer for i in sets for t in self._population.sets[i].producers}
            self._clamped[key] = [tensor for layer in layers.values() for tensor in own_here(layer)]
        return self._clamped[key]

    @override
    def _state_of_set(self, index: int) -> dict[str, Any]:
        return {"earned": list(self._earned[index])}

    @override
    def _restore_set(self, index: int, state: dict[str, Any]) -> None:
        self._earned[index] = list(state["earned"])

    @override
    def _state_of_all(self) -> dict[str, Any]:
        return {"scaled": [self.scaled_low, self.scaled_high]}

    @override
    def _restore_all(self, state: dict[str, Any]) -> None:
        self.scaled_low, self.scaled_high = state["scaled"]

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        utility = bias_corrected(self._averages["utility"], self._ages.now(), self.decay_rate)
        return {
            "scaled_low": self.scaled_low,
            "scaled_high": self.scaled_high,
            "activation_min": utility.min(),
            "activation_mean": utility.mean(),
            "activation_max": utility.max(),
        }
