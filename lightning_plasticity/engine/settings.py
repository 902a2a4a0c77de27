"""How a callback shows itself: as it was made; and what of it a copy has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from typing_extensions import Self, override


class ShowsSettings:
    """Has a ``repr`` that tells all settings, given or by default, but those that are None or empty."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keeps what the constructor is given."""
        made = super().__new__(cls)
        made._arguments = args, kwargs
        return made

    @override
    def __repr__(self) -> str:
        args, kwargs = self._arguments
        bound = inspect.signature(type(self)).bind(*args, **kwargs)
        bound.apply_defaults()
        shown = [
            f"{name}={value!r}"
            for name, value in bound.arguments.items()
            if value is not None and not (isinstance(value, (tuple, list, dict)) and not value)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def without_links(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a callback without those by which a Trainer ties it to the model: ``log`` and ``log_dict``."""
    return {name: value for name, value in attributes.items() if name not in ("log", "log_dict")}
