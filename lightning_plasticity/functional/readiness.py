"""Whether a network is ready to learn a task: gradients that are large for the loss, and that agree."""

import torch
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.functional.gradients import (
    LossFunction,
    check_batch,
    check_loss,
    measuring,
    trainable_parameters,
)


def optimization_readiness(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    batch_size: int = 4,
    batches: int = 128,
) -> Tensor:
    r"""How much a step of gradient descent could gain, by how large gradients are and how well those of batches agree.

    .. math:: \frac{\|g\|^2}{L} \cdot \frac{\|g\|^2}{\mathbb{E}_B \|g_B\|^2}

    with :math:`g` the gradient of the mean loss :math:`L` of all examples and :math:`g_B` that of small batches. 0
    where the loss or all gradients are 0. The model runs in evaluation mode and is left as it was.

    Args:
        model: the network.
        loss_fn: takes the output and the targets of a batch, gives their mean loss.
        inputs: examples of the task in dimension 0; the authors take 10,000.
        targets: as many targets.
        batch_size: the examples of a small batch.
        batches: how many small batches to draw at most, each example in one at most. The draw is always the same.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import optimization_readiness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> x, y = torch.ones(4, 1), torch.zeros(4, 1)  # the same gradient of 2 for all, and a loss of 1
        >>> optimization_readiness(model, torch.nn.functional.mse_loss, x, y)
        tensor(4., dtype=torch.float64)

    Reference:
        Wang et al. 2026, arXiv 2605.09044.
    """
    sums = readiness_sums(model, loss_fn, inputs, targets, batch_size, batches)
    return readiness_of(*sums)


def readiness_sums(
    model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor, batch_size: int, batches: int
) -> tuple[Tensor, Tensor, int, Tensor, int]:
    """What adds up over parts of the data.

    Returns:
        The sum of the examples' gradients, the sum of their losses, their number, the sum over small batches of the
        squared norm of their gradients, and the number of small batches.
    """
    checks.module("model", model)
    checks.function("loss_fn", loss_fn)
    checks.count("batch_size", batch_size, least=1)
    checks.count("batches", batches, least=1)
    with measuring(model):
        inputs, targets = check_batch(inputs, targets)
        if len(inputs) < batch_size:
            raise ValueError(
                f"At least batch_size={batch_size} examples are required at once, got {len(inputs)}: give more, or "
                "lower batch_size."
            )
        parameters = list(trainable_parameters(model).values())

        def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            loss = check_loss(loss_fn(model(x), y))
            if not loss.requires_grad:
                return loss.double(), torch.zeros(sum(p.numel() for p in parameters), device=x.device).double()
            parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
            return loss.detach().double(), torch.cat([part.flatten().double() for part in parts])

        loss, whole = gradient(inputs, targets)
        squares = [
            gradient(inputs[chosen], targets[chosen])[1].square().sum()
            for chosen in _small_batches(len(inputs), batch_size, batches)
        ]
        count = len(inputs)
        return whole * count, loss * count, count, torch.stack(squares).sum(), len(squares)


def _small_batches(count: int, size: int, most: int) -> list[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return list(torch.split(order, size))[: min(count // size, most)]


def readiness_of(
    gradient: Tensor, loss: Tensor, examples: Tensor | int, squares: Tensor, batches: Tensor | int
) -> Tensor:
    """The measure, given what :func:`readiness_sums` gives."""
    squared = (gradient / examples).square().sum()
    below = (loss / examples) * (squares / batches)
    return torch.where(below == 0, 0.0, squared.square() / below)
