"""The units of a network that is shared out among ranks are those of the whole one, and it trains on as before."""

from typing import Any

import pytest
import torch
from contract.shared_out import BOTH, FSDP_4, HSDP, NETS, Net, Way, batch
from contract.training import hooks
from ranks import on_ranks
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_plasticity.shards.tensors import whole
from lightning_plasticity.units import together
from lightning_plasticity.units.find import find_units

WAYS = [FSDP_4, HSDP, BOTH, Way(1, 4)]


class Attention(nn.Module):
    """Parts whose parameters are used without being called, a gate, tied weights, and a norm that mixes units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.view(-1, 4, 4)) * self.scale
        x = x + self.attention(x, x, x)[0]
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        x = nn.functional.linear(x, self.embed.weight.T)
        return self.second(self.norm(self.first(nn.functional.pad(x, (0, 4))))).mean(1)


COLUMNS, ROWS = NETS["MLP"].plan["3"], NETS["MLP"].plan["5"]
FOUND = NETS | {"Attention": Net(Attention, {"up": COLUMNS, "gate": COLUMNS, "down": ROWS})}


def plain(found: list[Any]) -> list[Any]:
    """Sets of units as what can be compared."""

    def slots(part: Any) -> list[Any]:
        return [(s.module, s.entry.tolist(), s.unit.tolist()) for s in part]

    return [
        (u.name, u.size, u.activation, u.exact, slots(u.producers), slots(u.norms), slots(u.consumers)) for u in found
    ]


def steps(model: nn.Module, rank: int, way: Way) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x, y = batch(step, rank // way.tensors)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return [whole(tensor).detach() for tensor in (*model.parameters(), *model.buffers())]


def look(rank: int) -> dict[Any, Any]:
    seen = {}
    for way in WAYS:
        for name, net in FOUND.items():
            model = way.share_out(net)
            before = hooks(model), torch.get_rng_state()
            x, _ = batch(7, rank)
            found = plain(find_units(model, x[: 1 + rank % 2]))  # other examples, and other numbers of them
            assert hooks(model) == before[0]
            assert torch.equal(torch.get_rng_state(), before[1])
            trained = steps(model, rank, way) if name != "Attention" else None
            without = steps(way.share_out(net), rank, way) if name != "Attention" else None
            seen[str(way), name] = found, trained, without
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_ranks(4, look, tmp_path_factory.mktemp("ranks"))


def test_all_ranks_find_what_one_finds(ranks: Any) -> None:
    alone = {name: plain(find_units(net.seeded(), batch(7, 0)[0][:1])) for name, net in FOUND.items()}
    assert all(alone.values())
    for rank in ranks:
        for (way, name), (found, trained, without) in rank.items():
            assert found == alone[name], (way, name)
            assert trained is None or all(map(torch.equal, trained, without)), (way, name)


def test_an_example_travels_by_the_device_of_the_parameters_and_lies_where_it_lay(monkeypatch) -> None:
    """Of the other rank nothing is needed but its message, which a stand-in for the broadcast brings."""
    sent = []

    def broadcast(message: list[Any], src: int, device: torch.device | None) -> None:
        sent.append((message[0], src, device))
        values = together._Packed(torch.ones(2), "meta")
        message[0] = {"here": together._Packed(torch.ones(3), "cpu"), "there": values, "rate": 2.0}

    monkeypatch.setattr(together, "is_shared_out", lambda _: True)
    monkeypatch.setattr(together.dist, "broadcast_object_list", broadcast)
    own = {"here": torch.zeros(3), "there": torch.zeros(2), "rate": 1.0}
    for device, by in (("meta", torch.device("meta")), ("cpu", None)):
        got = together.example_of_all(nn.Linear(2, 2, device=device), own)
        assert got["here"].tolist() == [1.0] * 3
        assert (got["there"].is_meta, got["here"].is_cpu, got["rate"]) == (True, True, 2.0)
        packed, source, through = sent[-1]
        assert (packed["here"].kind, packed["here"].values.tolist(), packed["rate"]) == ("cpu", [0.0] * 3, 1.0)
        assert (source, through) == (0, by)
