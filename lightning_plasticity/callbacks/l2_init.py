"""L2 Init: draw every parameter towards its initial value."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional.l2_init import l2_init_update
from lightning_plasticity.functional.weights import norm


class L2Init(PlasticityCallback):
    r"""L2 Init: after every step, draws every parameter towards its initial value instead of towards 0.

    .. math:: \theta \leftarrow \theta - \eta \lambda (\theta - \theta_0)

    with :math:`\eta` the learning rate that the parameter's group had in that step. This is the penalty
    :math:`\frac{\lambda}{2} \|\theta - \theta_0\|^2` decoupled from the loss, as AdamW decouples weight decay. All
    parameters of the optimizer count that are not frozen, those of normalisation layers and biases as well. The initial
    values are those of when training began; they are kept, and saved in the checkpoint, at the cost of one copy of the
    parameters. Where parameters are in half precision, so is what rounding takes away from the changes, in float32.

    Args:
        coefficient: :math:`\lambda`.
        module: the name of the module inside the model to work on; None for all of it.
        exclude: patterns (as in ``fnmatch``) of names of parameters to leave alone.
        optimizer_state: ``"keep"``, because every weight is nudged at every step, or ``"reset"``.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> method = L2Init(0.5).attach(model, optimizer)
        >>> before = model.bias.item()
        >>> model(torch.zeros(1, 2)).sum().backward()  # a gradient of 1 for the bias
        >>> optimizer.step()
        >>> method.step()
        >>> round(model.bias.item() - before, 4)
        -0.5

    Reference:
        Kumar, Marklund, Van Roy, "Maintaining plasticity in continual learning via regenerative regularization", 2023;
        arXiv 2308.11958.
    """

    def __init__(
        self,
        coefficient: float = 1e-3,
        *,
        module: str | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed)
        self.coefficient = checks.number("coefficient", coefficient, least=0)
        self.exclude = checks.words("exclude", exclude)
        self._parameters_by_name: dict[str, Tensor] = {}
        self._initial: dict[Tensor, Tensor] = {}

    @override
    def _start(self) -> None:
        if not self.optimizers:
            raise ValueError(
                "L2Init needs the optimizer, whose learning rate it follows. Give it to attach(model, optimizer)."
            )
        named = {self.prefix + name: parameter for name, parameter in self.scope.named_parameters()}
        # Frozen ones too: they may be unfrozen, and join the optimizer, while training goes on.
        self._parameters_by_name = {
            name: parameter
            for name, parameter in named.items()
            if parameter.is_floating_point() and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }
        for name, parameter in self._parameters_by_name.items():
            check_editable(parameter, name)  # type: ignore[arg-type]
        self._initial = {parameter: parameter.detach().clone() for parameter in self._parameters_by_name.values()}
        if not any(p in self._initial for o in self.optimizers for group in o.param_groups for p in group["params"]):
            raise ValueError(
                f"L2Init needs parameters that the optimizer trains, but of the {len(named)} in its part of the model "
                f"none is both in the optimizer and not excluded (module={self.module!r}, exclude={self.exclude!r}). "
                "Name another part with module=, or exclude less."
            )

    @override
    def _stop(self) -> None:
        self._parameters_by_name, self._initial = {}, {}

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        assert optimizer is not None, "_start refuses a loop without optimizers"
        for group in optimizer.param_groups:
            values = [p for p in group["params"] if p in self._initial and p.requires_grad]
            if values:
                initial = [self._initial[parameter] for parameter in values]
                update = l2_init_update(self.editor.precise(values), initial, group["lr"] * self.coefficient)
                self.editor.add(values, update)

    @override
    def _state(self) -> dict[str, Any]:
        return {"initial": {name: self._initial[p].clone() for name, p in self._parameters_by_name.items()}}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        initial: dict[str, Tensor] = state["initial"]
        if initial.keys() != self._parameters_by_name.keys():
            raise ValueError(
                "L2Init must resume with the parameters of its checkpoint, but only one of the two has "
                f"{sorted(initial.keys() ^ self._parameters_by_name.keys())}. Resume with the run's model and settings."
            )
        for name, parameter in self._parameters_by_name.items():
            self._initial[parameter].copy_(initial[name])

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        squares = [norm(parameter - initial).square() for parameter, initial in self._initial.items()]
        return {"distance_from_initial": sum(squares[1:], squares[0]).sqrt()}
