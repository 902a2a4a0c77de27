"""Parts of a model are examined when training first calls them: once for all listeners, and equal on all ranks."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract.training import assert_same, hooks, layers, weights
from torch import Tensor, nn

from lightning_plasticity import ContinualBackprop, LayerReset, SoftWeightRescaling
from lightning_plasticity.engine import examination as examinations
from lightning_plasticity.engine import forward
from lightning_plasticity.engine.examination import Examination, Part, is_inside
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.examining import undisturbed

X = torch.ones(4, 6)


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        self.parts.append(part.name if call is None else f"{part.name} in a call")

    def forget_parts(self) -> None:
        self.parts.clear()


def run(call: ForwardCall) -> str:
    """A question: runs the module, and answers its name."""
    with undisturbed(call.module), torch.no_grad():
        call.module.eval()(*call.args, **call.kwargs)
    return call.prefix


def examined(model: nn.Module) -> tuple[Examination, Notes]:
    examination, notes = Examination.of(model, model, "", run), Notes()
    examination.join(notes)
    return examination, notes


class Parts(nn.Module):
    """Two networks; `forward` calls the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers(), layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_a_part_is_what_is_called_and_all_that_it_calls() -> None:
    model = Parts()
    examination, notes = examined(model)
    model.eval()(X)  # no training
    model.train()(X)
    model(X)
    assert notes.parts == [" in a call"]
    assert examination.waiting() == ["second.first", "second.second", "second.head"]
    model.second[0](X)
    assert notes.parts == [" in a call", "second.first in a call"]
    model.second(X)  # a part of it is known: what is left is examined layer by layer
    assert set(notes.parts[2:]) == {f"second.{name} in a call" for name in ("norm", "second", "head")}
    assert examination.waiting() == []
    examination.leave(notes)
    assert hooks(model) == 0


def test_what_cannot_be_examined_as_a_whole_is_examined_in_its_parts() -> None:
    class Checks(Parts):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise ZeroDivisionError
            return self.second(self.first(x))

    model = Checks()
    examination, notes = examined(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X)  # the second takes six numbers, the first gives three: the user's own error stays the user's
    assert list(examination.failed) == ["", "second", "second.first"]
    assert notes.parts == ["first in a call"]
    examination.leave(notes)
    assert hooks(model) == 0


def test_listeners_share_what_is_known_until_the_last_one_leaves() -> None:
    model = Parts()
    examination, first = examined(model)
    model(X)
    same, second = examined(model)
    assert same is examination
    assert second.parts == [""]  # from before
    examination.leave(first)
    model.second(X)
    assert (first.parts, second.parts) == ([" in a call"], ["", "second in a call"])
    examination.leave(second)
    assert not examination.parts
    assert hooks(model) == 0


def test_a_frozen_part_waits_until_it_is_trained() -> None:
    model = Parts()
    model.second.requires_grad_(False)
    examination, notes = examined(model)
    model.second(X)
    assert notes.parts == []
    model.second.requires_grad_(True)
    model.second(X)
    assert notes.parts == ["second in a call"]
    examination.leave(notes)


def test_compiled_code_waits_for_the_first_step_and_then_runs() -> None:
    gc.collect()
    for reason in list(forward._reasons_to_run_eagerly):  # of what other tests have left attached, and still hold
        forward._forget_reason(reason)
    model = Parts()
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    model.first.compile(backend=backend, fullgraph=True)
    examination, notes = examined(model)
    other, others = Examination.of(model, model.second, "second", run), Notes()
    other.join(others)
    model(X)
    examination.settle()
    model(X)
    assert not compiled  # the other one still waits
    other.leave(others)
    examination.leave(notes)
    torch.compiler.reset()
    model(X)
    assert len(compiled) == 1


def test_it_is_over_when_all_has_been_called_and_agreed_on() -> None:
    model = Parts()
    examination, notes = examined(model)
    assert not examination.is_over(0)
    model(X)
    examination.settle()
    assert not examination.is_over(1), "the second waits"
    model.second(X)
    assert not examination.is_over(1), "it is not agreed on"
    assert not examination.is_over(2)
    examination.settle()
    assert examination.is_over(2)
    assert not examination.is_over(1), "the method has not begun with it"
    examination.leave(notes)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


