"""Edits are no part of what is differentiated."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")


def without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """As ``torch.no_grad()``, which takes several times as long: some edits are made at every step, and are short.

    Example:
        >>> @without_gradients
        ... def records() -> bool:
        ...     return torch.is_grad_enabled()
        >>> records(), torch.is_grad_enabled()
        (False, True)
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return call
