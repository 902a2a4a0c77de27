"""Sets of units, and what kernels are told of the layers that read them."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from lightning_plasticity import ContinualBackprop, find_units
from lightning_plasticity.engine.unit_sets import Table, check_units, reader_shapes, renamed
from lightning_plasticity.units.sets import HiddenUnits, Slots


def test_shapes_of_readers() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, (3, 2), groups=2), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 5 * 6, 2)),
    )
    method = ContinualBackprop().attach(network, example_inputs=(torch.zeros(1, 3, 8, 8),))
    # first unit and column, columns of a unit, groups, outputs and inputs of a group, places, whether inputs come first
    assert reader_shapes(method._population.sets).tolist() == [
        [0, 0, 1, 2, 3, 2, 6, False],
        [4, 4, 1, 1, 5, 6, 4, True],
        [10, 10, 30, 1, 2, 150, 1, False],
    ]


def test_units_of_a_layer_whose_weight_is_computed_are_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    units = find_units(network, torch.zeros(2, 4))
    weight_norm(network[2])
    with pytest.raises(RuntimeError, match=r"needs 2\.weight to be a parameter, but it is computed"):
        check_units(network, units[0])


def test_units_of_a_norm_whose_weight_is_computed_are_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    units = find_units(network, torch.zeros(2, 4))
    register_parametrization(network[1], "weight", nn.Softplus())
    with pytest.raises(RuntimeError, match="parameters of its own, but '1' is parametrized"):
        check_units(network, units[0])


def test_places_of_columns_of_units_that_have_several() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 2, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    method = ContinualBackprop().attach(network, example_inputs=(torch.zeros(1, 1, 2, 3),))
    units, columns = method._population.columns_of({0: torch.tensor([2, 0]), 1: torch.tensor([1])})
    assert units.tolist() == [2, 2, 0, 0, 4]
    assert columns.tolist() == [4, 5, 0, 1, 7]


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (5,), (1, 5), (5, 5)])
def test_what_was_read_of_several_batches_is_in_the_state(sizes: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(network.parameters())
    method = ContinualBackprop().attach(network, optimizer, (torch.zeros(1, 4),))
    batches = [torch.randn(size, 4) for size in sizes]
    for batch in batches:
        network(batch)
    heard = network[:2](torch.cat(batches)).detach()
    sums, rows = method._population.activations.state()
    torch.testing.assert_close(sums / rows, torch.stack([heard.mean(0), heard.abs().mean(0)]))


def by_hand(makes: Sequence[int], uses: Sequence[int], maker: str = "0", user: str = "2") -> HiddenUnits:
    def slots(module: str, entries: Sequence[int]) -> Slots:
        return Slots(module, torch.tensor(entries, dtype=torch.int64), torch.arange(len(entries)))

    return HiddenUnits("x", 2, (slots(maker, makes),), (), (slots(user, uses),), None, exact=True)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(4, 2))


def test_units_by_hand_may_be_any_outputs_and_inputs_that_are_there() -> None:
    model = network()
    layers = check_units(model, by_hand([5, 0], [0, 3]))
    assert {name: view.weight is model.get_submodule(name).weight for name, view in layers.items()} == {
        "0": True,
        "2": True,
    }


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (by_hand([0, 6], [0, 1]), "name outputs of '0' that it does not have: it has 6"),
        (by_hand([-1, 0], [0, 1]), "name outputs of '0' that it does not have: it has 6"),
        (by_hand([0, 1], [0, 4]), "name inputs of '2' that it does not have: it has 4"),
        (by_hand([0, 1], []), "name inputs of '2' that it does not have: it has 4"),
        (by_hand([0, 1], [0, 1], maker="1"), "name '1', which is no linear or convolution layer"),
        (by_hand([0, 1], [0, 1], user="3"), "name a module '3' that Sequential does not have"),
    ],
)
def test_units_by_hand_that_are_not_there_are_refused(units: HiddenUnits, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_units(network(), units)


def test_entries_are_sorted_by_unit_and_every_unit_has_as_many() -> None:
    def table(entries: Sequence[int], units: Sequence[int], size: int) -> Table:
        return Table.of(Slots("a", torch.tensor(entries), torch.tensor(units)), size, torch.device("cpu"), None)

    assert table([7, 8, 5, 6], [1, 0, 1, 0], 2).entries.tolist() == [[8, 6], [7, 5]]
    assert table([7, 8], [1, 0], 2).of_units(torch.tensor([1, 0])).tolist() == [7, 8]
    assert table([1, 0], [1, 0], 2).is_in_order
    assert not table([0, 1], [1, 0], 2).is_in_order
    assert not table([0, 1, 2, 3], [0, 0, 1, 1], 2).is_in_order
    for units, size in (([0, 0, 0, 1], 2), ([0, 0], 2), ([0, 0, 1, 1, 1], 2), ([0, 1], 3), ([1, 2], 2)):
        with pytest.raises(ValueError, match="the same number of entries in 'a', at least one"):
            table([*range(len(units))], units, size)


def test_units_are_named_from_further_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    [units] = find_units(model, torch.zeros(2, 4))
    moved = renamed(units, "net.")
    assert moved.name == "net.0"
    assert [slots.module for slots in (*moved.producers, *moved.norms, *moved.consumers)] == ["net.0", "net.1", "net.3"]
    assert renamed(units, "") is units
