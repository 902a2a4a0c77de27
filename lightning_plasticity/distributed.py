"""Sums over the ranks of a distributed run, and random draws that are equal on every rank.

In one process everything is local.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks; 1 where nothing is distributed.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over all ranks. All ranks must call this, with tensors of the same shapes and types in one order.

    Tensors of one type on one device travel together, in a single message. They must be on a device that the process
    group's backend serves (CUDA for NCCL).

    Returns:
        New tensors, in the order given, bitwise equal on every rank. In one process: copies.

    Example:
        >>> sum_over_ranks([torch.tensor([1.0, 2.0]), torch.tensor(3)])
        [tensor([1., 2.]), tensor(3)]
    """
    sums = [tensor.detach().clone() for tensor in tensors]
    if world_size() == 1:
        return sums
    together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for position, tensor in enumerate(sums):
        together.setdefault((tensor.dtype, tensor.device), []).append(position)
    for positions in together.values():
        message = torch.cat([sums[position].flatten() for position in positions])
        dist.all_reduce(message)
        parts = torch.split(message, [sums[position].numel() for position in positions])
        for position, part in zip(positions, parts, strict=True):
            sums[position] = part.view(sums[position].shape)
    return sums


def gather_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Stack what each tensor is on every rank, for a checkpoint: all ranks get all, and one of them may save it.

    All ranks must call this, with tensors of the same shapes and types in one order. :func:`share_of_this_rank` undoes
    it.

    Returns:
        New tensors, in the order given, with the rank as first dimension.

    Example:
        >>> gather_over_ranks([torch.tensor([1.0, 2.0])])
        [tensor([[1., 2.]])]
    """
    size, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    padded = [tensor.new_zeros((size, *tensor.shape)) for tensor in tensors]
    for stack, tensor in zip(padded, tensors, strict=True):
        stack[rank] = tensor.detach()
    return sum_over_ranks(padded)


def share_of_this_rank(gathered: Tensor) -> Tensor:
    """This rank's part of what :func:`gather_over_ranks` gave, bit for bit; the mean where the number of ranks changed.

    Example:
        >>> share_of_this_rank(torch.tensor([[1.0, 2.0]])), share_of_this_rank(torch.tensor([[1.0], [3.0]]))
        (tensor([1., 2.]), tensor([2.]))
    """
    if len(gathered) != world_size():
        return gathered.mean(0)
    return gathered[dist.get_rank() if world_size() > 1 else 0].clone()


def any_rank_has(flag: bool, device: torch.device | str) -> bool:
    """Whether the flag is set on any rank; all ranks must call this.

    Example:
        >>> any_rank_has(True, "cpu")
        True
    """
    return largest_over_ranks(int(flag), device) > 0


def largest_over_ranks(number: int, device: torch.device | str) -> int:
    """The largest of the whole numbers that ranks have; all ranks must call this.

    Example:
        >>> largest_over_ranks(3, "cpu")
        3
    """
    if world_size() == 1:
        return number
    message = torch.tensor(number, device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return int(message)


def all_ranks_have(value: Any, device: torch.device | str) -> bool:
    """Whether a value is the same on every rank, told by a number of it; all ranks must call this.

    Args:
        value: plain data: numbers, text, tensors, and records, lists, sets and dicts of them.
        device: a device that the process group's backend serves.

    Example:
        >>> all_ranks_have({"a": [1, 2.0, torch.ones(2)]}, "cpu")
        True
    """
    if world_size() == 1:
        return True
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    number = int.from_bytes(digest.digest()[:7], "big")  # no more than a signed integer holds
    message = torch.tensor([number, -number], device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    largest, smallest = message.tolist()
    return bool(largest == -smallest)


def _pieces(value: Any) -> Iterator[bytes]:
    """A value as bytes, which tell it from others."""
    yield type(value).__name__.encode()
    if isinstance(value, Tensor):
        yield str((value.dtype, tuple(value.shape))).encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _pieces(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _pieces((key, item))
    elif isinstance(value, (set, frozenset)):
        yield from _pieces(sorted(value))
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield repr(value).encode()


def gather_objects(value: T) -> list[T]:
    """What each rank has, in the order of ranks; all ranks must call this.

    Example:
        >>> gather_objects("a")
        ['a']
    """
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree_on_seed(seed: int | None, device: torch.device | str) -> int:
    """The seed for every rank: the one that rank 0 was given or, if that is ``None``, the seed of its random state.

    Every rank must call this, whatever it was given. No random state is changed.

    Args:
        seed: The user's choice; its lowest 63 bits count.
        device: A device that the process group's backend serves.

    Example:
        >>> agree_on_seed(7, "cpu")
        7
    """
    # A seed may have 64 bits, of which a signed integer that can be broadcast holds 63.
    agreed = (torch.initial_seed() if seed is None else seed) & (2**63 - 1)
    if world_size() == 1:
        return agreed
    message = torch.tensor(agreed, dtype=torch.int64, device=device)
    dist.broadcast(message, src=0)
    return int(message)


class EqualDraws:
    """Private random generators, one for each device, whose draws are equal on every rank.

    They are equal as long as every rank starts from the same seed (:func:`agree_on_seed`) and draws the same shapes in
    the same order. The user's random state is neither used nor changed.

    Args:
        seed: The same on every rank.

    Example:
        >>> draws = EqualDraws(0)
        >>> state = draws.state_dict()
        >>> first = torch.rand(2, generator=draws.generator("cpu"))
        >>> draws.load_state_dict(state)
        >>> torch.equal(first, torch.rand(2, generator=draws.generator("cpu")))
        True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._resumed: dict[str, list[Tensor]] = {}

    def generator(self, device: torch.device | str) -> torch.Generator:
        """The generator for a device, made at the first call.

        Ask anew for each use, for loading a checkpoint replaces it.
        """
        generator = torch.Generator(device)
        # "cuda" is the current device: the generator knows its number.
        device = generator.device
        if device not in self._generators:
            resumed = self._resumed.get(device.type)
            if resumed:
                generator.set_state(resumed.pop(0))
            else:
                generator.manual_seed(self._seed)
            self._generators[device] = generator
        return self._generators[device]

    def state_dict(self) -> dict[str, Any]:
        """The seed and, for each type of device, the generators' states in the order in which they were made.

        Not by the device's number: every rank resumes from the checkpoint of rank 0, on a device of its own.
        """
        states: dict[str, list[Tensor]] = {}
        for device, generator in self._generators.items():
            states.setdefault(device.type, []).append(generator.get_state())
        for kind, resumed in self._resumed.items():
            states.setdefault(kind, []).extend(resumed)
        return {"seed": self._seed, "states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the draws of a checkpoint.

        On another type of device than that of the checkpoint they start again from the seed.
        """
        for state in state_dict["states"].get("cpu", ()):
            torch.Generator().set_state(state.cpu())  # raises where it is none
        self._seed = state_dict["seed"]
        self._generators = {}
        # A checkpoint may have been loaded to the accelerator; generators take their state from the CPU.
        self._resumed = {kind: [state.cpu() for state in states] for kind, states in state_dict["states"].items()}
