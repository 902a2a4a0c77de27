"""The weights and biases of linear, convolution and attention layers, found by the layers' names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sized
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_editable
from lightning_plasticity.layer_views.home_made import home_made
from lightning_plasticity.names import named_modules_as_written, submodule
from lightning_plasticity.units.channels import is_norm

_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)
_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_BIASES = ("bias", "in_proj_bias")


@dataclass(frozen=True)
class LayerPatterns:
    """The layers whose names match one of ``include`` and none of ``exclude``, as in ``fnmatch``."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __str__(self) -> str:
        return f"include={self.include!r}" + (f" with exclude={self.exclude!r}" if self.exclude else "")

    def why_none(self, found: Sized, where: nn.Module) -> str:
        """Why none of the weights that were found in a module can be worked on, in words."""
        if not found:
            return f"{self} leaves none in {type(where).__name__}"
        each = "the only one" if len(found) == 1 else f"each of the {len(found)}"
        return f"{each} that {self} leaves in {type(where).__name__} is frozen or belongs to no optimizer"

    def mean(self, name: str) -> bool:
        """Whether a layer of this name is meant."""
        included = any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


def find_weights(model: nn.Module, scope: str, patterns: LayerPatterns) -> dict[str, nn.Parameter]:
    """The weights of the layers that are meant, by their names in the model.

    A module that is no layer of PyTorch's, but does with its weight what one does, is a layer (Hugging Face's
    ``Conv1D``). A weight that several layers share comes once, and one that is also an embedding's is an embedding: it
    is left out.

    Args:
        model: The network.
        scope: The name of the module in it to search, empty for all of it.
        patterns: Which layers are meant.

    Raises:
        ValueError: If a pattern matches no layer.
        RuntimeError: If a weight is no parameter of its own, or cannot be edited.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 1))
        >>> list(find_weights(model, "", LayerPatterns(("*",), ())))
        ['2.in_proj_weight', '2.out_proj.weight']
    """
    layers = {name: module for name, module in _modules(model, scope) if _is_layer(module)}
    for pattern in (*patterns.include, *patterns.exclude):
        if layers and not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"A pattern must match the name of a linear, convolution or attention layer, got {pattern!r}. "
                f"The names are: {', '.join(layers)}."
            )
    seen = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    weights: dict[str, nn.Parameter] = {}
    for layer_name, layer in layers.items():
        for own_name in _WEIGHTS if patterns.mean(layer_name) else ():
            if getattr(layer, own_name, None) is not None:
                name = f"{layer_name}.{own_name}".lstrip(".")
                parameter = _own_parameter(layer, own_name, name)
                if parameter not in seen:
                    seen.add(parameter)
                    weights[name] = parameter
    return weights


def weights_in_words(weights: Collection[Tensor], model: nn.Module, scope: str) -> str:
    """How many weights a method works on, and which matrices that are trained it leaves out.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
        >>> weights_in_words([model[1].weight], model, "")
        "1 weights (of 2). Left out: '0.weight'."
    """
    known = set(weights)
    others = [
        f"{name}.{own_name}".lstrip(".")
        for name, module in _modules(model, scope)
        for own_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and parameter.requires_grad and parameter not in known
    ]
    if not others:
        return f"{len(known)} weights."
    return f"{len(known)} weights (of {len(known) + len(others)}). Left out: {checks.few(others)}."


def find_biases(model: nn.Module, scope: str, patterns: LayerPatterns, of_norms: bool) -> list[nn.Parameter]:
    """The biases of the layers that are meant, and the shifts of normalisation layers if ``of_norms``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> [len(find_biases(model, "", LayerPatterns(("*",), ()), of_norms)) for of_norms in (False, True)]
        [1, 2]
    """
    return [
        bias
        for name, module in _modules(model, scope)
        # Normalisation layers have no common class. What has a bias and is neither a layer nor a recurrent one is one.
        if (of_norms or _is_layer(module)) and patterns.mean(name)
        for own_name in _BIASES
        if (bias := module._parameters.get(own_name)) is not None
    ]


def find_bias(model: nn.Module, weight: str) -> nn.Parameter | None:
    """The bias that is added to what a weight of :func:`find_weights` gives, if there is one.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(4, 1))
        >>> find_bias(model, "0.weight").shape, find_bias(model, "1.in_proj_weight").shape
        (torch.Size([3]), torch.Size([12]))
    """
    layer, _, own_name = weight.rpartition(".")
    bias = "bias" if own_name == "weight" else "in_proj_bias"
    return submodule(model, layer)._parameters.get(bias)


def has_inputs_first(model: nn.Module, weight: str) -> bool:
    """Whether the rows of a matrix of :func:`find_weights` are its layer's inputs, as with Hugging Face's ``Conv1D``.

    Example:
        >>> has_inputs_first(nn.Sequential(nn.Linear(4, 3)), "0.weight")
        False
    """
    kind = home_made(submodule(model, weight.rpartition(".")[0]))
    return kind is not None and kind.transposed


def find_parameters(model: nn.Module, scope: str, patterns: LayerPatterns) -> dict[str, nn.Parameter]:
    """All floating-point parameters of the modules that are meant, whatever they are, by their names in the model.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
        >>> list(find_parameters(model, "", LayerPatterns(("*",), ())))
        ['0.weight', '1.weight', '1.bias']
    """
    found: dict[nn.Parameter, str] = {}
    for name, module in _modules(model, scope):
        for own_name, parameter in module.named_parameters(recurse=False) if patterns.mean(name) else ():
            if parameter.is_floating_point() and parameter not in found:
                found[parameter] = f"{name}.{own_name}".lstrip(".")
                check_editable(parameter, found[parameter])
    return {name: parameter for parameter, name in found.items()}


def find_norm_parameters(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """The scales and shifts of normalisation layers, by their names in the model.

    Example:
        >>> list(find_norm_parameters(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), ""))
        ['1.weight', '1.bias']
    """
    return {
        f"{name}.{own_name}".lstrip("."): parameter
        for name, module in _modules(model, scope)
        if is_norm(module)
        for own_name, parameter in module.named_parameters(recurse=False)
    }


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) or home_made(module) is not None


def _modules(model: nn.Module, scope: str) -> Iterator[tuple[str, nn.Module]]:
    yield from named_modules_as_written(submodule(model, scope), scope)


def _own_parameter(layer: nn.Module, own_name: str, name: str) -> nn.Parameter:
    if own_name not in layer._parameters:
        raise RuntimeError(
            f"{name} must be a parameter, but it is computed from other tensors (by a parametrization, weight_norm, "
            "spectral_norm or pruning), so that what is written would be lost. Remove that, as with "
            "torch.nn.utils.parametrize.remove_parametrizations, or exclude the layer."
        )
    parameter = layer.get_parameter(own_name)
    check_editable(parameter, name)
    return parameter
