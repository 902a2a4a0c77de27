"""What gradients look like: norm, zeros, and how those of single examples agree with one another."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_plasticity import checks
from lightning_plasticity.examining import examining
from lightning_plasticity.functional.substitution import call_with
from lightning_plasticity.functional.weights import check_whole, dense, joint_norm, norm, whole
from lightning_plasticity.shards import tensors

LossFunction = Callable[[Tensor, Tensor], Tensor]
Summary = Literal["mean", "negative", "least"]

# Columns that are turned into float64 at once: bounds the memory of the copy, not the result.
_COLUMNS_AT_ONCE = 1 << 20


def read_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of the parameters that have one."""
    parameters = [checks.tensor("each parameter", p) for p in parameters]
    found = [tensors.gradient(p) for p in parameters]
    gradients = [dense("a gradient", g).detach() for g in found if g is not None and g.numel()]
    if not gradients:
        raise ValueError(
            "At least one parameter must have a gradient, got none: measure after `backward` and before `zero_grad`."
        )
    return gradients


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, in float64; NaN or infinity where they contain it.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import gradient_norm
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5., dtype=torch.float64)
    """
    return joint_norm(norm(gradient) for gradient in _some(gradients))


def zero_gradient_fraction(gradients: Iterable[Tensor]) -> Tensor:
    """Share of gradient entries that are exactly 0; NaN if an entry is not finite.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import zero_gradient_fraction
        >>> zero_gradient_fraction([torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 0.0]])])
        tensor(0.7500, dtype=torch.float64)
    """
    gradients = _some(gradients)
    # 0 * x is NaN for NaN and infinity, and 0 otherwise.
    zeros = [((g == 0) + g.detach() * 0).sum(dtype=torch.float64) for g in gradients]
    return torch.stack([whole(count) for count in zeros]).sum() / sum(g.numel() for g in gradients)


def gradient_dormancy(gradients: Iterable[Tensor], tau: float = 0.01) -> Tensor:
    r"""Share of units whose incoming weights have next to no gradient, relative to their layer.

    .. math:: \frac{G_i}{\mathrm{mean}_k\, G_k + 10^{-9}} \le \tau, \qquad G_i = \mathrm{mean}_j |g_{ij}|

    Args:
        gradients: those of weights, with a row for each unit; others (biases, scales) are left out.
        tau: the threshold.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import gradient_dormancy
        >>> gradient_dormancy([torch.tensor([[0.0, 0.0], [1.0, -3.0]])])
        tensor(0.5000, dtype=torch.float64)

    Reference:
        Liu et al., NeurIPS 2025; arXiv 2505.24061.
    """
    tau = checks.number("tau", tau, least=0)
    weights = [whole(gradient.detach()) for gradient in _some(gradients) if gradient.ndim > 1]
    rows = [weight.flatten(1).abs().mean(1, dtype=torch.float64) for weight in weights]
    if not rows:
        raise ValueError(
            "At least one gradient of a weight matrix or kernel is required, got none: pass those of the weights."
        )
    scores = torch.cat([row / (row.mean() + 1e-9) for row in rows])
    # 0 * x is NaN for NaN and infinity, and 0 otherwise.
    return (scores <= tau).double().mean() + (scores * 0).sum()


def _some(gradients: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(gradients, Tensor) or not isinstance(gradients, Iterable):
        raise ValueError(f"gradients must be several tensors, got {checks.shown(gradients)}: pass them in a list.")
    given = [g for g in gradients if dense("a gradient", g).numel()]
    if not given:
        raise ValueError("At least one gradient with an entry is required, got none: pass the gradients to measure.")
    return given


@contextmanager
def measuring(model: nn.Module) -> Generator[None, None, None]:
    """Hold a model still while it is differentiated: evaluation mode, and kernels that can be differentiated twice.

    Hooks of plasticity methods do not hear it.
    Every module gets its own mode back, also after an error. Gradients work inside, even under ``inference_mode``.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Fused attention kernels have neither a batching rule nor a second derivative.
        with examining(), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_batch(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Check that each input has its target; return copies that may be differentiated through."""
    checks.tensor("inputs", inputs)
    checks.tensor("targets", targets)
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) == 0 or len(inputs) != len(targets):
        raise ValueError(
            "Inputs and targets must hold the same number of examples, at least one, "
            f"got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}: pass one target for each input."
        )
    # Tensors made under `inference_mode` can only be differentiated through as copies made outside of it.
    return inputs.detach().clone(), targets.detach().clone()


def check_loss(loss: object) -> Tensor:
    """Raise unless a loss function has given one number."""
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else checks.shown(loss)
    raise ValueError(f"The loss must be a scalar, got {got}: reduce it over the batch, as by its mean.")


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of a module that require a gradient."""
    trainable: dict[str, Tensor] = {name: dense(name, p) for name, p in model.named_parameters() if p.requires_grad}
    check_whole(trainable)
    if not trainable:
        raise ValueError(
            "The model must have a parameter that requires a gradient, got none: call `model.requires_grad_(True)`."
        )
    return trainable


def per_sample_gradients(
    model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor, chunk_size: int | None = 16
) -> Tensor:
    """Gradient of each example's loss with respect to all trainable parameters, one row an example.

    The model runs in evaluation mode, so that batch norm does not mix the examples, and is left as it was: modes,
    statistics and ``.grad`` do not change.

    Args:
        model: the network; called on batches of one example.
        loss_fn: takes the output and the target of such a batch, gives its loss.
        inputs: examples in dimension 0.
        targets: as many targets.
        chunk_size: examples that are differentiated at once; fewer need less memory. None: all.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import per_sample_gradients
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
        >>> per_sample_gradients(model, lambda output, target: (output - target).sum(), x, y)
        tensor([[1., 2.],
                [3., 4.]])
    """
    checks.module("model", model)
    checks.function("loss_fn", loss_fn)
    checks.optional(checks.count, "chunk_size", chunk_size, least=1)
    with measuring(model):
        inputs, targets = check_batch(inputs, targets)
        parameters = {name: p.detach() for name, p in trainable_parameters(model).items()}

        def loss_of_one(parameters: dict[str, Tensor], one_input: Tensor, one_target: Tensor) -> Tensor:
            output = call_with(model, parameters, (one_input.unsqueeze(0),))
            return check_loss(loss_fn(output, one_target.unsqueeze(0)))

        per_sample = vmap(grad(loss_of_one), in_dims=(None, 0, 0), chunk_size=chunk_size)
        gradients = per_sample(parameters, inputs, targets)
        return torch.cat([g.detach().flatten(1).to(_at_least_single(g)) for g in gradients.values()], dim=1)


def _at_least_single(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def unit_length(gradients: Tensor) -> Tensor:
    """Scale each row to length 1; a row of zeros stays 0, one that is not finite becomes NaN."""
    lengths = torch.linalg.vector_norm(gradients, dim=1, keepdim=True, dtype=torch.float64)
    lengths = torch.where(lengths.isinf(), float("nan"), lengths)
    return gradients / torch.where(lengths == 0, 1.0, lengths).to(gradients.dtype)


def cosine_matrix(directions: Tensor) -> Tensor:
    """Inner products of rows of length 1, in float64."""
    parts = (part.double() for part in torch.split(directions, _COLUMNS_AT_ONCE, dim=1))
    return torch.stack([part @ part.T for part in parts]).sum(dim=0).clamp(-1.0, 1.0)


def gradient_covariance(
    model: nn.Module, loss_fn: LossFunction, inputs: Tensor, targets: Tensor, chunk_size: int | None = 16
) -> Tensor:
    r"""Cosines between the gradients of single examples.

    .. math:: C_{ij} = \langle g_i, g_j \rangle / (\|g_i\| \|g_j\|)

    An example whose gradient is 0 neither helps nor hurts another: its row is 0, also on the diagonal. A gradient that
    is not finite has a row of NaN. Arguments as for :func:`per_sample_gradients`.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import gradient_covariance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
        >>> gradient_covariance(model, lambda output, target: (output - target).sum(), x, y)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return cosine_matrix(unit_length(per_sample_gradients(model, loss_fn, inputs, targets, chunk_size)))


def summarize_covariance(covariance: Tensor, summary: Summary = "mean") -> Tensor:
    """Summarize the entries off the diagonal; NaN for a single example, or where an entry is NaN.

    Args:
        covariance: the matrix of :func:`gradient_covariance`.
        summary: ``"mean"``, ``"negative"`` (share of negative entries) or ``"least"``.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import summarize_covariance
        >>> summarize_covariance(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), "negative")
        tensor(1., dtype=torch.float64)
    """
    summary = checks.choice("summary", summary, get_args(Summary))
    if not (isinstance(covariance, Tensor) and covariance.ndim == 2 and len(covariance) == covariance.shape[1]):
        got = tuple(covariance.shape) if isinstance(covariance, Tensor) else checks.shown(covariance)
        raise ValueError(f"covariance must be a square matrix, got {got}: pass what gradient_covariance returned.")
    off_diagonal = ~torch.eye(len(covariance), dtype=torch.bool, device=covariance.device)
    pairs = covariance[off_diagonal].double()
    if pairs.numel() == 0 or pairs.isnan().any():
        return pairs.new_tensor(float("nan"))
    if summary == "negative":
        return (pairs < 0).double().mean()
    return pairs.min() if summary == "least" else pairs.mean()
