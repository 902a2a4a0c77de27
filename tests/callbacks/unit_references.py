"""The methods that work on units, slowly: plain NumPy loops written from the papers' formulas, for networks in float64.

They read weights and activations of a network that is trained beside the one the library works on, and write to it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass
class Layer:
    """Hidden units of a plain stack: what makes them and what uses them, with ``columns[i]`` those of unit ``i``."""

    producer: nn.Module
    consumer: nn.Module
    columns: list[list[int]]
    norm: nn.Module | None = None


def stack_layers(model: nn.Sequential) -> list[Layer]:
    """The hidden layers of a sequence of linear and convolution layers with whatever stands between them."""
    layers, producer, norm = [], None, None
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            norm = module
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if producer is not None:
                per_unit = module.weight.shape[1] // producer.weight.shape[0]
                columns = [list(range(i * per_unit, (i + 1) * per_unit)) for i in range(producer.weight.shape[0])]
                layers.append(Layer(producer, module, columns, norm))
            producer, norm = module, None
    return layers


class Reference:
    """Reads the consumers' inputs; subclasses say what is done after a step."""

    def __init__(self, model: nn.Sequential):
        self.layers = stack_layers(model)
        self.inputs: dict[nn.Module, list[np.ndarray]] = {}
        for layer in self.layers:
            layer.consumer.register_forward_pre_hook(self._read)

    def _read(self, module, args):
        self.inputs.setdefault(module, []).append(args[0].detach().numpy().copy())

    def activations(self, layer: Layer) -> np.ndarray:
        """Rows (examples and positions) by columns, since the last step."""
        rows = []
        for h in self.inputs.pop(layer.consumer):
            rows.append(h if h.ndim == 2 else h.transpose(0, 2, 3, 1).reshape(-1, h.shape[1]))
        return np.concatenate(rows)


def column(weight: torch.Tensor, index: int) -> np.ndarray:
    return weight[:, index].detach().numpy()


class ReferenceContinualBackprop(Reference):
    def __init__(self, model, *, rate, maturity, decay, utility, compensate, new_weights, random=None, names=()):
        super().__init__(model)
        self.rate, self.maturity, self.decay, self.utility = rate, maturity, decay, utility
        self.compensate, self.new_weights, self.random = compensate, new_weights, random
        self.u = [[0.0] * len(layer.columns) for layer in self.layers]
        self.f = [[[0.0] * len(columns) for columns in layer.columns] for layer in self.layers]
        self.a = [[0] * len(layer.columns) for layer in self.layers]
        self.c = [0.0] * len(self.layers)
        self.history: list[list[tuple[int, ...]]] = []

    def step(self):
        activations = [self.activations(layer) for layer in self.layers]
        chosen = []
        for number, (layer, h) in enumerate(zip(self.layers, activations, strict=True)):
            for i, columns in enumerate(layer.columns):
                self.a[number][i] += 1
                for j, k in enumerate(columns):
                    f = self.f[number][i][j]
                    self.f[number][i][j] = self.decay * f + (1 - self.decay) * h[:, k].mean()
                y = 0.0 if self.utility == "random" else self.current(number, layer, i, h)
                self.u[number][i] = self.decay * self.u[number][i] + (1 - self.decay) * y
            old = [i for i, a in enumerate(self.a[number]) if a > self.maturity]
            self.c[number] += self.rate * len(old)
            count = int(self.c[number])
            self.c[number] -= count
            ranking = [self.corrected(u, a) for u, a in zip(self.u[number], self.a[number], strict=True)]
            if self.utility == "random" and count:
                ranking = self.random(len(ranking))
            chosen.append(tuple(sorted(old, key=ranking.__getitem__)[:count]))
        self.history.append(chosen)
        self.replace(chosen)

    def corrected(self, average, age):
        return average / (1 - self.decay**age)

    def current(self, number, layer, i, h):
        weight_in = np.abs(layer.producer.weight[i].detach().numpy()).mean()
        per_column = []
        for j, k in enumerate(layer.columns[i]):
            out = np.abs(column(layer.consumer.weight, k)).mean()
            centre = self.corrected(self.f[number][i][j], self.a[number][i])
            per_column.append(
                {
                    "contribution": np.abs(h[:, k]).mean() * out,
                    "zero_contribution": np.abs(h[:, k] - centre).mean() * out,
                    "adaptable_contribution": np.abs(h[:, k] - centre).mean() * out / weight_in,
                    "adaptation": 1 / weight_in,
                    "weight": out,
                }[self.utility]
            )
        return np.mean(per_column)

    @torch.no_grad()
    def replace(self, chosen):
        for number, (layer, units) in enumerate(zip(self.layers, chosen, strict=True)):
            for i in units if self.compensate else ():
                for j, k in enumerate(layer.columns[i]):
                    mean = self.corrected(self.f[number][i][j], self.a[number][i])
                    layer.consumer.bias += mean * layer.consumer.weight[:, k].reshape(
                        len(layer.consumer.weight), -1
                    ).sum(1)
        for layer, units in zip(self.layers, chosen, strict=True):
            for i in units:
                layer.producer.weight[i] = self.new_weights(layer.producer.weight)[i]
                layer.producer.bias[i] = 0.0
                if layer.norm is not None:
                    layer.norm.weight[i], layer.norm.bias[i] = 1.0, 0.0
                    layer.norm.running_mean[i], layer.norm.running_var[i] = 0.0, 1.0
        for number, (layer, units) in enumerate(zip(self.layers, chosen, strict=True)):
            for i in units:
                layer.consumer.weight[:, layer.columns[i]] = 0.0
                self.u[number][i], self.a[number][i] = 0.0, 0
                self.f[number][i] = [0.0] * len(layer.columns[i])


