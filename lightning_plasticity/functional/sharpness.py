"""Sharpness: the largest curvature of the loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.functional.gradients import LossFunction, measuring
from lightning_plasticity.functional.hessian import hessian_product
from lightning_plasticity.notices import warn


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> Tensor:
    r"""Largest eigenvalue of the Hessian of a batch's loss, by Lanczos iteration with Hessian-vector products.

    Largest in value, not in size: a strongly negative eigenvalue, which power iteration would find, is not taken for
    it. Vectors are not orthogonalised again, so three of them are held at a time; repeated copies of an eigenvalue,
    which that allows, do not change the largest. The model runs in evaluation mode and is left as it was.

    Args:
        model: the network.
        loss_fn: takes the output and the targets of the batch, gives a scalar.
        inputs: examples in dimension 0.
        targets: as many targets.
        max_iterations: Hessian-vector products at most; reaching it without convergence warns.
        tolerance: accepted residual, relative to the eigenvalue.

    Returns:
        The eigenvalue in float64; NaN if the loss or its curvature is not finite.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> sharpness(model, lambda output, target: (output - target).square().sum() / 2, x, y)
        tensor(4.0000, dtype=torch.float64)
    """
    checks.module("model", model)
    checks.function("loss_fn", loss_fn)
    max_iterations, tolerance = check_lanczos(max_iterations, tolerance)
    with measuring(model):
        product = hessian_product(model, loss_fn, inputs, targets)
        return largest_eigenvalue(*product, max_iterations, tolerance).to(product[1].device)


def check_lanczos(max_iterations: int, tolerance: float) -> tuple[int, float]:
    """The settings, if with them the iteration can run and end."""
    return checks.count("max_iterations", max_iterations, least=1), checks.number("tolerance", tolerance, above=0)


def largest_eigenvalue(
    times: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int = 100, tolerance: float = 1e-3
) -> Tensor:
    """Largest eigenvalue of a symmetric matrix that is given by its products with vectors.

    Args:
        times: multiplies the matrix with a vector.
        start: a vector that no eigenvector is orthogonal to, such as a random one.
        max_iterations: products at most; reaching it without convergence warns.
        tolerance: accepted residual, relative to the eigenvalue.

    Example:
        >>> matrix = torch.diag(torch.tensor([-5.0, 1.0, 3.0]))
        >>> largest_eigenvalue(lambda v: matrix @ v, torch.ones(3))
        tensor(3.0000, dtype=torch.float64)
    """
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    previous, vector, beta = torch.zeros_like(start), start / start.norm(), 0.0
    eigenvalue, residual = float("nan"), float("inf")
    for _ in range(max_iterations):
        product = times(vector) - beta * previous
        diagonal.append(torch.dot(product, vector).item())
        product -= diagonal[-1] * vector
        beta = product.norm().item()
        if not math.isfinite(diagonal[-1] + beta):
            return torch.tensor(float("nan"), dtype=torch.float64)
        tridiagonal = torch.tensor(diagonal, dtype=torch.float64).diag()
        tridiagonal += torch.tensor(off_diagonal, dtype=torch.float64).diag(1) if off_diagonal else 0
        values, vectors = torch.linalg.eigh(tridiagonal, UPLO="U")
        eigenvalue, residual = values[-1].item(), beta * vectors[-1, -1].abs().item()
        # Below the rounding of the products nothing more can be gained, and the next vector would be noise.
        rounding = torch.finfo(start.dtype).eps * values.abs().max().item()
        if residual <= tolerance * abs(eigenvalue) or beta <= rounding:
            break
        off_diagonal.append(beta)
        previous, vector = vector, product / beta
    else:
        warn(
            f"The largest eigenvalue must converge in {max_iterations} iterations, got {eigenvalue:.4g} with residual "
            f"{residual:.2g}, more than {tolerance:g} of it: raise `max_iterations` or `tolerance`."
        )
    return torch.tensor(eigenvalue, dtype=torch.float64)
