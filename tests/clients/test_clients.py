"""Each program with each callback, and with three together, does what the page says of it."""

import pytest

from lightning_plasticity import callbacks

from .harness import CALLBACKS, Client
from .table import CLIENTS, COLUMNS, PAGE, cells, outcome, page, plain


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_program_with_a_callback(client: Client, column: str) -> None:
    for package in client.needs:
        pytest.importorskip(package, reason=f"{package} comes with the extra `dev`")
    assert outcome(client, column) == cells()[client.name, column]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_program_by_itself_is_repeatable(client: Client) -> None:
    for package in client.needs:
        pytest.importorskip(package, reason=f"{package} comes with the extra `dev`")
    first, again = plain(client).weights, client.run().weights
    assert all(first[name].equal(again[name]) for name in first)


def test_every_callback_is_tried() -> None:
    assert {*CALLBACKS} == {*callbacks.__all__}


def test_the_page_is_whole() -> None:
    assert PAGE.read_text() == page(cells())
