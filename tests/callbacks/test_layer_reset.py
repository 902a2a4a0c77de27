import pytest
import torch
from engine.test_schedule import Model, fit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_plasticity import LayerReset


class OutOfOrder(nn.Module):
    """Defined in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm, self.body = nn.Linear(6, 3), nn.BatchNorm1d(6), nn.Linear(4, 6)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


def reset(
    model: nn.Module, layers: int | str | list[str], **settings: object
) -> tuple[set[str], torch.optim.Optimizer]:
    """Which parameters and buffers a reset has changed after a step of training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    method = LayerReset(layers, every_n_train_steps=2).attach(model, optimizer)
    for _ in range(2):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        method.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}, optimizer


HEAD = {"head.weight", "head.bias"}
BODY = {"body.weight", "body.bias"}
NORM = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, HEAD),
        (2, HEAD | NORM | BODY),
        ("body", BODY),
        (["norm", "head"], HEAD | NORM),
    ],
)
def test_the_layers_chosen_and_no_others_are_reset(layers, expected):
    model = OutOfOrder()
    changed, optimizer = reset(model, layers)
    assert changed == expected
    for name, parameter in model.named_parameters():
        if name in expected:
            assert all(not state.any() for state in optimizer.state[parameter].values() if state.dim())


@pytest.mark.parametrize("is_in_optimizer", [False, True])
def test_last_layers_that_are_not_trained_are_passed_over(is_in_optimizer):
    """The head is frozen, or belongs to no optimizer, and so does a copy that is called after it."""

    class WithTarget(OutOfOrder):
        def __init__(self) -> None:
            super().__init__()
            self.target = OutOfOrder()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.target(x).detach()

    model = WithTarget()
    others = nn.ModuleList([model.head, model.target])
    trained = [*model.body.parameters(), *model.norm.parameters()]
    if is_in_optimizer:
        others.requires_grad_(False)
        trained += others.parameters()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    method = LayerReset(1, every_n_train_steps=1).attach(model, optimizer)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.step()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == BODY | NORM


def test_new_values_come_from_where_the_layer_began():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 60))
    nn.init.normal_(model[3].weight, 2.0, 0.5)
    nn.init.zeros_(model[3].bias)
    reset(model, ["1", "3"])
    assert model[3].weight.mean().item() == pytest.approx(2.0, abs=0.05)
    assert model[3].weight.std().item() == pytest.approx(0.5, abs=0.05)
    assert (model[3].bias == 0).all()
    assert (model[1].weight == 1).all()
    assert (model[1].running_var == 1).all()


@pytest.mark.parametrize("form", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_layer_that_is_reset_begins_as_with_a_new_optimizer(form):
    """To the bit: also its first step is corrected for the moments that start from 0."""

    def make():
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def train(model, optimizer, steps, method=None):
        generator = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).square().sum().backward()
            optimizer.step()
            if method is not None:
                method.step()

    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **form)
    train(model, optimizer, 7, LayerReset(["0", "1", "2"], every_n_train_steps=7).attach(model, optimizer))
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    train(model, optimizer, 5)
    train(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.1, **form), 5)
    torch.testing.assert_close(dict(model.state_dict()), dict(fresh.state_dict()), rtol=0, atol=0)


def test_a_container_and_a_parametrized_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    parametrizations.weight_norm(model[1][2])
    changed, _ = reset(model, "1")
    weight = "parametrizations.weight"
    assert changed == {
        "1.0.weight", "1.0.bias", "1.2.bias", f"1.2.{weight}.original0", f"1.2.{weight}.original1"
    }  # fmt: skip


def test_norms_without_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.LayerNorm(4, elementwise_affine=False))
    changed, _ = reset(model, ["1", "2"])
    assert changed == {"1.running_mean", "1.running_var"}


def test_only_what_the_stepping_optimizer_trains():
    model = OutOfOrder()
    parts = [[*model.body.parameters(), *model.norm.parameters()], list(model.head.parameters())]
    optimizers = [torch.optim.SGD(part, lr=0.0) for part in parts]
    method = LayerReset(["norm", "head"], every_n_train_steps=1).attach(model, optimizers)
    for optimizer, expected in zip(optimizers, (NORM - {"norm.weight", "norm.bias"}, HEAD), strict=True):
        model(torch.randn(8, 4)).sum().backward()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.step()
        method.step()
        assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == expected


class Numbered(Model):
    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).sum()


def test_a_run_that_resumes_at_the_boundary_resets_before_its_first_batch(tmp_path):
    torch.manual_seed(0)
    batches = list(torch.randn(3, 1, 2, 2))

    def model() -> Numbered:
        torch.manual_seed(1)
        made = Numbered()
        made.train_dataloader = lambda: batches
        return made

    whole, first, second = model(), model(), model()
    fit(LayerReset(1, every_n_epochs=2, seed=3), whole, epochs=4)
    used = fit(LayerReset(1, every_n_epochs=2, seed=3), first, epochs=2)
    used.save_checkpoint(tmp_path / "checkpoint")
    fit(LayerReset(1, every_n_epochs=2, seed=3), second, epochs=4, ckpt_path=tmp_path / "checkpoint")
    assert torch.equal(whole.layer.weight, second.layer.weight)
    assert not torch.equal(whole.layer.weight, first.layer.weight)


def test_on_fit_start():
    model = OutOfOrder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    LayerReset("head", on_fit_start=True, init="reset_parameters").attach(model)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == HEAD


def attach(model: nn.Module, layers: int | str | list[str]) -> LayerReset:
    return LayerReset(layers, every_n_train_steps=1).attach(model, example_inputs=(torch.randn(2, 4),))


def test_what_cannot_work_is_refused():
    for layers in (0, -1, "", []):
        with pytest.raises(ValueError, match="layers must be a"):
            LayerReset(layers, every_n_epochs=1)
    with pytest.raises(ValueError, match="on_fit_start=True needs layers by name, got layers=1"):
        LayerReset(1, on_fit_start=True)
    with pytest.raises(ValueError, match=r"there is no 'heads'\. Its children are: head, norm, body, unused"):
        attach(OutOfOrder(), ["body", "heads"])
    with pytest.raises(ValueError, match="as many layers with weights that are trained, but the forward pass calls 2"):
        attach(OutOfOrder(), 3)
    with pytest.raises(ValueError, match="but the forward pass calls none"):
        attach(nn.Sequential(nn.BatchNorm1d(4)), 1)
    with pytest.raises(ValueError, match="layers must name modules with parameters, but there are none in '1'"):
        attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "1")


def test_a_weight_that_is_tied_to_another_layer_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"would also reset '0\.weight', which is one parameter with '2\.weight'"):
        attach(model, "2")
    changed, _ = reset(model, ["0", "2"])
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("layer", ["head", "norm"])
def test_a_frozen_layer_is_refused(layer):
    model = OutOfOrder()
    model.get_submodule(layer).requires_grad_(False)
    with pytest.raises(ValueError, match=f"'{layer}.weight' is frozen"):
        attach(model, layer)
