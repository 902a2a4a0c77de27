"""Spectral regularisation: after every step, draws the largest singular value of weight matrices towards 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional.spectral_regularization import (
    lengths_and_directions,
    outer,
    spectral_step,
    times_columns,
    times_rows,
    vector_factor,
)
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.layers.trained import LayerWeights, by_groups, each_times
from lightning_plasticity.layers.weights import LayerPatterns, find_bias, find_norm_parameters, weights_in_words
from lightning_plasticity.shards.parts import Part, part_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import is_shared_out


class SpectralRegularization(PlasticityCallback):
    r"""Spectral regularisation: after every step, draws the largest singular value of each weight matrix towards 1.

    .. math:: W \leftarrow W - 2 \eta \lambda k \, \sigma^{k-1} (\sigma^k - 1) \, u v^\top

    with :math:`\eta` the learning rate that the weight had in that step. This is the step that the penalty
    :math:`\lambda (\sigma^k - 1)^2` calls for, decoupled from the loss, where the paper has it: with plain SGD the two
    are the same, with Adam coefficients are not comparable. A step never goes past 1, however large the coefficient.
    The singular value and its vectors :math:`u` and :math:`v` come from one power iteration a step, which goes on from
    those of the step before; a value below 1 is drawn up. Kernels of convolutions are flattened to one row for each
    output: their singular value is not that of the convolution.

    Biases are drawn to 0 by the penalty :math:`\lambda \|b\|^{2k}`, and so are the shifts of normalisation layers and
    the distance of their scales from 1. Unconfirmed, because the authors' code was not found: the exponent of biases,
    how normalisation layers are weighed, and that the last layer counts.

    Args:
        coefficient: :math:`\lambda`; about 1e-5 to 1e-2 have been tried (unconfirmed).
        power: :math:`k`.
        biases: draw biases to 0.
        norms: draw the scales of normalisation layers to 1 and their shifts to 0.
        include: patterns (as in ``fnmatch``) of names of layers to work on.
        exclude: patterns of names of layers to leave alone.
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: ``"keep"``, because every weight is nudged at every step, or ``"reset"``.
        seed: of the vectors that power iterations start from, equal on every rank; None takes rank 0's current seed.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.weight.data.fill_(2.0)
        tensor([[2.]])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> method = SpectralRegularization(0.01).attach(model, optimizer)
        >>> model.weight.grad = torch.zeros(1, 1)
        >>> optimizer.step()
        >>> method.step()
        >>> round(model.weight.item(), 4)
        1.76

    Reference:
        Lewandowski et al., ICLR 2025; arXiv 2406.06811.
    """

    works_on_parts = True

    def __init__(
        self,
        coefficient: float = 1e-3,
        *,
        power: int = 2,
        biases: bool = True,
        norms: bool = True,
        include: Sequence[str] | str = "*",
        exclude: Sequence[str] | str = (),
        module: str | None = None,
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed)
        self.coefficient = checks.number("coefficient", coefficient, least=0)
        self.power = checks.count("power", power, least=1)
        self.biases = checks.flag("biases", biases)
        self.norms = checks.flag("norms", norms)
        self.patterns = LayerPatterns(checks.words("include", include), checks.words("exclude", exclude))
        self._left: dict[Tensor, Tensor] = {}  # of each weight
        self._targets: dict[Tensor, float] = {}  # of each vector
        self._together = Tensors([])  # matrices that kernels work on

    @override
    def _start(self) -> None:
        if not self.optimizers:
            raise ValueError(
                "SpectralRegularization needs the optimizer, whose learning rate it follows. "
                "Give it to attach(model, optimizer)."
            )
        self._weights = LayerWeights(type(self).__name__, self.model, self.module or "", self.patterns, self.optimizers)
        for weight, name in self._weights.names.items():
            wide = torch.promote_types(weight.dtype, torch.float32)
            generator = self.draws.generator(weight.device)
            start = torch.randn(len(weight), generator=generator, device=weight.device, dtype=wide)
            self._left[weight] = start / torch.linalg.vector_norm(start)
            bias = find_bias(self.model, name) if self.biases else None
            if bias is not None:
                self._targets[bias] = 0.0
        for name, parameter in find_norm_parameters(self.model, self.module or "").items() if self.norms else ():
            layer, _, own_name = name.rpartition(".")
            if self.patterns.mean(layer):
                check_editable(parameter, name)
                self._targets[parameter] = 1.0 if own_name == "weight" else 0.0

    @override
    def _works_on(self) -> str:
        return weights_in_words(self._weights.names, self.model, self.module or "")

    @override
    def _stop(self) -> None:
        self._left, self._targets, self._together = {}, {}, Tensors([])
        vars(self).pop("_weights", None)

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        assert optimizer is not None, "_start refuses a loop without optimizers"
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        rates: dict[Tensor, Tensor | float] = {}
        for group in optimizer.param_groups:
            rate = group["lr"] * self.coefficient
            own = [p for p in group["params"] if p.requires_grad and (p in self._left or p in self._targets)]
            matrices += [p for p in own if p in self._left]
            vectors += [p for p in own if p not in self._left]
            rates |= dict.fromkeys(own, rate)
        trained = [*matrices, *vectors]
        values = self.editor.precise(trained)
        parts = [Part(v, part_of(p).layout) for p, v in zip(matrices, values[: len(matrices)], strict=True)]
        distances = [*values[len(matrices) :]]
        if vectors:
            distances = [*torch._foreach_sub(distances, [self._targets[p] for p in vectors])]
        self.editor.add(trained, self._steps(matrices, parts, vectors, distances, rates))

    def _steps(
        self,
        matrices: Sequence[Tensor],
        parts: Sequence[Part],
        vectors: Sequence[Tensor],
        distances: list[Tensor],
        rates: Mapping[Tensor, Tensor | float],
    ) -> list[Tensor]:
        """What to add to the parts that are here. Where parameters are shared out, two messages go to all ranks."""
        norms = torch._foreach_norm(distances) if vectors else ()
        squares = [*torch._foreach_mul(norms, norms)] if vectors else []
        if matrices and (kernels := self._kernels([part.local for part in parts])) is not None:
            steps, sums = self._steps_by_kernels(kernels, matrices, rates), sum_over_shards(squares, vectors)
        else:
            products = [times_columns(part, self._left[p]) for p, part in zip(matrices, parts, strict=True)]
            sums = sum_over_shards([*products, *squares], [*matrices, *vectors])
            steps = self._matrix_steps(matrices, parts, sums[: len(matrices)], rates) if matrices else []
            sums = sums[len(matrices) :]
        factors = by_groups(partial(vector_factor, power=self.power), sums, [rates[p] for p in vectors])
        return [*steps, *each_times(distances, factors)]

    def _kernels(self, values: Sequence[Tensor]) -> ModuleType | None:
        """Those for whole matrices on an accelerator."""
        if values[0].is_cpu or any(map(is_shared_out, self._left)):
            return None
        if not self._together.are(values):
            self._together = Tensors(values, in_order=True)
        return self._together.kernels()

    def _steps_by_kernels(
        self, kernels: ModuleType, matrices: Sequence[Tensor], rates: Mapping[Tensor, Tensor | float]
    ) -> list[Tensor]:
        """What to add to whole matrices: a launch does one product for all of them."""
        lefts = torch.cat([self._left[p] for p in matrices])
        sigmas, lefts, rights = kernels.power_iteration(self._together, lefts)
        self._left |= zip(matrices, lefts.split([len(p) for p in matrices]), strict=True)
        step, each = partial(spectral_step, power=self.power), [rates[p] for p in matrices]
        moves = torch.stack(by_groups(step, sigmas.unbind(), each))
        sizes = [p.numel() for p in matrices]
        steps = kernels.outer_products(self._together, lefts, rights, moves)
        return [step.view(p.shape) for p, step in zip(matrices, steps.split(sizes), strict=True)]

    def _matrix_steps(
        self,
        matrices: Sequence[Tensor],
        parts: Sequence[Part],
        products: list[Tensor],
        rates: Mapping[Tensor, Tensor | float],
    ) -> list[Tensor]:
        """What to add to the parts of matrices, whose products with the vectors on the left these are."""
        _, rights = lengths_and_directions(products)
        own = [times_rows(part, right) for part, right in zip(parts, rights, strict=True)]
        sigmas, lefts = lengths_and_directions(sum_over_shards(own, matrices))
        each = [rates[p] for p in matrices]
        moves = by_groups(partial(spectral_step, power=self.power), sigmas, each)
        have_directions = by_groups(lambda sigma, _: sigma > 0, sigmas, each)
        for weight, left, has_direction in zip(matrices, lefts, have_directions, strict=True):
            self._left[weight] = torch.where(has_direction, left, self._left[weight])
        scaled = torch._foreach_mul([self._left[p] for p in matrices], moves)
        return [outer(part, left, right) for part, left, right in zip(parts, scaled, rights, strict=True)]

    @override
    def _state(self) -> dict[str, Any]:
        return {"left": {name: self._left[weight].clone() for weight, name in self._weights.names.items()}}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        left: dict[str, Tensor] = state["left"]
        known = set(self._weights.names.values())
        if left.keys() != known:
            raise ValueError(
                "SpectralRegularization must resume with the weights of its checkpoint, but only one of the two has "
                f"{sorted(left.keys() ^ known)}. Resume with the run's model and settings."
            )
        for weight, name in self._weights.names.items():
            self._left[weight] = left[name].to(self._left[weight], copy=True)
