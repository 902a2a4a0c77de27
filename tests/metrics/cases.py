"""One case for each metric: how it is made, what it is given, and the value that the function gives for all of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_plasticity import functional as F
from lightning_plasticity import metrics as M
from lightning_plasticity.metrics.base import PlasticityMetric


@dataclass(frozen=True)
class Case:
    """`updates(seed)` gives the arguments of some updates; `expected(updates)` the value after all of them."""

    make: Callable[[], PlasticityMetric]
    updates: Callable[[int], list[tuple[Any, ...]]]
    expected: Callable[[list[tuple[Any, ...]]], Tensor]


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def fresh_network() -> nn.Sequential:
    return network(7)


def features(seed: int, shape: tuple[int, ...] = (5,)) -> list[tuple[Tensor]]:
    """Five batches of different sizes whose units are dead, dormant, duplicate or none of these."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in (7, 3, 1, 12, 5):
        h = torch.randn(size, 8, *shape, generator=generator, dtype=torch.float64).clamp(min=-1.0, max=1.0)
        h[:, 0] = 0
        h[:, 1] *= 0.01
        h[:, 2] = 3 * h[:, 3] + 1
        h[:, 4] *= h[:, 4] > 0.9
        h[:, 5] = h[:, 5].abs() + 0.1
        batches.append((h,))
    return batches


def matrices(seed: int) -> list[tuple[Tensor]]:
    return [(h[:, :, 0],) for (h,) in features(seed)]


def together(function: Callable[..., Tensor]) -> Callable[[list[tuple[Tensor]]], Tensor]:
    return lambda updates: function(torch.cat([h for (h,) in updates]))


def mean_of(function: Callable[..., Tensor]) -> Callable[[list[tuple[Any, ...]]], Tensor]:
    return lambda updates: torch.stack([function(*arguments) for arguments in updates]).mean()


def networks(seed: int) -> list[tuple[nn.Module]]:
    return [(network(seed + step),) for step in range(4)]


def with_gradients(seed: int) -> list[tuple[nn.Module]]:
    models = networks(seed)
    for (model,) in models:
        model[0].weight.requires_grad_(False)  # has no gradient
        torch.relu(model(torch.randn(5, 4, dtype=torch.float64)) - 0.5).sum().backward()
    return models


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def to_first(function: Callable[..., Tensor]) -> Callable[[list[tuple[nn.Module]]], Tensor]:
    return lambda updates: torch.stack([function(model, updates[0][0]) for (model,) in updates]).mean()


def to_previous(updates: list[tuple[nn.Module]]) -> Tensor:
    pairs = pairwise(updates)
    return torch.stack([F.update_ratio(after, before) for (before,), (after,) in pairs]).mean()


