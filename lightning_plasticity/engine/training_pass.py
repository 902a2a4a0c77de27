"""Gradients of the training loss, of which nothing remains: neither in the model nor in what the Trainer logs."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_plasticity.distributed import all_ranks_have, any_rank_has, world_size
from lightning_plasticity.shards.modules import shard_again, sharded_modules
from lightning_plasticity.shards.tensors import gradient, is_shared_out, local
from lightning_plasticity.units.examining import undisturbed

Loss = Callable[[nn.Module, Any], Tensor | None]  # of the model, and a batch as the data give it; None passes over it
_NEGLIGIBLE = 2.0**-30  # the share of a batch in an average that is less than rounding


def average_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], data: Iterable[Any], loss: Loss, weight: float
) -> tuple[list[Tensor], int]:
    r"""A running average of the gradients of batches, :math:`G \leftarrow (1 - a) G + a \nabla L`, in training mode.

    The model, its statistics, gradients and random numbers are as they were at the end, and hooks of methods hear
    nothing. A batch whose gradients are not finite does not count. Where ranks share parameters out, gradients are
    those of all of their batches together, and all ranks must have as many.

    Returns:
        The average for each parameter, of the part on this rank, in float32 at least, and how many batches it is of.
    """
    averages = [torch.zeros_like(local(p), dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    batches, trained = 0, list(model.parameters())
    device = averages[0].device
    are_shared_out = any(map(is_shared_out, trained))

    def any_has(flag: bool) -> bool:
        return any_rank_has(flag, device) if are_shared_out else flag

    before = [parameter.grad for parameter in trained]
    with (
        undisturbed(model),
        _attributes_put_back(model),
        _hooks_at_rest(trained),
        torch.compiler.set_stance("force_eager"),  # code would be compiled once more, for this alone
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            model.train()
            for batch in _in_step(data, device) if are_shared_out else data:
                for parameter in trained:
                    parameter.grad = None
                value = loss(model, batch)
                if any_has(value is None):
                    continue
                gradients = _gradients(_checked(value), parameters, are_shared_out)
                if not any_has(not all(bool(new.isfinite().all()) for new in gradients)):
                    batches += 1
                    for average, new in zip(averages, gradients, strict=True):
                        average.lerp_(new.to(average.dtype), weight)
        finally:
            for parameter, kept in zip(trained, before, strict=True):
                parameter.grad = kept
            shard_again(sharded_modules(model))
    return averages, batches


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter], are_shared_out: bool) -> Sequence[Tensor]:
    """Of the parts of parameters that are on this rank."""
    if not are_shared_out:
        # Not by `backward`, which others listen to: DDP would send, fused optimizers would step.
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    # FSDP2 adds up by it; what the loss depends on are not the parameters themselves.
    loss.backward()  # type: ignore[no-untyped-call]
    found = [gradient(parameter) for parameter in parameters]
    pairs = zip(parameters, found, strict=True)
    return [torch.zeros_like(local(p)) if new is None else local(new) for p, new in pairs]


def _in_step(data: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Batches, of which all ranks must have as many."""
    batches, end = iter(data), object()
    for number in itertools.count():
        batch = next(batches, end)
        if not all_ranks_have(batch is end, device):
            raise RuntimeError(
                "Where parameters are shared out among ranks, all must pass over the same number of batches, but "
                f"after {number} batches some ranks have another one and others have not. Give all as many, as "
                "DistributedSampler does."
            )
        if batch is end:
            return
        yield batch


@contextmanager
def _hooks_at_rest(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets nobody hear of gradients: an optimizer may step when there are some."""
    hooks = [h for p in parameters if (h := getattr(p, "_post_accumulate_grad_hooks", None))]
    kept = [dict(of_parameter) for of_parameter in hooks]
    for of_parameter in hooks:
        of_parameter.clear()
    try:
        yield
    finally:
        for of_parameter, before in zip(hooks, kept, strict=True):
            of_parameter.update(before)


def _checked(loss: object) -> Tensor:
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
        return loss
    got = type(loss).__name__
    if isinstance(loss, Tensor):
        got = f"shape {tuple(loss.shape)}" if loss.ndim else "a number that depends on none"
    raise ValueError(
        f"The loss of a batch must be one number that depends on trained parameters, got {got}. Give it as "
        "loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1])."
    )


@contextmanager
def _attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Puts back what a training step notes in its modules besides parameters and buffers: counts, metrics, lists."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    values = [value for of_module in attributes for value in of_module.values()]
    held = [(value, copy.copy(value)) for value in values if type(value) in (list, dict, set, deque)]
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_leaf]
    numbers = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for module, of_module in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(of_module)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
        with torch.no_grad():
            for tensor, number in zip(tensors, numbers, strict=True):
                tensor.copy_(number)


# ---- what a Trainer trains with


def trainers_loss(trainer: Trainer, model: nn.Module) -> Loss:
    """The loss that the ``training_step`` of the Trainer's model returns, of which nothing is logged.

    Raises:
        ValueError: If it cannot be told from outside of the Trainer's loop.
    """
    module: Any = model  # a LightningModule, of lightning or of pytorch_lightning
    arguments = inspect.signature(module.training_step).parameters
    if not module.automatic_optimization or "dataloader_iter" in arguments:
        raise ValueError(
            f"The training_step of {type(module).__name__} must return the loss of the batch it is given, but with "
            "manual optimization, or an iterator over batches, it does more. Give loss=lambda model, batch: "
            "cross_entropy(model(batch[0]), batch[1])."
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)

    def loss(model: nn.Module, batch: Any) -> Tensor | None:
        for part in model.modules():
            if callable(getattr(part, "log_dict", None)):  # of lightning, or of pytorch_lightning
                vars(part).update(log=_no_log, log_dict=_no_log)
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*([batch, 0] if len(arguments) > 1 else [batch]))
        value = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(value, Tensor) and scaler is not None:
            scaled: Tensor = scaler.scale(value)  # without which small gradients are 0 in float16
            return scaled
        return value

    return loss


def _no_log(*args: Any, **kwargs: Any) -> None:
    """Takes the place of ``log`` and ``log_dict``."""


def trainers_batches(trainer: Trainer, weight: float) -> Iterable[Any]:
    """This rank's share of the training data in their order, from where on batches count in a running average.

    Raises:
        ValueError: If the data have no order of their own, or come from several loaders.
    """
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or size is None:
        raise ValueError(
            "The training data must come from one DataLoader with a batch_size, over a dataset with a length, got "
            f"{type(loader).__name__}. Give the batches to pass over as data=."
        )
    dataset: Dataset[Any] = loader.dataset
    rank = dist.get_rank() if world_size() > 1 else 0
    order: list[int] = list(DistributedSampler(dataset, world_size(), rank, shuffle=False))
    counting = 1.0 if weight == 1 else math.log(_NEGLIGIBLE) / math.log1p(-weight)  # infinite for the smallest weights
    begin = math.floor(max(0.0, math.ceil(len(order) / size) - counting)) * size
    return DataLoader(
        dataset,
        size,
        sampler=order[begin:],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def as_trained_on(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches as the Trainer gives them to ``training_step``: on its device, in its precision."""
    for batch in batches:
        yield trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
