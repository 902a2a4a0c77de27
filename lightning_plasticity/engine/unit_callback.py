"""What methods on hidden units share: which units there are, their ages and running averages, and the checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.distributed import gather_over_ranks, share_of_this_rank, sum_over_ranks, world_size
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.engine.known_units import units_in
from lightning_plasticity.engine.maturity import Ages, Maturity
from lightning_plasticity.engine.old_state import by_name
from lightning_plasticity.engine.population import Population, average_in
from lightning_plasticity.engine.unit_sets import UnitSet
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.find import HiddenUnits

_FEW = 8  # ranks


class UnitCallback(PlasticityCallback):
    """Base of methods that act on hidden units.

    Units are found in the parts of the model as training calls them, or given by hand. For each step of the optimizer
    that trains a set of units, the set grows one step older, ``_earn`` says whether something is due, ``_measure``
    takes in how active its units were, and ``_act`` does what is due. All that is kept is saved by the names of sets.

    Class attributes:
        per_unit, per_column: names of the running averages in ``_averages``: flat arrays over all units, and over all
            columns that read units. They begin at 0, each rank has its own, and resets are up to the method.

    Args:
        units: the sets of units, given by hand; None to find them.
        exclude: patterns (as in ``fnmatch``) of names of sets to leave alone.
        maturity_threshold: the age in steps that a unit must exceed to be eligible.
        reads_sizes: whether ``_measure`` wants mean sizes of activations, besides their means.
        keep_inputs: whether it wants the activations of each example.
        module, optimizer_state, seed: see :class:`PlasticityCallback`.
    """

    works_on_parts = True
    per_unit: ClassVar[tuple[str, ...]] = ()
    per_column: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        units: Sequence[HiddenUnits] | None,
        exclude: Sequence[str] | str,
        maturity_threshold: int = 0,
        reads_sizes: bool = True,
        keep_inputs: bool = False,
        module: str | None,
        optimizer_state: OptimizerState,
        seed: int | None,
    ) -> None:
        question = units_in if units is None else None
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed, question=question)
        self.maturity_threshold = checks.count("maturity_threshold", maturity_threshold)
        self._population = Population(self, units, exclude, keep_inputs, reads_sizes)
        self._averages: dict[str, Tensor] = {}
        self._together: Tensors | None = None  # averages, and beside them what they were last moved towards

    # ---- what a method defines

    @abstractmethod
    def _add_sets(self, sets: Sequence[UnitSet]) -> None:
        """Prepares what the method keeps of more sets; those before stay as they are."""

    @abstractmethod
    def _earn(self, index: int, eligible: int) -> Any:
        """What is due of a set after a step, when so many of its units are old enough; None if nothing.

        Told on the host: nothing here may wait for the device.
        """

    def _take_gradients(self, sets: Sequence[int]) -> None:
        """Takes in the gradients of the step that has trained these sets, before anything else."""

    @abstractmethod
    def _measure(self, sets: Sequence[int]) -> None:
        """Takes in the activations that were heard of these sets since it was last called."""

    @abstractmethod
    def _act(self, due: Mapping[int, Any]) -> None:
        """Does what is due, by set."""

    def _finish(self, sets: Sequence[int]) -> None:
        """Ends a step that has trained these sets, whether or not something was due."""

    def _state_of_set(self, index: int) -> dict[str, Any]:
        """What the method keeps of a set, besides averages and ages."""
        return {}

    def _restore_set(self, index: int, state: dict[str, Any]) -> None:
        """Takes back what ``_state_of_set`` gave."""

    def _state_of_all(self) -> dict[str, Any]:
        """What the method keeps besides what it keeps of each set."""
        return {}

    def _restore_all(self, state: dict[str, Any]) -> None:
        """Takes back what ``_state_of_all`` gave; before the sets are restored."""

    # ---- a step

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        population = self._population
        trained = population.trained_by(optimizer)
        due = {}
        for i, eligible in zip(trained, self._maturity.advance(trained), strict=True):
            what = self._earn(i, eligible)
            if what is not None:
                due[i] = what
        if trained:
            self._take_gradients(trained)
        heard = population.heard(trained)
        if heard:
            self._measure(heard)
        if due:
            self._act(due)
        if trained:
            self._finish(trained)

    def _average_in(self, sets: Sequence[int], values: Mapping[str, Tensor], weight: float) -> None:
        """Moves running averages of these sets towards new values, except where these are not finite."""
        if len(sets) == len(self._population.sets):
            averages, beside = [self._averages[name] for name in values], [*values.values()]
            if self._together is None or not self._together.are(averages, beside):
                self._together = Tensors(averages, beside)
            kernels = self._together.kernels()
            if kernels is not None:
                kernels.average_in(self._together, weight)
                return
        units, columns = self._population.places(sets)
        for name, value in values.items():
            average_in(self._averages[name], units if name in self.per_unit else columns, value, weight)

    def _means_over_ranks(self, sets: Iterable[int]) -> list[Tensor]:
        """The running averages, each over all ranks for these sets and this rank's own for others. Not to be written.

        First those of units, then those of columns.
        """
        averages = [self._averages[name] for name in (*self.per_unit, *self.per_column)]
        if world_size() == 1:
            return averages
        found = [self._population.sets[i] for i in sets]
        spans = [[s.span for s in found] for _ in self.per_unit] + [[s.columns for s in found] for _ in self.per_column]
        means = [average.clone() for average in averages]
        parts = [mean[span] for mean, of_sets in zip(means, spans, strict=True) for span in of_sets]
        for part, total in zip(parts, sum_over_ranks(parts), strict=True):
            torch.div(total, world_size(), out=part)
        return means

    @override
    def _skipped(self) -> None:
        self._population.activations.forget()

    # ---- which units

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        self._population.add_found(part.found)

    @override
    def forget_parts(self) -> None:
        self._population.clear()

    @override
    def _start(self) -> None:
        self._population.add_given()
        self._population.check()
        self._averages = {name: self._population.zeros(0) for name in (*self.per_unit, *self.per_column)}
        self._maturity = Maturity([], self.maturity_threshold)
        self._ages = Ages(self._maturity)
        self._sets = 0  # how many sets the method works on; the population may know more since the last step
        self._waiting: dict[str, dict[str, Any]] = {}  # what a checkpoint says of sets that were not called yet
        self._reset()
        self._grow()

    def _reset(self) -> None:
        """Begins to count anew."""

    @override
    def _grow(self) -> None:
        population, first = self._population, self._sets
        more = population.sets[first:]
        if not more:
            return
        self._sets = len(population.sets)
        for names, size in ((self.per_unit, population.size), (self.per_column, population.columns)):
            for name in names:
                average = self._averages[name]
                self._averages[name] = torch.cat(
                    [average.to(population.zeros(0)), population.zeros(size - len(average))]
                )
        self._maturity.add([s.units.size for s in more])
        self._ages.add([s.span for s in more], population.device)
        self._add_sets(more)
        for i in range(first, self._sets):
            if population.sets[i].name in self._waiting:
                self._take_back(i, self._waiting.pop(population.sets[i].name))

    @override
    def _stop(self) -> None:
        self._population.clear()

    @override
    def _works_on(self) -> str:
        return self._population.in_words(self.not_called())

    # ---- checkpoints

    @override
    def _state(self) -> dict[str, Any]:
        population = self._population
        names = (*self.per_unit, *self.per_column)
        of_rank = [*(self._averages[name] for name in names), *population.activations.state()]
        *averages, sums, rows = gather_over_ranks(of_rank) if world_size() <= _FEW else _mean_over_ranks(of_rank)
        by_average = dict(zip(names, averages, strict=True))
        sets = {}
        for i, unit_set in enumerate(population.sets[: self._sets]):
            columns, readers = unit_set.columns, unit_set.readers
            places = dict.fromkeys(self.per_unit, unit_set.span) | dict.fromkeys(self.per_column, columns)
            sets[unit_set.name] = {
                "averages": {name: by_average[name][:, place] for name, place in places.items()},
                "age": self._ages.of(i),
                "maturity": self._maturity.state_of(i),
                "heard": {
                    "sums": sums[:, :, columns],
                    "rows": rows[:, readers[0].number : readers[-1].number + 1],
                },
                **self._state_of_set(i),
            }
        return {"sets": {**self._waiting, **sets}, **self._state_of_all()}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        state = by_name(state, self._population.sets[: self._sets])
        self._restore_all(state)
        self._waiting = dict(state["sets"])
        for i, unit_set in enumerate(self._population.sets[: self._sets]):
            if unit_set.name in self._waiting:
                self._take_back(i, self._waiting.pop(unit_set.name))

    def _take_back(self, index: int, state: dict[str, Any]) -> None:
        unit_set = self._population.sets[index]
        for names, place in ((self.per_unit, unit_set.span), (self.per_column, unit_set.columns)):
            for name in names:
                self._averages[name][place] = share_of_this_rank(state["averages"][name]).to(self._averages[name])
        self._maturity.restore(index, state["maturity"])
        self._ages.restore(index, state["age"])
        rows = share_of_this_rank(state["heard"]["rows"].double()).round().int().tolist()
        self._population.activations.restore(unit_set.readers, share_of_this_rank(state["heard"]["sums"]), rows)
        self._restore_set(index, state)


def _mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In the form of ``gather_over_ranks``, as if of one rank, so that a checkpoint does not grow with their number.

    All that is decided is decided by means over ranks. From a checkpoint each rank goes on from the mean: the same
    course, to rounding.
    """
    return [(total.double() / world_size()).to(total.dtype)[None] for total in sum_over_ranks(tensors)]
