import copy
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from callbacks.streams import INPUT, convolutional, mlp, train
from lightning_plasticity import ContinualBackprop, DirectionAwareShrink
from lightning_plasticity.engine.training_pass import trainers_loss
from lightning_plasticity.functional.direction_aware_shrink import shrink_factors


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def batches(shape: tuple[int, ...], count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, *shape, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (count, 5), generator=generator), strict=True))


@torch.no_grad()
def slow_shrink(model: nn.Module, data: list, averaging: float, least: float) -> None:
    """Entry by entry, on a copy."""
    twin = copy.deepcopy(model).train()
    names = [f"{name}.{key}" for name, m in model.named_modules() for key, _ in m.named_parameters(recurse=False)
             if isinstance(m, (nn.Linear, nn.Conv2d))]  # fmt: skip
    averages = {name: [0.0] * model.get_parameter(name).numel() for name in names}
    for batch in data:
        twin.zero_grad()
        with torch.enable_grad():
            loss_of(twin, batch).backward()
        for name, average in averages.items():
            for i, g in enumerate(twin.get_parameter(name).grad.flatten().tolist()):
                average[i] = (1 - averaging) * average[i] + averaging * -g
    for name, average in averages.items():
        weight = model.get_parameter(name)
        values, width = weight.flatten().tolist(), math.prod(weight.shape[1:] if weight.ndim == 2 else weight.shape[2:])
        width = len(values) if weight.ndim == 1 else width
        for start in range(0, len(values), width):
            w, g = values[start : start + width], average[start : start + width]
            size = math.hypot(*w) * math.hypot(*g)
            cosine = sum(a * b for a, b in zip(w, g, strict=True)) / size if size else 0.0
            for i in range(width):
                values[start + i] = w[i] * min(max(cosine, least), 1.0)
        weight.copy_(torch.tensor(values, dtype=weight.dtype).view(weight.shape))


@pytest.mark.parametrize("build", [mlp, convolutional])
def test_same_course_as_the_slow_reference_over_300_steps(build):
    model, twin = build(), build()
    if build is convolutional:  # before batch norm a bias has no gradient but rounding, whose direction is chance
        model[0].bias = twin[0].bias = None
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.003) for net in (model, twin)]
    data, steps = batches(INPUT[build], 4), []
    method = DirectionAwareShrink(0.4, 0.2, data=data, loss=loss_of, every_n_train_steps=60)
    method.attach(model, optimizers[0])
    train(model, optimizers[0], method.step, INPUT[build], 300)

    def act() -> None:
        steps.append(None)
        if len(steps) % 60 == 0:
            slow_shrink(twin, data, 0.4, 0.2)

    train(twin, optimizers[1], act, INPUT[build], 300)
    for tensor, slow in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, slow, rtol=1e-7, atol=1e-9)


def test_factors_of_what_has_no_direction_and_of_tiny_gradients():
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e-30, 0.0], [3.0, 4.0]])
    direction = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1e-30, 1e-30], [3e-30, 4e-30]])
    expected = torch.tensor([[0.1], [0.1], [0.5**0.5], [1.0]])
    torch.testing.assert_close(shrink_factors(weight, direction, 0.1), expected)
    vector = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(shrink_factors(vector, torch.tensor([0.0, 2.0]), 0.1), torch.tensor([0.8]))
    kernel = torch.randn(3, 2, 3, 3)
    assert shrink_factors(kernel, kernel, 0.1).shape == (3, 2, 1, 1)
    assert shrink_factors(kernel.half(), kernel, 0.1).dtype == torch.float32


