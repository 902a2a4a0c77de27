"""Local redundancy: how strongly a network's own predictions would move its weights."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_plasticity import checks
from lightning_plasticity.functional.churn import Outputs
from lightning_plasticity.functional.gradients import check_batch, measuring, per_sample_gradients


def local_redundancy(
    model: nn.Module, inputs: Tensor, outputs: Outputs = "classes", noise: float = 1.0, chunk_size: int | None = 16
) -> Tensor:
    r"""Mean squared norm of the gradient of each example's loss, with a target drawn from the model's own prediction.

    :math:`\frac{1}{n} \sum_i \|\nabla_\theta \ell(f(x_i), \tilde y_i)\|^2`, the trace of the Fisher information: inputs
    are enough. The loss is the cross-entropy, or half the squared error over the noise's variance. The draw is always
    the same. It went with later learning only weakly in its authors' experiments, so read it with care.

    Args:
        model: the network; its outputs are logits or values along the last dimension, one row an example.
        inputs: examples in dimension 0.
        outputs: ``"classes"``: targets are drawn from the softmax; ``"values"``: normal noise is added to the outputs.
        noise: standard deviation of that noise.
        chunk_size: examples that are differentiated at once; fewer need less memory. None: all.

    Example:
        >>> import torch
        >>> from lightning_plasticity.functional import local_redundancy
        >>> model = torch.nn.Linear(2, 3)
        >>> bool(local_redundancy(model, torch.randn(8, 2)) > 0)
        True

    Reference:
        Cheng, ICML 2026; arXiv 2607.13432.
    """
    checks.module("model", model)
    checks.choice("outputs", outputs, ("classes", "values"))
    noise = checks.number("noise", noise, above=0)
    with measuring(model), torch.no_grad():
        examples, _ = check_batch(inputs, inputs)
        predicted = model(examples)
        if not isinstance(predicted, Tensor) or predicted.ndim != 2:
            shape = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
            raise ValueError(
                f"The model must give a matrix with a row for each example, got {shape}: wrap it in one that does."
            )
        generator = torch.Generator().manual_seed(0)
        if outputs == "classes":
            shares = predicted.double().softmax(-1).cpu()
            if not shares.isfinite().all():
                return torch.tensor(float("nan"), dtype=torch.float64, device=predicted.device)
            targets = torch.multinomial(shares, 1, generator=generator).squeeze(1).to(predicted.device)
        else:
            drawn = torch.randn(predicted.shape, generator=generator, dtype=torch.float64).to(predicted)
            targets = predicted + noise * drawn

    def squared_error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / (2 * noise**2)

    loss = cross_entropy if outputs == "classes" else squared_error
    gradients = per_sample_gradients(model, loss, inputs, targets, chunk_size)
    return gradients.double().square().sum(1).mean()
