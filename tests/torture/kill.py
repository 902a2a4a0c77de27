"""Runs that are killed at random moments and resumed: bitwise the run that was never stopped."""

import os
import random
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contract.cases import CASES, Case
from contract.test_ranks import assert_alike_but_for_batch_statistics
from contract.training import LightningNetwork, assert_same, fit, seeded, weights
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from torture.processes import Child, wait_for


class Begins(Callback):
    """Leaves a file when training begins: from then on it may be killed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.file.touch()


class Run:
    """The run of a method on some ranks, in a folder of its own.

    Args:
        case: the method.
        ranks: how many.
        folder: for checkpoints and results.
    """

    def __init__(self, case: Case, ranks: int, folder: Path) -> None:
        self.case, self.ranks, self.folder = case, ranks, folder

    def children(self, name: str) -> list[Child]:
        """Starts, or resumes from the last checkpoint, on each rank."""
        for file in self.begun():
            file.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = self.folder / name
        checkpoints = [path for path in folder.glob("*.ckpt") if is_whole(path)]
        last = max(checkpoints, key=lambda path: int(path.stem.split("=")[-1]), default=None)
        return [
            Child(self.folder / f"{name} {rank}.pt", self.train, rank, port, folder, last) for rank in range(self.ranks)
        ]

    def begun(self) -> list[Path]:
        return [self.folder / f"begun {rank}" for rank in range(self.ranks)]

    def train(self, rank: int, port: int, folder: Path, last: Path | None) -> dict[str, Any]:
        method = self.case.make()
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {}
        if self.ranks > 1:
            options = {"devices": self.ranks, "strategy": "ddp"}
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.ranks),
                "LOCAL_WORLD_SIZE": str(self.ranks),
                "TORCHELASTIC_RUN_ID": "torture",  # tells Lightning that the processes are there
            }
        model = seeded(LightningNetwork)
        fit(method, saves, Begins(self.begun()[rank]), module=model, ckpt_path=last, **options)
        return {"weights": weights(model), "state": method.state_dict()}


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end before the process was killed."""
    try:
        torch.load(checkpoint, weights_only=True)
    except Exception:
        return False
    return True


def torment(case: Case, ranks: int, times: int, moments: random.Random, folder: Path) -> int:
    """Kills a run so many times on its way; raises unless it ends as the run that was not killed. How often it was."""
    run = Run(case, ranks, folder)
    children = run.children("whole")
    wait_for(run.begun())
    start = time.monotonic()
    whole = [child.result() for child in children]
    duration = time.monotonic() - start
    kills = 0
    for _ in range(times):
        children = run.children("killed")
        wait_for(run.begun())
        time.sleep(moments.random() * duration / times)
        kills += any([child.kill() for child in children])  # noqa: C419 (all of them are killed)
    resumed = [child.result() for child in run.children("killed")]
    assert_same(resumed[0], whole[0])
    for other in resumed[1:]:
        assert_alike_but_for_batch_statistics(other, resumed[0])
    return kills


def run(times: int, cases: Any = CASES) -> str:
    """Kills each method's run so often, on one rank, and some on two; the figures in Markdown."""
    moments = random.Random(0)
    kills = {}
    for ranks in (1, 2):
        for case in cases if ranks == 1 else cases[::3]:
            with tempfile.TemporaryDirectory() as folder:
                kills[case.name, ranks] = torment(case, ranks, times, moments, Path(folder))
            print(f"{case.name}, {ranks} ranks: {kills[case.name, ranks]} kills", flush=True)
    alone, together = (sum(count for (_, n), count in kills.items() if n == ranks) for ranks in (1, 2))
    lines = [
        "A Trainer that saves after every step is killed (`kill -9`) at random moments and resumed from the last",
        "checkpoint, each method several times on its way. Its end must be that of the run that was not killed, to the",
        "last bit: weights, statistics and the method's state.",
        "",
        f"- killed and resumed: {alone} times on one rank ({len(cases)} methods), {together} times on two ranks "
        f"({len(cases[::3])} methods, all ranks at once)",
        "- ended otherwise than the run that was not killed: 0 (one would stop the run)",
    ]
    return "\n".join(lines)