def batches_for(model_seed: int | None, seed: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """One model and some batches."""
    model = network(0 if model_seed is None else model_seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = (4, 1, 5)
    return [
        (
            model,
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def covariance(updates: list[tuple[nn.Module, Tensor, Tensor]], summary: str = "mean") -> Tensor:
    inputs, targets = (torch.cat(parts) for parts in list(zip(*updates, strict=True))[1:])
    return F.summarize_covariance(F.gradient_covariance(updates[0][0], cross_entropy, inputs, targets), summary)


def larger_batches(seed: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
    return [(model, x.repeat(2, 1) * torch.arange(1.0, 2 * len(x) + 1).double()[:, None], y.repeat(2))
            for model, x, y in batches_for(None, seed)]  # fmt: skip


def readiness(updates: list[tuple[nn.Module, Tensor, Tensor]]) -> Tensor:
    """As the formula has it, with the small batches that each update draws."""
    model = updates[0][0].eval()

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        parts = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    inputs, targets = (torch.cat(parts) for parts in list(zip(*updates, strict=True))[1:])
    squares = []
    for _, x, y in updates:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        squares += [gradient(x[part], y[part]).square().sum() for part in order.split(2) if len(part) == 2]
    squared = gradient(inputs, targets).square().sum()
    loss = cross_entropy(model(inputs), targets).detach()
    return squared**2 / (loss * torch.stack(squares).mean())


def moving_network(seed: int) -> list[tuple[nn.Module, Tensor]]:
    x = batches_for(None, seed)[0][1]
    return [(model, x) for (model,) in networks(seed)]


def churn_between(updates: list[tuple[nn.Module, Tensor]]) -> Tensor:
    outputs = [model.eval()(x).detach() for model, x in updates]
    return torch.stack([F.churn(*pair) for pair in pairwise(outputs)]).mean()


def inputs_only(seed: int) -> list[tuple[nn.Module, Tensor]]:
    return [(model, x) for model, x, _ in batches_for(None, seed)]


def predictions(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for size in (4, 9, 2, 6)
    ]


def predictions_by_task(seed: int) -> list[tuple[Tensor, Tensor, int]]:
    return [(*batch, task) for batch, task in zip(predictions(seed), (0, 2 + seed % 2, 0, 1), strict=True)]


def task_accuracies(updates: list[tuple[Tensor, Tensor, int]]) -> Tensor:
    values = []
    for task in range(1 + max(task for *_, task in updates)):
        of_task = [(p, t) for p, t, number in updates if number == task]
        if of_task:
            values.append(F.online_accuracy(*(torch.cat(parts) for parts in zip(*of_task, strict=True))))
        else:
            values.append(torch.tensor(float("nan"), dtype=torch.float64))
    return torch.stack(values)


SHARES = {
    "DeadUnits": (M.DeadUnits, F.dead_units, {"eps": 0.02}),
    "RarelyActiveUnits": (M.RarelyActiveUnits, F.rarely_active_units, {"rate": 0.3}),
    "DormantUnits": (M.DormantUnits, F.dormant_units, {"tau": 0.025}),
    "SaturatedUnits": (M.SaturatedUnits, F.saturated_units, {"margin": 0.1}),
    "LinearizedUnits": (M.LinearizedUnits, F.linearized_units, {}),
    "SignEntropy": (M.SignEntropy, F.sign_entropy, {}),
    "DuplicateUnits": (M.DuplicateUnits, F.duplicate_units, {"threshold": 0.9}),
    "EffectiveRank": (M.EffectiveRank, F.effective_rank, {}),
    "StableRank": (M.StableRank, F.stable_rank, {}),
    "FeatureRank": (M.FeatureRank, F.feature_rank, {"delta": 0.05}),
}
CONVOLUTION = {"unit_dim": 1}
AVERAGED = {"unit_dim": 1, "reduce": "mean"}

UNIT_CASES = {
    name: Case(partial(metric, **own), matrices, together(partial(function, **own)))
    for name, (metric, function, own) in SHARES.items()
}
CASES = {
    **UNIT_CASES,
    **{
        f"{name}, convolution": Case(
            partial(metric, **own, **CONVOLUTION), features, together(partial(function, **own, **CONVOLUTION))
        )
        for name, (metric, function, own) in SHARES.items()
    },
    **{
        f"{name}, averaged": Case(
            partial(metric, **own, **AVERAGED), features, together(partial(function, **own, **AVERAGED))
        )
        for name, (metric, function, own) in SHARES.items()
    },
    "WeightMagnitude": Case(M.WeightMagnitude, networks, mean_of(F.weight_magnitude)),
    "WeightNorm": Case(M.WeightNorm, networks, mean_of(F.weight_norm)),
    "DistanceFromInit": Case(M.DistanceFromInit, networks, to_first(F.distance_from_init)),
    "DistanceFromInit, relative": Case(
        partial(M.DistanceFromInit, relative=True), networks, to_first(partial(F.distance_from_init, relative=True))
    ),
    "UpdateRatio": Case(M.UpdateRatio, networks, to_previous),
    "Balancedness": Case(
        M.Balancedness,
        networks,
        to_first(lambda model, first: F.balancedness(F.weight_norms(model), F.weight_norms(first))),
    ),
    "GradientNorm": Case(M.GradientNorm, with_gradients, mean_of(lambda model: F.gradient_norm(gradients_of(model)))),
    "ZeroGradientFraction": Case(
        M.ZeroGradientFraction, with_gradients, mean_of(lambda model: F.zero_gradient_fraction(gradients_of(model)))
    ),
    "GradientDormancy": Case(
        partial(M.GradientDormancy, tau=0.9),
        with_gradients,
        mean_of(lambda m: F.gradient_dormancy(gradients_of(m), 0.9)),
    ),
    "IsometryDeviation": Case(M.IsometryDeviation, networks, mean_of(F.isometry_deviation)),
    "IsometryDeviation, any scale": Case(
        partial(M.IsometryDeviation, any_scale=True), networks, mean_of(partial(F.isometry_deviation, any_scale=True))
    ),
    "OptimizationReadiness": Case(partial(M.OptimizationReadiness, batch_size=2), larger_batches, readiness),
    "Churn": Case(M.Churn, moving_network, churn_between),
    "NTKRank": Case(M.NTKRank, inputs_only, mean_of(F.ntk_rank)),
    "NTKRank, effective": Case(
        partial(M.NTKRank, "effective", chunk_size=None), inputs_only, mean_of(partial(F.ntk_rank, summary="effective"))
    ),
    "HessianSpectrum": Case(
        partial(M.HessianSpectrum, steps=12),
        partial(batches_for, None),
        mean_of(lambda model, x, y: F.summarize_spectrum(F.hessian_spectrum(model, cross_entropy, x, y, 12))),
    ),
    "HessianSpectrum, negative": Case(
        partial(M.HessianSpectrum, summary="negative", steps=12),
        partial(batches_for, None),
        mean_of(lambda m, x, y: F.summarize_spectrum(F.hessian_spectrum(m, cross_entropy, x, y, 12), "negative")),
    ),
    "LocalRedundancy": Case(M.LocalRedundancy, inputs_only, mean_of(F.local_redundancy)),
    "GradientCovariance": Case(M.GradientCovariance, partial(batches_for, None), covariance),
    "GradientCovariance, least": Case(
        partial(M.GradientCovariance, summary="least", chunk_size=None),
        partial(batches_for, None),
        partial(covariance, summary="least"),
    ),
    "Sharpness": Case(
        partial(M.Sharpness, tolerance=1e-6),
        partial(batches_for, None),
        mean_of(lambda model, x, y: F.sharpness(model, cross_entropy, x, y, tolerance=1e-6)),
    ),
    "OnlineAccuracy": Case(
        M.OnlineAccuracy,
        predictions,
        lambda updates: F.online_accuracy(*(torch.cat(parts) for parts in zip(*updates, strict=True))),
    ),
    "TaskAccuracy": Case(M.TaskAccuracy, predictions_by_task, lambda updates: task_accuracies(updates).nanmean()),
    "TaskAccuracy, slope": Case(
        partial(M.TaskAccuracy, summary="slope"),
        predictions_by_task,
        lambda updates: F.accuracy_slope(task_accuracies(updates)),
    ),
    "TrainabilityProbe": Case(
        partial(M.TrainabilityProbe, fresh_network, "loss", budget=5),
        lambda seed: [(network(0), x.repeat(2, 1)) for _, x, _ in batches_for(None, seed)],
        mean_of(lambda model, x: F.trainability(model, x, fresh_network, "loss", budget=5)),
    ),
}
