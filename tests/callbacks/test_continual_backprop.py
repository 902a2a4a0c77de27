import math

import pytest
import torch
from torch import nn

from callbacks.streams import INPUT, convolutional, mlp, train
from callbacks.unit_references import ReferenceContinualBackprop
from lightning_plasticity.callbacks.continual_backprop import ContinualBackprop
from lightning_plasticity.engine.maturity import Maturity
from lightning_plasticity.units.find import HiddenUnits, Slots, find_units


def ramp(tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """New weights without chance: every row counts from -0.3 to 0.3."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(0)
    values = torch.linspace(-0.3, 0.3, rows.shape[1], dtype=tensor.dtype)
    return values.expand_as(rows).reshape(tensor.shape).clone()


def record_choices(method: ContinualBackprop) -> list:
    """What ``method`` replaces from now on: for each replacing step the units by set."""
    history = []
    replace = method._population.replace

    def recording(chosen, *args, **kwargs):
        history.append({i: tuple(units.tolist()) for i, units in chosen.items()})
        replace(chosen, *args, **kwargs)

    method._population.replace = recording
    return history


@pytest.mark.parametrize(("maturity", "steps"), [(0, 1), (1, 2), (5, 6)])
def test_a_replacement_that_is_just_earned_is_made_at_once(maturity, steps):
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = ContinualBackprop(0.25, maturity).attach(model, optimizer, example_inputs=(torch.zeros(1, 2).double(),))
    for step in range(1, steps + 1):
        model(torch.ones(3, 2).double()).sum().backward()
        optimizer.step()
        method.step()
        assert method.replaced == (step == steps)  # once all four units are old enough


def attached(method, build, lr=0.05, optimizer=torch.optim.SGD):
    model = build()
    optimizer = optimizer(model.parameters(), lr=lr)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, *INPUT[build], dtype=torch.float64),))
    return model, optimizer


@pytest.mark.parametrize(
    ("utility", "build", "steps", "compensate"),
    [
        ("contribution", mlp, 2000, True),
        ("contribution", convolutional, 2000, True),
        ("contribution", mlp, 500, False),
        ("contribution", convolutional, 300, False),
        ("adaptable_contribution", mlp, 500, True),
        ("adaptable_contribution", convolutional, 300, True),
        ("zero_contribution", mlp, 500, True),
        ("zero_contribution", convolutional, 300, True),
        ("adaptation", convolutional, 300, True),
        ("weight", convolutional, 300, True),
        ("random", mlp, 500, True),
    ],
)
def test_same_units_at_the_same_steps_as_the_slow_reference(utility, build, steps, compensate):
    settings = {"utility": utility, "init": ramp, "compensate_bias": compensate, "seed": 5}
    method = ContinualBackprop(0.004, 20, 0.95, **settings)
    model, optimizer = attached(method, build)
    choices = record_choices(method)

    def random_utilities(size):
        # the same stream of numbers, drawn beside the method's own
        return torch.rand(size, generator=own.generator("cpu"), dtype=torch.float64).tolist()

    own = type(method.draws)(method.draws._seed)
    twin = build()
    reference = ReferenceContinualBackprop(
        twin, rate=0.004, maturity=20, decay=0.95, utility=utility, compensate=compensate, new_weights=ramp,
        random=random_utilities,
    )  # fmt: skip
    train(model, optimizer, method.step, INPUT[build], steps)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.05), reference.step, INPUT[build], steps)

    expected = [{i: units for i, units in enumerate(chosen) if units} for chosen in reference.history]
    assert [chosen for chosen in expected if chosen] == choices
    assert method.replaced == sum(len(units) for chosen in choices for units in chosen.values()) > 0
    utilities = torch.tensor([u for layer in reference.u for u in layer], dtype=torch.float64)
    torch.testing.assert_close(method._averages["utility"], utilities, rtol=1e-5, atol=1e-9)
    for parameter, slow in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(parameter, slow, rtol=1e-6, atol=1e-8)


def test_new_units_live_at_least_as_long_as_the_threshold_says():
    method = ContinualBackprop(0.05, 30)
    model, optimizer = attached(method, mlp)
    choices = record_choices(method)
    born, seen = {}, 0

    def each_step(step):
        nonlocal seen
        for chosen in choices[seen:]:
            for i, units in chosen.items():
                for unit in units:
                    assert step - born.get((i, unit), -1) > 30
                    born[i, unit] = step
        seen = len(choices)

    train(model, optimizer, method.step, INPUT[mlp], 400, each_step)
    assert len(born) > 15


def test_a_count_below_one_is_neither_lost_nor_rounded_up():
    steps, rate, threshold = 10_000, 3e-5, 100
    method = ContinualBackprop(rate, threshold)
    model = nn.Sequential(nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method.attach(model, optimizer, example_inputs=(torch.zeros(1, 2),))
    x = torch.randn(4, 2)
    model(x).sum().backward()
    for _ in range(steps):
        optimizer.step()
        method.step()
    assert abs(method.replaced - rate * 40 * (steps - threshold)) <= 1


def test_ages_on_the_host_agree_with_a_plain_count():
    maturity, ages = Maturity([20], 7), [0] * 20
    torch.manual_seed(0)
    for _ in range(500):
        assert maturity.advance([0]) == [sum(age + 1 > 7 for age in ages)]
        ages = [age + 1 for age in ages]
        old = [i for i, age in enumerate(ages) if age > 7]
        assert maturity.eligible(0) == len(old)
        count = int(torch.randint(0, min(3, len(old)) + 1, ()))
        for i in old[:count]:
            ages[i] = 0
        maturity.replaced(0, count)


def test_replacing_dead_units_changes_no_output_and_their_outgoing_weights_stay_zero_until_a_gradient():
    method = ContinualBackprop(1.0, 0, utility="contribution")
    model, optimizer = attached(method, mlp, lr=0.0)
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, -1.0
        model[2].weight[4], model[2].bias[4] = 0.0, -1.0
    x = torch.randn(16, 6, dtype=torch.float64)
    before = model(x).detach().clone()
    model(x).sum().backward()
    method._population.replace, replace = lambda *_: None, method._population.replace  # only averages
    optimizer.step()
    method.step()
    chosen = {0: torch.tensor([3]), 1: torch.tensor([4])}
    replace(chosen, method._initial, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(model(x), before)
    assert (model[2].weight[:, 3] == 0).all()
    assert (model[4].weight[:, 4] == 0).all()
    assert model[0].weight[3].abs().min() > 0
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    optimizer.step()  # no gradient: nothing moves
    assert (model[2].weight[:, 3] == 0).all()


def test_compensation_keeps_the_mean_of_what_the_next_layer_gets():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = ContinualBackprop(0.26, 0, decay_rate=0.0).attach(
        model, optimizer, example_inputs=(torch.zeros(1, 6).double(),)
    )
    x = torch.randn(64, 6, dtype=torch.float64)
    before = model(x).mean(0)
    before.sum().backward()
    optimizer.step()
    method.step()  # decay 0: the average is the mean over this very batch
    assert method.replaced == 3
    torch.testing.assert_close(model(x).mean(0), before, rtol=0, atol=1e-12)


def test_where_two_layers_meet_the_zero_wins_and_a_new_units_bias_is_zero():
    method = ContinualBackprop(1.0, 0)
    model, optimizer = attached(method, mlp, lr=0.0)
    model(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    method.step()  # all units of both layers
    assert (model[2].weight == 0).all()
    assert (model[2].bias == 0).all()
    assert (model[4].weight == 0).all()
    assert (model[0].weight != 0).all()


def test_the_state_of_what_was_written_is_initial_and_the_rest_untouched():
    method = ContinualBackprop(0.3, 5)
    model, optimizer = attached(method, mlp, optimizer=torch.optim.Adam, lr=0.01)
    states = {}

    def replace_and_compare(chosen, *args):
        for p in model.parameters():
            states[p] = optimizer.state[p]["exp_avg"].clone()
        replace(chosen, *args)
        rows = [chosen.get(i, torch.empty(0, dtype=torch.long)) for i in (0, 1)]
        for layer, row, columns in ((model[0], rows[0], None), (model[2], rows[1], rows[0]), (model[4], None, rows[1])):
            written = torch.zeros_like(layer.weight, dtype=torch.bool)
            if row is not None:
                written[row] = True
            if columns is not None:
                written[:, columns] = True
            now = optimizer.state[layer.weight]["exp_avg"]
            assert (now[written] == 0).all()
            assert torch.equal(now[~written], states[layer.weight][~written])
        compared.append(chosen)

    compared = []
    replace, method._population.replace = method._population.replace, replace_and_compare
    train(model, optimizer, method.step, INPUT[mlp], 30)
    assert compared


@pytest.mark.parametrize("init", ["empirical", "quantiles", "kaiming_uniform", "reset_parameters"])
def test_new_weights_come_from_the_distribution_asked_for(init):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 400), nn.ReLU(), nn.Linear(400, 2))
    with torch.no_grad():
        model[0].weight.mul_(0.1).add_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = ContinualBackprop(1.0, 0, init=init).attach(model, optimizer, example_inputs=(torch.zeros(1, 200),))
    old = model[0].weight.clone()
    model(torch.randn(2, 200)).sum().backward()
    optimizer.step()
    method.step()
    expected = (
        (old.detach().mean(), old.detach().std())
        if init in ("empirical", "quantiles")
        else (0.0, 1 / math.sqrt(3 * 200))
    )
    assert model[0].weight.detach().mean().item() == pytest.approx(float(expected[0]), abs=0.001)
    assert model[0].weight.detach().std().item() == pytest.approx(float(expected[1]), rel=0.02)


TIMM = {
    "resnet18": (64, ["fc", "conv1", "layer1.0.conv2", "layer2.0.downsample.0", "layer4.1.conv2"]),
    "mobilenetv2_100": (64, ["classifier", "blocks.1.1.conv_pwl"]),
    "vit_tiny_patch16_224": (
        224,
        ["head", "patch_embed.proj", "blocks.0.attn.proj", "blocks.3.mlp.fc2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_heads_and_residual_streams_are_never_touched(name):
    timm = pytest.importorskip("timm", reason="needs timm: pip install lightning-plasticity[vision]")
    size, protected = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(2, 3, size, size)
    method = ContinualBackprop(0.5, 0).attach(model, optimizer, example_inputs=(x[:1],))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        method.step()
    assert method.replaced > 100
    produced = {slots.module for s in method._population.sets for slots in s.units.producers}
    assert not produced & set(protected)
    for layer in protected:
        now, old = model.get_submodule(layer).weight, before[f"{layer}.weight"]
        assert ((now == old) | (now == 0)).all()  # a column may be zeroed, a row is never redrawn
    fed = {slots.module for s in method._population.sets for slots in (*s.units.consumers, *s.units.norms)}
    for parameter, now in model.named_parameters():
        if parameter.rpartition(".")[0] not in produced | fed:
            assert torch.equal(now, before[parameter]), parameter


def test_gates_and_squeeze_and_excite_are_replaced_with_their_units():
    timm = pytest.importorskip("timm", reason="needs timm: pip install lightning-plasticity[vision]")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(2, 3, 64, 64)
    method = ContinualBackprop(1.0, 0).attach(model, optimizer, example_inputs=(x[:1],))
    gated = next(s for s in method._population.sets if any("se.conv_expand" in t.module for t in s.producers))
    before = model.get_submodule(gated.producers[-1].module).weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    method.step()
    assert (model.get_submodule(gated.producers[-1].module).weight != before).all()


def test_units_by_hand_work_like_those_found():
    histories = []
    for by_hand in (False, True):
        model = mlp()
        units = find_units(model, torch.zeros(1, 6).double()) if by_hand else None
        method = ContinualBackprop(0.05, 3, units=units, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        method.attach(model, optimizer, None if by_hand else (torch.zeros(1, 6).double(),))
        histories.append(record_choices(method))
        train(model, optimizer, method.step, INPUT[mlp], 50)
    assert histories[0] == histories[1] != []


def by_hand(producer="0", row=0, column=0, size=1, rows=(0,), readers=("2",)):
    def slots(module, entry, unit):
        return Slots(module, torch.tensor(entry), torch.tensor(unit))

    consumers = tuple(slots(reader, [column + i for i in range(size)], list(range(size))) for reader in readers)
    return HiddenUnits("x", size, (slots(producer, [row + i for i in range(size)], rows),), (), consumers, None, True)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (by_hand(producer="9"), "does not have"),
        (by_hand(row=12), "outputs of '0'"),
        (by_hand(column=12), "inputs of '2'"),
        (by_hand(readers=()), "lacks one"),
        (by_hand(size=2, rows=(0, 0)), "same number of entries"),
    ],
)
def test_units_that_contradict_the_model_are_refused(units, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(units=[units]).attach(model, torch.optim.SGD(model.parameters()), None).step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replacement_rate": -0.1}, "replacement_rate"),
        ({"replacement_rate": 1.1}, "replacement_rate"),
        ({"maturity_threshold": -1}, "maturity_threshold"),
        ({"decay_rate": 1.0}, "decay_rate"),
        ({"utility": "usefulness"}, "utility must be one of"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(**arguments)


def test_a_network_without_hidden_units_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(ValueError, match="explain=True"):
        ContinualBackprop().attach(model, torch.optim.SGD(model.parameters()), (torch.zeros(1, 6),))
    model = mlp()
    with pytest.raises(ValueError, match="excluded"):
        ContinualBackprop(exclude="*").attach(model, torch.optim.SGD(model.parameters()), (torch.zeros(1, 6).double(),))


@pytest.mark.gpu
def test_an_ordinary_step_does_not_wait_for_the_gpu():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 6, device="cuda")
    method = ContinualBackprop(1e-6, 2).attach(model, optimizer, example_inputs=(x[:1],))
    for step in range(8):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            method.step()
        finally:
            torch.cuda.set_sync_debug_mode("default") if step == 7 else None
    assert method.replaced == 0


@pytest.mark.parametrize("utility", ["adaptation", "adaptable_contribution"])
def test_a_unit_without_incoming_weights_has_a_finite_utility(utility):
    method = ContinualBackprop(0.05, 2, utility=utility)
    model, optimizer = attached(method, mlp)
    with torch.no_grad():
        model[0].weight[:3] = 0.0
        model[0].bias[:3] = 0.0
    train(model, optimizer, method.step, INPUT[mlp], 2)
    with torch.no_grad():
        model[0].weight[:3] = 0.0
        model[0].bias[:3] = 0.0
    train(model, optimizer, method.step, INPUT[mlp], 30)
    assert method._averages["utility"].isfinite().all()
    assert method.replaced > 0
