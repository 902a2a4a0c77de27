"""Checks of what users give: an error says what is required, what was given and what to do.

Each function returns the value as a plain one of Python, so that NumPy's numbers behave like all others from there on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from reprlib import Repr
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")
_SEEDS = (-(2**63), 2**64 - 1)  # what torch.manual_seed takes
_short = Repr()
_short.maxother = _short.maxstring = 60


def shown(value: object) -> str:
    """A value as an error names it: short, with its type where that is not plain to see.

    Example:
        >>> shown("1"), shown(1.5), shown([1])
        ("'1'", '1.5', '[1] (a list)')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return _short.repr(value)
    return f"{_short.repr(value)} (a {type(value).__name__})"


def _bounds(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    named = {"at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{word} {bound}" for word, bound in named.items() if bound is not None)


def _is_between(
    value: float, least: float | None, above: float | None, most: float | None, below: float | None
) -> bool:
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number within bounds.

    Example:
        >>> number("decay_rate", 0.9, least=0, below=1)
        0.9
        >>> number("decay_rate", float("nan"), least=0, below=1)
        Traceback (most recent call last):
        ValueError: decay_rate must be a finite number, at least 0 and below 1, got nan. Give a number in that range.
    """
    bounds = _bounds(least, above, most, below)
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            plain = float(value)
        except OverflowError:
            plain = math.inf
        if math.isfinite(plain) and _is_between(plain, least, above, most, below):
            return plain
        remedy = "Give a number in that range." if bounds else "Give a finite one."
    else:
        remedy = "Give a number of Python, as by float()."
    raise ValueError(f"{name} must be a finite number{', ' * bool(bounds)}{bounds}, got {shown(value)}. {remedy}")


def count(name: str, value: Any, *, least: int | None = 0) -> int:
    """A whole number.

    Example:
        >>> count("steps", 3, least=1)
        3
        >>> count("steps", 3.0, least=1)
        Traceback (most recent call last):
        ValueError: steps must be a whole number, at least 1, got 3.0. Give an int.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least):
        return int(value)
    bounds = "" if least is None else f", at least {least}"
    raise ValueError(f"{name} must be a whole number{bounds}, got {shown(value)}. Give an int.")


def seed(name: str, value: Any) -> int:
    """A seed of random draws."""
    low, high = _SEEDS
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise ValueError(
        f"{name} must be a whole number of at most 64 bits, got {shown(value)}. Give an int from -2**63 to 2**64 - 1."
    )


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that only counts as one of them.

    Example:
        >>> flag("relative", 1)
        Traceback (most recent call last):
        ValueError: relative must be True or False, got 1. Write one of them.
    """
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be True or False, got {shown(value)}. Write one of them.")


def choice(name: str, value: T, choices: Iterable[T], other: str = "") -> T:
    """One of several values; ``other`` says what else the caller takes, as in ``"a function or "``.

    Example:
        >>> choice("measure", "time", ("steps", "loss"))
        Traceback (most recent call last):
        ValueError: measure must be one of 'steps', 'loss', got 'time'. Choose one of them.
    """
    known = tuple(choices)
    # By type first: an array compares with a word entry by entry, and 1 is equal to True.
    if any(type(value) is type(one) and value == one for one in known):
        return value
    raise ValueError(
        f"{name} must be {other}one of {', '.join(map(repr, known))}, got {shown(value)}. Choose one of them."
    )


def function(name: str, value: Any) -> Any:
    """Something that can be called."""
    if callable(value):
        return value
    raise ValueError(f"{name} must be a function, got {shown(value)}. Give something that can be called.")


def word(name: str, value: Any) -> str:
    """A name: a string that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{name} must be a name, got {shown(value)}. Give a string that is not empty.")


def words(name: str, value: Any) -> tuple[str, ...]:
    """Names or patterns of names: one string, or several.

    Example:
        >>> words("exclude", "head"), words("exclude", ["head", "*.norm"])
        (('head',), ('head', '*.norm'))
    """
    given = (value,) if isinstance(value, str) else value
    if isinstance(given, Iterable) and not isinstance(given, (Mapping, bytes, Tensor)):
        found = tuple(given)
        if all(isinstance(one, str) and one for one in found):
            return found
    raise ValueError(
        f"{name} must be a name or pattern, or several in a list, got {shown(value)}. Give strings that are not empty."
    )


def instances(name: str, value: Any, *, kind: type[T]) -> tuple[T, ...]:
    """Some objects of a class, at least one.

    Example:
        >>> instances("numbers", [1, 2], kind=int)
        (1, 2)
    """
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping, bytes, Tensor)):
        found = tuple(value)
        if found and all(isinstance(one, kind) for one in found):
            return found
    raise ValueError(
        f"{name} must be one {kind.__name__} or more in a list, got {shown(value)}. Leave it out, or give such a list."
    )


def tensor(name: str, value: Any) -> Tensor:
    """A tensor."""
    if isinstance(value, Tensor):
        return value
    raise ValueError(f"{name} must be a tensor, got {shown(value)}. Convert it, as by torch.as_tensor().")


def module(name: str, value: Any) -> nn.Module:
    """A network."""
    if isinstance(value, nn.Module):
        return value
    raise ValueError(f"{name} must be a torch.nn.Module, got {shown(value)}. Give the network itself.")


def optional(check: Callable[..., T], name: str, value: Any, **bounds: Any) -> T | None:
    """A value that may also be None.

    Example:
        >>> optional(count, "chunk_size", None, least=1)
    """
    return None if value is None else check(name, value, **bounds)


def few(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, and how many more there are.

    Example:
        >>> few(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    shown = ", ".join(map(repr, names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
