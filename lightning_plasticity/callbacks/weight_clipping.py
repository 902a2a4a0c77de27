"""Weight clipping: after every step, keeps weights within a multiple of the bound that they were drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.layers.trained import LayerWeights
from lightning_plasticity.layers.weights import LayerPatterns, find_bias, has_inputs_first, weights_in_words


class WeightClipping(PlasticityCallback):
    r"""Weight clipping: after every step, brings weights and biases back into a multiple of PyTorch's initial bound.

    .. math:: w \leftarrow \min(\max(w, -\kappa s), \kappa s), \qquad s = 1 / \sqrt{d_\text{in}}

    where :math:`d_\text{in}` is the number of inputs of a unit, those of all places of a kernel together: PyTorch draws
    the weights and biases of linear and convolution layers from :math:`[-s, s]`, and this is the bound whatever they
    were drawn from. The last layer is clipped, too. Normalisation layers and embeddings stay, which the authors'
    networks do not have: a scale that starts at 1 is outside of the bounds of most layers.

    Optimizer state stays, as the authors leave it: a bound renews nothing.

    Args:
        kappa: :math:`\kappa`; the authors tried 1 to 5.
        biases: clip biases, too.
        include: patterns (as in ``fnmatch``) of names of layers to work on.
        exclude: patterns of names of layers to leave alone.
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: accepted as by all methods; state always stays.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> method = WeightClipping(kappa=2.0).attach(model)
        >>> model.weight.data = torch.tensor([[-7.0, -0.5, 0.5, 7.0]])
        >>> method.step()
        >>> model.weight.tolist()
        [[-1.0, -0.5, 0.5, 1.0]]

    Reference:
        Elsayed, Lan, Lyle, Mahmood, "Weight clipping for deep continual and reinforcement learning", RLC 2024; arXiv
        2407.01704.
    """

    works_on_parts = True

    def __init__(
        self,
        kappa: float = 1.0,
        *,
        biases: bool = True,
        include: Sequence[str] | str = "*",
        exclude: Sequence[str] | str = (),
        module: str | None = None,
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed)
        self.kappa = checks.number("kappa", kappa, above=0)
        self.biases = checks.flag("biases", biases)
        self.patterns = LayerPatterns(checks.words("include", include), checks.words("exclude", exclude))
        self._limited: dict[Tensor, tuple[float, list[Tensor]]] = {}  # by weight, which is among them

    @override
    def _start(self) -> None:
        self._weights = LayerWeights(type(self).__name__, self.model, self.module or "", self.patterns, self.optimizers)
        for weight, name in self._weights.names.items():
            bias = find_bias(self.model, name) if self.biases else None
            inputs = len(weight) if has_inputs_first(self.model, name) else math.prod(weight.shape[1:])
            limit = self.kappa / math.sqrt(inputs)
            self._limited[weight] = limit, [weight] if bias is None else [weight, bias]

    @override
    def _works_on(self) -> str:
        return weights_in_words(self._weights.names, self.model, self.module or "")

    @override
    def _stop(self) -> None:
        self._limited = {}
        vars(self).pop("_weights", None)

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        limited = [self._limited[w] for _, weights in self._weights.trained_by(optimizer) for w in weights]
        limits = [limit for limit, tensors in limited for _ in tensors]
        self.editor.clamp([tensor for _, tensors in limited for tensor in tensors], limits)
