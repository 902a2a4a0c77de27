"""Selective reinitialisation of the weights that are of the least use: before fine-tuning, or again and again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import is_finite
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.editing.initial import InitialDistribution
from lightning_plasticity.engine.gradient_utility import GradientUtility
from lightning_plasticity.engine.schedule import Schedule, ScheduledCallback
from lightning_plasticity.functional.selection import below, smallest
from lightning_plasticity.functional.selective_reinit import (
    Case,
    Reinit,
    check_settings,
    count_due,
    gradient_utilities,
    new_values,
)
from lightning_plasticity.layers.weights import (
    LayerPatterns,
    find_biases,
    find_parameters,
    find_weights,
    weights_in_words,
)
from lightning_plasticity.notices import warn_on_rank_zero
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import gradient, local

Utility: TypeAlias = Literal["magnitude", "gradient", "random"]
Parameters: TypeAlias = Literal["weights", "all"]


class SelectiveReinit(ScheduledCallback):
    r"""Give the weights of the least use in each tensor new values, once before fine-tuning or again and again.

    Of the :math:`N` weights of a tensor the :math:`\lfloor kN \rfloor` with the least utility get a new value (on a
    schedule, one more with the probability of the remainder); the others stay as they are, bit for bit. It works on the
    weights of linear, convolution and attention layers, each tensor on its own. Embeddings, positions, normalisation
    layers and all that is not trained are left alone.

    ================ ================================================= =======
    ``reinit``       new value                                         case
    ================ ================================================= =======
    ``"mean"``       the tensor's mean                                 M
    ``"mean_noise"`` mean :math:`+\, \mathcal{N}(0, 1) \cdot \mu / 10` MN
    ``"normal"``     :math:`\mathcal{N}(0, \text{std}^2)`              N; NS
    ``"init"``       a draw from the initial distribution
    ``"init_mean"``  the mean of the initial distribution
    ================ ================================================= =======

    :math:`\mu` is the mean magnitude of the weights that remain, as the paper's text has it ("an order of magnitude
    less than the remaining weights"); its formula can be read as the tensor's mean, with which the noise would be next
    to nothing. ``std`` is 1 in N and 0.2 in NS. The initial distribution is that of the weights when training starts.

    Without a schedule it acts exactly once, when training starts: after all has been loaded, and before methods that
    come later in the list of callbacks look at the weights. Its checkpoints remember that: it does not act again in a
    run that resumes, nor in a second ``fit`` unless :meth:`rearm` is called. In a plain loop it acts in ``attach``: to
    resume there, call ``load_state_dict`` before. On a schedule this is the method that is published as *selective
    weight reinitialisation*, which is abbreviated SWR as Soft Weight Rescaling is. :meth:`as_published` gives its
    settings: there all parameters take part, the optimizer remembers what was replaced, and the average begins anew
    each time.

    Args:
        fraction: the share :math:`k` of the weights of each tensor; 0.10 if not given. A threshold takes its place.
        reinit: the new value; ``"mean"`` if not given.
        std: of ``reinit="normal"``; 1.0 if not given.
        case: in place of these three, a case of the fine-tuning paper, as :meth:`from_case` takes it: ``"10M"``.
        utility: ``"magnitude"``, :math:`|w|`, or ``"gradient"``, :math:`|w \cdot \partial L / \partial w|`, which needs
            a schedule. The gradient is the one of the step just made, clipped and unscaled; the weight is the one that
            this step led to, and that would be replaced. In a plain loop, call ``step()`` before ``zero_grad()``.
            ``"random"``: by chance.
        decay_rate: :math:`\eta` of a running average of the gradient utility, :math:`u \leftarrow \eta u + (1 - \eta)
            |w \cdot \partial L / \partial w|`, corrected for its start at 0; with 0.0 the last step decides.
        forget: what the average forgets each time it acts. ``"renewed"``: the record of weights that got new values,
            which take over the tensor's mean average. ``"all"``, as published: all begins anew, so that only the steps
            since the last time count, which chooses more by chance.
        threshold: choose all weights whose utility is below this value.
        relative_threshold: choose all whose utility is at most this multiple of the tensor's mean utility.
        zero_biases: also set biases to 0 when it acts once: True those of the same layers, ``"all"`` also the shifts of
            normalisation layers. None takes True with a ``case``, as published, and otherwise False: networks whose
            biases matter lose much of what they know. On a schedule biases are left alone.
        parameters: ``"weights"``, those of linear, convolution and attention layers, or ``"all"``: also biases,
            normalisation layers, embeddings and whatever else is trained, each tensor on its own.
        every_n_train_steps: act after every so many optimizer steps.
        every_n_epochs: act after every so many epochs, as the next one begins.
        include: patterns (as in ``fnmatch``) of names of layers to work on.
        exclude: patterns of names of layers to leave alone.
        module: the name of the module inside the model to work on; None for all of it.
        optimizer_state: what the optimizer remembers of weights that get new values. ``"survivors"``: no momentum, and
            the mean size of the gradients of the others in the tensor; ``"reset"``: nothing; ``"keep"``: all.
        seed: of the draws, which are equal on every rank.

    Raises:
        ValueError: If a setting is out of its range, or two do not go together.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> before = model[0].weight.detach().clone()
        >>> method = SelectiveReinit.from_case("10M").attach(model)
        >>> (model[0].weight != before).sum()
        tensor(8)

    References:
        Coetzer, Schreuder, Bosman 2026, arXiv 2603.20860 (before fine-tuning); Hernandez-Garcia, Dohare, Luo, Sutton
        2025, arXiv 2508.00212 (while training).
    """

    works_on_parts = True

    def __init__(
        self,
        fraction: float | None = None,
        reinit: Reinit | None = None,
        *,
        std: float | None = None,
        case: str | None = None,
        utility: Utility = "magnitude",
        decay_rate: float = 0.0,
        forget: Literal["renewed", "all"] = "renewed",
        threshold: float | None = None,
        relative_threshold: float | None = None,
        zero_biases: bool | Literal["all"] | None = None,
        parameters: Parameters = "weights",
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        include: Sequence[str] | str = "*",
        exclude: Sequence[str] | str = (),
        module: str | None = None,
        optimizer_state: OptimizerState = "survivors",
        seed: int | None = None,
    ) -> None:
        once = every_n_train_steps is None and every_n_epochs is None
        schedule = Schedule(every_n_train_steps, every_n_epochs, on_fit_start=once)
        super().__init__(schedule, module=module, optimizer_state=optimizer_state, seed=seed)
        given = Case(0.10 if fraction is None else fraction, "mean" if reinit is None else reinit, std)
        if case is not None:
            if any(one is not None for one in (fraction, reinit, std)):
                raise ValueError(
                    f"case={case!r} stands for fraction, reinit and std, so that none of them may be given besides, "
                    f"got fraction={fraction}, reinit={reinit!r}, std={std}. Leave out either the case or the three."
                )
            given = Case.parse(case)
        self.fraction = checks.number("fraction", given.fraction, least=0, most=1)
        self.reinit: Reinit = checks.choice("reinit", given.reinit, get_args(Reinit))
        self.std = checks.optional(checks.number, "std", given.std, least=0)
        self.utility: Utility = checks.choice("utility", utility, get_args(Utility))
        self.decay_rate = checks.number("decay_rate", decay_rate, least=0, below=1)
        self.threshold = checks.optional(checks.number, "threshold", threshold, least=0)
        self.relative_threshold = checks.optional(checks.number, "relative_threshold", relative_threshold, least=0)
        self.forget = checks.choice("forget", forget, ("renewed", "all"))
        zeroed = case is not None and once if zero_biases is None else zero_biases
        self.zero_biases: bool | Literal["all"] = checks.choice("zero_biases", zeroed, (True, False, "all"))
        self.parameters: Parameters = checks.choice("parameters", parameters, get_args(Parameters))
        self.patterns = LayerPatterns(checks.words("include", include), checks.words("exclude", exclude))
        check_settings(
            once=once,
            reinit=self.reinit,
            std=self.std,
            utility=self.utility,
            decay_rate=self.decay_rate,
            forget=self.forget,
            threshold=self.threshold,
            relative_threshold=self.relative_threshold,
            zero_biases=self.zero_biases,
        )
        self._applied = False
        self._applied_to: weakref.ref[nn.Module] | None = None  # None also if that was in another process
        self._has_reported = False
        self._weights: dict[str, nn.Parameter] = {}
        self._averages = GradientUtility(decay_rate)
        self._renewed: dict[str, tuple[int, int]] = {}  # how many of how many weights, the last time

    @classmethod
    def from_case(cls, case: str, **settings: Any) -> Self:
        """The method as a case of the fine-tuning paper: ``<percent><code>``.

        Args:
            case: the percentage of the weights and one of the codes M, MN, NS, N. The paper advises "10M" for most
                cases, and 5 % where the new data are very unlike the old.
            settings: all else that the constructor takes.

        Example:
            >>> method = SelectiveReinit.from_case("25NS", exclude="head")
            >>> method.fraction, method.reinit, method.std
            (0.25, 'normal', 0.2)
        """
        return cls(case=checks.word("case", case), **settings)

    @classmethod
    def as_published(cls, **settings: Any) -> Self:
        """The method as selective weight reinitialisation was published, on a schedule.

        All trained parameters take part. Those of a tensor whose utility is at most a multiple of its mean are drawn
        anew: where a tensor has no gradient at all, it is redrawn whole. The optimizer's state stays, and an average of
        utilities, if there is one, begins anew each time. Without arguments these are the settings of the authors'
        vision transformer. Others of theirs, on permuted MNIST with plain SGD, are ``fraction=0.4,
        relative_threshold=None, every_n_train_steps=2400``, and ``utility="magnitude", reinit="init_mean",
        relative_threshold=0.001, every_n_train_steps=2048``. The gradient is that of the last batch, which in theirs
        has 30 examples or more: with small batches, where much of it is 0, give a ``decay_rate``.

        Args:
            settings: all that the constructor takes, in place of these.

        Example:
            >>> method = SelectiveReinit.as_published(relative_threshold=1e-3)
            >>> method.utility, method.parameters, method.relative_threshold, method.optimizer_state
            ('gradient', 'all', 0.001, 'keep')
        """
        published: dict[str, Any] = {
            "reinit": "init",
            "utility": "gradient",
            "relative_threshold": 5e-4,
            "parameters": "all",
            "every_n_train_steps": 128,
            "optimizer_state": "keep",
            "forget": "all" if settings.get("decay_rate") else "renewed",
        }
        if settings.get("every_n_epochs") is not None:
            del published["every_n_train_steps"]
        return cls(**published | settings)

    def rearm(self) -> None:
        """Lets a method that acts once act once more, when fitting starts again."""
        self._applied = False
        if self._saved is not None:
            self._saved = {**self._saved, "method": {**self._saved["method"], "applied": False}}

    # ---- when

    @override
    def _start_fitting(self) -> None:
        if self.schedule.on_fit_start:
            self._act_once()
        else:
            super()._start_fitting()

    @torch.no_grad()
    def _act_once(self) -> None:
        if self._applied:
            if self._applied_to is not None and self._applied_to() is not self.model:
                warn_on_rank_zero(
                    f"{type(self).__name__} acts once, and has acted on another model: it leaves this one as it is. "
                    "Call rearm() to let it act again, or use a new one for each model."
                )
                self._applied_to = None
            return
        biases = self._biases()
        self._act()
        self.editor.write(biases, [torch.zeros_like(local(bias)) for bias in biases])
        self._applied, self._applied_to = True, weakref.ref(self.model)
        if self._trainer is not None:
            self._log(self._trainer, self._shares(), self._trainer.global_step)

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        if self._averages_gradients:
            stepped = None if optimizer is None else {p for group in optimizer.param_groups for p in group["params"]}
            self._averages.update({n: w for n, w in self._weights.items() if stepped is None or w in stepped})
        super()._after_step(optimizer)

    # ---- what

    @override
    def _start(self) -> None:
        find = find_weights if self.parameters == "weights" else find_parameters
        self._weights = find(self.model, self.module or "", self.patterns)
        due = self._due()
        if not any(id(weight) in due for weight in self._weights.values()):
            raise ValueError(
                f"{type(self).__name__} needs weights of linear, convolution or attention layers that are trained, but "
                f"{self.patterns.why_none(self._weights, self.scope)}. "
                "Unfreeze some, hand them to the optimizer, or change include=, exclude= or module=."
            )
        self._initial = InitialDistribution(self.model, self._weights if self.reinit in ("init", "init_mean") else ())

    @override
    def _works_on(self) -> str:
        return weights_in_words(self._weights.values(), self.model, self.module or "")

    @override
    def _stop(self) -> None:
        self._weights, self._averages = {}, GradientUtility(self.decay_rate)
        vars(self).pop("_initial", None)

    # ---- how

    @override
    def _act(self) -> None:
        due = self._due()
        own = {name: weight for name, weight in self._weights.items() if id(weight) in due}
        if not own and self._stepped_last is not None:
            return  # it was the step of an optimizer that trains biases, or embeddings
        judged = {name: weight for name, weight in own.items() if self._is_judged(name, weight)}
        if not judged:
            raise RuntimeError(
                f"{type(self).__name__} needs weights that are trained and, with utility='gradient', have a gradient, "
                "but found none. In a plain loop, call step() before zero_grad()."
            )
        here = [self._renew(name, weight) for name, weight in judged.items()]
        counts = zip(judged.items(), sum_over_shards(here, list(judged.values())), strict=True)
        self._renewed = {name: (int(count), weight.numel()) for (name, weight), count in counts}
        if not self._has_reported:
            self._has_reported = True
            self._report()

    def _is_judged(self, name: str, weight: Tensor) -> bool:
        """Whether something is known by which to rank the weights."""
        if self._averages_gradients:
            return name in self._averages
        return self.utility != "gradient" or weight.grad is not None

    def _utility(self, name: str, weight: Tensor) -> Tensor:
        """What ranks the weights that are here by its magnitude."""
        if self._averages_gradients:
            return self._averages.read(name)
        if self.utility == "random":
            values = torch.rand(weight.shape, generator=self.draws.generator(weight.device), device=weight.device)
            return part_of(weight).take(values)
        if self.utility == "magnitude" or (found := gradient(weight)) is None:
            return local(weight)
        return gradient_utilities([local(weight)], [local(found)])[0]

    def _renew(self, name: str, weight: Tensor) -> Tensor:
        """Gives new values to what is due of a tensor, and tells how many of those that are here got one."""
        utility = self._utility(name, weight)
        if not is_finite(weight, utility):
            self.leave_alone(name, "its weights or their gradients")
            return torch.zeros((), dtype=torch.int64, device=weight.device)
        mask = self._choose(utility, weight)
        generator = self.draws.generator(weight.device)
        if self.reinit == "init":
            new = self._initial.draw(name, generator)[mask]
        elif self.reinit == "init_mean":
            new = torch.tensor(self._initial.mean(name), dtype=weight.dtype, device=weight.device)
        else:
            new = new_values(weight, mask, self.reinit, generator, self.std)
        write = self.editor.write_masked if new.dim() == 0 else self.editor.write_packed
        write(weight, mask, new)
        if self._averages_gradients and self.forget == "all":
            self._averages.forget(name)
        elif self._averages_gradients:
            self._averages.renew(name, mask, weight)
        return torch.count_nonzero(mask)

    def _choose(self, values: Tensor, weight: Tensor) -> Tensor:
        if self.threshold is not None:
            return below(values, self.threshold)
        if self.relative_threshold is not None:
            return below(values, self.relative_threshold, relative=True, tensor=weight)
        count, remainder = count_due(self.fraction, weight.numel())
        if not self.schedule.on_fit_start:
            count += int(torch.rand((), generator=self.draws.generator("cpu")) < remainder)
        return smallest(values, count, weight)

    @property
    def _averages_gradients(self) -> bool:
        # After an epoch the gradients may be gone: a run that resumes there has none.
        return self.utility == "gradient" and (self.decay_rate > 0 or self.schedule.every_n_epochs is not None)

    def _biases(self) -> list[nn.Parameter]:
        """Those that are to become 0."""
        if not self.zero_biases:
            return []
        due = self._due()
        found = find_biases(self.model, self.module or "", self.patterns, of_norms=self.zero_biases == "all")
        return [bias for bias in found if id(bias) in due]

    # ---- what is told

    def _shares(self) -> dict[str, Tensor | float]:
        if not self._renewed:
            return {}
        counts, sizes = zip(*self._renewed.values(), strict=True)
        numbers: dict[str, Tensor | float] = {"weights": sum(counts), "share": sum(counts) / sum(sizes)}
        for name, (count, size) in self._renewed.items():
            numbers |= {f"weights/{name}": count, f"share/{name}": count / size}
        return numbers

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        return {} if self.schedule.on_fit_start else self._shares()

    def _report(self) -> None:
        counts, sizes = (sum(numbers) for numbers in zip(*self._renewed.values(), strict=True))
        lines = [f"{name}: {count:,} of {size:,} ({count / size:.2%})" for name, (count, size) in self._renewed.items()]
        rank_zero_info(
            f"{type(self).__name__} gave new values to {counts:,} of {sizes:,} weights ({counts / sizes:.2%}):\n  "
            + "\n  ".join(lines)
        )

    # ---- checkpoints

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module, schedule=self.schedule, patterns=self.patterns)

    @override
    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "applied": self._applied,
            "initial": self._initial.state_dict(),
            "averages": self._averages.state_dict(self._weights),
        }

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._applied, self._applied_to = state["applied"], None
        self._initial.load_state_dict(state["initial"])
        self._averages.load_state_dict(state["averages"], self._weights)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_applied_to": None}  # a weak reference cannot be pickled
