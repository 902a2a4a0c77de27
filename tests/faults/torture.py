"""Random networks, methods, settings, optimizers and loops: each trains soundly or is refused by a clear error.

`make torture` runs 1,000 cases and writes docs/torture.md; TORTURE=20000 runs that many. The same number gives the same
cases, and hypothesis shrinks a case that fails.
"""

import logging
import os
import platform
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_plasticity import callbacks
from lightning_plasticity.editing import entry_ages

REPORT = Path(__file__).parents[2] / "docs" / "torture.md"
ODD = st.sampled_from([None, "x", -1, 0, 1.5, True, float("nan"), float("inf"), [], {}])
STEPS = st.integers(1, 6)
RATE = st.floats(0.0, 1.0)
# The settings of each method that its cases vary; all others stay as they are.
METHODS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "ContinualBackprop": {
        "replacement_rate": RATE,
        "maturity_threshold": st.integers(0, 5),
        "decay_rate": st.floats(0.0, 0.999),
        "utility": st.sampled_from(["contribution", "adaptable_contribution", "zero_contribution", "weight", "random"]),
        "compensate_bias": st.booleans(),
    },
    "ActivationReset": {
        "strategy": st.sampled_from(["auto", "relu", "tanh"]),
        "decay_rate": st.floats(0.0, 0.999),
        "maturity_threshold": st.integers(0, 5),
        "max_weight": st.none() | st.floats(0.1, 10.0),
    },
    "ReDo": {"threshold": st.floats(0.0, 1.0), "every_n_train_steps": STEPS},
    "SoftWeightRescaling": {"coefficient": RATE, "tie_residual": st.booleans()},
    "SelectiveReinit": {
        "fraction": RATE,
        "reinit": st.sampled_from(["mean", "mean_noise", "normal", "init", "init_mean"]),
        "utility": st.sampled_from(["magnitude", "gradient"]),
        "every_n_train_steps": STEPS,
    },
    "ShrinkAndPerturb": {"shrink": RATE, "perturb": RATE, "every_n_train_steps": STEPS},
    "L2Init": {"coefficient": st.floats(0.0, 1.0)},
    "LayerReset": {"layers": st.integers(1, 3), "every_n_train_steps": STEPS},
    "HareAndTortoise": {"decay": st.floats(0.0, 0.999), "every_n_train_steps": STEPS},
    "IsometryReinit": {"iterations": st.integers(1, 10), "every_n_train_steps": STEPS},
    "OptimizerReset": {"what": st.sampled_from(["all", "moments", "step"]), "every_n_train_steps": STEPS},
    "ParsevalRegularization": {"coefficient": st.floats(0.0, 1e-2)},
    "SpectralRegularization": {"coefficient": st.floats(0.0, 1e-2)},
    "WeightClipping": {"kappa": st.floats(0.5, 5.0)},
}
OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"]
ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.Identity]
NORMS = [nn.Identity, nn.BatchNorm1d, nn.LayerNorm]
outcomes: Counter[str] = Counter()
trained: Counter[str] = Counter()


@st.composite
def chosen_methods(draw: Any) -> list[tuple[str, dict[str, Any]]]:
    """One to three methods with settings; one case in four has an odd setting."""
    names = draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=3, unique=True))
    chosen = [(name, {key: draw(value) for key, value in METHODS[name].items()}) for name in names]
    if draw(st.integers(0, 3)) == 0:
        name, given_settings = draw(st.sampled_from(chosen))
        given_settings[draw(st.sampled_from(sorted(METHODS[name])))] = draw(ODD)
    return chosen


@st.composite
def networks(draw: Any) -> list[nn.Module]:
    """Hidden layers of any width, with norms and activations between them."""
    widths, before, layers = draw(st.lists(st.integers(1, 9), max_size=4)), 4, []
    for width in widths:
        layers += [nn.Linear(before, width, bias=draw(st.booleans())), draw(st.sampled_from(NORMS))(width)]
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        before = width
    return [*layers, nn.Linear(before, 2)]


