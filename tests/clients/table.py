"""All clients, what each callback does in each of them, and the page that says so.

Run in `tests`, `python -m clients.table` trains each client with each callback and writes `docs/clients.md`.
"""

from __future__ import annotations

import functools
import re
import traceback
from pathlib import Path

import pytest
import torch
from contract.training import difference

import lightning_plasticity

from . import (
    additions,
    adversarial,
    configured,
    detection,
    finetuning,
    reinforcement,
    representation,
    transformers_models,
)
from .harness import CALLBACKS, MONITOR, Client, Run, watched_edits

MODULES = (
    adversarial,
    reinforcement,
    representation,
    finetuning,
    transformers_models,
    detection,
    configured,
    additions,
)
CLIENTS = [client for module in MODULES for client in module.CLIENTS]
TOGETHER = "three together"
COLUMNS = [*CALLBACKS, TOGETHER]
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
PREFERRED = ("ContinualBackprop", "SoftWeightRescaling", "L2Init", "ShrinkAndPerturb", "SelectiveReinit")

BEGINNING = """\
# What the callbacks do in programs of many kinds

Each line is a small program of a kind that people write; they stand in `tests/clients`. Each was trained without and,
twice, with each callback. *acted*: the method changed weights in every part of the model in which it has to, and in
no network that is not trained; all weights stayed finite, both runs ended with the same bits, and no hook was left.
*measured*: the monitor logged finite numbers, and the weights ended with the bits of the plain run. *refused*: a
clear error, given below. *nothing silent*: every unit fired in each of the few steps, and no weight was changed.
*Three together* are the first three of `ContinualBackprop`, `SoftWeightRescaling`, `L2Init`, `ShrinkAndPerturb` and
`SelectiveReinit` that are not refused; in the second run a monitor stands before them, and changes no bit.

Made by `python -m clients.table` in the folder `tests`; the tests hold each cell to what they find.

"""


@functools.cache
def plain(client: Client) -> Run:
    return client.run()


def three(client: Client) -> list[str]:
    return [name for name in PREFERRED if name not in client.refused][:3]


def outcome(client: Client, column: str) -> str:
    """What becomes of the program with these callbacks; fails where something is wrong."""
    if column == TOGETHER:
        return acts(client, *three(client))
    if column in client.refused:
        return refuses(client, column)
    return measures(client) if column == MONITOR else acts(client, column)


def acts(client: Client, *names: str) -> str:
    with watched_edits() as written:
        run = client.run(*names)
    observed = len(names) > 1 and MONITOR not in client.refused
    again = client.run(*[MONITOR] * observed, *names)
    check_run(client, run, again)
    if names == ("SelfNormalizedReset",) and not written:
        assert difference(plain(client).weights, run.weights) is None, "it changed weights without the editor"
        return "nothing silent"
    assert difference(plain(client).weights, run.weights) is not None, "the weights are those of the run without it"
    found, expected = client.parts_of(written), set().union(*map(client.parts_for, names))
    if names in (("OptimizerReset",), ("SelfNormalizedReset",)):  # to no weight, and only where units were silent
        expected = set()
    elif names == ("LayerReset",):  # the last layer belongs to one of the parts
        assert found, "it wrote nothing"
        expected = found & expected
    assert expected <= found <= {*client.parts}, f"it has to write to {expected}, and wrote to {found}"
    return "acted"


def measures(client: Client) -> str:
    run = client.run(MONITOR)
    check_run(client, run, plain(client))
    numbers = {name: value for name, value in run.logged.items() if name.startswith("plasticity/")}
    has_units = {*client.parts} > {*client.without_units}
    expected = {"plasticity/WeightMagnitude", *["plasticity/EffectiveRank"] * has_units}
    assert expected <= numbers.keys(), f"it logged {[*numbers]}"
    assert all(torch.tensor(value).isfinite() for value in numbers.values()), f"it logged {numbers}"
    return "measured"


def check_run(client: Client, run: Run, again: Run) -> None:
    assert all(value.isfinite().all() for value in run.weights.values()), "a weight is not finite"
    found = difference(run.weights, again.weights)
    assert found is None, f"two runs differ: {found}"
    assert run.hooks == again.hooks == plain(client).hooks, "hooks are left"


def refuses(client: Client, name: str) -> str:
    refusal = client.refused[name]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(refusal.message)) as caught:
        client.run(name)
    raised_in = Path(traceback.extract_tb(caught.tb)[-1].filename)
    assert Path(lightning_plasticity.__file__).parent in raised_in.parents, f"the error is raised in {raised_in}"
    return "refused"


def page(outcomes: dict[tuple[str, str], str]) -> str:
    """The page that says what became of each client with each callback."""
    lines = [
        f"| program | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {c.name} | {' | '.join(outcomes[c.name, column] for column in COLUMNS)} |" for c in CLIENTS),
    ]
    refusals = [(c.name, name, refusal) for c in CLIENTS for name, refusal in c.refused.items()]
    lines += ["", "## What is left alone", "", "Parts in which no hidden units can be shown:", ""]
    lines += [f"- {c.name}: {in_code(c.without_units)}" for c in CLIENTS if c.without_units]
    lines += ["", "Parts that one method leaves alone:", ""]
    lines += [f"- {c.name}, {name}: {in_code(parts)}" for c in CLIENTS for name, parts in c.leaves.items()]
    lines += ["", "`LayerReset` works on one part, that of the last layer, `OptimizerReset` on no weights,"]
    lines += ["and `SelfNormalizedReset` on parts where units were silent."]
    lines += ["", "## Where a callback refuses", ""]
    lines += [f'- {client}, {name}: "… {r.message} …". {r.reason}' for client, name, r in refusals]
    return BEGINNING + "\n".join(lines) + "\n"


def in_code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def cells() -> dict[tuple[str, str], str]:
    """What the page says of each client and each callback."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    names = [name.strip() for name in rows[0]]
    return {
        (row[0].strip(), name): cell.strip() for row in rows[1:] for name, cell in zip(names[1:], row[1:], strict=True)
    }


if __name__ == "__main__":
    PAGE.write_text(page({(c.name, column): outcome(c, column) for c in CLIENTS for column in COLUMNS}))
