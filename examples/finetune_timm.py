"""Fine-tune any timm model, after giving its least used weights new values, and see whether that helped.

    python examples/finetune_timm.py --model vit_tiny_patch16_224 --data-dir path/to/images --case base 10M --seeds 5

fine-tunes the pretrained model once for each case and seed, stops each run early, and compares the cases with `base`,
the model as it was. `path/to/images`, or a zip file of it, has a folder `train` and a folder `test` with one folder for
each class; the name of a torchvision data set, such as `CIFAR10`, is downloaded instead. `--weights FILE` takes the
pretrained weights from a file instead of from timm's downloads.

The rows of `finetune_timm.csv` are written one by one, and a second call goes on where the first one stopped.
"""

import argparse
import csv
import inspect
import tempfile
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2
from typing_extensions import override

from lightning_plasticity import SelectiveReinit

SETTINGS = ("data", "model", "image_size", "train_images", "epochs", "patience", "batch_size", "lr")
MEASURED = ("test_accuracy", "best_epoch", "epochs_run", "seconds")
FIELDS = (*SETTINGS, "case", "seed", *MEASURED)


class Classifier(LightningModule):
    """Any network with one output for each class."""

    def __init__(self, model: nn.Module, classes: int, lr: float):
        super().__init__()
        self.model = model
        self.lr = lr
        self.accuracy = nn.ModuleDict(
            {stage: MulticlassAccuracy(classes, average="micro") for stage in ("validation", "test")}
        )

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return nn.functional.cross_entropy(self.model(torch.where(mirrored, images.flip(-1), images)), labels)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.accuracy[stage](self.model(images), labels)
        self.log(f"{stage}_accuracy", self.accuracy[stage], on_epoch=True, on_step=False)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._evaluate("validation", batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._evaluate("test", batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


# ---- the model


def make_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The pretrained model with a new head, for the image size asked for."""
    options = dict(option.split("=", 1) for option in args.model_option)
    # Older versions of timm take a local file for a NumPy archive where that is what is downloaded.
    overlay = {"file": str(args.weights), "custom_load": args.weights.suffix == ".npz"} if args.weights else {}
    if timm.models.get_pretrained_cfg(args.model).fixed_input_size:  # its positions are resized
        options["img_size"] = args.image_size
    return timm.create_model(
        args.model, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **options
    )


def make_method(case: str, **options: Any) -> SelectiveReinit:
    """The method of a case such as `10M`; `10M/keep-biases` does not set the biases to 0."""
    code, _, biases = case.partition("/")
    return SelectiveReinit.from_case(code, zero_biases=biases != "keep-biases", **options)


# ---- the data


def find_data(name: str, unpacked: Path) -> tuple[Dataset, Dataset, list[int]]:
    """Training set, test set, and the classes of the training images, from a folder, a zip file or torchvision."""
    path = Path(name)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked)
        path = unpacked
    if path.is_dir():
        train, test = (torchvision.datasets.ImageFolder(path / part) for part in ("train", "test"))
        return train, test, train.targets
    if not hasattr(torchvision.datasets, name):
        raise SystemExit(
            f"--data-dir must be a folder, a zip file or the name of a torchvision data set, not {name!r}."
        )
    data_set = getattr(torchvision.datasets, name)
    by_split = "split" in inspect.signature(data_set).parameters
    parts = [{"split": "train"}, {"split": "test"}] if by_split else [{"train": True}, {"train": False}]
    train, test = (data_set("data", download=True, **part) for part in parts)
    labels = next((getattr(train, name) for name in ("targets", "_labels") if hasattr(train, name)), None)
    return train, test, [int(label) for label in ([label for _, label in train] if labels is None else labels)]


def split(labels: list[int], train_images: int | None) -> tuple[list[int], list[int]]:
    """Images to train on and to validate on, a fifth of each class; the same for all runs."""
    generator = torch.Generator().manual_seed(0)
    counted = torch.tensor(labels)
    train, validation = [], []
    for label in counted.unique():
        images = (counted == label).nonzero().flatten()
        images = images[torch.randperm(len(images), generator=generator)].tolist()
        if train_images is not None:
            images = images[: max(2, round(train_images * len(images) / len(labels)))]
        held_out = max(1, len(images) // 5)
        validation += images[:held_out]
        train += images[held_out:]
    return train, validation


class Images(Dataset):
    """The images of a data set as tensors of one size, ready for the model; kept in memory if wanted."""

    def __init__(self, images: Dataset, args: argparse.Namespace):
        self.images = images
        self.kept: dict[int, tuple[Tensor, int]] | None = {} if args.keep_in_memory else None
        cfg = timm.models.get_pretrained_cfg(args.model)
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RGB(),
                v2.Resize(args.image_size, v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(args.image_size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(args.mean or cfg.mean, args.std or cfg.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        image, label = self.images[index]
        example = self.transform(image), int(label)
        if self.kept is not None:
            self.kept[index] = example
        return example


def make_loaders(args: argparse.Namespace, unpacked: Path) -> tuple[list[DataLoader], int]:
    """Loaders of training, validation and test images, and the number of classes."""
    train, test, labels = find_data(args.data_dir, unpacked)
    chosen, held_out = split(labels, args.train_images)
    images = Images(train, args)
    parts = [Subset(images, chosen), Subset(images, held_out), Images(test, args)]
    loaders = [DataLoader(part, args.batch_size, shuffle=part is parts[0], num_workers=args.workers) for part in parts]
    return loaders, len(set(labels))


# ---- one run


def fine_tune(args: argparse.Namespace, loaders: list[DataLoader], classes: int, case: str, seed: int) -> dict:
    """Fine-tune once; the accuracy is that of the epoch that was best in validation."""
    started = time.perf_counter()
    seed_everything(seed, workers=True, verbose=False)
    module = Classifier(make_model(args, classes), classes, args.lr)
    stopping = EarlyStopping("validation_accuracy", mode="max", patience=args.patience)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, "{epoch}", monitor="validation_accuracy", mode="max", save_weights_only=True)
        callbacks: list[Callback] = [stopping, best]
        if case != "base":
            callbacks.append(make_method(case))  # this line is all that the method needs
        trainer = Trainer(
            max_epochs=args.epochs,
            accelerator=args.accelerator,
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, loaders[0], loaders[1])
        epochs_run = trainer.current_epoch
        [result] = trainer.test(module, loaders[2], ckpt_path=best.best_model_path, verbose=False)
        best_epoch = int(Path(best.best_model_path).stem.split("=")[1].split("-")[0]) + 1
    return {
        "test_accuracy": f"{100 * result['test_accuracy']:.2f}",
        "best_epoch": best_epoch,
        "epochs_run": epochs_run,
        "seconds": f"{time.perf_counter() - started:.1f}",
    }


# ---- all runs


def settings(args: argparse.Namespace) -> dict[str, str]:
    values = vars(args) | {"data": Path(args.data_dir).stem}
    return {name: str(values[name]) for name in SETTINGS}


def read(results: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(results.read_text().splitlines())) if results.exists() else []


def run_all(args: argparse.Namespace, results: Path) -> None:
    """Every case with every seed, a row of the results each, without those that are there already."""
    ours = settings(args)
    done = {(row["case"], row["seed"]) for row in read(results) if ours.items() <= row.items()}
    missing = [(c, s) for s in range(args.seeds) for c in args.case if (c, str(s)) not in done]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as unpacked:
        loaders, classes = make_loaders(args, Path(unpacked))
        for case, seed in missing:
            row = ours | {"case": case, "seed": seed} | fine_tune(args, loaders, classes, case, seed)
            is_new = not results.exists()
            with results.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
            print(f"{case:>5}  seed {seed}  " + "  ".join(f"{name} {row[name]}" for name in MEASURED), flush=True)


# ---- what came out


EXPLANATION = """Written by `finetune_timm.py`. A case is the percentage of the weights of each layer that got new
values, and the code of the values: M the mean, MN the mean with noise, NS a draw from N(0, 0.2), N one from N(0, 1).
`base` is the pretrained model as it was. All biases of the layers were set to 0, except where the case says
`/keep-biases`. The accuracy is that of the test images, at the epoch that was best in validation; p is that of a
one-sided Mann-Whitney U test against `base`, once for a higher and once for a lower accuracy, not corrected for the
number of tests. Between two cases of a model all else is equal: the images, their order and the new head."""


def by_settings(rows: list[dict[str, str]]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    return groups


def accuracies(rows: list[dict[str, str]], case: str) -> list[float]:
    return [float(row["test_accuracy"]) for row in rows if row["case"] == case]


def compare(accuracy: list[float], base: list[float]) -> tuple[float, float, float]:
    """The gain, and how likely one as high, or as low, would be by chance (one-sided Mann-Whitney U)."""
    higher, lower = (mannwhitneyu(accuracy, base, alternative=side).pvalue for side in ("greater", "less"))
    return sum(accuracy) / len(accuracy) - sum(base) / len(base), higher, lower


def mean_and_std(values: Sequence[float]) -> str:
    std = f" ± {torch.tensor(values).std():.2f}" if len(values) > 1 else ""
    return f"{torch.tensor(values).mean():.2f}{std}"


def table(rows: list[dict[str, str]]) -> str:
    """Each case against `base`."""
    lines = ["| case | runs | test accuracy, % | gain | p (higher) | p (lower) | best epoch |"]
    lines.append("|---|---|---|---|---|---|---|")
    base = accuracies(rows, "base")
    for case in dict.fromkeys(row["case"] for row in rows):
        accuracy = accuracies(rows, case)
        against = ["", "", ""]
        if case != "base" and base:
            gain, higher, lower = compare(accuracy, base)
            against = [f"{gain:+.2f}", f"{higher:.3f}", f"{lower:.3f}"]
        epochs = mean_and_std([float(row["best_epoch"]) for row in rows if row["case"] == case])
        lines.append(f"| {' | '.join([case, str(len(accuracy)), mean_and_std(accuracy), *against, epochs])} |")
    return "\n".join(lines)


def by_code(rows: list[dict[str, str]]) -> str:
    """The same comparisons, one line for each code over all percentages, models and data sets."""
    comparisons: dict[str, list[tuple[float, float, float]]] = {}
    for chosen in by_settings(rows).values():
        base = accuracies(chosen, "base")
        for case in dict.fromkeys(row["case"] for row in chosen if row["case"] != "base" and base):
            comparisons.setdefault(case.lstrip("0123456789."), []).append(compare(accuracies(chosen, case), base))
    lines = ["| code | comparisons | mean gain | higher | higher, p < 0.05 | lower | lower, p < 0.05 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for code, found in comparisons.items():
        gains, higher, lower = zip(*found, strict=True)
        counts = [
            sum(gain > 0 for gain in gains),
            sum(p < 0.05 for p in higher),
            sum(gain < 0 for gain in gains),
            sum(p < 0.05 for p in lower),
        ]
        lines.append(f"| {code} | {len(found)} | {sum(gains) / len(gains):+.2f} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def report(rows: list[dict[str, str]]) -> str:
    """All that was measured, in tables."""
    parts = [
        f"# Fine-tuning after selective reinitialisation\n\n{EXPLANATION}\n\n{len(rows)} runs.\n\n{by_code(rows)}\n"
    ]
    for ours, chosen in by_settings(rows).items():
        named = dict(zip(SETTINGS, ours, strict=True))
        title = f"## {named.pop('model')} on {named.pop('data')}"
        parts.append(f"{title}\n\n{', '.join(f'{k} {v}' for k, v in named.items())}\n\n{table(chosen)}\n")
    return "\n".join(parts)


def draw_weights(args: argparse.Namespace, picture: Path) -> None:
    """The weights of the largest layer before and after each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in args.case if case != "base" and "/" not in case]
    figure, axes = pyplot.subplots(1, len(cases), figsize=(2 + 2.4 * len(cases), 3), sharey=True, squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        model = make_model(args, classes=10)
        layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        name, weight = max(layers.items(), key=lambda item: item[1].numel())
        before = weight.detach().flatten().clone()
        make_method(case, seed=0).attach(model).detach()
        limit = 4 * float(before.std())
        for values, label, style in ((weight.flatten(), "after", "stepfilled"), (before, "before", "step")):
            inside = values.detach()[values.abs() < limit].numpy()
            axis.hist(inside, bins=101, range=(-limit, limit), histtype=style, label=label)
        axis.set(title=case, yscale="log", xlabel="weight")
    axes[0, 0].set_ylabel("number of weights")
    axes[0, 0].legend(loc="lower center")
    figure.suptitle(f"{name}.weight of {args.model}")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vit_tiny_patch16_224", help="any name from timm.list_models()")
    add("--model-option", nargs="*", default=[], metavar="NAME=TEXT", help="for timm, as in pad_type=same")
    add("--weights", type=Path, help="a file of pretrained weights; without it timm downloads its own")
    add(
        "--data-dir",
        required=True,
        help="a folder or zip file with train/ and test/, or the name of a torchvision data set",
    )
    add("--train-images", type=int, help="take only so many of the training images, a fifth of them for validation")
    add("--image-size", type=int, default=224)
    add("--mean", type=float, nargs=3, help="of the pixels, where the weights want another than timm says")
    add("--std", type=float, nargs=3)
    add("--case", nargs="+", default=["base", "10M"], help="base, or a percentage and a code (M, MN, NS, N)")
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=100)
    add("--patience", type=int, default=10, help="stop after so many epochs without a better validation accuracy")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=3e-4)
    add("--workers", type=int, default=0, help="processes that load images")
    add("--keep-in-memory", action="store_true", help="load each image once: for small data sets, without workers")
    add("--accelerator", default="auto")
    add(
        "--results",
        type=Path,
        default=Path("finetune_timm"),
        help="where to write .csv, .md and .png, without the ending",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    run_all(args, args.results.with_suffix(".csv"))
    text = report(read(args.results.with_suffix(".csv")))
    args.results.with_suffix(".md").write_text(text)
    if any(case != "base" and "/" not in case for case in args.case):
        draw_weights(args, args.results.with_suffix(".png"))
    print(f"\n{text}")


if __name__ == "__main__":
    main()
