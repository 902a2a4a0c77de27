"""The tangent kernel of a network on some inputs: in how many directions it can move its outputs."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.functional.gradients import per_sample_gradients
from lightning_plasticity.functional.rank import effective_rank_of

NTKSummary: TypeAlias = Literal["energy", "effective"]


def ntk_rank(
    model: nn.Module,
    inputs: Tensor,
    summary: NTKSummary = "energy",
    energy: float = 0.99,
    chunk_size: int | None = 16,
) -> Tensor:
    r"""Rank of the neural tangent kernel :math:`J J^\top` on some inputs, at most their number.

    :math:`J` has a row for each input: the gradient of the sum of the outputs. The model runs in evaluation mode and is
    left as it was. Memory grows with inputs times parameters, so that some dozens of inputs are meant.

    Args:
        model: the network.
        inputs: examples in dimension 0.
        summary: ``"energy"``, how many of the largest eigenvalues it takes for this share of their sum, or
            ``"effective"``, the exponential of the entropy of their shares.
        energy: the share.
        chunk_size: inputs that are differentiated at once; fewer need less memory. None: all.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import ntk_rank
        >>> model = torch.nn.Linear(3, 1, bias=False)  # whose gradient is the input
        >>> ntk_rank(model, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
        tensor(2., dtype=torch.float64)
    """
    checks.choice("summary", summary, ("energy", "effective"))
    energy = checks.number("energy", energy, above=0, most=1)
    checks.tensor("inputs", inputs)
    targets = torch.zeros(len(inputs) if inputs.ndim else 0, device=inputs.device)
    gradients = per_sample_gradients(model, lambda output, _: output.sum(), inputs, targets, chunk_size).double()
    if not gradients.isfinite().all():
        return gradients.new_tensor(float("nan"))
    values = torch.linalg.eigvalsh(gradients @ gradients.T).flip(0).clamp(min=0)
    values = torch.where(values > len(values) * torch.finfo(torch.float64).eps * values[0], values, 0.0)
    if summary == "effective":
        return effective_rank_of(values)
    if values[0] == 0:
        return values.new_zeros(())
    reached = values.cumsum(0) / values.sum()
    # The slack decides ties, which rounding would otherwise decide.
    return (reached < energy - 1e-10).sum().double() + 1
