"""Runs of a network that are no training: hooks of methods ask, and hear nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

_examinations = 0  # how many are going on, one inside another


def is_examining() -> bool:
    """Whether a network is being examined or measured: then its calls are no training, and hooks have nothing to hear.

    Example:
        >>> with examining():
        ...     is_examining()
        True
        >>> is_examining()
        False
    """
    return _examinations > 0


@contextmanager
def examining() -> Iterator[None]:
    """Meanwhile :func:`is_examining` is true."""
    global _examinations
    _examinations += 1
    try:
        yield
    finally:
        _examinations -= 1
