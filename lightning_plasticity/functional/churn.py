"""Churn: how far a network's outputs on the same inputs have moved."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_plasticity import checks

Outputs: TypeAlias = Literal["classes", "values"]


def churn(before: Tensor, after: Tensor, outputs: Outputs = "classes") -> Tensor:
    r"""How far outputs on the same inputs have moved, the mean over examples (and positions).

    For ``"classes"`` the divergence :math:`\sum_c p_c \log (p_c / q_c)` of the probabilities :math:`q` now from those
    before, given logits along the last dimension; for ``"values"`` the mean squared difference.

    Args:
        before: what the network gave.
        after: what it gives now, of the same shape.
        outputs: what the outputs are.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import churn
        >>> churn(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]), "values")
        tensor(2., dtype=torch.float64)
    """
    checks.tensor("before", before)
    checks.tensor("after", after)
    checks.choice("outputs", outputs, ("classes", "values"))
    if before.shape != after.shape or before.ndim == 0 or before.numel() == 0:
        raise ValueError(
            "Outputs of the same inputs before and after are required, with at least one example, got shapes "
            f"{tuple(before.shape)} and {tuple(after.shape)}: compare the same network on the same inputs."
        )
    old, new = before.detach().double(), after.detach().double()
    if outputs == "values":
        return (old - new).square().mean()
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    # 0 where an old probability is 0, whatever the logarithms are
    terms = torch.where(old.isneginf(), 0.0, old.exp() * (old - new))
    return terms.sum(-1).mean()
