"""What the weights have become: magnitude, norms, distance from the start, balance between layers, size of a step.

Every function takes a module or named tensors. Of a module, "weights" are the parameters with two dimensions or more
(matrices and kernels: no biases, no scales of norm layers), "parameters" are all. Named tensors are used as they are.
NaN or infinity in a tensor gives NaN or infinity. Values are accumulated in float64.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.shards.tensors import is_flattened

Source = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def named_parameters(source: Source) -> dict[str, Tensor]:
    """All parameters of a module, shared ones once, or the named tensors as they are."""
    try:
        found = dict(source.named_parameters() if isinstance(source, nn.Module) else source)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A module or tensors by name are required, got {checks.shown(source)}: pass a module, or a mapping from "
            "names to tensors."
        ) from error
    for name, tensor in found.items():
        dense(checks.word("the name of a tensor", name), tensor)
    if not any(tensor.numel() for tensor in found.values()):
        raise ValueError(
            "At least one parameter with an entry is required, got none: "
            "pass a module that has parameters, or a mapping from names to tensors."
        )
    return found


def named_weights(source: Source) -> dict[str, Tensor]:
    """A module's parameters with two dimensions or more, or the named tensors as they are."""
    found = named_parameters(source)
    if not isinstance(source, nn.Module):
        return found
    weights = {name: tensor for name, tensor in found.items() if tensor.ndim >= 2}
    if not weights:
        raise ValueError(
            f"At least one weight matrix or kernel is required, got only {', '.join(found)}: "
            "pass the tensors to measure as a mapping from names to tensors."
        )
    return weights


def dense(name: str, value: object) -> Tensor:
    """A tensor that can be measured: of floating-point numbers, each of which is there, on this rank or on another."""
    tensor = checks.tensor(name, value)
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise ValueError(f"{name} must have values, got a tensor without: run the model once, or materialise it first.")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor of floating-point numbers, got {tensor.dtype} in the layout "
            f"{tensor.layout}: convert it, or leave it out and pass the others as a mapping from names to tensors."
        )
    if is_flattened(tensor):
        raise ValueError(
            f"{name} must be a parameter of its own, got a part of a flat one (FSDP1 or DeepSpeed stage 3), which does "
            "not know its shape: use a strategy that keeps parameters whole, or FSDP2."
        )
    return tensor


def check_whole(parameters: Mapping[str, Tensor]) -> None:
    """Raise if parameters are shared out among ranks: then a copy of the model cannot be run by one of them."""
    for name, parameter in parameters.items():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"Parameters must be whole on every rank, got {name!r}, which is sharded: measure a model that is not, "
                "such as one that has loaded this one's weights."
            )


def whole(value: Tensor) -> Tensor:
    """A value that was computed from sharded tensors, put together over the ranks: all must call this."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of all entries, in float64."""
    length: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)
    return whole(length)


