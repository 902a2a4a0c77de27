"""Parseval regularisation: after every step, draws weight matrices towards being orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.functional.parseval_regularization import (
    gram_of,
    parseval_factor,
    parseval_update,
    times_gram,
)
from lightning_plasticity.kernels import kernels_on
from lightning_plasticity.layers.flow import flow_in
from lightning_plasticity.layers.trained import LayerWeights, by_groups, groups_of, numbers_on, stacked
from lightning_plasticity.layers.weights import LayerPatterns, has_inputs_first, weights_in_words
from lightning_plasticity.names import submodule
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import is_shared_out, shared_out_as, whole
from lightning_plasticity.units.calls import ForwardCall


class ParsevalRegularization(PlasticityCallback):
    r"""Parseval regularisation: after every step, draws each weight matrix towards a multiple of an orthogonal one.

    .. math:: W \leftarrow W - \eta \lambda \left(\frac{64}{d_\text{out}}\right)^2 \nabla_W \|W W^\top - s I\|_F^2

    with :math:`\eta` the learning rate that the weight had in that step. The authors have the penalty in the loss, so
    that it passes through Adam; here it is decoupled, as in AdamO, and their coefficients are not comparable: with
    plain SGD the two are the same. Where a matrix has more rows than columns :math:`W^\top W` takes the place of
    :math:`W W^\top`, which could not be :math:`s I`. A rate so large that a singular value would be thrown past
    :math:`\sqrt s` is held below that.

    It works on the weights of linear, convolution and attention layers, without those that the outputs come from, the
    last layer; biases stay. Kernels of convolutions are flattened to one row for each output, which nothing published
    says. Where the model's parts are called one by one, each has its last layer.

    ``target=1.0, reference_width=None`` is the pull of AdamO. The authors add a trained factor for each unit after each
    layer in one of their experiments, to give back what is taken from the layer; this is left to the model, and so are
    their variants with normalised rows and with groups of units.

    Args:
        coefficient: :math:`\lambda`; 1e-3 and 1e-4 have been published.
        target: :math:`s`, the squared singular values to draw to. The authors' is 2, for networks that start from
            orthogonal matrices with a gain of :math:`\sqrt 2`.
        reference_width: the layer width for which ``coefficient`` is meant: 64; None to take it as it is for all.
        last_layer: work on the layers that the outputs come from, too.
        include: patterns (as in ``fnmatch``) of names of layers to work on.
        exclude: patterns of names of layers to leave alone.
        module: the name of the module inside the model to work on, whose last layer is meant then; None for all of it.
        optimizer_state: ``"keep"``, because every weight is nudged at every step, or ``"reset"``.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> method = ParsevalRegularization(0.01, target=1.0, reference_width=None, last_layer=True)
        >>> method = method.attach(model, optimizer, example_inputs=(torch.ones(1, 2),))
        >>> model.weight.data = torch.diag(torch.tensor([1.0, 2.0]))
        >>> model.weight.grad = torch.zeros(2, 2)
        >>> optimizer.step()
        >>> method.step()
        >>> model.weight.detach()
        tensor([[1.0000, 0.0000],
                [0.0000, 1.7600]])

    References:
        Chung et al., NeurIPS 2024, arXiv 2412.07224; Rosseau, Müller, Nowé, ICML 2026, arXiv 2606.09762 (AdamO).
    """

    works_on_parts = True

    def __init__(
        self,
        coefficient: float = 1e-3,
        *,
        target: float = 2.0,
        reference_width: int | None = 64,
        last_layer: bool = False,
        include: Sequence[str] | str = "*",
        exclude: Sequence[str] | str = (),
        module: str | None = None,
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        question = None if checks.flag("last_layer", last_layer) else flow_in
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed, question=question)
        self.coefficient = checks.number("coefficient", coefficient, least=0)
        self.target = checks.number("target", target, above=0)
        self.reference_width = checks.optional(checks.count, "reference_width", reference_width, least=1)
        self.last_layer = last_layer
        self.patterns = LayerPatterns(checks.words("include", include), checks.words("exclude", exclude))
        self._strengths: dict[Tensor, float] = {}  # of each weight: what the learning rate is multiplied by
        self._last: set[str] = set()  # the layers that the outputs come from

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        reaching = frozenset().union(*part.found.outputs)
        self._last.update(layer.name for layer in part.found.layers if layer.name in reaching)

    @override
    def forget_parts(self) -> None:
        self._last = set()

    @override
    def _grow(self) -> None:
        self._start()  # with more last layers

    @override
    def _start(self) -> None:
        if not self.optimizers:
            raise ValueError(
                "ParsevalRegularization needs the optimizer, whose learning rate it follows. "
                "Give it to attach(model, optimizer)."
            )
        last = {parameter for name in self._last for parameter in submodule(self.model, name).parameters()}
        self._weights = LayerWeights(
            type(self).__name__, self.model, self.module or "", self.patterns, self.optimizers, last
        )
        self._strengths = {weight: self._strength(weight, name) for weight, name in self._weights.names.items()}

    @override
    def _works_on(self) -> str:
        return weights_in_words(self._weights.names, self.model, self.module or "")

    @override
    def _stop(self) -> None:
        self._last, self._strengths = set(), {}
        vars(self).pop("_weights", None)

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        for rate, weights in self._weights.trained_by(optimizer):
            values = dict(zip(weights, self.editor.precise(weights), strict=True))
            updates: dict[Tensor, Tensor] = {}
            for weight, value in values.items():
                if is_shared_out(weight):
                    updates[weight] = self._update_of_part(weight, value, rate)
            held = [weight for weight in weights if weight not in updates]
            matrices, strengths = [values[w].flatten(1) for w in held], [self._strengths[w] for w in held]
            found = self._updates(matrices, strengths, rate)
            updates.update((w, update.view(w.shape)) for w, update in zip(held, found, strict=True))
            self.editor.add(weights, [updates[weight] for weight in weights])

    def _strength(self, weight: Tensor, name: str) -> float:
        if self.reference_width is None:
            return self.coefficient
        outputs = weight.shape[1 if has_inputs_first(self.model, name) else 0]
        return self.coefficient * (self.reference_width / outputs) ** 2

    def _updates(self, matrices: list[Tensor], strengths: Sequence[float], rate: Tensor | float) -> list[Tensor]:
        """What to add to whole matrices: two products for each group of one shape, and the rest for all together."""
        kernels = None if not matrices or matrices[0].is_cpu else kernels_on(matrices[0].device.type)
        if kernels is None or not all(kernels.suit(m.dtype, 0) and m.device == matrices[0].device for m in matrices):
            return by_groups(lambda m, strength: parseval_update(m, rate * strength, self.target), matrices, strengths)
        groups = groups_of(matrices, [None] * len(matrices))
        order = [place for places in groups for place in places]
        stacks = [stacked([matrices[place] for place in places]) for places in groups]
        grams = [gram_of(stack) for stack in stacks]
        norms = torch.stack(torch._foreach_norm([gram for stack in grams for gram in stack.unbind()]))
        rates = numbers_on(norms.device, tuple(strengths[place] for place in order)) * rate
        kernels.scale_from_diagonal(grams, self.target, parseval_factor(norms, rates, self.target))
        updates = [*matrices]
        for places in groups:  # what is done with is let go, so that there is never much more than the updates
            products = times_gram(grams.pop(0), stacks.pop(0))
            for place, update in zip(places, products.unbind(), strict=True):
                updates[place] = update
        return updates

    def _update_of_part(self, weight: Tensor, value: Tensor, rate: Tensor | float) -> Tensor:
        """What to add to the part of a weight that is here, whose value this is."""
        matrix = whole(shared_out_as(weight, value)).flatten(1)
        update = parseval_update(matrix, rate * self._strengths[weight], self.target)
        return part_of(weight).take(update.view(weight.shape))
