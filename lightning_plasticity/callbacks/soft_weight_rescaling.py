"""Soft Weight Rescaling: draw the norm of each layer's weights towards its initial value, and keep the decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_finite
from lightning_plasticity.editing.edits import OptimizerState
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.functional.soft_weight_rescaling import (
    joint_norms,
    log_rescaling_factor,
    log_rescaling_factors,
)
from lightning_plasticity.kernels import Tensors
from lightning_plasticity.layers.flow import Flow, flow_in
from lightning_plasticity.layers.rescaling import change_of_outputs, plan
from lightning_plasticity.layers.weights import weights_in_words
from lightning_plasticity.names import submodule
from lightning_plasticity.notices import warn
from lightning_plasticity.shards.sums import whole_norms
from lightning_plasticity.shards.tensors import local
from lightning_plasticity.units.calls import ForwardCall

_LARGE = 0.01  # a change of the outputs, as a share of their size, that a step should not bring about by itself
_FEW = 100  # factors and their products; far more are better worked out together


Biases: TypeAlias = Literal["follow", "keep"]


@dataclass(frozen=True)
class _Share:
    """What a step of one optimizer calls for: tensors to scale, and of each group of weights exponents and lambda.

    The logarithms of ``factors``, one for each tensor, are the product of exponents and the groups' logarithms.
    ``followers`` are the last of the tensors: biases and running statistics, whose norms nothing holds, with their own
    part of the factors.
    """

    tensors: list[Tensor]
    followers: Tensors
    of_followers: Tensor
    exponents: Tensor
    coefficients: Tensor
    factors: Tensor
    terms: list[list[tuple[int, float]]] | None  # exponents other than 0, where Python is to work the factors out


class SoftWeightRescaling(PlasticityCallback):
    r"""Soft Weight Rescaling: after every step, draws the norm of each layer's weights towards its initial value.

    .. math::
        c_l = \frac{\lambda n_l + (1 - \lambda) \|W_l\|}{\|W_l\|}, \qquad W_l \leftarrow c_l W_l, \qquad
        b_l \leftarrow \Bigl(\prod_{i \le l} c_i\Bigr) b_l

    with :math:`n_l` the norm when training began. The product runs over the layers since the last normalisation layer,
    which counts as a layer, so that the network's outputs are multiplied by one positive number and its decisions stay.
    Running statistics follow, and this holds in training and in evaluation mode. It is exact, up to the norms' epsilon,
    for feed-forward networks between whose layers a factor passes (ReLU, pooling, dropout, reshaping), and not for
    others (attention, GELU, tanh, residual branches): those are rescaled all the same. Where ``coefficient`` is large
    enough for a single step to move the outputs by more than 1 % of their size, a warning says by how much.
    To tell, and to see the order of layers, the first batch runs five more times.

    Beside something that shrinks the weights at every step, such as ``ShrinkAndPerturb``, norms are drawn up again and
    again, and biases, which follow all layers before them, grow without end. On the CPU the step that would make one
    overflow is refused with an error.

    Where weights are in half precision, what rounding takes away from the small changes is kept in float32, and saved
    in the checkpoint.

    With ``biases="keep"`` and a coefficient of 1 this is the projection of NaP (normalize and project), which goes with
    networks that have a normalisation layer before each activation function and no biases before those: there only the
    directions of weights matter, and the learning rate no longer falls as norms grow, so that it needs a schedule. The
    scales of normalisation layers are held at their initial norm and their shifts left alone; ``exclude`` their names
    to leave both free. That the last layer counts is unconfirmed, and its norm sets how sure the network can be: it may
    be excluded as well.

    The acronym, SWR, is also used for *selective weight reinitialisation*, see ``SelectiveReinit``.

    Args:
        coefficient: :math:`\lambda`, from 0 (do nothing) to 1 (hold every norm where it started).
        classifier_coefficient: :math:`\lambda` of the classifier; None for the same.
        classifier: names of the classifier's modules; by default what ``get_classifier()`` of a timm model gives, or
            the last linear layer that is called.
        tie_residual: give all layers that are added into one residual stream (or otherwise meet) a common growth. This
            makes residual networks of ReLU and normalisation layers exact.
        biases: ``"follow"`` the factors of the layers up to them, so that decisions stay, or ``"keep"`` their values.
        rebase_on_lr_drop: where the learning rate falls to this fraction or less from one step to the next, the norms
            of that moment become those to be drawn to; None for never. Meant for schedules in steps: 0.5, for instance.
        module: the name of the module inside the model to work on; None for all of it.
        exclude: patterns (as in ``fnmatch``) of names of layers to leave alone.
        optimizer_state: ``"keep"``, because every weight is nudged at every step, or ``"reset"``.
        seed: accepted as by all methods; nothing is drawn.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> method = SoftWeightRescaling(1.0).attach(model, optimizer, example_inputs=(torch.randn(3, 4),))
        >>> before = model[0].weight.norm().item()
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> method.step()
        >>> abs(model[0].weight.norm().item() - before) < 1e-6
        True

    References:
        Lyle et al., NeurIPS 2024, arXiv 2407.01800 (NaP).
        Oh, Park, Han, Kim 2025, arXiv 2507.04683. Its Algorithm 1 begins the product once, at the last normalisation
        layer; here it begins anew at each, as proportionality needs.
    """

    works_on_parts = True

    def __init__(
        self,
        coefficient: float = 1e-3,
        classifier_coefficient: float | None = None,
        *,
        classifier: Sequence[str] | str | None = None,
        tie_residual: bool = False,
        biases: Biases = "follow",
        rebase_on_lr_drop: float | None = None,
        module: str | None = None,
        exclude: Sequence[str] | str = (),
        optimizer_state: OptimizerState = "keep",
        seed: int | None = None,
    ) -> None:
        super().__init__(module=module, optimizer_state=optimizer_state, seed=seed, question=flow_in)
        if classifier is not None and classifier_coefficient is None:
            raise ValueError(
                f"classifier={classifier!r} needs a classifier_coefficient of its own, got None. Give both, or neither."
            )
        self.coefficient = checks.number("coefficient", coefficient, least=0, most=1)
        self.classifier_coefficient = checks.optional(
            checks.number, "classifier_coefficient", classifier_coefficient, least=0, most=1
        )
        self.classifier = checks.optional(checks.words, "classifier", classifier)
        self.tie_residual = checks.flag("tie_residual", tie_residual)
        self.biases: Biases = checks.choice("biases", biases, get_args(Biases))
        self.rebase_on_lr_drop = checks.optional(
            checks.number, "rebase_on_lr_drop", rebase_on_lr_drop, above=0, below=1
        )
        self.exclude = checks.words("exclude", exclude)
        self._has_warned = False
        self._flow = Flow((), ())
        self._weights: dict[str, nn.Parameter] = {}
        self._shares: dict[tuple[int, ...], _Share] = {}  # by optimizer and by which weights are trained

    # ---- before the first step

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        if call is not None and self.biases == "follow":
            self._report_change(call, part.found)
        self._flow = self._flow.then(part.found)

    @override
    def forget_parts(self) -> None:
        self._flow = Flow((), ())

    def _report_change(self, call: ForwardCall, flow: Flow) -> None:
        rescaling = plan(self.model, flow, self._is_excluded, tie_streams=self.tie_residual)
        if not rescaling.weights:
            return
        try:
            change = change_of_outputs(call.module, call.args, call.kwargs, rescaling)
        except Exception as error:
            self._warn(f"cannot tell whether this network's outputs stay proportional, for running it gives {error!r}")
            return
        if self.coefficient * change > _LARGE:
            self._warn(
                "cannot keep this network's outputs proportional: once the norms of its layers have changed by up to "
                f"10 %, each step moves the outputs by {self.coefficient * change:.2g} of their size, and it is made "
                f"all the same. A coefficient of {_LARGE / change:.2g} instead of {self.coefficient:g} moves them by "
                f"{_LARGE}." + ("" if self.tie_residual else " Where branches are added, tie_residual=True may help.")
            )

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(f"{type(self).__name__} {what}")

    def _is_excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    @override
    def _start(self) -> None:
        if self.rebase_on_lr_drop is not None and not self.optimizers:
            raise ValueError(
                "rebase_on_lr_drop needs an optimizer, whose learning rate it follows. "
                "Give it to attach(model, optimizer)."
            )
        self._weights = {}
        self._initial_norms = self._last_norms = torch.zeros(0)
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}  # what a checkpoint says of weights not called yet
        self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._grow()
        at_zero = [name for name, norm in zip(self._weights, self._initial_norms.tolist(), strict=True) if not norm]
        if at_zero and self._saved is None:
            warn(
                f"SoftWeightRescaling draws weights to their initial norm, which is 0 for {', '.join(at_zero)}: "
                "they would hardly grow. Exclude these layers, or start them from something else."
            )

    @override
    def _grow(self) -> None:
        keeps = self.biases == "keep"
        rescaling = plan(self.model, self._flow, self._is_excluded, tie_streams=self.tie_residual, keep_biases=keeps)
        if not rescaling.weights:
            raise ValueError(
                "SoftWeightRescaling needs layers with weights, and the forward pass calls none that is not excluded. "
                "Name another part with module=, or exclude less."
            )
        known = self._waiting | dict(
            zip(self._weights, zip(self._initial_norms, self._last_norms, strict=True), strict=True)
        )
        self._weights = rescaling.weights
        self._weights_together = Tensors([*self._weights.values()])
        self._dtype = torch.float32
        for weight in self._weights.values():
            self._dtype = torch.promote_types(self._dtype, weight.dtype)
        now = self._norms()
        if not now.isfinite().all():
            check_finite(self._weights, "SoftWeightRescaling needs")
        pairs = [known.get(name, (norm, norm)) for name, norm in zip(self._weights, now, strict=True)]
        self._initial_norms, self._last_norms = (torch.stack(norms).to(now) for norms in zip(*pairs, strict=True))
        self._waiting = {name: norms for name, norms in self._waiting.items() if name not in self._weights}
        is_tied = len(rescaling.groups) < len(self._weights)
        self._groups = rescaling.groups.to(self._initial_norms) if is_tied else None
        self._rescaling, self._coefficients = rescaling, self._coefficient_of_each()
        self._shares = {}
        for which in range(max(len(self.optimizers), 1)):
            self._share(which)

    def _share(self, which: int) -> _Share:
        """What a step of an optimizer calls for: nothing for weights that are frozen, or that another one trains."""
        optimizer = self.optimizers[which] if self.optimizers else None
        groups = 0 if optimizer is None else len(optimizer.param_groups)
        key = (which, groups, *[weight.requires_grad for weight in self._weights.values()])
        if key not in self._shares:
            self._shares[key] = self._share_out(optimizer)
        return self._shares[key]

    def _share_out(self, optimizer: Optimizer | None) -> _Share:
        rescaling = self._rescaling
        is_own = [w.requires_grad and self.optimizer_of(w) is optimizer for w in self._weights.values()]
        own = rescaling.groups * torch.tensor(is_own)
        concerned = (rescaling.exponents[:, own.any(1)] != 0).any(1)
        tensors = [t.tensor for t, is_one in zip(rescaling.targets, concerned.tolist(), strict=True) if is_one]
        factors = self._initial_norms.new_ones(len(tensors))
        exponents = rescaling.exponents[concerned]
        terms = [[(i, exponent) for i, exponent in enumerate(row) if exponent] for row in exponents.tolist()]
        is_small = factors.is_cpu and self._groups is None and sum(map(len, terms)) <= _FEW
        weights = sum(concerned[: len(self._weights)].tolist())
        return _Share(
            tensors,
            Tensors(tensors[weights:]),
            factors[weights:],
            exponents.to(self._initial_norms).contiguous(),
            (own * self._coefficients).amax(1).to(self._initial_norms),
            factors,
            terms if is_small else None,
        )

    def _coefficient_of_each(self) -> Tensor:
        classifier = self._find_classifier() if self.classifier_coefficient is not None else ()
        coefficients = [
            self.classifier_coefficient
            if self.classifier_coefficient is not None and any(name.startswith(f"{part}.") for part in classifier)
            else self.coefficient
            for name in self._weights
        ]
        return torch.tensor(coefficients, dtype=torch.float64)

    def _find_classifier(self) -> Sequence[str]:
        names = {module: name for name, module in self.model.named_modules()}
        found: Sequence[str] = self.classifier or ()
        if self.classifier is None:
            for module in self.scope.modules():
                if callable(get_classifier := getattr(module, "get_classifier", None)):  # timm's models
                    given = get_classifier()
                    found = [names[part] for part in (given if isinstance(given, tuple) else (given,)) if part in names]
            if not self._holds_weights(found):
                called = {layer.name: submodule(self.model, layer.name) for layer in self._flow.layers}
                found = [name for name, layer in called.items() if isinstance(layer, nn.Linear)][-1:]
        if not self._holds_weights(found):
            raise ValueError(
                "classifier_coefficient needs a classifier with weights that are called and not excluded, and there is "
                f"none (classifier={self.classifier!r}). Name its modules with classifier=, as in named_modules()."
            )
        return found

    def _holds_weights(self, modules: Sequence[str]) -> bool:
        return any(weight.startswith(f"{module}.") for weight in self._weights for module in modules)

    @override
    def _stop(self) -> None:
        self._flow, self._weights, self._shares = Flow((), ()), {}, {}
        for name in ("_rescaling", "_weights_together"):
            vars(self).pop(name, None)

    # ---- after every step

    @override
    def _after_step(self, optimizer: Optimizer | None) -> None:
        which = 0 if optimizer is None else self.optimizers.index(optimizer)
        if self.rebase_on_lr_drop is not None:
            self._rebase(which, self.rebase_on_lr_drop)
        share = self._share(which)
        if not share.tensors:
            return
        self._find_factors(share)
        if share.factors.is_cpu:  # elsewhere the step would have to wait for the answer
            self._refuse_overflow(share)
        self.editor.scale(share.tensors, share.factors)
        if self.rebase_on_lr_drop is not None:
            self._last_norms = self._norms()

    def _find_factors(self, share: _Share) -> None:
        """Writes the factors into memory that stays.

        In a small network on the CPU Python's numbers take less time than a few small tensors.
        """
        kernels = self._kernels() if self._groups is None else None
        if kernels is not None:
            initial, own = self._initial_norms, (share.coefficients, share.exponents, share.factors)
            kernels.rescaling_factors(self._weights_together, initial, *own)
        elif share.terms is not None:
            numbers = (values.tolist() for values in (self._norms(), self._initial_norms, share.coefficients))
            logs = [log_rescaling_factor(*of_weight) for of_weight in zip(*numbers, strict=True)]
            share.factors.numpy()[:] = [
                math.exp(sum([exponent * logs[i] for i, exponent in terms])) for terms in share.terms
            ]
        else:
            joint, initial = self._joint(self._norms()), self._joint(self._initial_norms)
            # Not a product of matrices, which on CUDA may be rounded to TF32.
            terms = share.exponents * log_rescaling_factors(joint, initial, share.coefficients)
            torch.exp(terms.sum(1), out=share.factors)

    def _refuse_overflow(self, share: _Share) -> None:
        if (kernels := share.followers.kernels()) is not None:
            is_too_large = kernels.overflow(share.followers, share.of_followers)
        else:
            pairs = zip(map(local, share.followers.tensors), share.of_followers.tolist(), strict=True)
            is_too_large = any(factor > 1 and _overflows(values, factor) for values, factor in pairs)
        if not is_too_large:
            return
        raise RuntimeError(
            "SoftWeightRescaling needs weights that nothing else shrinks again and again: it draws their norms back up "
            "each time, biases follow all layers before them, and would now be too large for their type. Shrink less "
            '(ShrinkAndPerturb, weight decay), or leave biases as they are, with biases="keep".'
        )

    def _kernels(self) -> ModuleType | None:
        """Those for norms: on other devices one of PyTorch's operations does all of them."""
        return self._weights_together.kernels() if self._weights_together.tensors[0].is_cpu else None

    def _norms(self) -> Tensor:
        kernels = self._kernels()
        if kernels is None:
            with torch.no_grad():
                return whole_norms(self._weights_together.tensors, self._dtype)
        norms = torch.empty(len(self._weights), dtype=self._dtype)
        kernels.norms(self._weights_together, norms)
        return norms

    def _joint(self, norms: Tensor) -> Tensor:
        return norms if self._groups is None else joint_norms(norms, self._groups)

    def _rebase(self, which: int, ratio: float) -> None:
        """Takes the norms before this step as the initial ones where its learning rate is that much lower."""
        groups = self.optimizers[which].param_groups
        before = self._rates[which]
        self._rates[which] = [float(group["lr"]) for group in groups]
        for group, old, new in zip(groups, before, self._rates[which], strict=False):
            if old > 0 and new <= ratio * old:
                own = {id(parameter) for parameter in group["params"]}
                is_own = torch.tensor([id(weight) in own for weight in self._weights.values()])
                is_own = is_own.to(self._initial_norms.device)
                self._initial_norms = torch.where(is_own, self._last_norms, self._initial_norms)

    @override
    def _works_on(self) -> str:
        found = weights_in_words(self._weights.values(), self.model, self.module or "")
        return f"{found} Biases and running statistics go with them."

    @override
    def _state(self) -> dict[str, Any]:
        norms = dict(zip(self._weights, zip(self._initial_norms, self._last_norms, strict=True), strict=True))
        return {
            "norms": {name: torch.stack(pair) for name, pair in (self._waiting | norms).items()},
            "rates": [list(rates) for rates in self._rates],
        }

    @override
    def _restore(self, state: dict[str, Any]) -> None:
        norms: dict[str, Tensor] = state["norms"]
        if "weights" in state:  # saved by version 0.1.0
            pairs = torch.stack([state["initial_norms"], state["norms"]], 1)
            norms = dict(zip(state["weights"], pairs, strict=True))
        names = {name for name, _ in self.model.named_parameters()}
        differing = sorted((self._weights.keys() - norms.keys()) | (norms.keys() - names))
        if differing:
            raise ValueError(
                f"SoftWeightRescaling must resume with the layers of its checkpoint, but only one of the two has "
                f"{differing}. Resume with the run's model and settings."
            )
        now = self._initial_norms
        known = torch.stack([norms[name].to(now) for name in self._weights])
        self._initial_norms, self._last_norms = (norms.contiguous() for norms in known.unbind(1))
        self._waiting = {
            name: (pair.to(now)[0], pair.to(now)[1]) for name, pair in norms.items() if name not in self._weights
        }
        self._rates = [list(rates) for rates in state["rates"]]

    @override
    def _numbers(self) -> dict[str, Tensor | float]:
        ratios = self._norms() / self._initial_norms
        return {"largest_norm_ratio": ratios.max(), "smallest_norm_ratio": ratios.min()}


def _overflows(values: Tensor, factor: float) -> bool:
    """Whether any of some values, none of which is infinite, becomes so when multiplied by a factor above 1."""
    most = torch.finfo(values.dtype).max
    return values.numel() > 0 and most >= float(values.abs().max()) > most / factor
