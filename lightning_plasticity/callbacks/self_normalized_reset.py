"""Self-normalized resets: replace units that have been silent for longer than is usual for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.distributed import gather_over_ranks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, check_init
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.engine.unit_callback import UnitCallback
from lightning_plasticity.engine.unit_sets import UnitSet, weights_of_producers
from lightning_plasticity.functional.self_normalized_reset import (
    FIRED,
    SILENT,
    bin_of,
    count_silences,
    new_thresholds,
)
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.find import Findings, HiddenUnits

_MANY_STEPS = 128  # that wait to be counted
_ROUNDING = 1e-5  # of sums over examples, relative to the sum of sizes
_NEVER_SILENT = ("tanh", "sigmoid", "softsign", "softplus", "hardtanh")


class SelfNormalizedReset(UnitCallback):
    r"""Self-normalized resets (SNR): replaces units that have been silent for longer than is usual for them.

    A unit fires in a step if its activation is above 0 for any example (and position), as the next layer reads it. For
    each unit it is learned how many steps it usually is silent between two firings, and it is replaced as soon as it
    has been silent for so long that no more than a share :math:`\eta` of its silences were longer: a unit that rarely
    fires may wait, while one that always did is replaced soon. There is no rate and no age below which units are
    protected. A replaced unit gets incoming weights from their initial distribution, a bias of 0 and outgoing weights
    of 0.

    Every so many steps each unit's threshold becomes the :math:`1 - \eta` quantile of the lengths of its silences, of
    those of one step at least, if that is below the threshold until now, and otherwise twice that; then counting begins
    anew. Lengths above 16 steps are counted to a sixteenth.

    Units that are never 0 fire when they are positive, which makes sense where the negative side is the passive one
    (GELU, SiLU, ELU, leaky ReLU). It does not for tanh, sigmoid, softsign and softplus, whose units are left out. A
    ReLU's units fire almost always in large batches, and are then replaced only when they are dead.

    The authors count examples; steps are the same where batches are alike: divide their 20,000 and 100 examples by the
    batch size (16 in most of their runs, which the defaults are for). With one example a step most silences mean
    little: take longer ones. In their code Adam's moments of new entries become 0, and its count of steps stays.

    Args:
        significance: :math:`\eta`; 0.08 down to 0.00125 have been published.
        every_n_train_steps: learn thresholds anew after every so many optimizer steps. (Replaced is in any step.)
        min_silence: the least threshold, in steps.
        max_silence: the greatest threshold, with which units begin.
        init: where new incoming weights come from, as in ``ContinualBackprop``.
        module: the name of the module inside the model to work on; None for all of it.
        units: the sets of units, given by hand; None to find them.
        exclude: patterns of names of sets of units to leave alone.
        optimizer_state: what the optimizer remembers of weights that are written: ``"survivors"``, ``"reset"`` or
            ``"keep"``, as in ``ContinualBackprop``.
        seed: of the draws, which are equal on every rank; None takes rank 0's current seed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> _ = model[0].bias.data[:3].fill_(-100.0)  # three dead units
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> method = SelfNormalizedReset(max_silence=10)
        >>> method = method.attach(model, optimizer, example_inputs=(torch.zeros(1, 4),))
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(64, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     method.step()
        >>> method.replaced
        3

    Reference:
        Farias, Jozefiak, "Self-normalized resets for plasticity in continual learning", ICLR 2025; arXiv 2410.20098.
    """

    def __init__(
        self,
        significance: float = 0.08,
        *,
        every_n_train_steps: int = 1000,
        min_silence: int = 7,
        max_silence: int = 1250,
        init: Init = "empirical",
        module: str | None = None,
        units: Sequence[HiddenUnits] | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "survivors",
        seed: int | None = None,
    ) -> None:
        super().__init__(units=units, exclude=exclude, module=module, optimizer_state=optimizer_state, seed=seed)
        self.significance = checks.number("significance", significance, above=0, below=1)
        self.every_n_train_steps = checks.count("every_n_train_steps", every_n_train_steps, least=1)
        self.min_silence = checks.count("min_silence", min_silence, least=1)
        self.max_silence = checks.count("max_silence", max_silence, least=1)
        if self.min_silence > self.max_silence:
            raise ValueError(
                f"min_silence must be at most max_silence, which is {max_silence}, got {min_silence}. Lower the one, "
                "or raise the other."
            )
        self.init = check_init(init)
        self.replaced = 0

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        suited = [units for units in part.found.units if units.activation not in _NEVER_SILENT]
        others = {
            units.name: f"units of {units.activation} are never silent"
            for units in part.found.units
            if units.activation in _NEVER_SILENT
        }
        self._population.add_found(Findings(suited, part.found.left_out | others, part.found.runs))

    @override
    def _reset(self) -> None:
        self._initial = InitialDistribution(self.model, (), self.init)
        self._silences = self._thresholds = torch.zeros(0, dtype=torch.int64)
        self._bins = int(bin_of(torch.tensor(self.max_silence))) + 1
        self._histogram = torch.zeros(0, self._bins, dtype=torch.int32)
        # What units did in the last steps. Each rank heard other examples, but they are put together only when a unit
        # can have been silent for long enough, and no later.
        self._heard = torch.zeros(_MANY_STEPS, 0, dtype=torch.uint8)
        self._steps_heard = 0
        self._next_look = 1  # after so many of them
        self.replaced = 0

    @override
    def _add_sets(self, sets: Sequence[UnitSet]) -> None:
        self._initial.add(weights_of_producers(sets))
        more = self._population.size - len(self._silences)
        ages = torch.zeros(more, dtype=torch.int64)
        columns = torch.zeros(_MANY_STEPS, more, dtype=torch.uint8)
        rows = torch.zeros(more, self._bins, dtype=torch.int32)
        device = self._population.device
        self._silences = torch.cat([self._silences.to(device), ages.to(device)])
        self._thresholds = torch.cat([self._thresholds.to(device), (ages + self.max_silence).to(device)])
        self._histogram = torch.cat([self._histogram.to(device), rows.to(device)])
        self._heard = torch.cat([self._heard.to(device), columns.to(device)], 1)

    @override
    def _earn(self, index: int, eligible: int) -> bool | None:
        looks = self._steps_heard + 1 >= self._next_look
        return True if looks or self._learns(index) else None

    def _learns(self, index: int) -> bool:
        return self._maturity.steps[index] % self.every_n_train_steps == 0

    @override
    def _take_gradients(self, sets: Sequence[int]) -> None:
        self._steps_heard += 1  # no gradients are needed, but that a step was made

    @override
    def _measure(self, sets: Sequence[int]) -> None:
        population = self._population
        means, sizes = population.take_means(sets)
        # Twice the mean of what is above 0. Where nothing is, rounding is all that may be left of it.
        positive = population.mean_over_consumers(means + sizes, sets)
        fires = positive > _ROUNDING * population.mean_over_consumers(sizes, sets)
        units, _ = population.places(sets)
        # what is not finite tells nothing: x * 0 is 0 for every finite x, and otherwise NaN
        self._heard[self._steps_heard - 1, units] = torch.where(positive * 0 == 0, SILENT + fires.byte(), 0)

    @override
    def _act(self, due: Mapping[int, bool]) -> None:
        self._count()
        if int((self._thresholds - self._silences).min()) <= 0:  # this step waits for the device
            self._replace(due)
        for i in due:
            if self._learns(i):
                span = self._population.sets[i].span
                self._thresholds[span] = new_thresholds(
                    self._thresholds[span], self._histogram[span], self.significance, self.min_silence, self.max_silence
                )
                self._histogram[span] = 0
        self._plan()

    def _count(self) -> None:
        """Counts the last steps, those of all ranks together: a unit fires if it does on any."""
        if self._steps_heard:
            (heard,) = gather_over_ranks([self._heard[: self._steps_heard]])
            self._silences, self._histogram = count_silences(self._silences, self._histogram, heard.amax(0))
            self._heard[: self._steps_heard] = 0
            self._steps_heard = 0

    def _plan(self) -> None:
        """No unit can be due earlier than if the one that is nearest stays silent from now on."""
        left = int((self._thresholds - self._silences).min())
        self._next_look = min(max(left, 1), _MANY_STEPS)

    def _replace(self, sets: Mapping[int, bool]) -> None:
        chosen = {}
        for i in sets:
            span = self._population.sets[i].span
            silences = self._silences[span]
            units = (silences >= self._thresholds[span]).nonzero().squeeze(1)
            if len(units):
                chosen[i] = units
                self.replaced += len(units)
                fired = torch.full((1, len(units)), FIRED, device=units.device)  # as if they did in the next step
                silences[units], self._histogram[span][units] = count_silences(
                    silences[units], self._histogram[span][units], fired
                )
        self._population.replace(chosen, self._initial)

    @override
    def _state(self) -> dict[str, Any]:
        self._count()  # what differs from rank to rank
        self._plan()
        return super()._state()

    @override
    def _state_of_all(self) -> dict[str, Any]:
        return {"initial": self._initial.state_dict(), "replaced": self.replaced}

    @override
    def _restore_all(self, state: dict[str, Any]) -> None:
        self._initial.load_state_dict(state["initial"], partial=True)
        self.replaced = state["replaced"]
        self._heard.zero_()
        self._steps_heard, self._next_look = 0, 1

    @override
    def _state_of_set(self, index: int) -> dict[str, Any]:
        span = self._population.sets[index].span
        kept = {"silences": self._silences, "thresholds": self._thresholds, "histogram": self._histogram}
        return {name: tensor[span].clone() for name, tensor in kept.items()}

    @override
    def _restore_set(self, index: int, state: dict[str, Any]) -> None:
        span = self._population.sets[index].span
        self._silences[span] = state["silences"].to(self._silences)
        self._thresholds[span] = state["thresholds"].to(self._thresholds)
        self._histogram[span] = state["histogram"].to(self._histogram)

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        return {"replaced": self.replaced}
