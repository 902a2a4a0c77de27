"""Shrink & Perturb: at a boundary, shrink all weights and mix in fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, InitName
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.functional.shrink_and_perturb import shrink_and_perturb
from lightning_plasticity.shards.parts import held_of
from lightning_plasticity.shards.tensors import for_state, local


class ShrinkAndPerturb(ScheduledCallback):
    r"""Shrink & Perturb: at a boundary, such as the arrival of new data, shrinks all weights and mixes in fresh ones.

    .. math:: W \leftarrow s \, W + p \, W_\text{new}

    with :math:`W_\text{new}` a new draw from the initial distribution. All trained parameters count, those of
    normalisation layers and biases as well; running statistics stay, and follow by themselves. Of several optimizers
    each one's steps count for the parameters that it trains. Where parameters are in half precision and
    ``every_n_train_steps`` is given, what rounding takes away from small changes is kept in float32, and saved in the
    checkpoint.

    Several methods go by this name:

    - The authors', at a boundary: their code has ``ShrinkAndPerturb(0.4, 0.1, init="reset_parameters")``.
    - With one parameter :math:`l`: ``shrink=1 - l, perturb=l``; the soft form is that with a small :math:`l` and
      ``every_n_train_steps=1``.
    - Dohare et al.'s, L2 regularisation and noise of standard deviation :math:`\sigma` on all weights at every step:
      weight decay in the optimizer and ``ShrinkAndPerturb(1.0, 1.0, every_n_train_steps=1, init=noise,
      optimizer_state="keep")``, with ``noise = functools.partial(torch.nn.init.normal_, std=sigma)``.
    - A blend with the saved start of the very same weights, as in FIRE and Hare & Tortoise: ``init="start"``, for
      instance with 0.2 and 0.8.

    Args:
        shrink: :math:`s`.
        perturb: :math:`p`.
        every_n_epochs: act after every so many epochs, when the next one begins.
        every_n_train_steps: act after every so many optimizer steps.
        on_fit_start: act once when a fit starts, if it does not go on from a checkpoint in which that was done.
        init: the initial distribution: ``"empirical"``, a normal one with the mean and standard deviation that each
            parameter had when the method was first attached; ``"reset_parameters"``, what the modules themselves draw,
            which is needed where the method first meets a model that is trained already; ``"start"``, the very values
            that each parameter had when the method was first attached, of which a copy is kept and saved in the
            checkpoint; or a function, see :class:`~lightning_plasticity.editing.initial.InitialDistribution`.
        module: the name of the module inside the model to work on; None for all of it.
        exclude: patterns (as in ``fnmatch``) of names of parameters to leave alone.
        optimizer_state: ``"reset"``: the optimizer begins anew with what is written, its counts of steps too;
            ``"survivors"`` is the same here, for whole tensors leave none; ``"keep"`` leaves its state. None takes
            ``"keep"`` for a nudge, which acts at every step or leaves at least 0.9 of the weights, and ``"reset"`` for
            more: an optimizer that began anew at every step would never get beyond its first one.
        seed: of the draws, which are equal on every rank; None takes rank 0's current seed.

    Example:
        >>> model = nn.LayerNorm(2)  # which starts from 1 and 0
        >>> model.weight.data.fill_(5.0)
        tensor([5., 5.])
        >>> method = ShrinkAndPerturb(0.5, 0.1, on_fit_start=True, init="reset_parameters").attach(model)
        >>> model.weight.data
        tensor([2.6000, 2.6000])

    Reference:
        Ash, Adams, "On warm-starting neural network training", NeurIPS 2020; arXiv 1910.08475.
    """

    works_on_parts = True

    def __init__(
        self,
        shrink: float = 0.6,
        perturb: float = 0.4,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        on_fit_start: bool = False,
        init: Init | Literal["start"] = "empirical",
        module: str | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState | None = None,
        seed: int | None = None,
    ) -> None:
        schedule = Schedule(every_n_train_steps, every_n_epochs, on_fit_start)
        if optimizer_state is None:
            is_nudge = every_n_train_steps == 1 or checks.number("shrink", shrink, least=0) >= 0.9
            optimizer_state = "keep" if is_nudge else "reset"
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        self.shrink = checks.number("shrink", shrink, least=0)
        self.perturb = checks.number("perturb", perturb, least=0)
        known = (*get_args(InitName), "start")
        self.init = init if callable(init) else checks.choice("init", init, known, other="a function or ")
        self.exclude = checks.words("exclude", exclude)

    @override
    def _start(self) -> None:
        # Not only the trained ones: a frozen parameter may be trained later, from the values that it has now.
        self._names = [
            self.prefix + name
            for name, parameter in self.scope.named_parameters()
            if parameter.is_floating_point()
            and not any(fnmatchcase(self.prefix + name, pattern) for pattern in self.exclude)
        ]
        if not self._names:
            raise ValueError(
                f"ShrinkAndPerturb needs parameters to work on, but none is left (module={self.module!r}, "
                f"exclude={self.exclude!r}). Name another part of the model with module=, or exclude less."
            )
        for name in self._names:
            check_editable(self.model.get_parameter(name), name)
        starts = self._names if self.init == "start" else ()
        self._starts = {name: self.model.get_parameter(name).detach().clone() for name in starts}
        drawn = self._names if self.init != "start" else ()
        self._initial = InitialDistribution(self.model, drawn, "empirical" if self.init == "start" else self.init)

    @override
    def _works_on(self) -> str:
        return f"{len(self._names)} parameters."

    @override
    def _act(self) -> None:
        due = self._due()
        trained = [name for name in self._names if id(self.model.get_parameter(name)) in due]
        parameters: list[nn.Parameter] = [self.model.get_parameter(name) for name in trained]
        fresh = [
            local(self._starts[name]) if self._starts else self._initial.draw(name, self.draws.generator(p.device))
            for name, p in zip(trained, parameters, strict=True)
        ]
        if parameters:  # or all belong to an optimizer that has not stepped
            # Where steps are counted the changes may be small and many, so that what rounding takes away is kept.
            is_repeated = self.schedule.every_n_train_steps is not None
            values = self.editor.precise(parameters) if is_repeated else list(map(local, parameters))
            self.editor.write(parameters, shrink_and_perturb(values, fresh, self.shrink, self.perturb))

    @override
    def _state(self) -> dict[str, Any]:
        starts = {name: for_state(start) for name, start in self._starts.items()}
        return super()._state() | {"initial": self._initial.state_dict(), "starts": starts}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._initial.load_state_dict(state["initial"])
        starts: dict[str, Tensor] = state.get("starts", {})  # which older checkpoints lack
        if starts.keys() != self._starts.keys():
            raise ValueError(
                "ShrinkAndPerturb must resume with the parameters of its checkpoint, but only one of the two kept the "
                f"start of {sorted(starts.keys() ^ self._starts.keys())}. Resume with the run's model and settings."
            )
        for name, start in starts.items():
            local(self._starts[name]).copy_(held_of(start, self._starts[name]))
