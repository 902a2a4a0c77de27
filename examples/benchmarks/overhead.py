"""What the callbacks cost: the time of a training step with each of them over that of the same step without.

    python examples/benchmarks/overhead.py                                 # all cases that this machine can run
    python examples/benchmarks/overhead.py --case mlp1-loop mlp1-trainer --method ContinualBackprop
    python examples/benchmarks/overhead.py --case mlp1-loop --quick        # few rounds, nothing is written

A network is trained beside twins of it, each with one callback in its default settings; they start from the same
weights and see the same data. The twins take turns within one process: in each round every callback's twin trains for
a block of steps just before or just after the plain one, which of them is drawn, and the ratio of the two times is one
sample. Garbage is collected between blocks. The tables give the median over rounds and the quartiles. Rare events, such
as replaced units, are in the blocks in which they happen; the ratio of the added up times counts all of them.
"""

import argparse
import copy
import gc
import itertools
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_plasticity import ActivationReset, ContinualBackprop, PlasticityMonitor, SoftWeightRescaling

METHODS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": lambda: ContinualBackprop(seed=0),
    "ActivationReset": lambda: ActivationReset(seed=0),
    "SoftWeightRescaling": lambda: SoftWeightRescaling(),
    "PlasticityMonitor": lambda: PlasticityMonitor(figures=False),  # measures at the end of the epoch, which never ends
}


def mlp(width: int = 100, hidden_layers: int = 3, classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in [784, *[width] * (hidden_layers - 1)]:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


@dataclass(frozen=True)
class Case:
    """A network, a way to train it, and the ratios to stay below; "each" stands for the methods not named."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the inputs of a step
    loop: str
    steps: int  # in a block
    rounds: int
    targets: dict[str, float]


def cases() -> dict[str, Case]:
    monitor = {"PlasticityMonitor": 1.01}
    mlp1 = {"ContinualBackprop": 1.40, "ActivationReset": 1.35, "SoftWeightRescaling": 1.20}
    return {
        # 100 units of age earn one replacement in 100 steps
        "mlp1-loop": Case(mlp, (1, 784), "loop", 100, 60, mlp1),
        "mlp10-loop": Case(mlp, (10, 784), "loop", 100, 60, {}),
        "mlp100-loop": Case(mlp, (100, 784), "loop", 100, 40, {}),
        "mlp1-trainer": Case(mlp, (1, 784), "trainer", 100, 60, {"each": 1.12, **monitor}),
        "mlp100-trainer": Case(mlp, (100, 784), "trainer", 100, 40, {"each": 1.05, **monitor}),
    }


# ---- twins


class LoopTwin:
    """Trains a network in a plain PyTorch loop, a block of steps at a time."""

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], method: Any) -> None:
        self._model, self._method = model, method
        self._batches = itertools.cycle(batches)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
        if method is not None:
            method.attach(model, self._optimizer, example_inputs=batches[0][:1])

    def train(self, steps: int) -> float:
        """The time that a number of steps takes."""
        model, optimizer, method = self._model, self._optimizer, self._method
        start = now()
        for x, y in itertools.islice(self._batches, steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if method is not None:
                method.step()
        return now() - start

    def stop(self) -> None:
        """Ends the training."""
        if self._method is not None:
            self._method.detach()


class Module(LightningModule):
    """The same training in Lightning's words."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.003)


class TrainerTwin:
    """Trains a network in a Trainer, whose data come from a stream that waits until the next block is asked for.

    The Trainer runs in a thread of its own; only one of all twins is ever awake.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], method: Any) -> None:
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._took: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._fit, args=(Module(model), batches, method), daemon=True)
        self._thread.start()

    def _fit(self, module: Module, batches: Sequence[tuple[Tensor, Tensor]], method: Any) -> None:
        try:
            trainer = Trainer(
                max_epochs=1,
                callbacks=[] if method is None else [method],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                accelerator="auto",
                devices=1,
            )
            trainer.fit(module, self._stream(batches))
        except BaseException as error:
            self._took.put(error)

    def _stream(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        endless = itertools.cycle(batches)
        while steps := self._asked.get():
            start = now()
            yield from itertools.islice(endless, steps)
            self._took.put(now() - start)

    def train(self, steps: int) -> float:
        """The time that a number of steps takes."""
        self._asked.put(steps)
        took = self._took.get()
        if isinstance(took, BaseException):
            raise took
        return took

    def stop(self) -> None:
        """Ends the training."""
        self._asked.put(0)
        self._thread.join()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- a comparison


@dataclass
class Times:
    """Seconds of blocks of a twin, and of the plain blocks beside them."""

    method: list[float]
    plain: list[float]


def compare(case: Case, methods: Sequence[str], rounds: int, warm_up: int) -> dict[str, Times]:
    """Trains a plain twin and one for each method in turns."""
    torch.manual_seed(0)
    model = case.network()
    batches = [(torch.randn(case.shape), torch.randint(10, case.shape[:1])) for _ in range(20)]
    make = {"loop": LoopTwin, "trainer": TrainerTwin}[case.loop]
    twins = {name: make(copy.deepcopy(model), batches, METHODS[name]()) for name in methods}
    plain = make(model, batches, None)
    for twin in (plain, *twins.values()):
        twin.train(warm_up)
    draw = random.Random(0)
    times = {name: Times([], []) for name in methods}
    gc.disable()
    try:
        for _ in range(rounds):
            for name in draw.sample(methods, len(methods)):
                gc.collect()
                pair = [(plain, times[name].plain), (twins[name], times[name].method)]
                for twin, taken in draw.sample(pair, 2):
                    taken.append(twin.train(case.steps))
    finally:
        gc.enable()
    for twin in (plain, *twins.values()):
        twin.stop()
    return times


def summary(case: Case, method: str, times: Times) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times.method, times.plain, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "method": method,
        "plain step, µs": round(statistics.median(times.plain) / case.steps * 1e6, 1),
        "ratio": round(median, 4),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "of all time": round(sum(times.method) / sum(times.plain), 4),
        "target": case.targets.get(method, case.targets.get("each")),
        "rounds": len(ratios),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=cases(), default=list(cases()), metavar="CASE")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.case:
        case = cases()[name]
        methods = [m for m in options.method if case.loop == "trainer" or m != "PlasticityMonitor"]
        times = compare(case, methods, 15 if options.quick else case.rounds, 200)
        for method in methods:
            print(name, summary(case, method, times[method]))


if __name__ == "__main__":
    main()
