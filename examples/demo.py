"""Networks on a stream of tasks: what becomes of plain training, and of three methods that keep networks able to learn.

Each task shows the handwritten digits that come with scikit-learn once, with the pixels in a new random order. Every
task is as hard as any other, so a network that keeps its ability to learn does not get worse. `make demo` runs this in
one to two minutes, prints a table and draws a picture.

All networks start with the same weights and see the same images in the same order; "fresh networks" start anew with
each task, and are what the others must be measured against. The learning rate, the same for all, is the one of 0.025,
0.05, 0.1 and 0.2 with which fresh networks learn best. Continual Backprop and activation reset have their default
settings. The strength of soft weight rescaling is the best of 1, 0.1, ..., 0.00001 on another seed, and yet it is no
cure here: it ends between plain training and the others.

`--data-dir FOLDER`, or the variable PLASTICITY_DATA, takes MNIST from `FOLDER/mnist.npz` instead.
"""

import argparse
import copy
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from lightning_plasticity import ActivationReset, ContinualBackprop, SoftWeightRescaling
from lightning_plasticity.functional import dead_units, effective_rank, online_accuracy, weight_magnitude

BATCH_SIZE, LEARNING_RATE = 8, 0.1
WINDOW = 10  # the table compares the first so many tasks with the last; the curves are means over so many
LINES = {  # colours that colour-blind readers tell apart, and dashes for those who see none
    "plain training": ("#D55E00", "-"),
    "Continual Backprop": ("#0072B2", "-"),
    "activation reset": ("#009E73", "--"),
    "soft weight rescaling": ("#CC79A7", "-."),
    "fresh networks": ("#666666", ":"),
}


def load_images(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Images as rows of numbers between 0 and 1, and their labels."""
    digits = load_digits()
    images, labels = digits.data / 16, digits.target
    if folder is not None:
        data = np.load(folder / "mnist.npz")  # as many images as scikit-learn has
        images, labels = data["x_train"][: len(images)].reshape(-1, 784) / 255, data["y_train"][: len(images)]
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)


def make_network(inputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, 100, 100):
        layers += [nn.Linear(width, 100), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # PyTorch's own start learns little in one pass
            nn.init.zeros_(layer.bias)
    return model


class Learner:
    """A network, its optimizer, and the method that keeps it able to learn."""

    def __init__(self, model: nn.Sequential, method, example: Tensor) -> None:
        self.model, self.method = model, method
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.accuracies: list[float] = []  # of each task
        if method is not None:
            method.attach(model, self.optimizer, example_inputs=(example,))

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """One pass over a task; its accuracy is that on each image before the image was learned from."""
        predictions = []
        for x, y in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
            scores = self.model(x)
            predictions.append(scores.argmax(dim=1))
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(scores, y).backward()
            self.optimizer.step()
            if self.method is not None:
                self.method.step()
        self.accuracies.append(float(online_accuracy(torch.cat(predictions), labels)))

    @torch.no_grad()
    def row(self, images: Tensor) -> str:
        """How well it learned the first and the last tasks, and what has become of its hidden units and its weights."""
        first, last = np.mean(self.accuracies[:WINDOW]), np.mean(self.accuracies[-WINDOW:])
        features = [self.model[:depth](images) for depth in (2, 4, 6)]  # what each hidden layer gives out
        dead, rank = (np.mean([float(measure(x)) for x in features]) for measure in (dead_units, effective_rank))
        return f"{first:16.1%}{last:12.1%}{dead:14.1%}{rank:18.1f}{float(weight_magnitude(self.model)):17.3f}"


def draw(learners: dict[str, Learner], picture: Path) -> None:
    figure, ends = Figure(figsize=(8, 4.2), layout="constrained"), {}
    axes = figure.subplots()
    for name, learner in learners.items():
        window = min(WINDOW, len(learner.accuracies))
        means = 100 * np.convolve(learner.accuracies, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(len(means)) + window, means, LINES[name][1], color=LINES[name][0], linewidth=2)
        ends[name] = means[-1]
    gap, height = np.diff(axes.get_ylim())[0] / 16, -np.inf
    for name in sorted(ends, key=ends.get):  # names at the ends of the lines, but not one over another
        height = max(ends[name], height + gap)
        axes.annotate(name, (1.01, height), xycoords=("axes fraction", "data"), va="center", color=LINES[name][0])
    axes.set(xlabel="task", ylabel="online accuracy (%)", title=f"Accuracy on new tasks, mean over {WINDOW} of them")
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PLASTICITY_DATA"))
    parser.add_argument("--picture", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small to gain from more
    torch.manual_seed(0)
    images, labels = load_images(options.data_dir)
    pixels = images.shape[1]
    methods = {
        "Continual Backprop": ContinualBackprop(),
        "activation reset": ActivationReset(),
        "soft weight rescaling": SoftWeightRescaling(1e-4),
    }
    start = make_network(pixels)
    learners = {name: Learner(copy.deepcopy(start), methods.get(name), images[:1]) for name in LINES}
    for _ in tqdm(range(options.tasks), unit="task"):
        order = torch.randperm(len(images))
        task = images[order][:, torch.randperm(pixels)]
        for name, learner in learners.items():
            if name == "fresh networks":
                learner.model.load_state_dict(make_network(pixels).state_dict())
            learner.learn(task, labels[order])

    print(f"\nOnline accuracy over {options.tasks} tasks of {len(images)} images; units and weights after the last:\n")
    print(f"{'':21}  first {WINDOW} tasks     last {WINDOW}    dead units    effective rank    mean |weight|")
    for name, learner in learners.items():
        print(f"{name:21}{learner.row(task)}")
    draw(learners, options.picture)
    print(f"\nPicture: {options.picture}")


if __name__ == "__main__":
    main()