@settings(
    max_examples=int(os.environ.get("TORTURE", "1000")),
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    layers=networks(),
    chosen=chosen_methods(),
    optimizer=st.sampled_from(OPTIMIZERS),
    accumulate=st.integers(1, 3),
    double=st.booleans(),
    has_example=st.booleans(),
    lost=st.sets(st.integers(0, 11), max_size=3),
)
def case(
    layers: list[nn.Module],
    chosen: list[tuple[str, dict[str, Any]]],
    optimizer: str,
    accumulate: int,
    double: bool,
    has_example: bool,
    lost: set[int],
) -> None:
    """Trains, or is refused where it is made, attached or called first."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = model.double() if double else model
    try:
        methods = [getattr(callbacks, name)(**given_settings, seed=0) for name, given_settings in chosen]
        train(model, methods, optimizer, accumulate, has_example, lost)
    except (ValueError, RuntimeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "lightning_plasticity" not in last.filename or not (last.line or "").startswith("raise"):
            raise
        outcomes["refused by a clear error"] += 1
    else:
        outcomes["trained soundly"] += 1
        trained.update(name for name, _ in chosen)


def train(model: nn.Module, methods: list[Any], name: str, accumulate: int, has_example: bool, lost: set[int]) -> None:
    """Some steps; the forward pass of a lost batch gives NaN, and its step is left out."""
    generator = torch.Generator().manual_seed(1)
    own = torch.optim.__dict__[name](model.parameters(), lr=1e-3)
    dtype = next(model.parameters()).dtype
    steps = 0
    try:
        for method in methods:
            method.attach(model, own, (torch.zeros(2, 4, dtype=dtype),) if has_example else None)
        for step in range(12):
            own.zero_grad()
            for _ in range(accumulate):
                x, y = (torch.randn(5, size, generator=generator, dtype=dtype) for size in (4, 2))
                is_normed = any(isinstance(module, nn.BatchNorm1d) for module in model)
                if step in lost and steps and not is_normed:  # whose running statistics would take NaN in
                    model(x * torch.nan)
                loss: Tensor = mse_loss(model(x), y)
                loss.backward()
            own.step()
            steps += 1
            for method in methods:
                method.step()
        for method in methods:
            if method.optimizer_steps != steps:
                raise AssertionError(f"{method.optimizer_steps} of {steps} steps were counted")
            saved = method.state_dict()
            method.load_state_dict(saved)
    finally:
        for method in methods:
            method.detach()
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise AssertionError("weights are not finite")
    hooks = [
        hook for m in model.modules() for kind in (m._forward_pre_hooks, m._forward_hooks) for hook in kind.values()
    ]
    hooks += [*own._optimizer_step_pre_hooks.values(), *own._optimizer_step_post_hooks.values()]
    # Adam keeps the ages of renewed entries, as long as it keeps their averages.
    if any(hook.__module__ != entry_ages.__name__ for hook in hooks):
        raise AssertionError("hooks are left")


def report(seconds: float) -> str:
    """The page, with the figures of this run."""
    lines = [
        "# Torture",
        "",
        "Written by `make torture`. Random networks with one to three methods, with settings right and wrong, six",
        "optimizers, accumulation, two precisions, batches that are lost to NaN. Each case must train soundly (finite",
        "weights, every step counted, state that loads again, no hook left) or be refused by a clear error.",
        "",
        f"- cases: {sum(outcomes.values()):,}, of which failed: 0 (a failure stops the run)",
        *(f"- {outcome}: {count:,}" for outcome, count in sorted(outcomes.items())),
        f"- time: {seconds:,.0f} s with torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}",
        "",
        "| method | cases that trained with it |",
        "|---|---|",
        *(f"| {name} | {trained[name]:,} |" for name in sorted(METHODS)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all cases and writes the report."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    start = time.monotonic()
    case()
    REPORT.write_text(report(time.monotonic() - start))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
