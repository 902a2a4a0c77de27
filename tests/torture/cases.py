"""Random cases: networks, methods with settings right and wrong, and optimizers; and what a refusal must look like."""

import traceback
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plasticity import callbacks

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
    "ReDo": {
        "threshold": st.floats(0.0, 1.0),
        "every_n_train_steps": STEPS,
        "score": st.sampled_from(["activation", "gradient"]),
    },
    "PartialReset": {"strength": RATE, "every_n_train_steps": STEPS, "decay_rate": st.floats(0.0, 0.999)},
    "SoftWeightRescaling": {
        "coefficient": RATE,
        "tie_residual": st.booleans(),
        "biases": st.sampled_from(["follow", "keep"]),
    },
    "SelectiveReinit": {
        "fraction": RATE,
        "reinit": st.sampled_from(["mean", "mean_noise", "normal", "init", "init_mean"]),
        "utility": st.sampled_from(["magnitude", "gradient"]),
        "every_n_train_steps": STEPS,
    },
    "ShrinkAndPerturb": {"shrink": RATE, "perturb": RATE, "every_n_train_steps": STEPS},
    "L2Init": {"coefficient": RATE, "match": st.sampled_from(["position", "sorted"]), "decoupled": st.booleans()},
    "LayerReset": {"layers": st.integers(1, 3), "every_n_train_steps": STEPS},
    "HareAndTortoise": {"decay": st.floats(0.0, 0.999), "every_n_train_steps": STEPS},
    "IsometryReinit": {"iterations": st.integers(1, 10), "every_n_train_steps": STEPS},
    "OptimizerReset": {"what": st.sampled_from(["all", "moments", "step"]), "every_n_train_steps": STEPS},
    "ParsevalRegularization": {"coefficient": st.floats(0.0, 1e-2)},
    "SpectralRegularization": {"coefficient": st.floats(0.0, 1e-2)},
    "SelfNormalizedReset": {
        "significance": st.floats(0.01, 0.9),
        "every_n_train_steps": STEPS,
        "min_silence": st.integers(1, 4),
        "max_silence": st.integers(4, 9),
    },
    "DirectionAwareShrink": {"averaging": RATE, "least": RATE, "every_n_train_steps": STEPS},
    "WeightClipping": {"kappa": st.floats(0.5, 5.0)},
}
OPTIMIZERS = st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
ACTIVATIONS = st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.Identity])


def alike(count: int) -> settings:
    """So many cases, the same in every run; one that fails is shrunk."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def chosen_methods(draw: Any, most: int = 3) -> list[tuple[str, dict[str, Any]]]:
    """Some methods with settings; one case in four has an odd setting."""
    names = draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=most, unique=True))
    chosen = [(name, {key: draw(value) for key, value in METHODS[name].items()}) for name in names]
    if draw(st.integers(0, 3)) == 0:
        name, given_settings = draw(st.sampled_from(chosen))
        given_settings[draw(st.sampled_from(sorted(METHODS[name])))] = draw(ODD)
    return chosen


def made(chosen: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """The methods."""
    return [getattr(callbacks, name)(**given_settings, seed=0) for name, given_settings in chosen]


class Residual(nn.Module):
    """Adds what a network makes of its input to the input."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


@st.composite
def networks(draw: Any) -> nn.Sequential:
    """From four channels, in images of 5 by 5 or without positions, to two numbers."""
    is_image = draw(st.booleans())
    least = draw(st.integers(0, 3))  # by themselves, draws are mostly short
    widths, before, layers = draw(st.lists(st.integers(1, 9), min_size=least, max_size=4)), 4, []
    for width in widths:
        bias = draw(st.booleans())
        if is_image:
            mixing: nn.Module = nn.Conv2d(before, width, draw(st.sampled_from([1, 3])), padding="same", bias=bias)
            norm = draw(st.sampled_from([nn.Identity, nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n)]))(width)
        else:
            mixing = nn.Linear(before, width, bias=bias)
            norm = draw(st.sampled_from([nn.Identity, nn.BatchNorm1d, nn.LayerNorm]))(width)
        block = nn.Sequential(mixing, norm, draw(ACTIVATIONS)())
        layers += [Residual(block)] if before == width and draw(st.booleans()) else [*block]
        before = width
    pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if is_image else []
    return nn.Sequential(*layers, *pooling, nn.Linear(before, 2))


def renewed(model: nn.Module) -> nn.Module:
    """The same network with the weights of a seed: it was made wherever hypothesis had drawn it."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def shape_of_inputs(model: nn.Module) -> tuple[int, ...]:
    """Of one example."""
    return (4, 5, 5) if any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model) else (4,)


def is_normed(model: nn.Module) -> bool:
    """Whether there are running statistics, which take NaN in."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def is_clear(error: Exception) -> bool:
    """Whether the package itself has raised an error on purpose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = "lightning_plasticity" in last.filename and (last.line or "").startswith("raise")
    return is_ours and isinstance(error, (ValueError, RuntimeError))