class Notes(LightningModule):
    """Notes much in each of its training steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.seen: list[float] = []
        self.count, self.last = 0, None

    def training_step(self, batch, batch_idx):
        self.seen.append(float(batch[0].sum()))
        self.count += 1
        output = self.net(batch[0])
        self.last = output
        self.accuracy.update(output, batch[1])
        loss = cross_entropy(output, batch[1])
        self.log("loss", loss)
        self.log_dict({"a": loss, "b": 1.0})
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NotesWithoutIndex(Notes):
    def training_step(self, batch):
        return super().training_step(batch, 0)


def loader(shuffle: bool = True) -> DataLoader:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3) if shuffle else None
    return DataLoader(TensorDataset(x, torch.arange(40) % 3), batch_size=8, shuffle=shuffle, generator=generator)


def fit(*callbacks, module: LightningModule, data=None, **options) -> Trainer:
    torch.manual_seed(7)
    trainer = Trainer(
        callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module, loader() if data is None else data)
    return trainer


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
@pytest.mark.parametrize("beside", [[], [ContinualBackprop]])
def test_in_a_trainer_its_own_data_in_their_order_and_nothing_but_weights_is_changed(beside):
    """With ``least=1`` it runs over the data and changes no weight: then the run is the plain one to the last bit."""
    plain, passed = Notes(), Notes()
    fit(*[method(0.05, 2, seed=1) for method in beside], module=plain)
    every_epoch = DirectionAwareShrink(least=1.0, every_n_epochs=1, on_fit_start=True)
    trainer = fit(every_epoch, *[method(0.05, 2, seed=1) for method in beside], module=passed)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(passed.state_dict()[name], tensor), name
    assert passed.seen == plain.seen
    assert passed.count == 10
    assert torch.equal(passed.last, plain.last)
    assert torch.equal(passed.accuracy.compute(), plain.accuracy.compute())
    assert trainer.callback_metrics.keys() == {"loss", "a", "b"}
    assert "log" not in vars(passed)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(passed.parameters(), plain.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
@pytest.mark.parametrize("kind", [Notes, NotesWithoutIndex])
def test_in_a_trainer_the_same_as_with_data_and_loss_by_hand(kind):
    own, by_hand = kind(), kind()
    for module in (own, by_hand):
        module.net[3].p = 0.0
    data = list(loader(shuffle=False))
    fit(DirectionAwareShrink(every_n_epochs=1), module=own)
    given = DirectionAwareShrink(
        data=data, loss=lambda module, batch: cross_entropy(module.net(batch[0]), batch[1]), every_n_epochs=1
    )
    fit(given, module=by_hand)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), by_hand.parameters(), strict=True))
    plain = Notes()
    plain.net[3].p = 0.0
    fit(module=plain)
    assert not any(torch.equal(own.net[i].weight, plain.net[i].weight) for i in (0, 4))


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
def test_a_long_pass_begins_where_batches_count():
    many = TensorDataset(torch.randn(400, 6, generator=torch.Generator().manual_seed(2)), torch.arange(400) % 3)
    seen = []

    class Sees(DirectionAwareShrink):
        def _data(self):
            seen.extend(super()._data())
            return seen

    short, whole = Notes(), Notes()
    for module in (short, whole):
        module.net[3].p = 0.0
    data = DataLoader(many, batch_size=4)
    fit(Sees(0.5, every_n_epochs=1), module=short, data=data)
    assert len(seen) == 30  # 0.5 ** 30 of a batch is no more than rounding
    assert torch.equal(seen[-1][0], many.tensors[0][-4:])
    given = DirectionAwareShrink(
        0.5, data=list(data), loss=lambda module, batch: cross_entropy(module.net(batch[0]), batch[1]), every_n_epochs=1
    )
    fit(given, module=whole, data=data)
    for a, b in zip(short.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_frozen_weights_norms_and_embeddings_stay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model[1].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [(torch.arange(5), torch.tensor([0, 1, 2, 0, 1]))]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    DirectionAwareShrink(data=data, loss=loss_of, on_fit_start=True).attach(model, optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"3.weight", "3.bias"}
    assert all(p.grad is None for p in model.parameters())


def test_batches_without_loss_or_with_gradients_that_are_not_finite_do_not_count():
    data = batches((6,), 3)
    bad = [(torch.full_like(data[0][0], float("nan")), data[0][1]), data[0], (data[0][0], None), data[1], data[2]]
    models = mlp(), mlp()
    for model, given in zip(models, (data, bad), strict=True):
        DirectionAwareShrink(
            data=given, loss=lambda model, batch: None if batch[1] is None else loss_of(model, batch), on_fit_start=True
        ).attach(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    model, before = mlp(), mlp()
    with pytest.warns(UserWarning, match="leaves 'Sequential' alone where the gradients of all batches are not finite"):
        DirectionAwareShrink(data=bad[:1], loss=loss_of, on_fit_start=True).attach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_optimizer_state_stays_unless_asked():
    for what, is_kept in (("keep", True), ("reset", False)):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters())
        method = DirectionAwareShrink(
            data=batches((6,), 2), loss=loss_of, every_n_train_steps=2, optimizer_state=what
        ).attach(model, optimizer)
        train(model, optimizer, method.step, (6,), 2)
        assert bool(optimizer.state[model[0].weight]["exp_avg"].any()) == is_kept


def test_a_plain_loop_needs_data_and_their_loss():
    for settings in ({}, {"data": [1]}, {"loss": loss_of}):
        with pytest.raises(ValueError, match=r"which only a Trainer knows by itself. Give data=loader and loss="):
            DirectionAwareShrink(on_fit_start=True, **settings).attach(mlp())
    with pytest.raises(ValueError, match="more than once, such as a loader or a list of batches, got"):
        DirectionAwareShrink(data=iter([1]), loss=loss_of, on_fit_start=True)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda model, batch: model(batch[0]), r"shape \(5, 3\)"),
        (lambda model, batch: 1.0, "float"),
        (lambda model, batch: torch.tensor(1.0), "a number that depends on none"),
    ],
)
def test_a_loss_must_be_one_number_that_depends_on_weights(loss, got):
    model = mlp()
    model[0].weight.grad = before = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match=f"must be one number that depends on trained parameters, got {got}. Give it"):
        DirectionAwareShrink(data=batches((6,), 1), loss=loss, on_fit_start=True).attach(model)
    assert model[0].weight.grad is before


def test_nothing_to_work_on_is_refused():
    settings = {"data": batches((6,), 1), "loss": loss_of, "on_fit_start": True}
    with pytest.raises(
        ValueError, match=r"needs linear, attention or convolution layers that are trained, but .*LayerNorm"
    ):
        DirectionAwareShrink(**settings).attach(nn.LayerNorm(3))


class Manual(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OfAnIterator(Notes):
    def training_step(self, dataloader_iter):
        raise AssertionError


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
@pytest.mark.parametrize("module", [Manual, OfAnIterator])
def test_a_training_step_that_is_more_than_a_loss_is_refused(module):
    method = DirectionAwareShrink(on_fit_start=True)
    with pytest.raises(ValueError, match=f"The training_step of {module.__name__} must return the loss .* Give loss="):
        fit(method, module=module())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(torch.randn(8, 6), torch.arange(8) % 3))


@pytest.mark.filterwarnings("ignore:::lightning.pytorch")
@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: {"a": loader(), "b": loader()},
        lambda: list(loader()),
    ],
    ids=["stream", "several", "list"],
)
def test_data_without_an_order_of_their_own_must_be_given(data):
    with pytest.raises(ValueError, match=r"must come from one DataLoader .* Give the batches to pass over as data="):
        fit(DirectionAwareShrink(on_fit_start=True), module=Notes(), data=data())


def test_in_float16_the_loss_is_scaled():
    class Precision:
        class scaler:  # noqa: N801
            @staticmethod
            def scale(loss):
                return loss * 1024

        @staticmethod
        def train_step_context():
            return torch.autocast("cpu", enabled=False)

    class Fake:
        precision_plugin = Precision

    module, batch = Notes(), next(iter(loader()))
    module.net[3].p = 0.0
    value = trainers_loss(Fake(), module)(module, batch)
    assert value.item() == pytest.approx(1024 * cross_entropy(module.net(batch[0]), batch[1]).item())


def test_a_parameter_that_the_loss_does_not_depend_on_has_no_direction():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
    before = model["unused"].weight.clone()
    data = [(torch.randn(4, 3), torch.randn(4, 2))]
    method = DirectionAwareShrink(
        0.4,
        0.2,
        data=data,
        loss=lambda model, batch: mse_loss(model["used"](batch[0]), batch[1]),
        every_n_train_steps=1,
    )
    method.attach(model)
    method.step()
    torch.testing.assert_close(model["unused"].weight, 0.2 * before)
