"""Proofs in turn: what they tell of each set of units is what a run for that set alone tells."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.units.find import _every_second, find_units
from lightning_plasticity.units.runs import Escape
from lightning_plasticity.units.wiring import Wiring, codewords
from units.property_check import invalid
from units.test_find import NETWORKS, randomised
from units.test_runs import Function, wiring_of


def alone(wiring: Wiring, sets: list[Tensor]) -> list[Escape | None]:
    return [wiring.prover.escape(members).escape for members in sets]


def compare(model: nn.Module, *inputs) -> tuple[list[Escape], int]:
    """Where half of the units of each layer escape to; in how many runs that is told of those that do."""
    wiring = wiring_of(model, *inputs)
    nobody = torch.zeros(wiring.count, dtype=torch.bool)
    sets = [nobody, *(_every_second(wiring, layer) for layer in wiring.layers)]
    expected = alone(wiring, sets)
    assert wiring.prover.escapes_in_turn(sets) == expected
    escaping = [(members, escape) for members, escape in zip(sets, expected, strict=True) if escape is not None]
    before = wiring.network.runs
    assert wiring.prover.escapes_in_turn([members for members, _ in escaping]) == [escape for _, escape in escaping]
    return [escape for _, escape in escaping], wiring.network.runs - before


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_told_in_turn_is_what_is_told_alone(name: str) -> None:
    torch.manual_seed(0)
    build, inputs, _ = NETWORKS[name]
    compare(randomised(build()), *inputs)


# ---- streams


def stream(join, blocks: int = 4) -> nn.Module:
    """Blocks of which each adds to a stream by ``join``; what the stream was is kept to the end."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x, kept = self.stem(x), []
        for block in self.blocks:
            kept.append(x)
            x = join(x, block(x))
        return self.head(x + 0.0 * kept[-1])

    torch.manual_seed(0)
    blocks_ = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(blocks)
    )
    return Function(forward, stem=nn.Linear(6, 6), blocks=blocks_, head=nn.Linear(6, 2))


def expanded(x: Tensor, y: Tensor) -> Tensor:
    """The stream as a tensor that cannot be written to: its tokens are one."""
    return (x + y).mean(0, keepdim=True).expand(x.shape)


JOINS = {
    "a sum": torch.add,
    "a sum in place": lambda x, y: x.add_(y),
    "a sum in place of a view": lambda x, y: x.t().add_(y.t()).t(),
    "a sum by out=": lambda x, y: torch.add(x, y, out=x.new_empty(x.shape)),
    "expanded": expanded,
}


@pytest.mark.parametrize("blocks", [2, 9])
@pytest.mark.parametrize("name", JOINS)
def test_all_that_meet_on_a_stream_share_a_few_runs(name: str, blocks: int) -> None:
    join = JOINS[name]
    found, runs = compare(stream(join, blocks), torch.randn(3, 6))
    at = [escape.at.name for escape in found if escape.at is not None]
    # the first block reads the stem's units alone; who adds to the stream comes to the next block, or to the head
    assert at == ["blocks.1.1", *(f"blocks.{index}.1" for index in range(1, blocks)), "head"]
    assert runs == (len(found) if join is expanded else 2)  # block 0 adds while the stem's units are still on their way


def test_what_the_network_had_before_is_never_written_to() -> None:
    """It keeps views of its own table with NaN in it."""
    table, views = torch.full((2, 6), math.nan), []

    def join(x: Tensor, y: Tensor) -> Tensor:
        views.append(table[0])
        return x + y + torch.where(views[-1].isnan(), 0.0, views[-1])

    compare(stream(join), torch.randn(3, 6))
    assert bool(table.isnan().all())


# ---- other escapes than to a layer


def test_the_next_has_its_turn_after_products_scores_and_softmaxes() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for part in self.parts:
            query, key, value, gate = (part[name](x) for name in ("query", "key", "value", "gate"))
            x = nn.functional.scaled_dot_product_attention(query, key, value)
            outer = part["left"](x).unsqueeze(-1) * part["right"](x).unsqueeze(-2)
            x = part["out"](x * gate.softmax(-1) + outer.sum(-1))
        return x

    torch.manual_seed(0)
    names = ("query", "key", "value", "gate", "left", "right", "out")
    parts = nn.ModuleList(nn.ModuleDict({name: nn.Linear(6, 6) for name in names}) for _ in range(3))
    found, runs = compare(Function(forward, parts=parts), torch.randn(1, 5, 6))
    kinds = {"the scores of attention, which mix them", "a softmax, which mixes them", "a product with other units"}
    assert kinds < {escape.where for escape in found}
    assert runs == 4, (runs, [escape.where for escape in found])


def test_a_decision_or_a_refusal_ends_the_run_and_the_others_are_told_in_the_next() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x if bool((x > 0).any()) else -x
        x = self.second(x)
        if checks and math.isnan(x.numpy().sum()):
            raise ValueError("not a number")
        return self.fourth(self.third(x) + x)

    torch.manual_seed(0)
    checks: list[bool] = []
    parts = {name: nn.Linear(6, 6) for name in ("first", "second", "third", "fourth")}
    wiring = wiring_of(Function(forward, **parts), torch.randn(3, 6))
    sets = [_every_second(wiring, layer) for layer in wiring.layers]
    checks.append(True)
    found = wiring.prover.escapes_in_turn(sets)
    assert found == alone(wiring, sets)
    assert [escape.where for escape in found] == [
        "a decision (gt)",
        "a check of their values, which raises ValueError: not a number",
        "the inputs of 'fourth'",
        "the network's output",
    ]


def linears(*names: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Linear(6, 6) for name in names}