class ReferenceActivationReset(Reference):
    def __init__(self, model, *, strategies, maturity, decay, max_weight):
        super().__init__(model)
        self.strategies, self.maturity, self.decay, self.max_weight = strategies, maturity, decay, max_weight
        self.u = [[0.0] * len(layer.columns) for layer in self.layers]
        self.a = [[0] * len(layer.columns) for layer in self.layers]
        self.c = [[0.0, 0.0] for _ in self.layers]
        self.history: list[tuple[int, str, tuple[int, ...]]] = []

    @torch.no_grad()
    def step(self):
        for number, (layer, strategy) in enumerate(zip(self.layers, self.strategies, strict=True)):
            h, u, a = self.activations(layer), self.u[number], self.a[number]
            for i, columns in enumerate(layer.columns):
                a[i] += 1
                u[i] = self.decay * u[i] + (1 - self.decay) * np.mean([h[:, k].mean() for k in columns])
            for end, rate, scale in (("low", strategy[0], strategy[2]), ("high", strategy[1], strategy[3])):
                old = [i for i in range(len(a)) if a[i] > self.maturity]
                which = 0 if end == "low" else 1
                self.c[number][which] += rate * len(old)
                count = int(self.c[number][which])
                self.c[number][which] -= count
                sign = 1 if end == "low" else -1
                units = sorted(old, key=lambda i: sign * u[i] / (1 - self.decay ** a[i]))[:count]
                for i in units:
                    layer.producer.weight[i] *= scale
                    layer.producer.bias[i] *= scale
                    a[i], u[i] = 0, 0.0
                if units:
                    self.history.append((number, end, tuple(units)))
        for layer in self.layers:
            layer.producer.weight.clamp_(-self.max_weight, self.max_weight)
            layer.producer.bias.clamp_(-self.max_weight, self.max_weight)


class ReferenceReDo(Reference):
    def __init__(self, model, *, threshold, every, new_weights, score_steps=1):
        super().__init__(model)
        self.threshold, self.every, self.new_weights, self.steps = threshold, every, new_weights, 0
        self.score_steps, self.heard, self.history = score_steps, [], []

    @torch.no_grad()
    def step(self):
        self.steps += 1
        self.heard.append([self.activations(layer) for layer in self.layers])
        if self.steps % self.every:
            return
        chosen = []
        for k, layer in enumerate(self.layers):
            h = np.concatenate([step[k] for step in self.heard[-self.score_steps :]])
            sizes = [np.mean([np.abs(h[:, k]).mean() for k in columns]) for columns in layer.columns]
            mean = np.mean(sizes)
            chosen.append([i for i, size in enumerate(sizes) if mean == 0 or size / mean <= self.threshold])
        self.history.append(chosen)
        for layer, units in zip(self.layers, chosen, strict=True):
            for i in units:
                layer.producer.weight[i] = self.new_weights(layer.producer.weight)[i]
                layer.producer.bias[i] = 0.0
        for layer, units in zip(self.layers, chosen, strict=True):
            for i in units:
                layer.consumer.weight[:, layer.columns[i]] = 0.0


def slow_gradient_sizes(layer: Layer) -> list[float]:
    """For each unit the mean size of the gradients of the weights that make it."""
    return [float(np.mean([abs(g) for g in row.flatten().tolist()])) for row in layer.producer.weight.grad]