def test_a_layer_that_attention_uses_without_calling_it_belongs_to_its_call() -> None:
    model = Attends()
    examination, notes = examined(model)
    model(X)
    assert notes.parts == [" in a call"]
    assert examination.waiting() == []
    assert hooks(model) == 0
    examination.leave(notes)
    examination, notes = examined(model.attention)
    model.attention(X, X, X)
    assert notes.parts == [" in a call"]
    assert hooks(model) == 0
    examination.leave(notes)


def test_a_part_is_examined_with_the_arguments_that_it_is_called_with() -> None:
    model, seen = layers(), []
    model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))

    def question(call: ForwardCall) -> str:
        seen.append((call.args[0], call.module))
        return run(call)

    examination, notes = Examination.of(model, model, "", question), Notes()
    examination.join(notes)
    model(X)
    [(x, module)] = seen
    assert torch.equal(x, X), "the model's own hook follows"
    assert module is model
    examination.leave(notes)


def test_an_example_is_asked_of_once_and_nothing_waits_for_a_call_any_more() -> None:
    model, asked = Parts(), []

    def question(call: ForwardCall) -> str:
        asked.append(call.prefix)
        return run(call)

    examination, notes = Examination.of(model, model.first, "first", question), Notes()
    examination.join(notes)
    assert id(examination) in forward._reasons_to_run_eagerly
    examination.examine_example([X], {})
    examination.examine_example([X], {})
    assert asked == ["first."]
    assert id(examination) not in forward._reasons_to_run_eagerly
    assert examination.waiting() == []
    examination.leave(notes)
    assert hooks(model) == 0


def test_an_examination_that_pauses_waits_for_no_call() -> None:
    model = Parts()
    examination, notes = examined(model)
    examination.pause()
    assert hooks(model) == 0
    assert id(examination) not in forward._reasons_to_run_eagerly
    model(X)
    assert notes.parts == []
    examination.leave(notes)


def test_a_frozen_layer_is_not_said_to_wait() -> None:
    model = Parts()
    model.second.requires_grad_(False)
    model.first.first.bias.requires_grad_(False)
    examination, notes = examined(model)
    assert examination.waiting() == ["first.first", "first.second", "first.head"]
    examination.leave(notes)


@pytest.mark.parametrize(
    ("name", "whole", "inside"),
    [
        ("net", "", True),
        ("", "", True),
        ("net", "net", True),
        ("net.first", "net", True),
        ("network", "net", False),
        ("net", "net.first", False),
        ("", "net", False),
    ],
)
def test_a_module_is_inside_another_by_its_name(name: str, whole: str, inside: bool) -> None:
    assert is_inside(name, whole) == inside


