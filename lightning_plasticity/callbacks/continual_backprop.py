"""Continual Backprop: replace a few of the least useful mature units, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, check_init
from lightning_plasticity.engine.maturity import whole_and_rest
from lightning_plasticity.engine.unit_callback import UnitCallback
from lightning_plasticity.engine.unit_sets import UnitSet, weights_of_producers
from lightning_plasticity.functional.continual_backprop import UTILITIES, Utility, bias_corrected, per_incoming, ranked
from lightning_plasticity.units.find import HiddenUnits


class ContinualBackprop(UnitCallback):
    r"""Continual Backprop (CBP): replaces the least useful mature hidden units, a small fraction at each step.

    For each unit an exponential average :math:`u` of its utility and, for each column that reads it, one of its
    activation :math:`f` are kept, both corrected for their start: :math:`\hat u = u / (1 - \eta^a)` at age :math:`a`.
    In each step a set of units with :math:`n` units older than ``maturity_threshold`` earns :math:`\rho n`
    replacements; fractions are saved up. A replaced unit gets incoming weights from their initial distribution and
    outgoing weights of 0; what it gave on average moves into the biases of the layers that used it.

    The authors' code draws new weights from a uniform distribution, clears the mean activation before its own
    compensation reads it, and has an Adam that counts the steps of each weight. With SGD and linear layers
    ``init=functools.partial(torch.nn.init.kaiming_uniform_, nonlinearity="relu"), compensate_bias=False`` gives the
    same course; in convolutions it counts all units, not only mature ones, as earning replacements, and subtracts one
    mean for each channel.

    Args:
        replacement_rate: :math:`\rho`, the share of mature units replaced per step.
        maturity_threshold: the age in steps up to which a unit is protected.
        decay_rate: :math:`\eta`, of the running averages.
        utility: ``"contribution"`` (size of activation times size of outgoing weights), ``"zero_contribution"``
            (distance of the activation from its mean instead), ``"adaptable_contribution"`` (that, divided by the size
            of incoming weights), ``"adaptation"`` (1 / size of incoming weights), ``"weight"`` (size of outgoing
            weights), ``"random"`` (drawn anew at each choice).
        init: where new incoming weights come from: ``"empirical"`` (normal, with the mean and standard deviation that
            the weights had at the start), ``"quantiles"`` (distributed as they were, so that uniform stays uniform),
            ``"kaiming_uniform"``, ``"reset_parameters"`` (the layer's own), or a function such as those of
            ``torch.nn.init``.
        compensate_bias: move the unit's mean contribution into the biases of the layers that used it.
        module: the name of the module inside the model to work on; None for all of it.
        units: the sets of units, given by hand; None to find them.
        exclude: patterns of names of sets of units to leave alone.
        optimizer_state: what the optimizer remembers of weights that are written. ``"survivors"``: no momentum, and the
            mean size of the gradients of the others in the tensor, so that Adam moves new units no more than others;
            ``"reset"``: nothing; ``"keep"``: all. Shifted biases keep theirs.
        seed: of the draws, which are equal on every rank; None takes rank 0's current seed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> method = ContinualBackprop(replacement_rate=0.01, maturity_threshold=10)
        >>> method = method.attach(model, optimizer, example_inputs=(torch.zeros(1, 4),))
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     method.step()
        >>> method.replaced
        1

    Reference:
        Dohare et al., "Loss of plasticity in deep continual learning", Nature 632, 2024; arXiv 2306.13812.
    """

    per_unit = ("utility",)
    per_column = ("activation",)

    def __init__(
        self,
        replacement_rate: float = 1e-4,
        maturity_threshold: int = 100,
        decay_rate: float = 0.99,
        utility: Utility = "contribution",
        init: Init = "empirical",
        compensate_bias: bool = True,
        *,
        module: str | None = None,
        units: Sequence[HiddenUnits] | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "survivors",
        seed: int | None = None,
    ) -> None:
        self.utility = checks.choice("utility", utility, UTILITIES)
        self._centred = utility in ("zero_contribution", "adaptable_contribution")
        super().__init__(
            units=units,
            exclude=exclude,
            maturity_threshold=maturity_threshold,
            keep_inputs=self._centred,
            module=module,
            optimizer_state=optimizer_state,
            seed=seed,
        )
        self.replacement_rate = checks.number("replacement_rate", replacement_rate, least=0, most=1)
        self.decay_rate = checks.number("decay_rate", decay_rate, least=0, below=1)
        self.init = check_init(init)
        self.compensate_bias = checks.flag("compensate_bias", compensate_bias)
        self.replaced = 0

    @override
    def _reset(self) -> None:
        self._initial = InitialDistribution(self.model, (), self.init)
        self._earned: list[float] = []
        self.replaced = 0

    @override
    def _add_sets(self, sets: Sequence[UnitSet]) -> None:
        self._initial.add(weights_of_producers(sets))
        self._earned += [0.0] * len(sets)

    @override
    def _earn(self, index: int, eligible: int) -> int | None:
        self._earned[index] += self.replacement_rate * eligible
        if self._earned[index] < 1:
            return None
        count, self._earned[index] = whole_and_rest(self._earned[index])
        return min(count, eligible)

    @override
    def _measure(self, sets: Sequence[int]) -> None:
        population, new_weight = self._population, 1 - self.decay_rate
        mean, size = population.take_means(sets)
        new = {"activation": mean}
        if self._centred:
            self._average_in(sets, new, new_weight)
            size = population.activations.take_mean_distance(self._mean_activation(sets), population.readers(sets))
            new = {}
        if self.utility != "random":
            new["utility"] = self._current_utility(size, sets)
        self._average_in(sets, new, new_weight)

    def _mean_activation(self, sets: Sequence[int]) -> Tensor:
        """The mean activation of each column, corrected for the average's start."""
        units, columns = self._population.places(sets)
        age = self._ages.now()[units][self._population.unit_of_column(sets)]
        return bias_corrected(self._averages["activation"][columns], age, self.decay_rate)

    def _current_utility(self, size: Tensor, sets: Sequence[int]) -> Tensor:
        population = self._population
        if self.utility == "adaptation":
            incoming = population.incoming(sets)
            return per_incoming(torch.ones_like(incoming), incoming)
        if self.utility == "weight":
            return population.contribution(sets)
        contribution = population.contribution(sets, size)
        if self.utility == "adaptable_contribution":
            return per_incoming(contribution, population.incoming(sets))
        return contribution

    @override
    def _act(self, due: Mapping[int, int]) -> None:
        population, age = self._population, self._ages.now()
        utility, activation = self._means_over_ranks(due)
        if self.utility == "random":
            utility = utility.clone()
            for i in due:
                self._draw(utility[population.sets[i].span])
        else:
            utility = bias_corrected(utility, age, self.decay_rate)
        ranking = ranked(utility, age > self.maturity_threshold)
        chosen = {i: ranking[population.sets[i].span].argsort(stable=True)[:count] for i, count in due.items()}
        units, columns = population.columns_of(chosen)
        amounts = bias_corrected(activation[columns], age[units], self.decay_rate) if self.compensate_bias else None
        population.replace(chosen, self._initial, amounts)
        self._averages["utility"].index_fill_(0, units, 0.0)
        self._averages["activation"].index_fill_(0, columns, 0.0)
        for i, replaced in chosen.items():
            self._ages.reset(i, replaced)
            self._maturity.replaced(i, len(replaced))
            self.replaced += len(replaced)

    def _draw(self, out: Tensor) -> None:
        torch.rand(out.shape, generator=self.draws.generator(out.device), out=out)

    @override
    def _state_of_set(self, index: int) -> dict[str, Any]:
        return {"earned": self._earned[index]}

    @override
    def _restore_set(self, index: int, state: dict[str, Any]) -> None:
        self._earned[index] = state["earned"]

    @override
    def _state_of_all(self) -> dict[str, Any]:
        return {"initial": self._initial.state_dict(), "replaced": self.replaced}

    @override
    def _restore_all(self, state: dict[str, Any]) -> None:
        self._initial.load_state_dict(state["initial"], partial=True)
        self.replaced = state["replaced"]

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        utility = bias_corrected(self._averages["utility"], self._ages.now(), self.decay_rate)
        return {"replaced": self.replaced, "utility_min": utility.min(), "utility_mean": utility.mean()}