def joint_norm(norms: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of several tensors together, given the norm of each."""
    return norm(torch.stack(list(norms)))


def weight_magnitude(source: Source) -> Tensor:
    """Mean absolute value of the weights, over all entries of all layers.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import weight_magnitude
        >>> weight_magnitude({"weight": torch.tensor([[1.0, -3.0]])})
        tensor(2., dtype=torch.float64)
    """
    weights = named_weights(source).values()
    total = torch.stack([whole(w.detach().abs().sum(dtype=torch.float64)) for w in weights]).sum()
    return total / sum(w.numel() for w in weights)


def weight_norms(source: Source) -> dict[str, Tensor]:
    """Frobenius norm of each weight.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import weight_norms
        >>> weight_norms({"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([12.0])})
        {'first': tensor(5., dtype=torch.float64), 'second': tensor(12., dtype=torch.float64)}
    """
    return {name: norm(weight) for name, weight in named_weights(source).items()}


def weight_norm(source: Source) -> Tensor:
    """Frobenius norm of all weights together.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import weight_norm
        >>> weight_norm({"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([12.0])})
        tensor(13., dtype=torch.float64)
    """
    return joint_norm(weight_norms(source).values())


def distance_from_init(source: Source, initial: Source, relative: bool = False) -> Tensor:
    r"""Euclidean distance of all parameters from their initial values.

    .. math:: \|\theta - \theta_0\|, \qquad \text{relative: } \|\theta - \theta_0\| / \|\theta_0\|

    Args:
        source: the parameters now.
        initial: the parameters at the start, by the same names.
        relative: divide by the norm of the initial parameters; if that is 0, infinity (or NaN, where nothing moved).

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import distance_from_init
        >>> distance_from_init({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 2.0])})
        tensor(3.6056, dtype=torch.float64)
    """
    now, start = named_parameters(source), named_parameters(initial)
    check_same_tensors(now, start)
    # The difference is taken in float64: half precision would round away small changes of large weights.
    moved = joint_norm(norm(now[name].detach().double() - start[name].to(now[name].device)) for name in now)
    return moved / joint_norm(norm(tensor) for tensor in start.values()).to(moved.device) if relative else moved


def update_ratio(source: Source, before: Source) -> Tensor:
    r"""Size of a step relative to the parameters before it.

    .. math:: \|\theta_{t+1} - \theta_t\| / \|\theta_t\|

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import update_ratio
        >>> update_ratio({"w": torch.tensor([3.0, 4.5])}, {"w": torch.tensor([3.0, 4.0])})
        tensor(0.1000, dtype=torch.float64)
    """
    return distance_from_init(source, before, relative=True)


def balancedness(norms: Mapping[str, Tensor], initial_norms: Mapping[str, Tensor]) -> Tensor:
    r"""Largest change of the ratio of two layers' norms since the start.

    .. math:: \max_{i \ne j} \Bigl| \frac{\|W_i\|}{\|W_j\|} - \frac{\|W_i^0\|}{\|W_j^0\|} \Bigr|

    Both orders of each pair count. A layer of norm 0 gives infinity or NaN.

    Args:
        norms: norm of each layer now, as from :func:`weight_norms`.
        initial_norms: norm of each layer at the start.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import balancedness
        >>> start = {"first": torch.tensor(1.0), "second": torch.tensor(1.0)}
        >>> balancedness({"first": torch.tensor(1.0), "second": torch.tensor(2.0)}, start)
        tensor(1., dtype=torch.float64)
    """
    norms, initial_norms = named_parameters(norms), named_parameters(initial_norms)
    check_same_tensors(norms, initial_norms)
    if len(norms) < 2:
        raise ValueError(
            f"Balancedness compares layers and needs at least two weights, got {len(norms)}: "
            "measure the whole network rather than one layer."
        )
    now = torch.stack(list(norms.values())).double()
    start = torch.stack([initial_norms[name] for name in norms]).to(now)
    change = (now[:, None] / now - start[:, None] / start).abs()
    # The diagonal is 0 by definition, also where a norm is 0.
    return change.fill_diagonal_(0.0).max()


def isometry_deviation(source: Source, any_scale: bool = False) -> Tensor:
    r"""Deviation from isometry, the mean over the weights.

    .. math:: \|W^\top W - I\|_F^2

    with :math:`W W^\top` in place of :math:`W^\top W` where a matrix has fewer rows than columns. Kernels are flattened
    to one row for each output.

    Args:
        source: a module or named matrices.
        any_scale: divide each matrix by the root mean square of its singular values first, so that a multiple of an
            isometry counts as one. A matrix of zeros is none.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import isometry_deviation
        >>> isometry_deviation({"w": torch.diag(torch.tensor([1.0, 2.0]))})
        tensor(9., dtype=torch.float64)
        >>> isometry_deviation({"w": 3 * torch.eye(4)}, any_scale=True)
        tensor(0., dtype=torch.float64)

    Reference:
        Han et al., ICLR 2026; arXiv 2602.08040.
    """
    checks.flag("any_scale", any_scale)
    deviations = []
    for name, weight in named_weights(source).items():
        if weight.ndim < 2:
            raise ValueError(
                f"Matrices or kernels are required, got {name!r} of shape {tuple(weight.shape)}: leave it out."
            )
        matrix = whole(weight.detach()).flatten(1).double()
        gram = matrix @ matrix.mT if len(matrix) < matrix.shape[1] else matrix.mT @ matrix
        if any_scale:
            mean = gram.diagonal().mean()
            gram = gram / torch.where(mean == 0, 1.0, mean)
        gram.diagonal().sub_(1)
        deviations.append(gram.square().sum())
    return torch.stack(deviations).mean()


def check_same_tensors(now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """Raise unless both have the same names and shapes."""
    shapes_now = {name: tuple(tensor.shape) for name, tensor in now.items()}
    shapes_start = {name: tuple(tensor.shape) for name, tensor in start.items()}
    if shapes_now != shapes_start:
        changed = sorted(name for name, _ in shapes_now.items() ^ shapes_start.items())
        raise ValueError(
            "The parameters must have the same names and shapes as at the start, got changes in "
            f"{', '.join(dict.fromkeys(changed))}: measure a network that stays the same, or start anew."
        )
