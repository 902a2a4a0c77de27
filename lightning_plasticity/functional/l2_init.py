"""L2 Init: draw weights back to where they started."""

from collections.abc import Sequence

import torch
from torch import Tensor


def l2_init_update(values: Sequence[Tensor], initial: Sequence[Tensor], rate: Tensor | float) -> list[Tensor]:
    r"""What to add to parameters: :math:`-\eta \lambda (\theta - \theta_0)`.

    Args:
        values: :math:`\theta`.
        initial: :math:`\theta_0`.
        rate: :math:`\eta \lambda`, a number or a tensor without dimensions.

    Example:
        >>> l2_init_update([torch.tensor([3.0, 1.0])], [torch.tensor([1.0, 1.0])], 0.5)
        [tensor([-1., -0.])]
    """
    update = list(torch._foreach_sub(list(values), list(initial)))
    torch._foreach_mul_(update, -rate)
    return update


def at_the_same_rank(values: Tensor, ordered: Tensor) -> Tensor:
    """For each value the number that has the same place in ``ordered`` as the value has among all.

    Of equal values the one that comes first counts as smaller.

    Args:
        values: in any order.
        ordered: as many numbers, from the smallest to the largest.

    Example:
        >>> at_the_same_rank(torch.tensor([[5.0, -1.0, 2.0]]), torch.tensor([10.0, 20.0, 30.0]))
        tensor([[30., 10., 20.]])
    """
    order = values.flatten().argsort(stable=True)
    return torch.empty_like(ordered).scatter_(0, order, ordered).view(values.shape)
