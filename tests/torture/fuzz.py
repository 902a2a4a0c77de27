"""Random networks, methods, settings, optimizers, loops and precisions: trained soundly or refused by a clear error."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_plasticity.editing import entry_ages
from torture.cases import (
    METHODS,
    OPTIMIZERS,
    alike,
    chosen_methods,
    is_clear,
    is_normed,
    made,
    networks,
    renewed,
    shape_of_inputs,
)

STEPS = 12
LOOPS = {
    "plain, 32": torch.float32,
    "plain, 64": torch.float64,
    "plain, bf16": torch.bfloat16,
    "plain, bf16 mixed": torch.float32,
    "plain, 16 scaled": torch.float32,
    "Trainer, 32-true": torch.float32,
    "Trainer, 64-true": torch.float64,
    "Trainer, bf16-true": torch.bfloat16,
    "Trainer, bf16-mixed": torch.float32,
    "Trainer, 16-mixed": torch.float32,
}
outcomes: Counter[tuple[str, str]] = Counter()  # of loop and outcome
trained: Counter[str] = Counter()


@given(
    layers=networks(),
    chosen=chosen_methods(),
    optimizer=OPTIMIZERS,
    accumulate=st.integers(1, 3),
    loop=st.sampled_from(sorted(LOOPS)),
    has_example=st.booleans(),
    lost=st.sets(st.integers(1, STEPS - 1), max_size=3),
)
def case(
    layers: nn.Sequential,
    chosen: list[tuple[str, dict[str, Any]]],
    optimizer: str,
    accumulate: int,
    loop: str,
    has_example: bool,
    lost: set[int],
) -> None:
    """Trains, or is refused where it is made, attached or called first."""
    torch.manual_seed(0)
    run = Run(renewed(layers).to(LOOPS[loop]), optimizer, accumulate, loop, lost)
    methods: list[Any] = []
    try:
        methods = made(chosen)
        (run.in_trainer if "Trainer" in loop else run.in_plain_loop)(methods, has_example)
    except Exception as error:
        if not is_clear(error):
            raise
        outcomes[loop, "refused"] += 1
    else:
        run.check(methods)
        outcomes[loop, "trained"] += 1
        trained.update(name for name, _ in chosen)


class Run(LightningModule):
    """Some steps of training; the forward pass of a lost batch gives NaN, and the batch is left out."""

    def __init__(self, net: nn.Sequential, optimizer: str, accumulate: int, loop: str, lost: set[int]) -> None:
        super().__init__()
        self.net, self.accumulate, self.loop = net, accumulate, loop
        self.lost = set() if is_normed(net) else lost
        self.own = torch.optim.__dict__[optimizer](net.parameters(), lr=1e-3)
        self.steps = 0
        self.own.register_step_post_hook(self.count)
        self.data = torch.Generator().manual_seed(1)
        self.shape = shape_of_inputs(net)

    def count(self, *_: Any) -> None:
        # A Trainer steps for a batch that was left out, too, without gradients.
        self.steps += any(parameter.grad is not None for parameter in self.net.parameters())

    def loss(self) -> Tensor:
        x, y = (torch.randn(5, *shape, generator=self.data) for shape in (self.shape, (2,)))
        dtype = self.net[-1].weight.dtype
        return mse_loss(self.net(x.to(dtype)).float(), y)

    def lose(self) -> None:
        self.net(torch.full((5, *self.shape), torch.nan, dtype=self.net[-1].weight.dtype))

    def in_plain_loop(self, methods: list[Any], has_example: bool) -> None:
        example = torch.zeros(2, *self.shape, dtype=self.net[-1].weight.dtype)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled="scaled" in self.loop)
        mixed = torch.autocast("cpu", torch.bfloat16) if "mixed" in self.loop else nullcontext()
        try:
            for method in methods:
                method.attach(self.net, self.own, (example,) if has_example else None)
            for step in range(STEPS):
                self.own.zero_grad()
                for _ in range(self.accumulate):
                    with mixed:
                        if step in self.lost:
                            self.lose()
                        loss = self.loss()
                    scaler.scale(loss).backward()
                scaler.step(self.own)
                scaler.update()
                for method in methods:
                    method.step()
        finally:
            for method in methods:
                method.detach()

    def in_trainer(self, methods: list[Any], has_example: bool) -> None:
        trainer = Trainer(
            accelerator="cpu",
            callbacks=methods,
            precision=self.loop.split(", ")[1],  # type: ignore[arg-type]
            accumulate_grad_batches=self.accumulate,
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self, DataLoader(range(STEPS * self.accumulate // 2), batch_size=1))  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if batch_idx in self.lost:
            self.lose()
            return None
        return self.loss()

    def configure_optimizers(self) -> Any:
        return self.own

    def check(self, methods: list[Any]) -> None:
        """Raises where something is unsound."""
        for method in methods:
            if method.optimizer_steps != self.steps:
                raise AssertionError(f"{method.optimizer_steps} of {self.steps} steps were counted")
            method.load_state_dict(method.state_dict())
        if not all(tensor.isfinite().all() for tensor in self.net.state_dict().values()):
            raise AssertionError("weights are not finite")
        hooks = [
            hook
            for module in self.modules()
            for kind in (module._forward_pre_hooks, module._forward_hooks)
            for hook in kind.values()
        ]
        hooks += [*self.own._optimizer_step_pre_hooks.values(), *self.own._optimizer_step_post_hooks.values()]
        # Adam keeps the ages of renewed entries, as long as it keeps their averages.
        if any(hook.__module__ not in (entry_ages.__name__, __name__) for hook in hooks):
            raise AssertionError("hooks are left")


def run(count: int) -> str:
    """All cases, and their figures in Markdown."""
    alike(count)(case)()
    lines = [
        "Random networks, plain, convolutional and residual, with one to three methods, with settings right and wrong,",
        "six optimizers, accumulation, loops and precisions of ten kinds, batches that are lost to NaN. Each case must",
        "train soundly (finite weights, every step counted, state that loads again, no hook left) or be refused by a",
        "clear error. A case that does neither stops the run, after it was made as small as it can be.",
        "",
        f"- cases: {sum(outcomes.values()):,}, of which failed: 0",
        "",
        "| loop, precision | trained soundly | refused clearly |",
        "|---|---|---|",
        *(f"| {loop} | {outcomes[loop, 'trained']} | {outcomes[loop, 'refused']} |" for loop in LOOPS),
        "",
        "| method | cases that trained with it |",
        "|---|---|",
        *(f"| {name} | {trained[name]:,} |" for name in sorted(METHODS)),
    ]
    return "\n".join(lines)
