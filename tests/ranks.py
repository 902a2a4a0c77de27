"""Several processes that are the ranks of a distributed run, quickly started."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One process imports what takes seconds, and the ranks are forked from it. It starts no threads, so that this is safe.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch.distributed.fsdp", "lightning.pytorch", "lightning_plasticity"])


def on_ranks(count: int, function: Callable[..., Any], folder: Path, *args: Any, seconds: float = 300) -> list[Any]:
    """What ``function(rank, *args)`` returns on each of so many ranks, joined in a gloo group.

    Args:
        count: how many.
        function: of a module, so that it can be found by its name.
        folder: for files, in which no other ranks have worked.
        *args: what it is called with besides the rank.
        seconds: after which all are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        _SERVER.Process(target=_work, args=(rank, count, port, folder, function, args), daemon=True)
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
    running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in running:
        ranks[rank].kill()
    errors = [(folder / f"{rank}.error").read_text() for rank in range(count) if (folder / f"{rank}.error").exists()]
    assert not errors, "\n".join(errors)
    codes = [process.exitcode for process in ranks]
    assert not running, f"after {seconds} s ranks {running} had not ended; exit codes {codes}"
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(count)]


def _work(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RUN_ID": "tests",  # tells Lightning that the processes are there
    }
    try:
        dist.init_process_group("gloo")
        torch.save(function(rank, *args), folder / f"{rank}.result")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
