"""The example for FSDP2 trains, on two ranks, and its method acts on units of every block."""

import sys
from pathlib import Path

import torch.distributed as dist
from ranks import on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(rank: int) -> tuple[int, int]:
    dist.destroy_process_group()  # Lightning makes its own
    sys.path.insert(0, str(EXAMPLES))
    from fsdp2_vit import main

    _, method = main(["--devices", "2", "--accelerator", "cpu", "--steps", "3"])
    return method.optimizer_steps, len(method.state_dict()["method"]["sets"])


def test_it_trains(tmp_path: Path) -> None:
    assert on_ranks(2, run, tmp_path) == [(3, 24), (3, 24)]  # values and MLP of twelve blocks
