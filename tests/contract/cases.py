"""Every method, one line each: the contract tests run each through all of their scenarios."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contract.minimal_method import NoisyUnits
from lightning_plasticity import (
    DirectionAwareShrink,
    HareAndTortoise,
    IsometryReinit,
    L2Init,
    LayerReset,
    OptimizerReset,
    ParsevalRegularization,
    PartialReset,
    SelectiveReinit,
    SelfNormalizedReset,
    ShrinkAndPerturb,
    SoftWeightRescaling,
    SpectralRegularization,
    WeightClipping,
)
from lightning_plasticity.callbacks.activation_reset import ActivationReset
from lightning_plasticity.callbacks.continual_backprop import ContinualBackprop
from lightning_plasticity.callbacks.redo import ReDo
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.functional.activation_reset import ActivationStrategy


@dataclass(frozen=True)
class Case:
    """How the contract tests make a method.

    The network (``contract.training.Network``) has the layers ``net.first`` (linear), ``net.norm`` (batch norm),
    ``net.second`` (linear) and ``net.head`` (linear, three classes). Runs take 10 to 40 steps.

    Attributes:
        name: for the test's name.
        make: makes a method that changes weights within the first eight steps, and again later where it can. The
            tests also call it with ``module=``, ``seed=`` and ``optimizer_state=``.
        rate_zero: makes one that changes nothing, or says why there is none.
        leaves_out: scenarios (names of test functions) that make no sense for the method, each with the reason.
    """

    name: str
    make: Callable[..., PlasticityCallback]
    rate_zero: Callable[..., PlasticityCallback] | str
    leaves_out: Mapping[str, str] = field(default_factory=dict)


def loss_of_a_batch(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    *_, last = model.parameters()
    network = getattr(model, "net", model)
    return cross_entropy(network(batch[0].to(last.device, last.dtype)), batch[1].to(last.device))


BATCHES_TO_PASS_OVER = [(torch.arange(48.0).view(8, 6).mul(i + 1).sin(), torch.arange(8) % 3) for i in range(2)]
dash = partial(DirectionAwareShrink, data=BATCHES_TO_PASS_OVER, loss=loss_of_a_batch, every_n_train_steps=4)

CASES = [
    Case("ContinualBackprop", partial(ContinualBackprop, 0.1, 2), rate_zero=partial(ContinualBackprop, 0.0)),
    Case(
        "ActivationReset",
        partial(ActivationReset, ActivationStrategy(0.1, 0.1, -0.5, 0.5), maturity_threshold=2),
        rate_zero=partial(ActivationReset, ActivationStrategy(0.0, 0.0, -0.5, 0.5), max_weight=None),
    ),
    Case("ReDo", partial(ReDo, 0.5, 3), rate_zero=partial(ReDo, 0.025, 10_000)),
    Case(
        "ReDo by gradient",
        partial(ReDo, 0.5, 3, score="gradient", score_steps=2),
        rate_zero=partial(ReDo, 0.01, 10_000, score="gradient"),
    ),
    Case("PartialReset", partial(PartialReset, 0.5, 3), rate_zero=partial(PartialReset, 0.5, 10_000)),
    Case(
        "SelfNormalizedReset",
        partial(SelfNormalizedReset, 0.5, every_n_train_steps=3, min_silence=1, max_silence=2),
        rate_zero=partial(SelfNormalizedReset, max_silence=10_000),
    ),
    Case("ReDo over steps", partial(ReDo, 0.5, 3, score_steps=2), rate_zero=partial(ReDo, 0.025, 10_000)),
    Case(
        "SoftWeightRescaling",
        partial(SoftWeightRescaling, coefficient=0.1, classifier_coefficient=0.5),
        rate_zero=partial(SoftWeightRescaling, coefficient=0.0),
    ),
    Case(
        "SoftWeightRescaling, biases kept",
        partial(SoftWeightRescaling, coefficient=1.0, biases="keep"),
        rate_zero=partial(SoftWeightRescaling, coefficient=0.0, biases="keep"),
    ),
    Case(
        "ShrinkAndPerturb",
        partial(ShrinkAndPerturb, shrink=0.8, perturb=0.2, every_n_train_steps=4),
        rate_zero=partial(ShrinkAndPerturb, shrink=1.0, perturb=0.0, every_n_train_steps=4, optimizer_state="keep"),
    ),
    Case(
        "ShrinkAndPerturb to the start",
        partial(ShrinkAndPerturb, shrink=0.8, perturb=0.2, init="start", every_n_train_steps=4),
        rate_zero=partial(ShrinkAndPerturb, 1.0, 0.0, init="start", every_n_train_steps=4, optimizer_state="keep"),
    ),
    Case("L2Init", partial(L2Init, coefficient=0.1), rate_zero=partial(L2Init, coefficient=0.0)),
    Case(
        "L2Init sorted",
        partial(L2Init, coefficient=0.1, match="sorted", every_n_train_steps=2),
        rate_zero=partial(L2Init, coefficient=0.0, match="sorted"),
    ),
    Case(
        "L2Init in the loss",
        partial(L2Init, coefficient=0.1, decoupled=False, norms=False),
        rate_zero=partial(L2Init, coefficient=0.0, decoupled=False),
    ),
    Case(
        "LayerReset",
        partial(LayerReset, layers=1, every_n_train_steps=4),
        rate_zero="it either redraws a layer or does not",
        leaves_out={"test_children_that_are_called_one_by_one": "it acts on the last layers, here those of one child"},
    ),
    Case(
        "SelectiveReinit",
        partial(SelectiveReinit, 0.2, "mean_noise", every_n_train_steps=4),
        rate_zero=partial(SelectiveReinit, 0.0, every_n_train_steps=4),
    ),
    Case(
        "SelectiveReinit once",
        partial(SelectiveReinit.from_case, "25MN"),
        rate_zero=partial(SelectiveReinit, 0.0, zero_biases=False),
        leaves_out={
            "test_fit_again": "it acts once, and on another model only when asked: see its own tests",
            "test_resume_a_plain_loop": "it acts in attach, before which its state must be loaded: see its own tests",
        },
    ),
    Case(
        "SelectiveReinit by gradient",
        partial(SelectiveReinit, 0.2, "init", utility="gradient", decay_rate=0.9, every_n_train_steps=4),
        rate_zero=partial(SelectiveReinit, 0.0, "init", utility="gradient", decay_rate=0.9, every_n_train_steps=4),
    ),
    Case(
        "HareAndTortoise",
        partial(HareAndTortoise, 0.9, every_n_train_steps=4),
        rate_zero=partial(HareAndTortoise, every_n_train_steps=10_000),
    ),
    Case(
        "IsometryReinit",
        partial(IsometryReinit, every_n_train_steps=4),
        rate_zero="it either makes isometries or does not",
    ),
    Case("DirectionAwareShrink", dash, rate_zero=partial(dash, every_n_train_steps=10_000)),
    Case(
        "OptimizerReset",
        partial(OptimizerReset, every_n_train_steps=4),
        rate_zero="it either resets or does not",
    ),
    Case(
        "ParsevalRegularization",
        partial(ParsevalRegularization, coefficient=0.1),
        rate_zero=partial(ParsevalRegularization, coefficient=0.0),
    ),
    Case(
        "SpectralRegularization",
        partial(SpectralRegularization, coefficient=0.1),
        rate_zero=partial(SpectralRegularization, coefficient=0.0),
    ),
    Case("WeightClipping", partial(WeightClipping, 0.5), rate_zero=partial(WeightClipping, 1e6)),
    Case(
        "SelectiveReinit as published",
        partial(SelectiveReinit.as_published, relative_threshold=0.5, every_n_train_steps=4, decay_rate=0.9),
        rate_zero=partial(SelectiveReinit.as_published, every_n_train_steps=10_000),
    ),
    Case("NoisyUnits", partial(NoisyUnits, every_n_steps=3), rate_zero=partial(NoisyUnits, every_n_steps=None)),
]
