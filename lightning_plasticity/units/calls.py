"""A call of a module, to be repeated on one example of its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class ForwardCall:
    """A call of a module: ``prefix`` is its name inside the model, with a final dot unless it is the model itself."""

    module: nn.Module
    prefix: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def is_empty(self) -> bool:
        """Whether it is of a batch without an example."""
        return any(x.ndim and not len(x) for x in _tensors((self.args, self.kwargs)))

    def on_one_example(self, examine: Callable[[tuple[Any, ...], Mapping[str, Any]], T]) -> T:
        """``examine(args, kwargs)`` with the batch cut to one example, or with all where the module refuses one."""
        sizes = {x.shape[0] for x in _tensors((self.args, self.kwargs)) if x.ndim}
        if len(sizes) == 1 and sizes != {1}:
            try:
                return examine(_first_example(self.args), _first_example(self.kwargs))
            except Exception:  # what a network raises on a batch of one is its own affair; the whole batch decides
                pass
        return examine(self.args, self.kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _first_example(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:1] if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _first_example(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_first_example(item) for item in value)
    return value


def arguments_of(example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments and keyword arguments that an example is of."""
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if not isinstance(example_inputs, (tuple, list)):
        raise ValueError(
            "example_inputs must be a tuple of the model's inputs, a dict of its keyword inputs, or a pair of both, "
            f"got {type(example_inputs).__name__}. Write example_inputs=(x,)."
        )
    match example_inputs:
        case (tuple() as args, dict() as kwargs):
            return args, kwargs
    return example_inputs, {}
