"""What the least that a method must do costs inside a training step: the floors that `overhead.py` is measured against.

    python examples/benchmarks/overhead_floor.py

There are two floors. That of the dispatcher is what a method's work takes as PyTorch's operations, however few. That of
memory is what it takes in a compiled function over the same memory: Numba's kernels, called with nothing around them.
The second table compares the methods with both, added up from the rows of the first; the rest is Python's. It has what
happens rarely in it, such as replacing units.

A multi-layer perceptron, 784-3x100-10, trains with batch 1 in a plain loop, once as it is and once with each of a few
operations of PyTorch added to every step, in blocks of steps that take turns. Between the operations of a step the
processor's caches are cold for each kind of operation: the same call takes several times as long as in a loop of its
own. Prints a table, and writes it to `overhead_floor.md` beside this file.
"""

import gc
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lightning_plasticity as plasticity
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.kernels import Tensors, on_cpu

STEPS, ROUNDS = 100, 60
Extra = Callable[[], None]


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )


def hook(model: nn.Sequential, function: Callable[..., None]) -> None:
    for layer in (model[2], model[4], model[6]):  # those that read hidden units
        layer.register_forward_pre_hook(function)


def nothing(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    del model, optimizer


def empty_hooks(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    hook(model, lambda *_: None)


def reading_hooks(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    kept = torch.zeros(1, 100)

    def read(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        kept.copy_(args[0].detach())

    hook(model, read)


def optimizer_hooks(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)


def average(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    kept, new = torch.zeros(300), torch.rand(300)
    return lambda: kept.mul_(0.99).add_(new, alpha=0.01)


def outgoing_weights(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    weights = [model[i].weight for i in (2, 4, 6)]
    sums, memory = torch.zeros(3, 100), [torch.zeros_like(weight) for weight in weights]

    def extra() -> None:
        for weight, absolute, total in zip(weights, memory, sums, strict=True):
            torch.sum(torch.abs(weight, out=absolute), 0, out=total)

    return extra


def clamp(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    parameters = [p for i in (0, 2, 4) for p in model[i].parameters()]

    def extra() -> None:
        for parameter in parameters:
            parameter.clamp_(-10.0, 10.0)

    return extra


def norms(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    weights = [model[i].weight for i in (0, 2, 4, 6)]
    return lambda: torch._foreach_norm(weights)


def scale(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    parameters, factors = list(model.parameters()), torch.ones(8).unbind()
    return lambda: torch._foreach_mul_(parameters, factors)


class Idle(PlasticityCallback):
    """A method that has nothing to do."""

    def _start(self) -> None:
        pass

    def _works_on(self) -> str:
        return "nothing."

    def _after_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        pass


def idle_method(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    return Idle().attach(model, optimizer).step


def together(tensors: Sequence[torch.Tensor], beside: Sequence[torch.Tensor] = ()) -> Tensors:
    group = Tensors(tensors, beside)
    assert group.kernels() is not None, "needs Numba"
    return group


def compiled_averages(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    weights = together([model[i].weight for i in (2, 4, 6)])
    shapes = [(100 * i, 100 * i, 1, 1, outputs, 100, 1, 0) for i, outputs in enumerate((100, 100, 10))]
    readers, sizes, utility = np.array(shapes), torch.rand(300), torch.zeros(300)
    averages = together([torch.zeros(300), torch.zeros(300)], [sizes, utility])

    def extra() -> None:
        on_cpu.contributions(weights, readers, sizes, utility)
        on_cpu.average_in(averages, 0.01)

    return extra


def compiled_average(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    averages = together([torch.zeros(300)], [torch.rand(300)])
    return lambda: on_cpu.average_in(averages, 0.01)


def compiled_clamp(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    group = together([p for i in (0, 2, 4) for p in model[i].parameters()])
    return lambda: on_cpu.clamp(group, [10.0] * 6)


def compiled_scale(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    weights, every = together([model[i].weight for i in (0, 2, 4, 6)]), together(list(model.parameters()))
    initial, coefficients, exponents, factors = torch.ones(4), torch.zeros(4), torch.zeros(8, 4), torch.ones(8)

    def extra() -> None:
        on_cpu.rescaling_factors(weights, initial, coefficients, exponents, factors)
        on_cpu.scale(every, factors)

    return extra


def method(make: Callable[[], PlasticityCallback], model: nn.Sequential, optimizer: torch.optim.Optimizer) -> Extra:
    return make().attach(model, optimizer, example_inputs=(torch.zeros(1, 784),)).step


EXTRAS: dict[str, Callable[..., Extra | None]] = {
    "nothing": nothing,
    "three forward hooks that do nothing": empty_hooks,
    "three forward hooks that copy what they see": reading_hooks,
    "two hooks of the optimizer that do nothing": optimizer_hooks,
    "a method of this library that has nothing to do": idle_method,
    "a running average of 300 numbers": average,
    "mean size of the weights that read 300 units": outgoing_weights,
    "hidden layers clamped": clamp,
    "norms of all weights": norms,
    "all parameters scaled": scale,
    "Numba: sizes of the weights that read 300 units, two running averages": compiled_averages,
    "Numba: a running average of 300 numbers": compiled_average,
    "Numba: hidden layers clamped": compiled_clamp,
    "Numba: norms of all weights, all parameters scaled": compiled_scale,
    "ContinualBackprop": partial(method, lambda: plasticity.ContinualBackprop(seed=0)),
    "ActivationReset": partial(method, lambda: plasticity.ActivationReset(seed=0)),
    "SoftWeightRescaling": partial(method, plasticity.SoftWeightRescaling),
}
_HOOKS = "three forward hooks that copy what they see"
FLOORS = {  # of the dispatcher and of memory, added up
    "ContinualBackprop": (
        [_HOOKS, *["a running average of 300 numbers"] * 2, "mean size of the weights that read 300 units"],
        ["Numba: sizes of the weights that read 300 units, two running averages"],
    ),
    "ActivationReset": (
        [_HOOKS, "a running average of 300 numbers", "hidden layers clamped"],
        ["Numba: a running average of 300 numbers", "Numba: hidden layers clamped"],
    ),
    "SoftWeightRescaling": (
        ["norms of all weights", "all parameters scaled"],
        ["Numba: norms of all weights, all parameters scaled"],
    ),
}


BETWEEN = """\
What lies between is Python's: hooks of layers and of the optimizer, and what decides in each step that nothing is due.
A step of ContinualBackprop makes 159 calls more than a plain one, one of ActivationReset 174, one of
SoftWeightRescaling 87 (as cProfile counts them, functions of C and hooks among them); one that replaces or scales three
units makes 98 or 74 operations of PyTorch, views counted. In a loop of its own the same Python takes a third of the
time, for there its code and data stay in the processor's caches.
Tried and left out: hooks that only note a tensor for one kernel after the step, because activations would live until
then, and might be written to before; sums of norms in float32, which would be twice as fast and less exact; fewer
arguments for Numba's functions, of which one more takes 0.02 µs.
With wide layers (2 x 2,000 units, batch 1) memory is the floor: the kernels alone, with nothing around them, take most
of what a method adds. The weights that read units are 16 MB, those that are clamped 22 MB, and each is read once;
Soft Weight Rescaling reads all 22 MB for the norms, then reads and writes them once more, which must come after.
"""


class Arm:
    """A network that trains with one operation added."""

    def __init__(self, prepare: Callable[..., Extra | None], batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._model = make_network()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.003)
        self._extra = prepare(self._model, self._optimizer) or (lambda: None)
        self._batches = itertools.cycle(batches)

    def train(self) -> float:
        """Microseconds of a step."""
        model, optimizer, extra = self._model, self._optimizer, self._extra
        start = time.perf_counter()
        for x, y in itertools.islice(self._batches, STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                extra()
        return (time.perf_counter() - start) / STEPS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = list(zip(torch.rand(100, 1, 784), torch.randint(10, (100, 1)), strict=True))
    arms = {name: Arm(prepare, batches) for name, prepare in EXTRAS.items()}
    for arm in arms.values():
        for _ in range(2):
            arm.train()  # units are old enough to be replaced then
    gc.disable()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name in random.sample(list(arms), len(arms)):
            times[name].append(arms[name].train())
    plain = times.pop("nothing")
    lines = [
        f"A plain step takes {statistics.median(plain):.0f} µs (median of {ROUNDS} blocks of {STEPS} steps; "
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}).",
        "",
        "| added to each step | µs | share of the step |",
        "|---|---:|---:|",
    ]
    added = {}
    for name, with_extra in times.items():
        added[name] = statistics.median(a - b for a, b in zip(with_extra, plain, strict=True))
        ratio = statistics.median(a / b for a, b in zip(with_extra, plain, strict=True)) - 1
        lines.append(f"| {name} | {added[name]:.0f} | {ratio:.1%} |")
    lines += ["", "| method | added, µs | floor of the dispatcher, µs | floor of memory, µs |", "|---|---:|---:|---:|"]
    for name, floors in FLOORS.items():
        dispatcher, memory = (sum(added[part] for part in parts) for parts in floors)
        lines.append(f"| {name} | {added[name]:.0f} | {dispatcher:.0f} | {memory:.0f} |")
    text = "\n".join(lines)
    print(text)
    made_by = "Made by `python examples/benchmarks/overhead_floor.py`."
    Path(__file__).with_suffix(".md").write_text(f"# The floor of a step\n\n{text}\n\n{BETWEEN}\n{made_by}\n")


if __name__ == "__main__":
    main()
