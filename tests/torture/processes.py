"""Processes that begin at once with all that was imported before, and give back what a function returns."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch

__all__ = ["Child", "lightning"]


class Child:
    """A process that writes what a function returns to a file, in a group of its own.

    Args:
        file: where to.
        function: what to run, with these arguments.
    """

    def __init__(self, file: Path, function: Callable[..., Any], *args: Any) -> None:
        self._file = file
        file.unlink(missing_ok=True)
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                torch.save(function(*args), file)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def kill(self) -> bool:
        """Ends it on the spot; whether it was still running."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        return os.WIFSIGNALED(status)

    def result(self) -> Any:
        """Waits for what the function returns."""
        _, status = os.waitpid(self._pid, 0)
        if status:
            raise AssertionError(f"a process ended with status {status}")
        return torch.load(self._file, weights_only=True)


def wait_for(files: Sequence[Path]) -> None:
    """Waits until there are these files."""
    while not all(file.exists() for file in files):
        time.sleep(0.002)