class ReferenceGradientReDo:
    def __init__(self, model, *, threshold, every, new_weights, score_steps):
        self.layers = stack_layers(model)
        self.threshold, self.every, self.new_weights, self.steps = threshold, every, new_weights, 0
        self.score_steps, self.sizes, self.history = score_steps, [], []

    @torch.no_grad()
    def step(self):
        self.steps += 1
        self.sizes.append([slow_gradient_sizes(layer) for layer in self.layers])
        if self.steps % self.every:
            return
        chosen = []
        for k in range(len(self.layers)):
            sizes = np.mean([step[k] for step in self.sizes[-self.score_steps :]], axis=0)
            chosen.append([i for i, size in enumerate(sizes) if size / (np.mean(sizes) + 1e-9) <= self.threshold])
        self.history.append(chosen)
        for layer, units in zip(self.layers, chosen, strict=True):
            for i in units:
                layer.producer.weight[i] = self.new_weights(layer.producer.weight)[i]
                layer.producer.bias[i] = 0.0
        for layer, units in zip(self.layers, chosen, strict=True):
            for i in units:
                layer.consumer.weight[:, layer.columns[i]] = 0.0


class ReferencePartialReset:
    def __init__(self, model, *, strength, every, new_weights):
        self.layers = stack_layers(model)
        self.strength, self.every, self.new_weights, self.steps = strength, every, new_weights, 0
        self.u = [[1.0] * len(layer.columns) for layer in self.layers]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for layer, u in zip(self.layers, self.u, strict=True):
            sizes = slow_gradient_sizes(layer)
            for i, size in enumerate(sizes):
                u[i] = 0.99 * u[i] + 0.01 * size / (np.mean(sizes) + 1e-9)
        if self.steps % self.every:
            return
        shares = [
            [self.strength * min(2 / (1 + np.exp(16 * (value - 1))), 1.0) for value in u] for u in self.u
        ]  # fmt: skip
        for layer, of_units in zip(self.layers, shares, strict=True):
            fresh = self.new_weights(layer.producer.weight)
            for i, share in enumerate(of_units):
                layer.producer.weight[i] = (1 - share) * layer.producer.weight[i] + share * fresh[i]
        for layer, of_units in zip(self.layers, shares, strict=True):
            for i, share in enumerate(of_units):
                for k in layer.columns[i]:
                    layer.consumer.weight[:, k] *= 1 - share
        self.u = [[1.0] * len(u) for u in self.u]


class ReferenceSelfNormalizedReset(Reference):
    """Counts the silences of up to 31 steps one by one, as the library does."""

    def __init__(self, model, *, significance, every, least, most, new_weights):
        super().__init__(model)
        self.significance, self.every, self.least, self.most = significance, every, least, most
        self.new_weights, self.steps, self.history = new_weights, 0, []
        self.silent = [[0] * len(layer.columns) for layer in self.layers]
        self.threshold = [[most] * len(layer.columns) for layer in self.layers]
        self.ended = [[[] for _ in layer.columns] for layer in self.layers]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        chosen = {}
        for k, layer in enumerate(self.layers):
            h = self.activations(layer)
            for i, columns in enumerate(layer.columns):
                if (h[:, columns] > 0).any():
                    self.ended[k][i].append(min(self.silent[k][i], self.most))
                    self.silent[k][i] = 0
                else:
                    self.silent[k][i] += 1
                if self.silent[k][i] >= self.threshold[k][i]:
                    chosen.setdefault(k, []).append(i)
                    self.ended[k][i].append(self.silent[k][i])
                    self.silent[k][i] = 0
        if chosen:
            self.history.append({k: tuple(units) for k, units in chosen.items()})
        for k, units in chosen.items():
            for i in units:
                self.layers[k].producer.weight[i] = self.new_weights(self.layers[k].producer.weight)[i]
                self.layers[k].producer.bias[i] = 0.0
        for k, units in chosen.items():
            for i in units:
                self.layers[k].consumer.weight[:, self.layers[k].columns[i]] = 0.0
        if self.steps % self.every == 0:
            self.learn()

    def learn(self):
        for of_layer, thresholds in zip(self.ended, self.threshold, strict=True):
            for i, ended in enumerate(of_layer):
                counted = sorted(silence for silence in ended if silence > 0)
                if counted:
                    enough = (1 - self.significance) * len(counted)
                    likely = next(s for n, s in enumerate(counted, 1) if n >= enough - 1e-9)
                    new = likely if likely < thresholds[i] else 2 * thresholds[i]
                    thresholds[i] = min(max(new, self.least), self.most)
                ended.clear()
