"""FIRE: at a boundary, every weight matrix becomes the isometry nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.functional.isometry_reinit import nearest_isometry
from lightning_plasticity.layers.matrices import FUSED, Matrices
from lightning_plasticity.layers.weights import LayerPatterns, find_weights, weights_in_words
from lightning_plasticity.names import submodule
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import whole


class IsometryReinit(ScheduledCallback):
    r"""FIRE: at a boundary, such as the arrival of new data, makes every weight matrix the isometry nearest to it.

    .. math:: W \leftarrow \sqrt{\frac{d_\text{out}}{d_\text{in}}} \, W (W^\top W)^{-1/2}

    It keeps what the network has learned as far as directions go, and makes all of them equally strong. It works on the
    weights of linear, convolution and attention layers, the last one too; biases, normalisation layers and embeddings
    stay. Of a convolution each place of the kernel is a matrix of its own, divided by the number of places as well.
    Each group of a convolution, and queries, keys and values, are matrices of their own. Depthwise convolutions, which
    have no matrices, and matrices that are 0 stay as they are.

    With ``iterations``, as published, large square matrices do **not** become isometries: after 10 iterations 37 % of
    the singular values of a Gaussian matrix of 256 by 256 are below 0.99, and 70 % of one of 1024 by 1024; after 5,
    which the paper calls enough, the matrix as a whole is several times too small. One that is far from square, such as
    100 by 400, is an isometry after 10. ``exact=True`` gives the isometry itself.

    The authors make vision transformers' queries and keys isometries only: for that, name their layers with
    ``include``. In their experiments the optimizer starts anew at the boundary, except in Atari games.

    Args:
        iterations: of the published approximation; 10 and 5 have been published.
        exact: find the nearest isometry by singular value decomposition instead.
        every_n_epochs: act after every so many epochs, when the next one begins.
        every_n_train_steps: act after every so many optimizer steps.
        on_fit_start: act once when a fit starts, if it does not go on from a checkpoint in which that was done.
        fused: how many matrices a weight holds one above the other, by patterns (as in ``fnmatch``) of its name; the
            first that fits counts. By default 3 for queries, keys and values as PyTorch and timm name them.
        include: patterns of names of layers to work on.
        exclude: patterns of names of layers to leave alone.
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: ``"reset"`` clears the optimizer's state of what is written, ``"keep"`` leaves it.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> method = IsometryReinit(exact=True, on_fit_start=True).attach(model)
        >>> (model.weight @ model.weight.T).detach().round(decimals=4).abs()
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 1.]])

    Reference:
        Han, Park, Oh, Kim, Lee, Kim, ICLR 2026; arXiv 2602.08040.
    """

    works_on_parts = True

    def __init__(
        self,
        iterations: int = 10,
        *,
        exact: bool = False,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        on_fit_start: bool = False,
        fused: Mapping[str, int] | None = None,
        include: Sequence[str] | str = "*",
        exclude: Sequence[str] | str = (),
        module: str | None = None,
        optimizer_state: OptimizerState = "reset",
        seed: int | None = None,
    ) -> None:
        schedule = Schedule(every_n_train_steps, every_n_epochs, on_fit_start)
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        self.iterations = checks.count("iterations", iterations, least=1)
        self.exact = checks.flag("exact", exact)
        self.fused = _checked(FUSED if fused is None else fused)
        self.patterns = LayerPatterns(checks.words("include", include), checks.words("exclude", exclude))
        self._weights: dict[str, nn.Parameter] = {}
        self._matrices: dict[str, Matrices] = {}

    @override
    def _start(self) -> None:
        found = find_weights(self.model, self.module or "", self.patterns)
        layers = {name: submodule(self.model, name.rpartition(".")[0]) for name in found}
        matrices = {name: Matrices.of(layers[name], name, weight, self.fused) for name, weight in found.items()}
        self._matrices = {name: of_weight for name, of_weight in matrices.items() if not of_weight.is_depthwise}
        self._weights = {name: found[name] for name in self._matrices}
        due = self._due()
        if not any(id(weight) in due for weight in self._weights.values()):
            raise ValueError(
                "IsometryReinit needs weights of linear, attention or convolution layers that are trained and not "
                f"depthwise, but {self.patterns.why_none(self._weights, self.scope)}. "
                "Unfreeze some, hand them to the optimizer, or change include=, exclude= or module=."
            )

    @override
    def _works_on(self) -> str:
        return weights_in_words(self._weights.values(), self.model, self.module or "")

    @override
    def _stop(self) -> None:
        self._weights, self._matrices = {}, {}

    @override
    def _act(self) -> None:
        due = self._due()
        for name, weight in self._weights.items():  # one by one: no second copy of the model is needed
            if id(weight) in due:
                isometry = self._isometry(self._matrices[name], whole(weight))
                self.editor.write([weight], [part_of(weight).take(isometry)])

    def _isometry(self, matrices: Matrices, weight: Tensor) -> Tensor:
        old = matrices.split(weight)
        outputs, inputs = old.shape[-2:]
        scale = (outputs / inputs) ** 0.5 / matrices.places
        return matrices.join(nearest_isometry(old, None if self.exact else self.iterations, scale))


def _checked(fused: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(fused, Mapping):
        raise ValueError(
            f"fused must be a dict from patterns of names to numbers, got {checks.shown(fused)}. Write it as "
            "{'*qkv.weight': 3}, or leave it out."
        )
    return {checks.word("fused", name): checks.count("fused", number, least=1) for name, number in fused.items()}
