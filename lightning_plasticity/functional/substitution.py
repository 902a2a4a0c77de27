"""Call a network with other tensors in the place of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    model: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """What a network returns with other tensors wherever it uses the named ones, of which one name is enough.

    ``torch.func.functional_call`` by itself, which looks for the other names, does not give a module back its own
    parameters where it stands in the network under two names.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> twice = nn.Sequential(layer, layer)
        >>> call_with(twice, {"0.weight": torch.tensor([[3.0]])}, (torch.ones(1, 1),)).item()
        9.0
        >>> layer.weight is twice[1].weight and isinstance(layer.weight, nn.Parameter)
        True
    """
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    given = {id(tensor): tensors[name] for name, tensor in own if name in tensors}
    places = {
        f"{name}.{key}".lstrip("."): given[id(tensor)]
        for name, module in model.named_modules()  # each once
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and id(tensor) in given
    }
    return functional_call(model, places, tuple(args), dict(kwargs or {}), tie_weights=False)
