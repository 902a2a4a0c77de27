"""How well a network can still learn: a copy of it fits random targets, next to a fresh network of the same kind."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.examining import examining
from lightning_plasticity.functional.weights import check_whole, named_parameters

Measure = Literal["steps", "loss"]


def trainability(
    model: nn.Module,
    inputs: Tensor,
    fresh: Callable[[], nn.Module] | None = None,
    measure: Measure = "steps",
    *,
    budget: int = 200,
    target_loss: float = 0.1,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    r"""How a copy of the network fits fresh random targets, as a ratio to a fresh network.

    .. math:: \mathrm{steps}(\text{model}) / \mathrm{steps}(\text{fresh}) \quad\text{or}\quad
              \mathrm{loss}(\text{model}) / \mathrm{loss}(\text{fresh})

    Both networks learn the same standard normal targets from all inputs at once, in training mode, by Adam on the mean
    squared error; all parameters take part, also frozen ones. Above 1 the network learns worse than a fresh one.
    Neither the model nor the random state is changed.

    Args:
        model: the network; copied, so that memory for two copies, gradients and Adam's averages is needed.
        inputs: the examples to fit.
        fresh: makes a fresh network. None: a copy of the model on which every module's ``reset_parameters`` was called.
        measure: ``"steps"``, the steps until the loss is at most ``target_loss``; or ``"loss"``, that after ``budget``.
            A model that needs more steps than the budget counts as if it had needed just the budget: the ratio is then
            a lower bound. If the fresh network needs more, the ratio is NaN. The loss compares best after a budget that
            does not let the fresh network fit completely.
        budget: optimizer steps at most.
        target_loss: loss to reach by ``"steps"``; always answering 0 has an expected loss of 1.
        learning_rate: Adam's.
        seed: of the targets, the fresh network and dropout.

    Returns:
        The ratio in float64; where training diverged, NaN or infinity by ``"loss"``, and the budget by ``"steps"``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import trainability
        >>> model = torch.nn.Linear(4, 2)
        >>> bool(trainability(model, torch.randn(8, 4), measure="loss", budget=20) > 0)
        True
    """
    checks.module("model", model)
    check_probe(fresh, measure, budget, target_loss, learning_rate, seed)
    if checks.tensor("inputs", inputs).ndim == 0 or len(inputs) == 0:
        raise ValueError(
            f"At least one example is required, got inputs of shape {tuple(inputs.shape)}: pass a batch of inputs."
        )
    # Half precision would measure its own rounding rather than the network.
    dtype = torch.promote_types(next(iter(named_parameters(model).values())).dtype, torch.float32)
    # Gradients are needed also where the caller has turned them off, as Lightning does in validation.
    with (
        examining(),  # a copy shares the hooks of the network
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []),
    ):
        inputs = inputs.detach().clone()
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        stop_at = target_loss if measure == "steps" else None
        torch.manual_seed(seed)
        check_whole(named_parameters(model))
        copied = copy.deepcopy(model).to(inputs.device, dtype)
        # Copied also if given: `fresh` may return the same network each time.
        begun = _fresh_copy(copied) if fresh is None else copy.deepcopy(checks.module("what fresh returns", fresh()))
        begun = begun.to(inputs.device, dtype)
        of_model, of_fresh = (
            _fit(network, inputs, seed, budget, learning_rate, stop_at) for network in (copied, begun)
        )
    if measure == "loss":
        return of_model.loss / of_fresh.loss
    fresh_steps = float(of_fresh.steps) if of_fresh.loss <= target_loss else float("nan")
    return torch.tensor(of_model.steps, dtype=torch.float64, device=inputs.device) / fresh_steps


def check_probe(
    fresh: object, measure: Measure, budget: int, target_loss: float, learning_rate: float, seed: int
) -> None:
    """Raise unless the probe can run."""
    checks.optional(checks.function, "fresh", fresh)
    checks.choice("measure", measure, get_args(Measure))
    checks.count("budget", budget, least=1)
    checks.number("target_loss", target_loss, above=0)
    checks.number("learning_rate", learning_rate, above=0)
    checks.seed("seed", seed)


@dataclass(frozen=True)
class _Fit:
    loss: Tensor
    steps: int


def _fresh_copy(model: nn.Module) -> nn.Module:
    """Copy a model and draw its parameters anew."""
    fresh = copy.deepcopy(model)
    for name, module in fresh.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"A fresh network needs `reset_parameters` of each module with parameters, got {type(module).__name__} "
                f"{name!r} without it: pass `fresh`, a function that makes a fresh network."
            )
    return fresh


def _fit(
    network: nn.Module, inputs: Tensor, seed: int, budget: int, learning_rate: float, stop_at: float | None
) -> _Fit:
    """Fit standard normal targets, until a loss is reached if one is given."""
    network.requires_grad_(True).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    torch.manual_seed(seed)  # the same dropout for every network
    targets: Tensor | None = None
    for steps in range(budget + 1):
        output = network(inputs)
        checks.tensor("the network's output", output)
        if targets is None:
            targets = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
        loss = (output - targets).square().mean()
        if steps == budget or (stop_at is not None and loss <= stop_at):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _Fit(loss.detach().double(), steps)