class OtherRanks:
    """What ranks send each other, and what the others answer."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: list[int] = []
        self.largest = 0  # that others have
        self.seen: list[list[Part]] | None = None  # by each rank; None where all have seen the same
        patch.setattr(examinations, "world_size", lambda: 2)
        patch.setattr(examinations, "largest_over_ranks", self.hear)
        patch.setattr(examinations, "all_ranks_have", lambda value, device: self.seen is None)
        patch.setattr(examinations, "gather_objects", lambda value: self.seen)

    def hear(self, number: int, device: torch.device) -> int:
        self.sent.append(number)
        largest, self.largest = max(number, self.largest), 0
        return largest


def test_ranks_ask_each_other_as_long_as_a_module_waits_and_then_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, others = Parts(), OtherRanks(monkeypatch)
    examination, notes = examined(model)
    examination.settle()
    assert others.sent == [1]
    model(X)
    examination.settle()
    examination.settle()
    assert others.sent == [1, 2, 1, 1]
    assert not examination.is_settled
    model.second(X)
    examination.settle()
    assert others.sent[4:] == [2, 0]
    examination.settle()
    assert len(others.sent) == 6
    assert examination.is_over(2)
    assert [part.name for part in examination.parts] == ["", "second"]
    assert notes.parts == [" in a call", "second in a call"]
    examination.leave(notes)


def test_a_rank_waits_for_what_is_left_of_a_part_that_the_first_rank_has_seen_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, others = Parts(), OtherRanks(monkeypatch)
    examination, notes = examined(model)
    model.second(X)
    model.first(X)
    piece = Part("second.first", None, frozenset({"second.first"}))
    others.seen = [[piece], list(examination._new)]
    examination.settle()
    assert [part.name for part in examination.parts] == ["second.first", "first"]
    assert notes.parts == ["second.first", "first"]
    assert examination.waiting() == ["second.second", "second.head"]
    model.second(X)
    assert set(notes.parts[2:]) == {f"second.{name} in a call" for name in ("norm", "second", "head")}
    examination.leave(notes)
    assert hooks(model) == 0


def test_a_rank_hears_of_a_part_that_only_another_one_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, others = Parts(), OtherRanks(monkeypatch)
    examination, notes = examined(model)
    names = ("second", *(f"second.{name}" for name, _ in model.second.named_children()))
    others.seen, others.largest = [[], [Part("second", None, frozenset(names))]], 2
    examination.settle()
    assert notes.parts == ["second"]
    assert examination.waiting() == ["first.first", "first.second", "first.head"]
    model.second(X)
    assert notes.parts == ["second"]
    examination.leave(notes)


def test_a_line_says_what_is_worked_on_and_what_waits(caplog: pytest.LogCaptureFixture) -> None:
    model = Parts()
    with caplog.at_level(logging.INFO):
        method = ContinualBackprop(0.1, 2).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), (X,))
        model(X).sum().backward()
        model.second(X).sum().backward()
        method.optimizers[0].step()
    method.detach()
    first, then = (record.getMessage() for record in caplog.records if "works on" in record.getMessage())
    assert first == (
        "ContinualBackprop works on 24 units of 2 layers (of 6). Left out: 'first.head'; find_units(model, example, "
        "explain=True) says why. Not called yet, and taken in when training calls it: 'second.first', 'second.second', "
        "'second.head'."
    )
    assert then.startswith(
        "ContinualBackprop works on 48 units of 4 layers (of 6). Left out: 'first.head', 'second.head';"
    )


# ---- ranks that see other parts, or see them in another order


METHODS: dict[str, Callable[[], Any]] = {
    "ContinualBackprop": lambda: ContinualBackprop(0.1, 2),
    "SoftWeightRescaling": lambda: SoftWeightRescaling(0.1),
    "LayerReset": lambda: LayerReset(1, every_n_train_steps=4),
}


class Branches(nn.Module):
    """Three branches: each rank takes those that it is told, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = layers(), layers(), layers()

    def branch(self, names: str, x: Tensor) -> Tensor:
        return torch.stack([getattr(self, name)(x) for name in names]).sum(0)


PATHS = [["ab", "ab", "abc", "abc"], ["ba", "b", "b", "abc"]]  # by rank and step; the last one again and again


def train_on_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for name, make in METHODS.items():
        torch.manual_seed(0)
        model = Branches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = make().attach(model, optimizer)
        generator = torch.Generator().manual_seed(rank)
        for step in range(12):
            x = torch.randn(8, 6, generator=generator)
            optimizer.zero_grad()
            model.branch(PATHS[rank][min(step, 3)], x).square().mean().backward()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
            optimizer.step()
            method.step()
        results[name] = weights(model), method.state_dict()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ranks_agree_on_parts(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train_on_rank, args=(port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in METHODS:
        of_first, of_second = (
            {key: tensor for key, tensor in rank[name][0].items() if "running" not in key and "tracked" not in key}
            for rank in (first, second)
        )
        assert_same(of_first, of_second)
        assert_same(first[name][1], second[name][1])
    assert set(first["ContinualBackprop"][1]["method"]["sets"]) == {
        f"{x}.{y}" for x in "abc" for y in ("first", "second")
    }
