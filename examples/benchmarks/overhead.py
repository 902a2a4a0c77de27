"""What the callbacks cost: time and memory of training with each of them, over the same training without.

    python examples/benchmarks/overhead.py                                 # all cases that suit this machine
    python examples/benchmarks/overhead.py --case mlp1-loop 'width*' --method ContinualBackprop
    python examples/benchmarks/overhead.py --case mlp1-loop --quick        # few rounds, nothing is written

A network is trained beside twins of it, each with one callback in its default settings; they start from the same
weights and see the same data. The twins take turns within one process: in each round every callback's twin trains for
a block of steps just before or just after the plain one, in drawn order, and the ratio of the two times is one sample.
Garbage is collected between blocks only. "Continual Backprop in plain operations" is no method of this library: it is
the same method, written from its description as one update for each layer without regard to cost, as research code is;
the authors' own code is not used. Numba's kernels are used where Numba is installed, and with
`LIGHTNING_PLASTICITY_KERNELS=off` before the command nowhere. The tables give the median of the samples and their
quartiles. What happens rarely, such as replacing units, is part of the blocks in which it happens;
"of all time" is the ratio of all blocks
added up. Memory is the largest resident size of a process of its own, or of the tensors on a GPU, above what it was
with the network loaded.

`overhead.json` beside this file holds a row for every device, case, method, number of threads and way to run; a new run
replaces its own rows. `overhead.md` shows them all.
"""

import argparse
import copy
import gc
import itertools
import json
import logging
import os
import platform
import queue
import random
import re
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

import lightning_plasticity as plasticity

Batches = Sequence[tuple[Tensor, Tensor]]
Row = dict[str, Any]


class EagerContinualBackprop:
    """Continual Backprop of a chain of linear layers, as one update for each of them: what others are compared with."""

    rate, maturity_threshold, decay = 1e-4, 100, 0.99

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, example_inputs: Any) -> None:
        """Starts to listen."""
        del optimizer, example_inputs
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        self._pairs = list(itertools.pairwise(layers))
        zeros = [torch.zeros(layer.out_features) for layer in layers[:-1]]
        self._utility, self._mean, self._age = ([z.clone() for z in zeros] for _ in range(3))
        self._earned, self._heard = [0.0] * len(zeros), list(zeros)
        for i, layer in enumerate(layers[1:]):
            layer.register_forward_pre_hook(lambda _, args, i=i: self._heard.__setitem__(i, args[0].detach()))

    @torch.no_grad()
    def step(self) -> None:
        """Acts once."""
        for i, (made_by, read_by) in enumerate(self._pairs):
            activation, age = self._heard[i], self._age[i]
            age += 1
            self._mean[i].mul_(self.decay).add_((1 - self.decay) * activation.mean(0))
            contribution = read_by.weight.abs().mean(0) * activation.abs().mean(0)
            self._utility[i].mul_(self.decay).add_((1 - self.decay) * contribution)
            correction = 1 - self.decay**age
            eligible = (age > self.maturity_threshold).nonzero().squeeze(1)
            if len(eligible) == 0:
                continue
            self._earned[i] += self.rate * len(eligible)
            count = int(self._earned[i])
            self._earned[i] -= count
            if count:
                utility = (self._utility[i] / correction)[eligible]
                self._replace(i, eligible[utility.topk(count, largest=False).indices], correction, made_by, read_by)

    def _replace(self, i: int, units: Tensor, correction: Tensor, made_by: nn.Linear, read_by: nn.Linear) -> None:
        read_by.bias += (read_by.weight[:, units] * (self._mean[i] / correction)[units]).sum(1)
        bound = made_by.in_features**-0.5
        made_by.weight[units] = torch.empty(len(units), made_by.in_features).uniform_(-bound, bound)
        made_by.bias[units] = 0.0
        read_by.weight[:, units] = 0.0
        for kept in (self._utility[i], self._mean[i], self._age[i]):
            kept[units] = 0.0

    def detach(self) -> None:
        """Has nothing to let go of."""


