"""The first updates of renewed entries, beside a slow Adam that counts the steps of each entry."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_plasticity.editing.edits import Editor
from lightning_plasticity.editing.entry_ages import _STEP_SIZES, _step_sizes

LR, BETAS = 0.01, (0.9, 0.999)
EPS = 1e-15  # which new entries that are reset feel more than fresh ones, as a test of its own says
FORMS: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, {"fused": True}]


class AdamOfEachEntry:
    """Adam, entry by entry: each has moments and a count of its own, and starts again by itself."""

    def __init__(self, size: int) -> None:
        self.first, self.second, self.steps = [0.0] * size, [0.0] * size, [0] * size

    def renew(self, entry: int) -> None:
        self.first[entry] = self.second[entry] = 0.0
        self.steps[entry] = 0

    def updates(self, gradients: list[float]) -> list[float]:
        found = []
        for i, gradient in enumerate(gradients):
            self.steps[i] += 1
            self.first[i] = BETAS[0] * self.first[i] + (1 - BETAS[0]) * gradient
            self.second[i] = BETAS[1] * self.second[i] + (1 - BETAS[1]) * gradient**2
            mean = self.first[i] / (1 - BETAS[0] ** self.steps[i])
            size = math.sqrt(self.second[i] / (1 - BETAS[1] ** self.steps[i]))
            found.append(LR * mean / (size + EPS))
        return found


def updates_after_a_renewal(
    mode: Any, gradient_of_new: Callable[[int], float], form: dict[str, Any], steps: int = 300
) -> tuple[torch.Tensor, torch.Tensor]:
    """How entry 0 of 40 moves in each step after it was renewed, in learning rates: ours, and the slow Adam's."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(8, 5, dtype=torch.float64))
    optimizer, slow = torch.optim.Adam([weight], lr=LR, betas=BETAS, eps=EPS, **form), AdamOfEachEntry(40)
    ours, theirs = [], []
    for step in range(3000 + steps):
        gradient = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        if step == 3000:
            mask = torch.zeros(8, 5, dtype=torch.bool)
            mask[0, 0] = True
            Editor(nn.Identity(), [optimizer], mode).write_masked(weight, mask, torch.tensor(0.5))
            slow.renew(0)
        if step >= 3000:
            gradient[0, 0] = gradient_of_new(step - 2999)
        weight.grad, before = gradient, weight.detach().clone()
        optimizer.step()
        expected = torch.tensor(slow.updates(gradient.flatten().tolist()), dtype=torch.float64)
        moved = (before - weight.detach()).flatten()
        torch.testing.assert_close(moved[1:], expected[1:], rtol=1e-6, atol=1e-9)  # the others go on as before
        if step >= 3000:
            ours.append(moved[0].item() / LR)
            theirs.append(expected[0].item() / LR)
    return torch.tensor(ours), torch.tensor(theirs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_survivors_move_a_new_entry_by_no_more_than_a_fresh_adam_would(form: dict[str, Any]) -> None:
    """Wherever the new entry's gradients are at most as large as those of the others."""
    constant, fresh = updates_after_a_renewal("survivors", lambda age: 1.0, form)
    torch.testing.assert_close(fresh, torch.ones(300), rtol=1e-6, atol=1e-6)
    assert (constant <= 1.1 * fresh).all()
    ages = torch.arange(1.0, 301.0)
    # (1 - 0.9^a) of a gradient as large as the others' root mean square, which is known to a few percent
    torch.testing.assert_close(constant, 1 - 0.9**ages, rtol=0.1, atol=0.0)
    growing, fresh = updates_after_a_renewal("survivors", lambda age: age / 300, form)
    assert (growing <= fresh).all()
    assert growing[0] < 0.001 < fresh[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("gradient", [lambda age: 1.0, lambda age: age / 300, lambda age: math.sin(age)])
def test_reset_moves_a_new_entry_as_a_fresh_adam_would(form: dict[str, Any], gradient: Callable[[int], float]) -> None:
    ours, fresh = updates_after_a_renewal("reset", gradient, form)
    torch.testing.assert_close(ours, fresh, rtol=1e-6, atol=1e-6)


def one_step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()


OF_ADAM = [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}, {"betas": (0.0, 0.9)}]
EXACT: list[tuple[Any, dict[str, Any]]] = [
    *((torch.optim.Adam, {"eps": EPS} | settings) for settings in OF_ADAM),
    *((torch.optim.AdamW, {"eps": EPS} | settings) for settings in OF_ADAM),
    (torch.optim.Adamax, {}),
    (torch.optim.Adamax, {"weight_decay": 0.1, "betas": (0.8, 0.99)}),
    # These do not count, or not for the size of their steps: there is nothing to make up for.
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Rprop, {}),
]


