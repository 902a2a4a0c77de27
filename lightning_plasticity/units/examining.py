"""How a network is examined: it is run so that nothing remains, and who wants to know can tell."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from lightning_plasticity.examining import examining
from lightning_plasticity.examining import is_examining as is_examining


class ForwardError(ValueError):
    """A network does not run on its example input: ``__cause__`` is the error that it raised itself."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Examines a network: puts training flags, buffers and every random state back as they were.

    Meanwhile :func:`.is_examining` is true, and autocasting, which goes on where it was on, keeps no casts of weights:
    one that was made without gradients would be taken again when training goes on, and cut its gradients off.
    """
    flags = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    put_random_states_back = random_states(model)
    keeps_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with examining():
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps_casts)
        put_random_states_back()
        for module, training in flags.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                # a NaN in a buffer that was there before is equal to itself here
                if not torch.equal(buffer.nan_to_num(), before.nan_to_num()) or buffer.isnan().any():
                    buffer.copy_(before)


@contextmanager
def quietly() -> Iterator[None]:
    """Without gradients, compilation and warnings, with all parts of transformer layers called, and without checks.

    The checks are those that torch's distributions make of what they are given.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes transformer layers without calling their parts
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Distribution.set_default_validate_args(checks)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def random_states(model: nn.Module) -> Callable[[], None]:
    """Notes every random state that a network may draw from, and returns what puts them back."""
    import numpy as np

    back: list[Callable[[], Any]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    for device in {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}:
        accelerator = torch.get_device_module(device)
        index = () if device.type == "mps" else (device,)
        back.append(partial(accelerator.set_rng_state, accelerator.get_rng_state(*index), *index))
    for own in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(own, torch.Generator):
            back.append(partial(own.set_state, own.get_state()))
        elif isinstance(own, np.random.Generator):
            back.append(partial(setattr, own.bit_generator, "state", own.bit_generator.state))
        elif isinstance(own, random.Random):
            back.append(partial(own.setstate, own.getstate()))

    def put_back() -> None:
        for put in back:
            put()

    return put_back
