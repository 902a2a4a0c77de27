"""DASH: at a boundary, shrinks weights, least where they point as the loss calls for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.distributed import sum_over_ranks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.engine.training_pass import (
    Loss,
    as_trained_on,
    average_gradients,
    trainers_batches,
    trainers_loss,
)
from lightning_plasticity.functional.direction_aware_shrink import shrink_factors
from lightning_plasticity.layers.weights import (
    LayerPatterns,
    find_bias,
    find_weights,
    has_inputs_first,
    weights_in_words,
)
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import is_shared_out, shared_out_as, whole


class DirectionAwareShrink(ScheduledCallback):
    r"""Direction-aware shrinking (DASH): at a boundary, shrinks weights, least where they point as the loss calls for.

    .. math::
        \text{over the data:} \quad G \leftarrow (1 - a) G - a \nabla L \qquad
        \text{then:} \quad w \leftarrow \mathrm{clamp}(\cos(G_w, w), \lambda, 1) \, w

    for each row :math:`w` of the weights of linear and attention layers, each kernel of a convolution, of one output
    and one input, and each bias as a whole. The last layer counts, normalisation layers and embeddings stay. A kernel
    of one place is kept or shrunk wholly, for its cosine is a sign.

    It needs gradients of the training loss, and so a pass over the data, in training mode, without a step: all that it
    touches in the model is put back, and nothing is logged. In a Trainer it takes the loss that ``training_step``
    returns and the data of the Trainer's own loader, in their order instead of shuffled; augmentation stays, where the
    authors have none. The running average forgets quickly: with :math:`a = 0.3` the last twenty batches are nearly all
    of it, and the pass begins only where batches count for more than rounding. So where data lie by class or by age,
    give ``data`` that do not. On several ranks each passes over its share, and the averages are averaged; where ranks
    share parameters out, all need the same number of batches.

    The authors keep the optimizer's state.

    Args:
        averaging: :math:`a`; 0.3, and 0.1 to 0.3 by others.
        least: :math:`\lambda`; 0.3, and 0.05 to 0.3 by others.
        data: the batches to pass over: a loader, or a list. A Trainer brings them to its device and precision; for
            another loop they must be there. None takes the Trainer's.
        loss: gives the loss of a batch of ``data``: ``loss(model, batch)``. None takes the Trainer's ``training_step``.
            A plain or Fabric loop needs both.
        every_n_epochs: act after every so many epochs, when the next one begins.
        every_n_train_steps: act after every so many optimizer steps.
        on_fit_start: act once when a fit starts, if it does not go on from a checkpoint in which that was done.
        include: patterns (as in ``fnmatch``) of names of layers to work on.
        exclude: patterns of names of layers to leave alone.
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: ``"keep"``, as published, or ``"reset"`` to let the optimizer begin anew with what is written.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0]])
        >>> method = DirectionAwareShrink(
        ...     data=[torch.tensor([[0.0, 1.0]])], loss=lambda model, x: -model(x).sum(), on_fit_start=True
        ... )
        >>> method = method.attach(model)  # the loss calls for more of the second: a cosine of 0.8
        >>> model.weight.detach()
        tensor([[2.4000, 3.2000]])

    Reference:
        Shin et al., "DASH: warm-starting neural network training in stationary settings without loss of plasticity",
        NeurIPS 2024; arXiv 2410.23495.
    """

    works_on_parts = True

    def __init__(
        self,
        averaging: float = 0.3,
        least: float = 0.3,
        *,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        on_fit_start: bool = False,
        include: Sequence[str] | str = "*",
        exclude: Sequence[str] | str = (),
        module: str | None = None,
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        schedule = Schedule(every_n_train_steps, every_n_epochs, on_fit_start)
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        self.averaging = checks.number("averaging", averaging, above=0, most=1)
        self.least = checks.number("least", least, least=0, most=1)
        self.data = checks.optional(_batches, "data", data)
        self.loss: Loss | None = checks.optional(checks.function, "loss", loss)
        self.patterns = LayerPatterns(checks.words("include", include), checks.words("exclude", exclude))
        self._parameters: list[nn.Parameter] = []
        self._inputs_first: set[nn.Parameter] = set()  # weights with a row for each input

    @override
    def _start(self) -> None:
        if self._trainer is None and (self.data is None or self.loss is None):
            raise ValueError(
                "DirectionAwareShrink needs data to pass over and their loss, which only a Trainer knows by itself. "
                "Give data=loader and loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1])."
            )
        weights = find_weights(self.model, self.module or "", self.patterns)
        biases = [find_bias(self.model, name) for name in weights]
        self._inputs_first = {weight for name, weight in weights.items() if has_inputs_first(self.model, name)}
        self._parameters = list(dict.fromkeys(p for p in (*weights.values(), *biases) if p is not None))
        due = self._due()
        if not any(id(parameter) in due for parameter in self._parameters):
            raise ValueError(
                "DirectionAwareShrink needs linear, attention or convolution layers that are trained, but "
                f"{self.patterns.why_none(weights, self.scope)}. Unfreeze some, hand them to the optimizer, or change "
                "include=, exclude= or module=."
            )

    @override
    def _works_on(self) -> str:
        found = [parameter for parameter in self._parameters if parameter.ndim > 1]
        return weights_in_words(found, self.model, self.module or "") + " Biases go with them."

    @override
    def _stop(self) -> None:
        self._parameters, self._inputs_first = [], set()

    @override
    def _act(self) -> None:
        due = self._due()
        parameters = [parameter for parameter in self._parameters if id(parameter) in due]
        loss = self._loss()  # first: what cannot tell its loss is refused whatever the data
        gradients, batches = average_gradients(self.model, parameters, self._data(), loss, self.averaging)
        # Those of parameters that are shared out are of all ranks' batches already.
        apart = [i for i, parameter in enumerate(parameters) if not is_shared_out(parameter)]
        count = torch.tensor(float(batches), device=parameters[0].device)
        *sums, total = sum_over_ranks([*[gradients[i] for i in apart], count])
        for i, of_all in zip(apart, sums, strict=True):
            gradients[i] = of_all
        if not total:
            self.leave_alone(self.module or type(self.model).__name__, "the gradients of all batches")
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            weight, direction = whole(parameter.detach()), -whole(shared_out_as(parameter, gradient))
            if parameter in self._inputs_first:
                weight, direction = weight.T, direction.T
            shrunk = weight * shrink_factors(weight, direction, self.least)
            shrunk = shrunk.T if parameter in self._inputs_first else shrunk
            self.editor.write([parameter], [part_of(parameter).take(shrunk)])

    def _data(self) -> Iterable[Any]:
        if self._trainer is None:
            assert self.data is not None
            return self.data
        data = trainers_batches(self._trainer, self.averaging) if self.data is None else self.data
        return as_trained_on(self._trainer, data)

    def _loss(self) -> Loss:
        if self.loss is not None:
            return self.loss
        assert self._trainer is not None
        return trainers_loss(self._trainer, self.model)


def _batches(name: str, value: Any) -> Iterable[Any]:
    if isinstance(value, Iterator) or not isinstance(value, Iterable):
        raise ValueError(
            f"{name} must be something to go through more than once, such as a loader or a list of batches, got "
            f"{checks.shown(value)}."
        )
    return value