@pytest.mark.parametrize(("make", "settings"), EXACT, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_entry_that_is_reset_goes_the_way_of_a_new_optimizer(make: Any, settings: dict[str, Any]) -> None:
    """Also with two that edit, through a checkpoint, where it got no gradient, and when it is reset again."""
    old = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make([old], lr=LR, **settings)
    first, second = (Editor(nn.Identity(), [optimizer], "reset") for _ in range(2))
    mask, gradients = torch.tensor([True, False]), [0.3, -1.0, 2.0, 0.1, 0.7, -0.2]
    for _ in range(50):
        one_step(old, optimizer, 1.5)
    for editor in (first, second):
        editor.write_masked(old, mask, torch.tensor(0.5))
        new = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))
        fresh = make([new], lr=LR, **settings)
        for step, gradient in enumerate(gradients):
            if step == 3:
                loaded = make([old], lr=LR, **settings)
                loaded.load_state_dict(optimizer.state_dict())
                optimizer = loaded
                first, second = (Editor(nn.Identity(), [optimizer], "reset") for _ in range(2))
                editor = second
            for weight, its in ((old, optimizer), (new, fresh)):
                one_step(weight, its, gradient)
                weight.grad = None
                its.step()  # which moves nothing
            torch.testing.assert_close(old[:1], new, rtol=1e-9, atol=1e-12)


def moves_of_old_and_fresh(make: Any, gradients: torch.Tensor, before: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """How far an entry moves that is reset after some steps, and one of a fresh optimizer, in learning rates."""
    old, new = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer, fresh = (make([weight]) for weight in (old, new))
    for _ in range(before):
        one_step(old, optimizer, 1.5)
    editor = Editor(nn.Identity(), [optimizer], "reset")
    editor.write_masked(old, torch.tensor([True, False]), torch.tensor(0.0))
    moves = []
    for gradient in gradients.tolist():
        start = torch.stack([old[0], new[0]]).detach()
        one_step(old, optimizer, gradient)
        one_step(new, fresh, gradient)
        moves.append((start - torch.stack([old[0], new[0]]).detach()) / LR)
    editor.close()
    return torch.stack(moves).unbind(1)


def test_radam_stands_still_as_long_as_a_fresh_one_does_not_divide_by_sizes_of_gradients() -> None:
    gradients = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, fresh = moves_of_old_and_fresh(partial(torch.optim.RAdam, lr=LR, eps=EPS), gradients)
    assert ours[:5].abs().max() < 1e-20
    torch.testing.assert_close(ours[5:], fresh[5:], rtol=1e-9, atol=1e-12)
    # reset before the optimizer divides by anything: nothing breaks
    ours, _ = moves_of_old_and_fresh(partial(torch.optim.RAdam, lr=LR, eps=EPS), gradients, before=2)
    assert ours.isfinite().all()


def test_nadam_begins_with_less_than_a_fresh_one_and_has_its_pace_as_its_momentum_fills() -> None:
    ours, fresh = moves_of_old_and_fresh(partial(torch.optim.NAdam, lr=LR, eps=EPS), torch.ones(60).double(), 3000)
    share = ours / fresh
    following = 0.9 * (1 - 0.5 * 0.96 ** (3001 * 0.004))  # of the tensor, at its first step after the reset
    assert share[0].item() == pytest.approx(1 - following + following * 0.1, rel=1e-3)
    assert (share.diff() > 0).all()
    assert share[-1].item() == pytest.approx(1.0, abs=0.005)
    cleared = 1.0 / math.sqrt(1 - 0.999) * share[0].item()  # what it would be without looking after it
    assert cleared > 10


@pytest.mark.parametrize("momentum_decay", [0.004, 1.0])
@pytest.mark.parametrize("make", _STEP_SIZES)
def test_what_is_told_of_steps_is_what_a_fresh_optimizer_does(make: Any, momentum_decay: float) -> None:
    """Under a constant gradient, where averages, of which these are not told, are as full as their age makes them."""
    beta1, beta2 = 0.8, 0.95
    own = {"momentum_decay": momentum_decay} if make is torch.optim.NAdam else {}
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = make([weight], lr=1.0, betas=(beta1, beta2), eps=EPS, weight_decay=0.0, **own)
    sizes = _step_sizes(_STEP_SIZES[make], beta1, beta2, momentum_decay)
    assert len(sizes) == 201
    assert sizes[-1].item() == pytest.approx(1.0, rel=1e-6)  # for all that are older
    for age in range(1, 200):
        before = weight.item()
        one_step(weight, optimizer, 1.0)
        first, second = 1 - beta1**age, math.sqrt(1 - beta2**age)
        filled = {torch.optim.NAdam: second, torch.optim.Adamax: 1 / first}.get(make, second / first)
        stands_still = make is torch.optim.RAdam and age < 6
        expected = 0.0 if stands_still else (before - weight.item()) * filled
        assert sizes[age].item() == pytest.approx(expected, rel=1e-6, abs=1e-20)  # NAdam counts in float32


def test_momentum_with_dampening_begins_without_the_first_gradient_s_privilege() -> None:
    make = partial(torch.optim.SGD, lr=LR, momentum=0.9, dampening=0.6)
    ours, fresh = moves_of_old_and_fresh(make, torch.ones(4, dtype=torch.float64))
    momentum = torch.tensor([sum(0.9**i for i in range(age)) for age in range(1, 5)], dtype=torch.float64)
    torch.testing.assert_close(ours, 0.4 * momentum)
    assert fresh[0].item() == pytest.approx(1.0)  # the whole of its first gradient


def test_the_rate_of_adagrad_goes_on_to_fall() -> None:
    make = partial(torch.optim.Adagrad, lr=LR, lr_decay=0.1)
    ours, fresh = moves_of_old_and_fresh(make, torch.ones(4, dtype=torch.float64))
    ages = torch.arange(4, dtype=torch.float64)  # of which a step is 1 / sqrt(age + 1)
    torch.testing.assert_close(fresh, 1 / (1 + 0.1 * ages) / (ages + 1).sqrt())
    torch.testing.assert_close(ours, 1 / (1 + 0.1 * (50 + ages)) / (ages + 1).sqrt())


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1.0])
def test_with_a_large_epsilon_an_entry_that_is_reset_moves_less_than_a_fresh_one(eps: float) -> None:
    gradients = 0.1 + torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, fresh = moves_of_old_and_fresh(partial(torch.optim.Adam, lr=LR, eps=eps), gradients, 20_000)
    assert (ours <= fresh * (1 + 1e-9)).all()
    assert (ours > 0).all()
    ages = torch.arange(1.0, 201.0, dtype=torch.float64)
    # as if epsilon were larger by as much as the second moment is not filled
    filled = (1 - 0.999**ages).sqrt()
    sizes, second = [], 0.0
    for gradient in gradients.tolist():
        second = 0.999 * second + 0.001 * gradient**2
        sizes.append(math.sqrt(second))
    size = torch.tensor(sizes, dtype=torch.float64) / filled
    torch.testing.assert_close(ours / fresh, (size + eps) / (size + eps / filled), rtol=1e-7, atol=0.0)