def test_a_decision_that_nan_takes_sends_no_other_units_another_way() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.first(x)
        usual = bool((x > -math.inf).all())
        y = self.second(x)
        return self.third(y + x) if usual else self.fourth(y + x)

    wiring = wiring_of(Function(forward, **linears("first", "second", "third", "fourth")), torch.randn(3, 6))
    sets = [_every_second(wiring, layer) for layer in wiring.layers]
    found = wiring.prover.escapes_in_turn(sets)
    assert found == alone(wiring, sets)
    assert found[1].at.name == "third"


def mixed(x: Tensor) -> Tensor:
    """No channel is of one unit any more."""
    return x + x.flip(-1)


def test_a_layer_that_is_called_again_after_its_escape_has_no_second_turn() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.first(mixed(self.third(mixed(self.second(mixed(self.first(x)))))))

    found, runs = compare(Function(forward, **linears("first", "second", "third")), torch.randn(3, 6))
    assert [escape.at and escape.at.name for escape in found] == ["second", "third", "first"]
    assert runs == 1


def test_a_layer_that_is_called_again_after_its_escape_is_not_marked() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.first(x)
        again = self.first(self.second(mixed(x)))
        last = self.last(x)
        return self.third(mixed(again)).sum(-1) + last.sum(-1)

    wiring = wiring_of(Function(forward, **linears("first", "second", "third", "last")), torch.randn(3, 6))
    sets = [_every_second(wiring, layer) for layer in wiring.layers if layer.name in ("first", "last")]
    found = wiring.prover.escapes_in_turn(sets)
    assert found == alone(wiring, sets)
    assert [escape.at and escape.at.name for escape in found] == ["second", None]


def test_a_set_of_units_of_several_layers_begins_at_the_first_of_them() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.second(mixed(self.first(x)))
        return self.last(mixed(self.fourth(mixed(self.third(x)))))

    wiring = wiring_of(Function(forward, **linears("first", "second", "third", "fourth", "last")), torch.randn(3, 6))
    numbers = {layer.name: layer.numbers for layer in wiring.layers}
    sets = [torch.zeros(wiring.count, dtype=torch.bool) for _ in range(2)]
    sets[0][torch.cat([numbers["first"], numbers["third"][::2]])] = True
    sets[1][torch.cat([numbers["third"][1::2], numbers["last"]])] = True
    before = wiring.network.runs
    found = wiring.prover.escapes_in_turn(sets)
    assert wiring.network.runs == before + 1
    assert found == alone(wiring, sets)
    assert [escape.at.name for escape in found] == ["second", "fourth"]


def test_products_after_an_escape_at_a_gate_are_of_numbers() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate = self.first(x) + self.second(x)
        product = self.value(x) * gate
        return self.third(x).sum(-1) + self.fourth(product).sum(-1)

    compare(Function(forward, **linears("first", "second", "value", "third", "fourth")), torch.randn(3, 6))


def test_what_modules_of_several_layers_give_is_cleaned_too() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        left = self.left(mixed(y))  # where the units of the recurrent network escape
        return left.sum(-1) + self.right(mixed(y)).sum(-1)

    torch.manual_seed(0)
    parts = {"rnn": nn.RNN(6, 6, batch_first=True), **linears("left", "right")}
    found, _ = compare(Function(forward, **parts), torch.randn(2, 3, 6))
    assert "the network's output" in {escape.where for escape in found}


def test_the_networks_own_error_is_raised() -> None:
    calls = []

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > limit[0]:
            raise RuntimeError("tired")
        return self.second(x + self.first(x))

    limit = [math.inf]
    wiring = wiring_of(Function(forward, first=nn.Linear(6, 6), second=nn.Linear(6, 2)), torch.randn(3, 6))
    limit[0] = len(calls)
    with pytest.raises(RuntimeError, match="tired"):
        wiring.prover.escapes_in_turn([_every_second(wiring, layer) for layer in wiring.layers])


# ---- norms without entries


class HeadNorm(nn.Module):
    """The norm of each head's values, without entries of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


def heads(blocks: int, shared: bool = False) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for part in self.parts:
            y = part["value"](x).view(*x.shape[:-1], 2, 4)
            x = x + part["out"](part["head_norm"](y).flatten(-2))
            x = x + part["down"](part["up"](x).relu())
        return self.head(x)

    torch.manual_seed(0)
    sizes, norm = {"value": (6, 8), "out": (8, 6), "up": (6, 9), "down": (9, 6)}, HeadNorm()
    parts = nn.ModuleList(
        nn.ModuleDict(
            {name: nn.Linear(*size) for name, size in sizes.items()} | {"head_norm": norm if shared else HeadNorm()}
        )
        for _ in range(blocks)
    )
    return Function(forward, parts=parts, head=nn.Linear(6, 2))


@pytest.mark.parametrize("shared", [False, True])
def test_units_before_norms_without_entries_share_a_run_where_they_cannot_meet(shared: bool) -> None:
    runs = {}
    for blocks in (2, 9):
        wiring = wiring_of(heads(blocks, shared), torch.randn(3, 6))
        exact = {group.layer.name: group.exact for group in wiring.proven}
        assert exact == {f"parts.{index}.{name}": name == "up" for index in range(blocks) for name in ("value", "up")}
        runs[blocks] = wiring.network.runs - int(codewords(wiring.count).max()).bit_length()
    assert runs[9] - runs[2] == (
        14 if shared else 0
    )  # a proof and a look at the norms for each that meets others there
    x = torch.randn(3, 6)
    assert invalid(heads(2, shared), (x,), find_units(heads(2, shared), x)) == []
