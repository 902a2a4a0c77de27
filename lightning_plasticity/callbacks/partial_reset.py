"""Calibrated partial resets: every so often, resets a small part of each unit, more of those of little use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.init import kaiming_uniform_
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, check_init
from lightning_plasticity.engine.unit_callback import UnitCallback
from lightning_plasticity.engine.unit_sets import Reader, Table, UnitSet, weights_of_producers
from lightning_plasticity.functional.partial_reset import reset_shares
from lightning_plasticity.functional.redo import gradient_scores
from lightning_plasticity.shards.layers import by_output, held_view, inputs_read
from lightning_plasticity.units.find import HiddenUnits


class PartialReset(UnitCallback):
    r"""Calibrated partial resets (CPR): every so often, resets a small part of each unit, more of those of little use.

    .. math::
        \text{every step:} \quad u_i \leftarrow d \, u_i + (1 - d) \frac{G_i}{\overline{G} + 10^{-9}} \qquad
        \text{every so often:} \quad W_i \leftarrow (1 - r_i) W_i + r_i W_\text{new}, \quad V_i \leftarrow (1 - r_i) V_i

    with :math:`G_i` the mean size of the gradient of a unit's incoming weights :math:`W_i`, :math:`V_i` its outgoing
    weights and :math:`r_i = \rho \min(2 \, \mathrm{sigmoid}(-\kappa (u_i - 1)), 1)`; then :math:`u = 1` for all. No
    activations are read, and it makes sense with any activation function. Biases and normalisation layers stay. The
    last layer is shrunk where it uses hidden units, and not redrawn.

    The gradients are those of the step just made, clipped and unscaled, and equal on all ranks: in a plain loop, call
    ``step()`` before ``zero_grad()``. Every step costs one more pass over them.

    The authors' numbers could not be confirmed, and an earlier version, *continuous continual backpropagation*, has
    others: an exponential in place of the sigmoid, and 0.95 and 0.012.

    Args:
        strength: :math:`\rho`, the largest share that is reset at once.
        every_n_train_steps: reset after every so many optimizer steps.
        decay_rate: :math:`d`.
        sharpness: :math:`\kappa`, how quickly the share falls above the mean utility.
        init: where new incoming weights come from: He's uniform distribution as published, or as in
            ``ContinualBackprop``.
        module: the name of the module inside the model to work on; None for all of it.
        units: the sets of units, given by hand; None to find them.
        exclude: patterns of names of sets of units to leave alone.
        optimizer_state: ``"keep"``, as published, or ``"reset"`` to let the optimizer begin anew with what is written.
        seed: of the draws, which are equal on every rank; None takes rank 0's current seed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> method = PartialReset(every_n_train_steps=5)
        >>> method = method.attach(model, optimizer, example_inputs=(torch.zeros(1, 4),))

    Reference:
        McCutcheon et al. 2026, arXiv 2607.24996.
    """

    def __init__(
        self,
        strength: float = 0.015,
        every_n_train_steps: int = 1000,
        *,
        decay_rate: float = 0.99,
        sharpness: float = 16.0,
        init: Init = kaiming_uniform_,
        module: str | None = None,
        units: Sequence[HiddenUnits] | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        super().__init__(units=units, exclude=exclude, module=module, optimizer_state=optimizer_state, seed=seed)
        self.strength = checks.number("strength", strength, least=0, most=1)
        self.every_n_train_steps = checks.count("every_n_train_steps", every_n_train_steps, least=1)
        self.decay_rate = checks.number("decay_rate", decay_rate, least=0, below=1)
        self.sharpness = checks.number("sharpness", sharpness, least=0)
        self.init = check_init(init)

    @override
    def _reset(self) -> None:
        self._initial = InitialDistribution(self.model, (), self.init)
        self._utilities = torch.zeros(0)  # of units

    @override
    def _add_sets(self, sets: Sequence[UnitSet]) -> None:
        self._initial.add(weights_of_producers(sets))
        more = [self._population.zeros(unit_set.units.size) + 1 for unit_set in sets]
        self._utilities = torch.cat([self._utilities.to(more[0]), *more])
        self._population.activations.listening = False

    @override
    def _earn(self, index: int, eligible: int) -> bool | None:
        return True if self._maturity.steps[index] % self.every_n_train_steps == 0 else None

    @override
    def _take_gradients(self, sets: Sequence[int]) -> None:
        seen, sizes = self._population.gradient_sizes(sets)
        if not seen:
            return
        places, _ = self._population.places(seen)
        mean, utilities = self._population.mean_of_sets(sizes, seen), self._utilities[places]
        # A layer with gradients that are not finite tells nothing: scores are relative to all of it.
        scores = torch.where(mean * 0 == 0, gradient_scores(sizes, mean), utilities)
        utilities.lerp_(scores, 1 - self.decay_rate)
        if not isinstance(places, slice):
            self._utilities[places] = utilities

    @override
    def _measure(self, sets: Sequence[int]) -> None:
        self._population.take_means(sets)  # the first call was heard before it was known that none is wanted

    @override
    def _act(self, due: Mapping[int, bool]) -> None:
        spans = {i: self._population.sets[i].span for i in due}
        shares = {i: reset_shares(self._utilities[span], self.strength, self.sharpness) for i, span in spans.items()}
        for i, share in shares.items():
            for table in self._population.sets[i].producers:
                self._mix(table, share)
        for i, share in shares.items():
            for reader in self._population.sets[i].readers:
                self._shrink(reader, share)
            self._utilities[spans[i]] = 1.0

    def _mix(self, table: Table, shares: Tensor) -> None:
        """Mixes fresh values into these rows of a layer's weight."""
        view = table.layer
        every_row = torch.arange(view.outputs, device=view.weight.device)  # however the layer holds its weight
        fresh = self._initial.draw(table.weight, self.draws.generator(view.weight.device), every_row, view)
        [value] = self.editor.precise([view.weight])
        value = value.clone()
        rows, part = held_view(view).by_output(value), by_output(view, view.weight)
        of_rows = part.take(_spread(shares, table.entries, view.outputs), 0)
        rows.add_(of_rows.view(-1, *(1,) * (rows.ndim - 1)) * (part.take(fresh) - rows))
        self.editor.write([view.weight], [value])

    def _shrink(self, reader: Reader, shares: Tensor) -> None:
        """Shrinks what a layer multiplies these inputs by."""
        view = reader.view
        [value] = self.editor.precise([view.weight])
        value = value.clone()
        columns = held_view(view).matrix(value)
        kept = (1 - _spread(shares, reader.table.entries, view.inputs))[inputs_read(view)]
        columns.mul_(kept.view(*kept.shape, *(1,) * (columns.ndim - 2)))
        self.editor.write([view.weight], [value])

    @override
    def _state_of_set(self, index: int) -> dict[str, Any]:
        return {"utility": self._utilities[self._population.sets[index].span].clone()}

    @override
    def _restore_set(self, index: int, state: dict[str, Any]) -> None:
        self._utilities[self._population.sets[index].span] = state["utility"].to(self._utilities)

    @override
    def _state_of_all(self) -> dict[str, Any]:
        return {"initial": self._initial.state_dict()}

    @override
    def _restore_all(self, state: dict[str, Any]) -> None:
        self._initial.load_state_dict(state["initial"], partial=True)


def _spread(shares: Tensor, entries: Tensor, size: int) -> Tensor:
    """The units' shares at the places of their entries, and 0 elsewhere."""
    spread = shares.new_zeros(size)
    spread[entries] = shares.unsqueeze(1).expand(entries.shape)
    return spread
