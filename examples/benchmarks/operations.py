"""How many operations the methods add to a training step: what they cost on an accelerator, counted without one.

    python examples/benchmarks/operations.py                  # writes operations.json and operations.md beside it
    python examples/benchmarks/operations.py --label before   # keeps the counts under another heading

On an accelerator a small operation takes as long as its launch, whatever the size of its tensors, so that the number of
operations tells what a method adds to a step. They are counted in an ordinary step, in which nothing is replaced or
reset, of ResNet-50, ViT-B/16 and a multi-layer perceptron with AdamW; small images give the same counts as large ones.
Views and new memory are not counted. An operation over a list of tensors (``_foreach_``) counts once where CUDA has a
fused kernel for it, and once for each tensor where the shapes of its lists differ, for which it has none. A launch of a
kernel of Triton counts once, and so does the copy of a table of addresses that it needs. What runs is the path for
accelerators, on the CPU: tensors say that they are elsewhere.

The aim is 5 %. Methods that read activations or gradients launch one kernel for each layer that is read, 34 on
ResNet-50 (4.6 %), and a few for all. Parseval regularisation makes two products for each shape of matrices, and
ResNet-50 has 20 shapes: 40 operations, 5.4 %. Of the small perceptron 5 % are fewer than three operations, while it
has three layers to read and a step has more than two operations for all.
"""

import argparse
import contextlib
import gc
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_plasticity as plasticity
from lightning_plasticity.kernels import choice, on_gpu

SELDOM = {"every_n_train_steps": 1000}
METHODS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": plasticity.ContinualBackprop,
    "ActivationReset": plasticity.ActivationReset,
    "ReDo": plasticity.ReDo,
    "ReDo, steps that decide": lambda: plasticity.ReDo(score_steps=1000),
    "ReDo, gradients that decide": lambda: plasticity.ReDo(score="gradient", score_steps=1000),
    "PartialReset": plasticity.PartialReset,
    "SoftWeightRescaling": plasticity.SoftWeightRescaling,
    "L2Init": plasticity.L2Init,
    "L2Init in the loss": lambda: plasticity.L2Init(decoupled=False),
    "WeightClipping": plasticity.WeightClipping,
    "HareAndTortoise": lambda: plasticity.HareAndTortoise(**SELDOM),
    "ParsevalRegularization": plasticity.ParsevalRegularization,
    "SpectralRegularization": plasticity.SpectralRegularization,
    "SelectiveReinit": lambda: plasticity.SelectiveReinit(**SELDOM),
    "SelectiveReinit by gradient": lambda: plasticity.SelectiveReinit(
        reinit="init", utility="gradient", decay_rate=0.9, **SELDOM
    ),
    "ShrinkAndPerturb": lambda: plasticity.ShrinkAndPerturb(**SELDOM),
    "LayerReset": lambda: plasticity.LayerReset(layers=1, **SELDOM),
    "OptimizerReset": lambda: plasticity.OptimizerReset(**SELDOM),
    "IsometryReinit": lambda: plasticity.IsometryReinit(**SELDOM),
}


def mlp() -> nn.Module:
    widths = [784, 100, 100, 100]
    hidden = [layer for n in itertools.pairwise(widths) for layer in (nn.Linear(*n), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(100, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-50": (torchvision.models.resnet50, (2, 3, 32, 32)),
    "ViT-B/16": (lambda: torchvision.models.vit_b_16(image_size=32), (2, 3, 32, 32)),
    "MLP 784-3x100-10": (mlp, (2, 784)),
}


NO_WORK = ("empty", "new_empty", "lift", "_unsafe_view", "promote_types", "result_type")  # the operators' names


class Counts(TorchDispatchMode):
    """Counts what an accelerator would be asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.startswith(NO_WORK):
            self.of[name] += launches(args) if name.startswith("_foreach") else 1
        return func(*args, **(kwargs or {}))


def launches(args: Sequence[Any]) -> int:
    """How many kernels CUDA starts for an operation over lists, long lists aside."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and all(isinstance(t, Tensor) for t in a)]
    are_alike = all(
        a.shape == b.shape and a.stride() == b.stride()
        for more in lists[1:]
        for a, b in zip(lists[0], more, strict=True)
    )
    return 1 if are_alike else len(lists[0])


def count(network: Callable[[], nn.Module], shape: tuple[int, ...], method: Any = None) -> Counter[str]:
    """The operations of the fourth step, by kind."""
    gc.collect()  # the model before, which hooks hold in circles
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    counts = Counts()
    with as_on_an_accelerator(counts):
        if method is not None:
            method.attach(model, optimizer, example_inputs=(x,))
        for _ in range(4):
            counts.of.clear()
            with counts:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if method is not None:
                    method.step()
        if method is not None:
            method.detach()
    return counts.of


@contextlib.contextmanager
def as_on_an_accelerator(counts: Counts) -> Iterator[None]:
    """Tensors say that they are not on the CPU, and kernels of Triton are counted instead of launched."""
    table = on_gpu._table

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        counts.of[f"Triton {kernel.__name__}"] += 1

    def copy(*rows: Any) -> Tensor:
        counts.of["copy of addresses"] += 1
        return table(*rows)

    is_elsewhere, here = patch.object(torch.Tensor, "is_cpu", False), patch.object(choice, "_found", lambda _: on_gpu)
    with is_elsewhere, here, patch.object(on_gpu, "_launch", launch), patch.object(on_gpu, "_table", copy):
        yield


def report(found: dict[str, Any]) -> str:
    """A table for each network: what each method adds, now and under other headings."""
    assert __doc__ is not None
    parts = ["# Operations that the methods add to a step", "\n\n".join(__doc__.split("\n\n")[2:]).strip()]
    for network in dict.fromkeys(name for of_label in found.values() for name in of_label):
        labels = [label for label in found if network in found[label]]
        plain = found[labels[0]][network]["plain"]["count"]
        lines = [["method", *(c for label in labels for c in (f"added, {label}", "share")), "most often"]]
        lines += [["---", *["---:"] * (2 * len(labels)), "---"]]
        for method in METHODS:
            row, kinds = [method], {}
            for label in labels:
                of = found[label][network].get(method, {})
                row += [str(of.get("count", "")), f"{of['count'] / plain:.1%}" if of else ""]
                kinds = of.get("kinds", kinds)
            lines.append([*row, ", ".join(f"{n} {kind}" for kind, n in kinds.items())])
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts += [f"## {network}: {plain} operations without", table]
    return "\n\n".join([*parts, "Made by `python examples/benchmarks/operations.py`."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now", help="the heading of the counts")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    file = Path(__file__).with_suffix(".json")
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in options.network:
        plain = count(*NETWORKS[name])
        rows = found.setdefault(options.label, {}).setdefault(name, {})
        rows["plain"] = {"count": plain.total()}
        for method in options.method:
            added = count(*NETWORKS[name], METHODS[method]())
            added.subtract(plain)
            kinds = {kind.lstrip("_"): n for kind, n in added.most_common(4) if n > 0}
            rows[method] = {"count": added.total(), "kinds": kinds}
            print(f"{name}, {method}: {added.total()} of {plain.total()} {kinds}", flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(report(found))


if __name__ == "__main__":
    main()
