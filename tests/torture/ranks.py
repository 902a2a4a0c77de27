"""Random cases on two and on four ranks with different data: equal to the last bit on all, or refused on all."""

import hashlib
import pickle
import socket
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torture.cases import (
    OPTIMIZERS,
    alike,
    chosen_methods,
    is_clear,
    is_normed,
    made,
    networks,
    renewed,
    shape_of_inputs,
)
from torture.processes import Child

STEPS = 8
PATIENCE = timedelta(seconds=60)  # for a rank that never comes


def digest(model: nn.Module, methods: list[Any]) -> str:
    """Tells weights and state apart from any other, to the last bit."""
    pieces = [parameter.detach() for parameter in model.parameters()]
    for method in methods:
        pieces += tensors_of(method.state_dict())
    return hashlib.sha256(b"".join(piece.contiguous().numpy().tobytes() for piece in pieces)).hexdigest()


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors of a nested state, numbers among them."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, (int, float)):
        return [torch.tensor(state, dtype=torch.float64)]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [piece for part in parts for piece in tensors_of(part)]


def train(model: nn.Module, methods: list[Any], optimizer: str, lost: set[int], rank: int) -> str:
    """Some steps in which each rank has other data, and one of them looks at lost batches that it leaves out."""
    ddp = DistributedDataParallel(model)
    own = torch.optim.__dict__[optimizer](model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)
    shape = shape_of_inputs(model)
    for method in methods:
        method.attach(ddp, own)
    for step in range(STEPS):
        own.zero_grad()
        if step in lost and rank == 1 and not is_normed(model):
            with ddp.no_sync(), torch.no_grad():
                ddp(torch.full((3, *shape), torch.nan))
        x, y = (torch.randn(3 + rank, *size, generator=generator) + rank for size in (shape, (2,)))
        (ddp(x) - y).square().mean().backward()
        own.step()
        for method in methods:
            method.step()
    found = digest(model, methods)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise AssertionError("weights are not finite")
    for method in methods:
        method.detach()
    return found


def on_rank(rank: int, ranks: int, port: int, count: int) -> dict[str, int]:
    """All cases, in step with the other ranks. The first one draws them, and shrinks what fails; others follow it."""
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, timeout=PATIENCE)
    outcomes: Counter[str] = Counter()
    number = 0

    def play(layers: nn.Sequential, chosen: list[Any], optimizer: str, lost: set[int]) -> None:
        nonlocal number
        number += 1
        torch.manual_seed(0)
        # A group for each case: what one that failed has left on the way does not reach the next.
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=ranks, timeout=PATIENCE
        )
        try:
            found = f"equal {train(renewed(layers), made(chosen), optimizer, lost, rank)}"
        except Exception as error:
            found = "refused" if is_clear(error) else f"failed: {type(error).__name__}: {error}"
        store.set(f"{number} of {rank}", found)
        of_all = [store.get(f"{number} of {other}").decode() for other in range(ranks)]
        dist.destroy_process_group()  # not before: others might still be on their way into it
        if rank == 0 and (len(set(of_all)) > 1 or found.startswith("failed")):
            raise AssertionError("; ".join(of_all))
        outcomes[found.split()[0]] += 1

    @alike(count)
    @given(
        layers=networks(),
        chosen=chosen_methods(),
        optimizer=OPTIMIZERS,
        lost=st.sets(st.integers(1, STEPS - 1), max_size=2),
    )
    def draw(layers: nn.Sequential, chosen: list[Any], optimizer: str, lost: set[int]) -> None:
        case = layers, chosen, optimizer, lost
        store.set(f"case {number + 1}", pickle.dumps(case))
        play(*case)

    if rank == 0:
        try:
            draw()
        finally:
            store.set(f"case {number + 1}", pickle.dumps(None))
    else:
        while (case := pickle.loads(store.get(f"case {number + 1}"))) is not None:
            play(*case)
    store.set(f"end of {rank}", "")
    if rank == 0:  # its store is in this process, and others may still read from it
        store.wait([f"end of {other}" for other in range(ranks)], PATIENCE)
    return dict(outcomes)


def run(count: int) -> str:
    """Half of the cases on two ranks, half on four; the figures in Markdown."""
    lines = [
        "Random cases as above, in data-parallel training where each rank has other data and one sees batches that are",
        "lost to NaN. All ranks must end with weights and state that are equal to the last bit, or all must refuse.",
        "",
    ]
    for ranks in (2, 4):
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            children = [
                Child(Path(folder) / f"{rank}.pt", on_rank, rank, ranks, port, count // 2) for rank in range(ranks)
            ]
            outcomes, *_ = [child.result() for child in children]
        equal, refused = outcomes.get("equal", 0), outcomes.get("refused", 0)
        lines.append(f"- on {ranks} ranks: {equal} equal, {refused} refused, 0 otherwise")
    return "\n".join(lines)
