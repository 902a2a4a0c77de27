"""L2 Init: draw every parameter towards its initial value, or towards the initial value of the same rank."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_editable, check_finite
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional.l2_init import at_the_same_rank, l2_init_update
from lightning_plasticity.functional.weights import norm
from lightning_plasticity.layers.weights import find_norm_parameters
from lightning_plasticity.shards.parts import held_of, part_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import for_state, gradient, local, shared_out_as, whole

Match: TypeAlias = Literal["position", "sorted"]


class L2Init(PlasticityCallback):
    r"""L2 Init: after every step, draws every parameter towards its initial value instead of towards 0.

    .. math:: \theta \leftarrow \theta - \eta \lambda (\theta - \theta_0)

    with :math:`\eta` the learning rate that the parameter's group had in that step. This is the penalty
    :math:`\frac{\lambda}{2} \|\theta - \theta_0\|^2` decoupled from the loss, as AdamW decouples weight decay. All
    parameters of the optimizer count that are not frozen, those of normalisation layers and biases as well. The initial
    values are those of when training began; they are kept, and saved in the checkpoint, at the cost of one copy of the
    parameters. Where parameters are in half precision, so is what rounding takes away from the changes, in float32.

    The authors have the penalty in the loss, so that it passes through Adam, and leave normalisation layers out:
    ``decoupled=False, norms=False``. Their coefficients are not comparable with those of the decoupled form, except
    with plain SGD; and their text has :math:`\lambda \|\theta - \theta_0\|^2`, twice what their code and this class
    have.

    ``match="sorted"`` is Wasserstein regularisation: each weight is drawn to the initial value of the same rank in its
    tensor, the smallest to the smallest, and so on. That holds the distribution of the weights, and leaves them free to
    change places. Sorting takes time, which ``every_n_train_steps`` saves; where parameters are shared out among ranks,
    each is put together for it, one at a time.

    Args:
        coefficient: :math:`\lambda`; 1e-3 has been published for the sorted form.
        match: ``"position"``, each weight to its own initial value, or ``"sorted"``.
        decoupled: draw the parameters themselves; False to add the penalty's gradient to theirs right before the
            optimizer steps, after they were clipped.
        norms: draw the parameters of normalisation layers, too.
        every_n_train_steps: act after every so many optimizer steps, as many times as strongly.
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

    References:
        Kumar, Marklund, Van Roy, "Maintaining plasticity in continual learning via regenerative regularization", 2023;
        arXiv 2308.11958. Lewandowski et al., "Directions of curvature as an explanation for loss of plasticity", 2023;
        arXiv 2312.00246 (the sorted form).
    """

    works_on_parts = True

    def __init__(
        self,
        coefficient: float = 1e-3,
        *,
        match: Match = "position",
        decoupled: bool = True,
        norms: bool = True,
        every_n_train_steps: int = 1,
        module: str | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed)
        self.coefficient = checks.number("coefficient", coefficient, least=0)
        self.match: Match = checks.choice("match", match, get_args(Match))
        self.decoupled = checks.flag("decoupled", decoupled)
        self.norms = checks.flag("norms", norms)
        self.every_n_train_steps = checks.count("every_n_train_steps", every_n_train_steps, least=1)
        if not decoupled and self.every_n_train_steps > 1:
            raise ValueError(
                "decoupled=False needs every_n_train_steps=1, because the penalty is in the gradient of each step, got "
                f"{every_n_train_steps}. Leave one of the two out."
            )
        self.exclude = checks.words("exclude", exclude)
        self._parameters_by_name: dict[str, Tensor] = {}
        self._initial: dict[Tensor, Tensor] = {}  # in order with match="sorted"; shared out as the parameters are
        self._steps: list[int] = []  # of each optimizer

    @override
    def _start(self) -> None:
        if not self.optimizers:
            raise ValueError(
                "L2Init needs the optimizer, whose learning rate it follows. Give it to attach(model, optimizer)."
            )
        named = {self.prefix + name: parameter for name, parameter in self.scope.named_parameters()}
        # not by name, for those of a compiled module are others
        left_out = set() if self.norms else {*find_norm_parameters(self.model, self.module or "").values()}
        # Frozen ones too: they may be unfrozen, and join the optimizer, while training goes on.
        self._parameters_by_name = {
            name: parameter
            for name, parameter in named.items()
            if parameter.is_floating_point()
            and parameter not in left_out
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }
        for name, parameter in self._parameters_by_name.items():
            check_editable(parameter, name)  # type: ignore[arg-type]
        check_finite(self._parameters_by_name, "L2Init needs")
        self._initial = {parameter: self._target(parameter) for parameter in self._parameters_by_name.values()}
        self._steps = [0] * len(self.optimizers)
        if not any(p in self._initial for o in self.optimizers for group in o.param_groups for p in group["params"]):
            raise ValueError(
                "L2Init needs parameters that the optimizer trains, but in its part of the model none is both in the "
                f"optimizer and not excluded (module={self.module!r}, exclude={self.exclude!r}). "
                "Name another part with module=, or exclude less."
            )
        for optimizer in self.optimizers if not self.decoupled else ():
            self.keep(optimizer.register_step_pre_hook(self._before_update))

    def _target(self, parameter: Tensor) -> Tensor:
        """What is kept of a parameter's initial value."""
        start = parameter.detach()
        if self.match == "position":
            return start.clone()
        ordered = whole(start).flatten().sort().values.view(start.shape)
        return shared_out_as(parameter, part_of(parameter).take(ordered))

    def _aims(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """What the parts on this rank of each of the parameters are drawn to, given their values."""
        if self.match == "position":
            return [local(self._initial[parameter]) for parameter in parameters]
        return [self._aim_in_order(*pair) for pair in zip(parameters, values, strict=True)]

    def _aim_in_order(self, parameter: Tensor, value: Tensor) -> Tensor:
        ordered = whole(self._initial[parameter]).flatten()
        return part_of(parameter).take(at_the_same_rank(whole(shared_out_as(parameter, value)), ordered))

    @override
    def _works_on(self) -> str:
        return f"{len(self._initial)} parameters."

    @override
    def _stop(self) -> None:
        self._parameters_by_name, self._initial = {}, {}

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        assert optimizer is not None, "_start refuses a loop without optimizers"
        which = self.optimizers.index(optimizer)
        self._steps[which] += 1
        if not self.decoupled or self._steps[which] % self.every_n_train_steps:
            return
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p in self._initial and p.requires_grad]
            if parameters:
                rate = group["lr"] * self.coefficient * self.every_n_train_steps
                if self.match == "position":
                    self.editor.draw_towards(parameters, self._aims(parameters, parameters), rate)
                else:
                    values = self.editor.precise(parameters)
                    self.editor.add(parameters, l2_init_update(values, self._aims(parameters, values), rate))

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Runs when ``optimizer.step()`` begins, and adds the penalty to the gradients, or to those of its closure."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_to_gradients(optimizer)
            return None

        def with_penalty(*given: Any) -> Any:
            result = closure(*given)
            self._add_to_gradients(optimizer)
            return result

        return args[:1], {**kwargs, "closure": with_penalty}

    @torch.no_grad()
    def _add_to_gradients(self, optimizer: Optimizer) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p in self._initial]
        parameters = [p for p in trained if p.grad is not None]
        for parameter in parameters:
            parameter.grad = gradient(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if any(of_one.is_sparse for of_one in gradients):
            raise RuntimeError(
                "L2Init(decoupled=False) needs dense gradients, but one of an embedding with sparse=True is not. Use "
                "decoupled=True, or exclude the embedding."
            )
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it inside its kernel
        rate = self.coefficient * (1.0 if scale is None else scale)
        if parameters:
            values = list(map(local, parameters))
            update = l2_init_update(values, self._aims(parameters, values), -rate)
            torch._foreach_add_(list(map(local, gradients)), update)

    @override
    def _state(self) -> dict[str, Any]:
        initial = {name: for_state(self._initial[p]) for name, p in self._parameters_by_name.items()}
        return {"initial": initial, "steps": list(self._steps)}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        initial: dict[str, Tensor] = state["initial"]
        if initial.keys() != self._parameters_by_name.keys():
            raise ValueError(
                "L2Init must resume with the parameters of its checkpoint, but only one of the two has "
                f"{sorted(initial.keys() ^ self._parameters_by_name.keys())}. Resume with the run's model and settings."
            )
        for name, parameter in self._parameters_by_name.items():
            target, saved = self._initial[parameter], initial[name]
            if self.match == "sorted":
                saved = saved.view(target.shape)  # version 0.1.0 saved it flat
            local(target).copy_(held_of(saved, target))
        self._steps = list(state.get("steps", self._steps))  # which older checkpoints lack

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        parameters = list(self._initial)
        values = list(map(local, parameters))
        aims = self._aims(parameters, values)
        squares = [norm(value - aim).square() for value, aim in zip(values, aims, strict=True)]
        return {"distance_from_initial": torch.stack(sum_over_shards(squares, parameters)).sum().sqrt()}