DECOUPLED = [
    torch.optim.AdamW,
    partial(torch.optim.NAdam, decoupled_weight_decay=True),
    partial(torch.optim.RAdam, decoupled_weight_decay=True),
]


@pytest.mark.parametrize("make", DECOUPLED, ids=["AdamW", "NAdam", "RAdam"])
def test_what_decays_beside_its_step_decays_as_fast_whatever_its_age(make: Any) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make([weight], lr=0.1, weight_decay=0.5)
    for _ in range(20):
        one_step(weight, optimizer, 1.0)
    editor = Editor(nn.Identity(), [optimizer], "reset")
    editor.write_masked(weight, torch.tensor([True, False]), torch.tensor(2.0))
    one_step(weight, optimizer, 0.0)
    assert weight[0].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5), rel=1e-12)


class AlsoAdam(torch.optim.Adam):
    """Takes the steps of Adam."""


class OwnSteps(torch.optim.Adam):
    """May do anything."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_a_class_that_takes_the_steps_of_adam_is_looked_after_and_another_one_warned_of() -> None:
    gradients = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, fresh = moves_of_old_and_fresh(partial(AlsoAdam, lr=LR, eps=EPS), gradients)
    torch.testing.assert_close(ours, fresh, rtol=1e-9, atol=1e-12)
    with pytest.warns(UserWarning, match="OwnSteps .* counts steps by tensor.* Use optimizer_state='survivors'"):
        ours, fresh = moves_of_old_and_fresh(partial(OwnSteps, lr=LR, eps=EPS), gradients, 3000)
    assert (ours[0] / fresh[0]).item() == pytest.approx(0.1 / math.sqrt(0.001), rel=0.05)
    weight = nn.Parameter(torch.ones(2))
    optimizer = OwnSteps([weight])
    editor = Editor(nn.Identity(), [optimizer], "reset")
    mask = torch.tensor([True, False])
    editor.write_masked(weight, mask, torch.tensor(0.0))  # nothing is remembered yet
    one_step(weight, optimizer, 1.0)
    with pytest.warns(UserWarning, match="OwnSteps"):
        editor.write_masked(weight, mask, torch.tensor(0.0))
    editor.write_masked(weight, mask, torch.tensor(0.0))  # it was said once; more would be an error


def test_an_entry_is_as_old_as_its_tensor_after_ten_times_what_the_averages_remember() -> None:
    """And then it is looked after no longer, which changes next to nothing."""
    gradients = torch.randn(130, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    make = partial(torch.optim.Adam, lr=LR, betas=(0.5, 0.9), eps=EPS)
    ours, fresh = moves_of_old_and_fresh(make, gradients, before=300)
    torch.testing.assert_close(ours, fresh, rtol=1e-4, atol=1e-9)
    weight = nn.Parameter(torch.ones(2))
    optimizer = make([weight])
    editor = Editor(nn.Identity(), [optimizer], "reset")
    one_step(weight, optimizer, 1.0)
    ages = []
    for step in range(150):
        if step in (0, 40):
            editor.write_masked(weight, torch.tensor([True, False]), torch.tensor(0.0))
        one_step(weight, optimizer, 1.0)
        ages.append(optimizer.state[weight]["age"].tolist() if "age" in optimizer.state[weight] else None)
    assert [age is None for age in ages] == [False] * 139 + [True] * 11
    assert ages[138] == [99.0, 100.0]


def test_survivors_and_whole_tensors_need_no_ages() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=LR)
    one_step(weight, optimizer, 1.0)
    mask = torch.tensor([True, False])
    Editor(nn.Identity(), [optimizer]).write_masked(weight, mask, torch.tensor(0.0))
    assert "age" not in optimizer.state[weight]
    Editor(nn.Identity(), [optimizer], "reset").write_masked(weight, mask, torch.tensor(0.0))
    assert optimizer.state[weight]["age"].tolist() == [0.0, math.inf]
    Editor(nn.Identity(), [optimizer], "survivors").write_masked(weight, mask, torch.tensor(0.0))
    assert optimizer.state[weight]["age"].tolist() == [math.inf, math.inf]
    Editor(nn.Identity(), [optimizer], "reset").write([weight], [torch.ones(2)])
    assert "age" not in optimizer.state[weight]


def test_ages_in_half_precision_come_through_a_checkpoint() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([weight], lr=LR)
    one_step(weight, optimizer, 1.0)
    Editor(nn.Identity(), [optimizer], "reset").write_masked(weight, torch.tensor([True, False]), torch.tensor(0.0))
    loaded = torch.optim.Adam([weight], lr=LR)
    loaded.load_state_dict(optimizer.state_dict())
    Editor(nn.Identity(), [loaded], "reset")
    for _ in range(300):  # beyond what bfloat16 can count
        one_step(weight, loaded, 1.0)
    assert loaded.state[weight]["age"].tolist() == [300.0, 301.0]  # the other is as old as the tensor


def test_nothing_is_made_up_for_a_step_that_a_gradient_scaler_skipped() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=LR, fused=True)
    one_step(weight, optimizer, 1.0)
    Editor(nn.Identity(), [optimizer], "reset").write_masked(weight, torch.tensor([True, False]), torch.tensor(0.5))
    one_step(weight, optimizer, 1.0)
    before = weight.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
    one_step(weight, optimizer, 1.0)
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["age"][0] == 1


def test_a_mean_that_is_not_finite_is_not_written() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    for broken in (math.inf, math.nan):
        second.fill_(broken)
        mask = torch.tensor([[True, False], [False, False]])
        editor = Editor(nn.Identity(), [optimizer])
        editor.write_masked(weight, mask, torch.tensor(0.0))
        assert second[0, 0] == 0
        assert not second.flatten()[1:].isfinite().any()


def test_several_editors_look_after_an_entry_once_and_leave_no_hook():
    """The first of them may leave: the next one goes on."""
    ends = []
    for count in (1, 3):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = torch.optim.Adam([weight], lr=0.1)
        editors = [Editor(nn.Identity(), [optimizer], "reset") for _ in range(count)]
        for step in range(6):
            weight.grad = torch.tensor([1.0, -0.5])
            optimizer.step()
            if step == 2:
                editors[-1].write_masked(weight, torch.tensor([True, False]), torch.tensor(0.5))
            elif step == 4 and count > 1:
                editors[0].close()
        ends.append(weight.detach().clone())
        for editor in editors:
            editor.close()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert torch.equal(*ends)