EAGER = "Continual Backprop in plain operations"
METHODS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": lambda: plasticity.ContinualBackprop(seed=0),
    "ActivationReset": lambda: plasticity.ActivationReset(seed=0),
    "SoftWeightRescaling": plasticity.SoftWeightRescaling,
    "PlasticityMonitor": lambda: plasticity.PlasticityMonitor(figures=False),  # due as the epoch ends: after all blocks
    "an empty Callback": Callback,  # what a Trainer takes for any
    EAGER: EagerContinualBackprop,
}
LOOP_METHODS = [name for name in METHODS if name not in ("PlasticityMonitor", "an empty Callback", EAGER)]
KEEP, RESET = "ContinualBackprop, 'keep'", "ContinualBackprop, 'reset'"  # of the optimizer's memory
METHODS[KEEP] = lambda: plasticity.ContinualBackprop(seed=0, optimizer_state="keep")
METHODS[RESET] = lambda: plasticity.ContinualBackprop(seed=0, optimizer_state="reset")
MONITOR = {"PlasticityMonitor": 1.01}
MLP1 = {"ContinualBackprop": 1.15, "ActivationReset": 1.15, "SoftWeightRescaling": 1.10}


def mlp(width: int = 100, layers: int = 3) -> nn.Module:
    inputs = [784, *[width] * (layers - 1)]
    hidden = [layer for n in inputs for layer in (nn.Linear(n, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


@dataclass(frozen=True)
class Case:
    """A network and a way to train it."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch
    targets: dict[str, float] = field(
        default_factory=dict
    )  # what the ratio may be; "each": of all that also work in loops
    steps: int = 100  # of a block: 100 units earn a replacement in that many
    rounds: int = 60
    trainer: bool = False  # or a plain loop
    on: str = "cpu"  # where the targets are meant; "cuda": run there only, in bf16-mixed
    parts: int = 0  # how many units or layers there are, where the cost is to be given per part
    ranks: int = 1
    threads: int = 1  # on the CPU
    is_chain: bool = False  # of linear layers, which is all that the method in plain operations knows
    adam: bool = False  # or plain SGD, which remembers nothing

    @property
    def methods(self) -> list[str]:
        """Those that are measured in it."""
        if self.adam:
            return ["ContinualBackprop", KEEP, RESET]
        if self.trainer:
            return [*LOOP_METHODS, "PlasticityMonitor", "an empty Callback"]
        return [*LOOP_METHODS, EAGER] if self.is_chain else LOOP_METHODS

    @property
    def title(self) -> str:
        """Of the table to which it belongs."""
        growth = "Time added, against width (one hidden layer, per unit) and depth (width 32, per layer)"
        return growth if self.parts else "Step time" if self.ranks == 1 else "Step time on two ranks (gloo, DDP)"


RESNET18, RESNET50, VIT = torchvision.models.resnet18, torchvision.models.resnet50, torchvision.models.vit_b_16
SMALL, LARGE = (32, 3, 64, 64), (64, 3, 224, 224)
ON_GPU = {"trainer": True, "on": "cuda", "steps": 10}


def vit_tiny() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=10)


CASES = {
    "mlp1-loop": Case(mlp, (1, 784), MLP1, is_chain=True),
    "mlp10-loop": Case(mlp, (10, 784), is_chain=True),
    "mlp100-loop": Case(mlp, (100, 784), {"each": 1.08}, rounds=40, is_chain=True),
    "mlp2000-loop": Case(lambda: mlp(2000, 2), (1, 784), {"each": 1.10}, steps=20, rounds=40, is_chain=True),
    "mlp1-trainer": Case(mlp, (1, 784), {"each": 1.08, **MONITOR}, rounds=40, trainer=True),
    "mlp100-trainer": Case(mlp, (100, 784), {"each": 1.05, **MONITOR}, rounds=40, trainer=True),
    "resnet18-64-32": Case(RESNET18, SMALL, {"each": 1.02}, steps=1, rounds=25, threads=2),
    "vit_tiny-224-8": Case(vit_tiny, (8, 3, 224, 224), {"each": 1.02}, steps=1, rounds=25, threads=2),
    "resnet50-224-64": Case(RESNET50, LARGE, {"each": 1.02, **MONITOR}, **ON_GPU),
    "vit_b_16-224-64": Case(VIT, LARGE, {"each": 1.02, **MONITOR}, **ON_GPU),
}
for n in (1, 16):
    CASES[f"mlp{n}-adam"] = Case(mlp, (n, 784), adam=True)
for n in (128, 512, 2048):
    CASES[f"width{n}"] = Case(lambda n=n: mlp(n, 1), (1, 784), {}, min(100, 100_000 // n), rounds=15, parts=n)
for n in (3, 30, 300):
    CASES[f"depth{n}"] = Case(lambda n=n: mlp(32, n), (1, 784), {}, max(5, 300 // n), rounds=15, parts=n)
CASES["ranks-mlp1"] = Case(mlp, (1, 784), MLP1, rounds=20, ranks=2)
CASES["ranks-resnet18-64-8"] = Case(RESNET18, (8, 3, 64, 64), {"each": 1.02}, steps=1, rounds=20, ranks=2)


# ---- twins


class LoopTwin:
    """Trains a network in a plain PyTorch loop, a block of steps at a time."""

    def __init__(self, model: nn.Module, batches: Batches, method: Any = None, adam: bool = False) -> None:
        self._model, self._method = model, method
        self._batches = itertools.cycle(batches)
        weights = model.parameters()
        # Adam is slow to learn: gradients of batches that are learned by heart become denormal, which takes time itself
        self._optimizer = torch.optim.Adam(weights, lr=1e-6) if adam else torch.optim.SGD(weights, lr=0.003)
        if method is not None:
            method.attach(model, self._optimizer, example_inputs=batches[0][:1])

    def train(self, steps: int) -> float:
        """The seconds that so many steps take."""
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
    """The same training for a Trainer."""

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
    """Trains a network in a Trainer, whose stream of data waits until the next block is asked for.

    Each Trainer has a thread of its own, and only one of them is ever awake.
    """

    def __init__(self, model: nn.Module, batches: Batches, method: Any = None) -> None:
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._fit, args=(model, batches, method), daemon=True)
        self._thread.start()

    def _fit(self, model: nn.Module, batches: Batches, method: Any) -> None:
        device = batches[0][0].device.type
        try:
            trainer = Trainer(
                max_epochs=1,
                callbacks=[] if method is None else [method],
                accelerator=device,
                devices=1,
                precision="bf16-mixed" if device == "cuda" else None,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.fit(Module(model), self._stream(batches))
            self._answers.put(0.0)
        except BaseException as error:
            self._answers.put(error)

    def _stream(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        endless = itertools.cycle(batches)
        while steps := self._asked.get():
            start = now()
            yield from itertools.islice(endless, steps)  # the Trainer fetches one batch ahead, in every block alike
            self._answers.put(now() - start)

    def train(self, steps: int) -> float:
        """The seconds that so many steps take."""
        self._asked.put(steps)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        """Ends the training."""
        self.train(0)
        self._thread.join()


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- steps in turns


def compare(case: Case, methods: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """Trains a plain twin and one with each method in turns, on each rank alike."""
    torch.manual_seed(0)
    model = case.network().to(options.device)
    batches = random_batches(case.shape, 20, options)

    def twin(*method: Any) -> LoopTwin | TrainerTwin:
        own = copy.deepcopy(model)
        if options.compile:
            own.compile()
        own = own if case.ranks == 1 else DistributedDataParallel(own)
        return TrainerTwin(own, batches, *method) if case.trainer else LoopTwin(own, batches, *method, adam=case.adam)

    plain, twins = twin(), {name: twin(METHODS[name]()) for name in methods}
    everyone = [plain, *twins.values()]
    for one in everyone:
        one.train(2)  # methods find units, which discards what was compiled before
    collectives = [count_collectives(one) for one in everyone] if case.ranks > 1 else []
    for name, one in twins.items():
        has_ages = name not in ("SoftWeightRescaling", "PlasticityMonitor", "an empty Callback") and not (
            options.quick and case.steps == 1
        )
        one.train(105 if has_ages else 3)  # from now on units are old enough to be replaced
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    draw = random.Random(0)
    gc.collect()
    gc.freeze()  # makes later collections short
    gc.disable()
    for _ in range(options.rounds or (min(15, case.rounds) if options.quick else case.rounds)):
        for name in draw.sample(methods, len(methods)):
            gc.collect()
            took = {one: one.train(case.steps) / case.steps * 1e6 for one in draw.sample((twins[name], plain), 2)}
            pairs[name].append((took[twins[name]], took[plain]))
    gc.enable()
    gc.unfreeze()
    for one in everyone:
        one.stop()
    rows = [row_of(case, name, pairs[name], options) for name in methods]
    for row, count in zip(rows, collectives[1:], strict=False):
        row |= {"collectives per step of DDP": collectives[0], "of the method": count - collectives[0]}
    return rows


def random_batches(shape: tuple[int, ...], count: int, options: argparse.Namespace) -> Batches:
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    images = torch.randn(count, *shape, generator=generator).to(options.device)
    labels = torch.randint(10, (count, shape[0]), generator=generator).to(options.device)
    return list(zip(images, labels, strict=True))


def row_of(case: Case, method: str, pairs: Sequence[tuple[float, float]], options: argparse.Namespace) -> Row:
    """What is told about blocks of a method and the plain ones beside them, given in microseconds per step."""
    low, ratio, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    added = statistics.median(a - b for a, b in pairs)
    target = case.targets.get(method, case.targets.get("each") if method in LOOP_METHODS else None)
    plain = statistics.median(b for _, b in pairs)
    row = {"method": method, "plain step, µs": round(plain, 1), "added, µs": round(added, 1)}
    if case.parts:
        return row | {"added per part, µs": round(added / case.parts, 4), "rounds": len(pairs)}
    return row | {
        "ratio": round(ratio, 4),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "of all time": round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 4),
        **verdict(ratio, target if case.on == torch.device(options.device).type else None),
        "rounds": len(pairs),
    }


def verdict(reached: float, target: float | None) -> Row:
    return {"target": target, "met": None if target is None else "yes" if reached <= target else "no"}


def count_collectives(twin: LoopTwin | TrainerTwin, steps: int = 10) -> float:
    """The collectives of gloo per step, those of DistributedDataParallel among them; no unit is old enough yet."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        twin.train(steps)
    return sum(event.name.startswith("gloo:") for event in profile.events()) / steps


def step_rows(name: str, options: argparse.Namespace) -> list[Row]:
    case = CASES[name]
    methods = [method for method in case.methods if method in options.method]
    if case.ranks == 1:
        return compare(case, methods, options)
    with tempfile.TemporaryDirectory() as folder:
        return in_processes(case.ranks, compare_on_rank, f"file://{folder}/store", name, methods, options)


def compare_on_rank(
    rank: int, results: Any, store: str, name: str, methods: Sequence[str], options: argparse.Namespace
) -> None:
    set_up(options)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=CASES[name].ranks)
    rows = compare(CASES[name], methods, options)
    if rank == 0:
        results.put(rows)
    dist.destroy_process_group()


# ---- what is measured in processes of their own


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> Any:
    """What ``function(rank, results, *arguments)`` puts into ``results``, run in new processes."""
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(function, (results, *arguments), count)
    return results.get()


def train_thrice(model: nn.Module, method: str, options: argparse.Namespace) -> None:
    batches = random_batches((64 if options.device == "cuda" else 16, 3, 224, 224), 1, options)
    LoopTwin(model, batches, METHODS[method]() if method in METHODS else None).train(3)


def find(model: nn.Module, method: str, options: argparse.Namespace, size: int = 224) -> None:
    plasticity.find_units(model, torch.zeros(1, 3, size, size, device=options.device))


def reinit(model: nn.Module, case: str, options: argparse.Namespace) -> None:
    plasticity.SelectiveReinit.from_case(case).attach(model)


@dataclass(frozen=True)
class Act:
    """What is done once, with each of some methods, to a network."""

    title: str
    network: Callable[[], nn.Module]
    do: Callable[[nn.Module, str, argparse.Namespace], None]
    methods: Sequence[str]
    seconds: float | None = None  # the target


MEMORY = "Memory of three training steps, ResNet-50 at 224x224 (batch 16 on the CPU, 64 on a GPU)"
ONCE = "What happens once: find_units (ResNet-50 at 64x64), and reinit (the largest weight of ViT-B/16 takes 9 MiB)"
ACTS = {
    "memory-resnet50": Act(MEMORY, RESNET50, train_thrice, ["plain", *LOOP_METHODS]),
    "find-resnet50": Act(ONCE, RESNET50, partial(find, size=64), ["find_units"], seconds=2.0),
    "find-vit_b_16": Act(ONCE, VIT, find, ["find_units"], seconds=8.0),
    "reinit-vit_b_16": Act(ONCE, VIT, reinit, ["10M", "10MN"], seconds=2.0),
}


def act_rows(name: str, options: argparse.Namespace) -> list[Row]:
    act, rows = ACTS[name], []
    # Has glibc give freed memory back at once: what it keeps depends on chance. Not where time counts.
    steady = {"MALLOC_MMAP_THRESHOLD_": "65536"} if act.do is train_thrice else {}
    for method in (m for m in act.methods if m not in METHODS or m in options.method):
        with patch.dict(os.environ, steady):
            runs = [in_processes(1, measure_act, name, method, options) for _ in range(1 if options.quick else 2)]
        seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
        row = {"method": method, "memory, MiB": round(memory, 1), "processes": len(runs)}
        if act.do is train_thrice:
            ratio = memory / rows[0]["memory, MiB"] if rows else 1.0
            rows.append(row | {"ratio": round(ratio, 4), **verdict(ratio, 1.01 if rows else None)})
        else:
            rows.append(row | {"seconds": round(seconds, 2), **verdict(seconds, act.seconds)})
    return rows


def measure_act(_: int, results: Any, name: str, method: str, options: argparse.Namespace) -> None:
    set_up(options)
    model = ACTS[name].network().to(options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, start = peak_memory(options), now()
    ACTS[name].do(model, method, options)
    results.put((now() - start, peak_memory(options) - before))


def peak_memory(options: argparse.Namespace) -> float:
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # the peak that getrusage gives can be the parent's
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 2**10


# ---- the report

TITLES = {name: thing.title for name, thing in (CASES | ACTS).items()}
KEY = ("case", "method", "threads", "compiled")  # what tells rows of one device apart


def report(rows: Sequence[Row]) -> str:
    """Tables in Markdown, one for each kind of measurement, each with the commands that made it."""
    parts = []
    for title in dict.fromkeys(TITLES[row["case"]] for row in rows):
        of_title = [row for row in rows if TITLES[row["case"]] == title]
        columns = [c for c in dict.fromkeys(c for row in of_title for c in row) if c not in ("torch", "command")]
        lines = [columns, ["---"] * len(columns)]
        lines += [["" if row.get(c) is None else str(row[c]) for c in columns] for row in of_title]
        commands = dict.fromkeys(f"`{row['command']}` (torch {row['torch']})" for row in of_title)
        parts += [f"### {title}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
        parts += ["Made by " + ", ".join(commands) + "."]
    return "\n\n".join(parts)


def save(output: Path, device: str, rows: Sequence[Row]) -> None:
    """Writes the rows into the results, in place of earlier ones of the same device and kind."""
    file = output.with_suffix(".json")
    found = json.loads(file.read_text()) if file.exists() else {}
    by_key = {tuple(row[k] for k in KEY): row for row in [*found.get(device, []), *rows]}
    order = list(TITLES)
    found[device] = sorted(by_key.values(), key=lambda r: (order.index(r["case"]), r["compiled"], r["threads"]))
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert __doc__ is not None
    sections = [f"# Overhead of the callbacks\n\n{__doc__.split(chr(10) * 2)[2]}"]
    sections += [f"## {name}\n\n{report(own)}" for name, own in found.items()]
    output.with_suffix(".md").write_text("\n\n".join(sections) + "\n")


def name_of(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def set_up(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def can_run(name: str, options: argparse.Namespace) -> bool:
    if name in ACTS:
        return not options.compile and (options.device == "cuda" or Path("/proc/self/clear_refs").exists())
    return options.device == "cpu" or CASES[name].ranks == 1 if CASES[name].on == "cpu" else options.device == "cuda"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["*"], help=f"names or patterns of: {', '.join(TITLES)}")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of each process, on the CPU; by default each case has its own")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--rounds", type=int, help="at least 2; by default each case has its own number")
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is written without --output")
    parser.add_argument("--anew", action="store_true", help="forget all earlier results")
    parser.add_argument("--output", type=Path, help="the results, without suffix (default: beside this file)")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    fitting = [name for name in TITLES if any(fnmatchcase(name, pattern) for pattern in options.case)]
    chosen = [name for name in fitting if can_run(name, options)]
    if not chosen:
        parser.error(f"none of {fitting or ' '.join(options.case)} can be run on {options.device}")
    if options.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=options.device))
        except Exception as error:  # each version of torch raises another kind where there is no compiler
            sys.exit(f"--compile needs what torch.compile needs, on the CPU a C++ compiler, and it failed: {error}")
    given = sys.argv[1:] if arguments is None else arguments
    about = {"torch": torch.__version__, "command": shlex.join(["python", "examples/benchmarks/overhead.py", *given])}
    device = name_of(options.device)
    output = options.output or (None if options.quick else Path(__file__).with_suffix(""))
    print(f"{device}, torch {torch.__version__}")
    if options.anew and output is not None:
        output.with_suffix(".json").unlink(missing_ok=True)
    own_threads = options.threads
    for name in chosen:
        options.threads = own_threads or getattr((CASES | ACTS)[name], "threads", 1)
        set_up(options)
        key = {"case": name, "compiled": "yes" if options.compile else "no", "threads": options.threads}
        rows = [key | row | about for row in (step_rows if name in CASES else act_rows)(name, options)]
        print(f"\n{report(rows)}", flush=True)
        if output is not None:
            save(output, device, rows)


if __name__ == "__main__":
    main()
