"""Layer reset: redraw the last layers every so often."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import Init, InitialDistribution, check_init
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.layers.flow import flow_in
from lightning_plasticity.names import named_modules_as_written, original, submodule
from lightning_plasticity.notices import warn
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.channels import is_norm


class LayerReset(ScheduledCallback):
    r"""Layer reset, or head reset: redraws the last layers from their initial distribution, every so often.

    Normalisation layers go back to their initial values, running statistics included.

    Args:
        layers: the name of a module, or several, or how many of the last layers with weights. Those are counted in the
            order of the forward pass, and the normalisation layers between and after them are reset too; layers that
            are frozen, or belong to no optimizer, are passed over.
        every_n_epochs: act after every so many epochs, when the next one begins.
        every_n_train_steps: act after every so many optimizer steps.
        on_fit_start: act once when a fit starts, if it does not go on from a checkpoint in which that was done. Needs
            layers by name.
        init: where new values come from: ``"empirical"``, a normal distribution with the mean and standard deviation
            that each parameter had when the method was first attached, or another of
            :class:`~lightning_plasticity.editing.initial.InitialDistribution`.
        module: the name of the module in which ``layers`` are counted; None for the whole model. Names in ``layers``
            are complete all the same.
        optimizer_state: ``"reset"``: the optimizer begins anew with what is written, its counts of steps too;
            ``"survivors"`` is the same here, for whole tensors leave none; ``"keep"`` leaves its state.
        seed: of the draws, which are equal on every rank; None takes rank 0's current seed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> before = [parameter.detach().clone() for parameter in model.parameters()]
        >>> method = LayerReset("2", on_fit_start=True).attach(model)
        >>> [torch.equal(old, new) for old, new in zip(before, model.parameters())]
        [True, True, False, False]

    Reference:
        Nikishin et al., "The primacy bias in deep reinforcement learning", ICML 2022; arXiv 2205.07802.
    """

    works_on_parts = True

    def __init__(
        self,
        layers: int | str | Sequence[str] = 1,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        on_fit_start: bool = False,
        init: Init = "empirical",
        module: str | None = None,
        optimizer_state: OptimizerState = "reset",
        seed: int | None = None,
    ) -> None:
        # A word is a name; what is no collection of names is to be a number.
        by_number = not isinstance(layers, Iterable)
        chosen = checks.count("layers", layers, least=1) if by_number else checks.words("layers", layers)
        schedule = Schedule(every_n_train_steps, every_n_epochs, on_fit_start)
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        if not chosen:
            raise ValueError(f"layers must be a number, or names of modules, got {layers!r}. Name at least one.")
        if by_number and on_fit_start:
            raise ValueError(
                f"on_fit_start=True needs layers by name, got layers={layers!r}: which are the last ones is only seen "
                "in the first training batch."
            )
        self.layers: int | tuple[str, ...] = chosen
        self.init = check_init(init)
        self._called: list[str] = []
        self._chosen: list[str] = []

    @override
    def _attach(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        # What is known from a checkpoint or from the last fit need not be seen again: it may be due at the first batch.
        is_same = self._saved_of is None or self._saved_of() is original(model)
        self.question = flow_in if isinstance(self.layers, int) and not (self._saved and is_same) else None
        super()._attach(model, optimizers)

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        self._called += [layer.name for layer in part.found.layers]

    @override
    def forget_parts(self) -> None:
        self._called = []

    @override
    def _grow(self) -> None:
        warn(
            "LayerReset counts the last layers among those that were called before the first step, and resets "
            f"{checks.few(self._chosen)}. Training calls others only now. If these are meant, name them with layers=."
        )

    @override
    def _works_on(self) -> str:
        parts = f"{len(self._names)} parameters and {len(self._norms)} normalisation layers"
        return f"{checks.few(self._chosen)}, with {parts}."

    @override
    def _stop(self) -> None:
        self._called = []

    @override
    def _start(self) -> None:
        modules = dict(named_modules_as_written(self.model))
        self._chosen = self._choose(modules)
        inside = {
            name: module
            for chosen in self._chosen
            for name, module in modules.items()
            if name == chosen or name.startswith(f"{chosen}.")
        }
        self._norms = [name for name, module in inside.items() if is_norm(module) and _has_entries(module)]
        self._refuse(inside, modules)
        drawn = {
            id(parameter): f"{name}.{key}"
            for name, module in inside.items()
            if name not in self._norms
            for key, parameter in module.named_parameters(recurse=False)
        }
        self._names = list(drawn.values())  # a parameter that two of them share is drawn once
        if not self._names and not self._norms:
            chosen = ", ".join(map(repr, self._chosen))
            raise ValueError(f"layers must name modules with parameters, but there are none in {chosen}.")
        self._initial = InitialDistribution(self.model, self._names, self.init)

    def _choose(self, modules: Mapping[str, nn.Module]) -> list[str]:
        if not isinstance(self.layers, int):
            names = list(self.layers)
            if missing := [name for name in names if name not in modules]:
                children = ", ".join(name for name, _ in self.model.named_children())
                raise ValueError(
                    f"layers must be names of modules in {type(self.model).__name__}, and there is no {missing[0]!r}. "
                    f"Its children are: {children}; model.named_modules() lists all."
                )
            return names
        if self._saved and self.question is None:
            known: list[str] = self._saved["method"]["layers"]
            return known
        trained = self._due()
        called = [name for name in self._called if all(id(p) in trained for p in modules[name].parameters())]
        places = [i for i, name in enumerate(called) if not is_norm(modules[name])]
        if len(places) < self.layers:
            raise ValueError(
                f"layers={self.layers} needs as many layers with weights that are trained, but the forward pass calls "
                f"{len(places) or 'none'}. Give a smaller number, or names."
            )
        return called[places[-self.layers] :]

    def _refuse(self, inside: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
        outside = {
            id(parameter): f"{name}.{key}"
            for name, module in modules.items()
            if name not in inside
            for key, parameter in module.named_parameters(recurse=False)
        }
        for name, module in inside.items():
            if name in self._norms:
                check_editable(module, name)
            for key, parameter in module.named_parameters(recurse=False):
                check_editable(parameter, f"{name}.{key}")
                if id(parameter) in outside:
                    raise ValueError(
                        f"LayerReset would also reset {outside[id(parameter)]!r}, which is one parameter with "
                        f"'{name}.{key}'. Name both of their modules in layers=, or neither."
                    )
                if not parameter.requires_grad:
                    raise ValueError(
                        f"LayerReset needs layers that are trained, for others cannot learn anew, but '{name}.{key}' "
                        "is frozen. Unfreeze it, or name other layers."
                    )

    @override
    def _act(self) -> None:
        due = self._due()
        drawn = {name: self.model.get_parameter(name) for name in self._names}
        drawn = {name: parameter for name, parameter in drawn.items() if id(parameter) in due}
        fresh = [self._initial.draw(name, self.draws.generator(p.device)) for name, p in drawn.items()]
        if drawn:  # or all belong to an optimizer that has not stepped
            self.editor.write(list(drawn.values()), fresh)
        for name in self._norms:
            norm = submodule(self.model, name)
            if all(id(parameter) in due for parameter in norm.parameters(recurse=False)):
                self.editor.reset_norm(name)

    @override
    def _state(self) -> dict[str, Any]:
        return super()._state() | {"layers": list(self._chosen), "initial": self._initial.state_dict()}

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._initial.load_state_dict(state["initial"])


def _has_entries(norm: nn.Module) -> bool:
    tensors = itertools.chain(norm.parameters(recurse=False), norm.buffers(recurse=False))
    return any(tensor.dim() and tensor.numel() for tensor in tensors)
