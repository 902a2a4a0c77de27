"""The curvature of the loss in all directions: products with its Hessian, and the eigenvalues of that."""

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

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
from lightning_plasticity.functional.rank import effective_rank_of, feature_rank_of

Product: TypeAlias = Callable[[Tensor], Tensor]
HessianSummary: TypeAlias = Literal["energy", "effective", "negative"]


def hessian_spectrum(
    model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor, steps: int = 50
) -> Tensor:
    r"""Eigenvalues of the Hessian of a batch's loss, by Lanczos iteration with Hessian-vector products.

    With as many steps as parameters these are all eigenvalues. With fewer it is so many of them: those at the ends of
    the spectrum, the largest and the most negative, are the first to be exact, and the rest stands for the mass between
    them. Each step costs two backward passes; all vectors are kept and made orthogonal again, so that memory grows with
    steps times parameters: small networks are meant. The model runs in evaluation mode and is left as it was.

    Args:
        model: the network.
        loss_fn: takes the output and the targets of the batch, gives a scalar.
        inputs: examples in dimension 0.
        targets: as many targets.
        steps: how many eigenvalues, at most the number of parameters.

    Returns:
        The eigenvalues in float64, the largest first; NaN if the loss or its curvature is not finite.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import hessian_spectrum
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> hessian_spectrum(model, lambda output, target: (output - target).square().sum() / 2, x, y)
        tensor([4.0000, 1.0000], dtype=torch.float64)
    """
    checks.module("model", model)
    checks.function("loss_fn", loss_fn)
    steps = checks.count("steps", steps, least=1)
    with measuring(model):
        product = hessian_product(model, loss_fn, inputs, targets)
        return lanczos_eigenvalues(*product, steps).to(product[1].device)


def summarize_spectrum(spectrum: Tensor, summary: HessianSummary = "energy", energy: float = 0.99) -> Tensor:
    r"""In how many directions the loss is curved, or how much of its curvature is negative.

    Args:
        spectrum: eigenvalues, the result of :func:`hessian_spectrum`.
        summary: ``"energy"``, how many of the largest in size it takes for this share of the sum of all sizes;
            ``"effective"``, the exponential of the entropy of their shares; or ``"negative"``, the share of that sum
            that negative ones have.
        energy: the share.

    Example:
        >>> import torch
        >>> summarize_spectrum(torch.tensor([6.0, 2.0, 0.0, -2.0]), "negative")
        tensor(0.2000, dtype=torch.float64)
    """
    summary = checks.choice("summary", summary, get_args(HessianSummary))
    energy = checks.number("energy", energy, above=0, most=1)
    values = checks.tensor("spectrum", spectrum).double()
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"spectrum must be a vector of eigenvalues, got shape {tuple(values.shape)}: pass what hessian_spectrum "
            "returned."
        )
    if not values.isfinite().all():
        return values.new_tensor(float("nan"))
    sizes = values.abs().sort(descending=True).values
    if summary == "energy":
        return feature_rank_of(sizes, 1 - energy)
    if summary == "effective":
        return effective_rank_of(sizes)
    return (-values).clamp(min=0).sum() / sizes.sum().clamp(min=torch.finfo(torch.float64).tiny)


def hessian_product(model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor) -> tuple[Product, Tensor]:
    """What multiplies the Hessian with a vector, and a vector to begin with; to be used while measuring the model."""
    inputs, targets = check_batch(inputs, targets)
    parameters = list(trainable_parameters(model).values())
    loss = check_loss(loss_fn(model(inputs), targets))
    if not loss.requires_grad:
        raise ValueError(
            "The loss must depend on the trainable parameters, got one without gradient: leave out what cuts it "
            "off, such as detach()."
        )
    # Created once: each product is then one more backward pass through this graph.
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    curved = [index for index, g in enumerate(gradient) if g.requires_grad]
    sizes = [p.numel() for p in parameters]

    def times(vector: Tensor) -> Tensor:
        if not curved:  # the loss is linear in every parameter
            return torch.zeros_like(vector)
        pieces = [v.view_as(p).to(p.dtype) for v, p in zip(torch.split(vector, sizes), parameters, strict=True)]
        product = torch.autograd.grad(
            [gradient[i] for i in curved],
            parameters,
            [pieces[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        return torch.cat([piece.flatten().to(vector.dtype) for piece in product])

    # Its own generator: the measure repeats itself, and the user's random state is left alone.
    start = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    return times, start.to(loss.device, torch.promote_types(parameters[0].dtype, torch.float32))


def lanczos_eigenvalues(times: Product, start: Tensor, steps: int) -> Tensor:
    """Eigenvalues of a symmetric matrix that is given by its products with vectors, the largest first.

    Args:
        times: multiplies the matrix with a vector.
        start: a vector that no eigenvector is orthogonal to, such as a random one.
        steps: how many eigenvalues, at most the size of the matrix.

    Example:
        >>> matrix = torch.diag(torch.tensor([2.0, -5.0, 2.0]))  # one of them twice
        >>> lanczos_eigenvalues(lambda v: matrix @ v, torch.tensor([1.0, 2.0, 3.0]), 3)
        tensor([ 2.0000,  2.0000, -5.0000], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(1)
    steps = min(steps, start.numel())
    basis = start.new_empty(steps, start.numel())
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    vector = start
    for k in range(steps):
        basis[k] = vector / vector.norm()
        product = times(basis[k])
        matrix[k, k] = torch.dot(product, basis[k]).item()
        vector = _orthogonal(product, basis[: k + 1])
        length = vector.norm().item()
        if not matrix[k, k].isfinite() or length != length:
            return torch.full((1,), float("nan"), dtype=torch.float64)
        if k + 1 == steps:
            break
        # Where less is left than rounding, the products lead nowhere new: on with a direction of chance.
        if length > 100 * torch.finfo(start.dtype).eps * product.norm().item():
            matrix[k, k + 1] = matrix[k + 1, k] = length
        else:
            fresh = torch.randn(start.numel(), generator=generator).to(start)
            vector = _orthogonal(fresh, basis[: k + 1])
    eigenvalues: Tensor = torch.linalg.eigvalsh(matrix).flip(0)
    return eigenvalues


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """What a vector has beside some vectors that are orthogonal; twice, for rounding."""
    rest: Tensor = vector - basis.T @ (basis @ vector)
    rest -= basis.T @ (basis @ rest)
    return rest
