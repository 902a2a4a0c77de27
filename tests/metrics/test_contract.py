"""What every metric must do, whatever it measures: the ways of torchmetrics."""

import io
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from torch import Tensor

from lightning_plasticity import metrics as M

from .cases import CASES, UNIT_CASES, Case

matplotlib.use("agg")
NO_DATA = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def fed(case: Case, seed: int = 0) -> M.base.PlasticityMetric:
    metric = case.make()
    for arguments in case.updates(seed):
        metric.update(*arguments)
    return metric


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_every_public_metric_has_a_case():
    assert {name.split(",")[0] for name in CASES} == set(M.__all__)


@every_case
def test_pieces_give_the_value_of_the_function_for_all_at_once(case):
    value = fed(case).compute()
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert_same(value, case.expected(case.updates(0)))


@every_case
def test_forward_gives_the_batch_and_accumulates(case):
    metric = case.make()
    for arguments in case.updates(0):
        alone = deepcopy(metric)
        alone.reset()
        alone.update(*arguments)
        assert_same(metric(*arguments), alone.compute())
    assert_same(metric.compute(), case.expected(case.updates(0)))


@NO_DATA
@every_case
def test_without_data_the_value_is_nan(case):
    metric = case.make()
    assert metric.compute().isnan()
    for arguments in case.updates(0):
        metric.update(*arguments)
    metric.reset()
    assert metric.compute().isnan()


@every_case
def test_reset_starts_anew(case):
    metric = case.make()
    metric.update(*case.updates(0)[0])  # the reference of those that have one, which `reset` keeps
    for _ in range(2):
        metric.reset()
        for arguments in case.updates(0):
            metric.update(*arguments)
        value = metric.compute()
    if type(metric).__name__ not in ("UpdateRatio", "Churn"):  # the first update counts, if they know an earlier one
        assert_same(value, case.expected(case.updates(0)))


@every_case
def test_copies_and_pickles_go_on_independently(case):
    updates = case.updates(0)
    metric = case.make()
    for arguments in updates[:2]:
        metric.update(*arguments)
    for copied in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        for arguments in updates[2:]:
            copied.update(*arguments)
        assert_same(copied.compute(), case.expected(updates))
    for arguments in updates[2:]:
        metric.update(*arguments)
    assert_same(metric.compute(), case.expected(updates))


@every_case
def test_merging_gives_the_value_of_all_data(case):
    updates = case.updates(0)
    whole = fed(case)
    for as_state in (False, True):
        first, second = case.make(), case.make()
        first.update(*updates[0])  # also the reference of those that have one
        second._reference = getattr(first, "_reference", None)
        for arguments in updates[1:]:
            second.update(*arguments)
        # measured before, to see that nothing old is given again
        first.compute()
        first.merge_state({name: getattr(second, name) for name in second._defaults} if as_state else second)
        assert_same(first.compute(), whole.compute())
    empty = case.make()
    empty.merge_state(whole)
    assert_same(empty.compute(), whole.compute())


def test_merging_what_does_not_belong_together_is_refused():
    for other in (None, 1, {}, M.DormantUnits(), {"largest": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"takes in the state of another|with its states"):
            M.DeadUnits().merge_state(other)
    with pytest.raises(ValueError, match="Both metrics must have the same settings"):
        M.DeadUnits(unit_dim=1).merge_state(M.DeadUnits(unit_dim=-1))
    three, two = M.DeadUnits(), M.DeadUnits()
    three.update(torch.ones(2, 3))
    two.update(torch.ones(2, 2))
    with pytest.raises(ValueError, match="same number of units, got 2 and 3"):
        three.merge_state(two)
    assert three.compute() == 0
    with pytest.raises(ValueError, match="largest must be a tensor, got None"):
        three.merge_state({**{name: getattr(three, name) for name in three._defaults}, "largest": None})
    norms, others = M.WeightNorm(), M.WeightNorm()
    norms.update({"a": torch.ones(2)})
    others.update({"b": torch.ones(2)})
    with pytest.raises(ValueError, match="must measure the same weights, a, got b"):
        norms.merge_state(others)
    fresh = M.WeightNorm()
    fresh.merge_state(norms)
    assert_same(fresh.per_layer(), norms.per_layer())


@NO_DATA
@every_case
def test_persistent_state_survives_a_checkpoint(case):
    updates = case.updates(0)
    metric, resumed = case.make(), case.make()
    metric.persistent(True)
    for arguments in updates[:2]:
        metric.update(*arguments)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed.compute(), metric.compute())
    for arguments in updates[2:]:
        resumed.update(*arguments)
    assert_same(resumed.compute(), case.expected(updates))


@every_case
def test_states_are_not_in_a_checkpoint_unless_asked(case):
    saved = fed(case).state_dict()
    assert set(saved) <= {"_extra_state"}


@every_case
def test_a_cast_of_the_owner_costs_no_precision(case):
    metric = case.make().to(torch.float16).half()
    for arguments in case.updates(0):
        metric.update(*arguments)
    assert_same(metric.compute(), case.expected(case.updates(0)))


@every_case
def test_moves_to_a_device(case):
    metric = fed(case).to("cpu")
    assert metric.device == torch.device("cpu")
    assert_same(metric.compute(), case.expected(case.updates(0)))


@pytest.mark.gpu
@every_case
def test_gives_the_same_on_the_gpu(case):
    metric = case.make().to("cuda")
    for arguments in case.updates(0):
        metric.update(*(a.to("cuda") if isinstance(a, Tensor | torch.nn.Module) else a for a in arguments))
    value = metric.compute()
    assert value.device.type == "cuda"
    torch.testing.assert_close(value.cpu(), case.expected(case.updates(0)), rtol=1e-6, atol=1e-9)
    assert metric.cpu().compute().device.type == "cpu"


@every_case
def test_plots(case):
    metric = fed(case)
    figure, ax = metric.plot()
    assert isinstance(figure, Figure)
    assert ax.figure is figure
    _, own = plt.subplots()
    figure, ax = metric.plot([metric.compute(), metric.compute() + 0.1], ax=own)
    assert ax is own
    assert figure is own.figure
    assert list(ax.lines[0].get_xdata()) == [0, 1]
    figure.canvas.draw()
    plt.close("all")


@every_case
def test_says_what_it_is(case):
    metric = case.make()
    assert metric.is_differentiable is False
    assert metric.full_state_update is isinstance(metric, M.TaskAccuracy)
    assert not any(module is not metric for module in metric.modules())  # no model became a part of it
    assert not list(metric.parameters())
    with pytest.raises(ValueError, match="Unexpected keyword"):
        type(metric)(nonsense=1)


@pytest.mark.parametrize("case", UNIT_CASES.values(), ids=UNIT_CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_accumulated_in_float64(case, dtype):
    metric = case.make()
    rounded = [(h.to(dtype),) for (h,) in case.updates(0)]
    for arguments in rounded:
        metric.update(*arguments)
    if isinstance(metric, M.SaturatedUnits):  # compares with bounds, which are rounded as the features are
        expected = case.expected(rounded)
    else:
        expected = case.expected([(h.double(),) for (h,) in rounded])
    assert_same(metric.compute(), expected)


@pytest.mark.parametrize("case", UNIT_CASES.values(), ids=UNIT_CASES.keys())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_nan(case, value):
    updates = case.updates(0)
    updates[1][0][1, 5] = value
    metric = case.make()
    for arguments in updates:
        metric.update(*arguments)
    assert metric.compute().isnan()
    assert case.expected(updates).isnan()
    metric.reset()
    for arguments in case.updates(0):
        metric.update(*arguments)
    assert metric.compute().isfinite()


@pytest.mark.parametrize("case", UNIT_CASES.values(), ids=UNIT_CASES.keys())
@pytest.mark.parametrize("way", ["update", "forward"])
@pytest.mark.parametrize(("first", "second"), [(5, 3), (5, 1), (1, 5)])
def test_another_number_of_units_is_refused(case, way, first, second):
    metric = case.make()
    feed = metric.update if way == "update" else metric.forward
    feed(torch.randn(4, first))
    with pytest.raises(ValueError, match="same number of units"):
        feed(torch.randn(4, second))


# ---- two processes ---------------------------------------------------------------------------------------------------


def seeds_of(rank: int) -> int:
    return 10 * rank


def value_on_rank(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """The value over both ranks, and this rank's own afterwards."""
    metric = case.make()
    for arguments in case.updates(seeds_of(rank)):
        metric.update(*arguments)
    everywhere = metric.compute()
    metric._to_sync, metric._computed = False, None
    return everywhere, metric.compute()


def details_on_rank(rank: int) -> dict[str, Any]:
    """What the methods beside `compute` give, and what a rank without data gets."""
    tasks, covariance, norms = (fed(CASES[name], seeds_of(rank)) for name in DETAILS)
    one_has_data, uneven = M.EffectiveRank(), M.EffectiveRank()
    if rank == 1:
        one_has_data.update(CASES["EffectiveRank"].updates(0)[0][0])
    uneven.update(torch.randn(4, 2 + rank))
    try:
        refused = str(uneven.compute())
    except ValueError as error:
        refused = str(error)
    return {
        "per_task": tasks.per_task(),
        "matrix": covariance.matrix(),
        "per_layer": norms.per_layer(),
        "tasks go on": tasks.correct_by_task,
        "one has data": one_has_data.compute(),
        "uneven": refused,
    }


DETAILS = ("TaskAccuracy", "GradientCovariance", "WeightNorm")


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        values = {name: value_on_rank(case, rank) for name, case in CASES.items()}
        torch.save({"values": values, "details": details_on_rank(rank)}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Starting processes takes seconds, so that one start serves all tests."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# Measures with a reference take their own on each rank; in training all ranks have one model, and nothing differs.
OWN_REFERENCE = {"DistanceFromInit", "DistanceFromInit, relative", "UpdateRatio", "Balancedness", "Churn"}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_gives_for_all_data(two_ranks, name):
    case = CASES[name]
    parts = [case.updates(seeds_of(rank)) for rank in range(2)]
    if name in OWN_REFERENCE:
        expected = torch.stack([case.expected(part) for part in parts]).mean()
    else:
        expected = case.expected(parts[0] + parts[1])
    for rank in range(2):
        everywhere, own = two_ranks[rank]["values"][name]
        assert_same(everywhere, expected)
        assert_same(own, case.expected(parts[rank]))  # the other rank's data did not stay


def test_details_are_of_all_ranks(two_ranks):
    parts = {name: [CASES[name].updates(seeds_of(rank)) for rank in range(2)] for name in DETAILS}
    alone = {name: CASES[name].make() for name in DETAILS}
    for name, metric in alone.items():
        for arguments in parts[name][0] + parts[name][1]:
            metric.update(*arguments)
    for rank in range(2):
        details = two_ranks[rank]["details"]
        assert_same(details["per_task"], alone["TaskAccuracy"].per_task())
        assert_same(details["matrix"], alone["GradientCovariance"].matrix())
        assert_same(details["per_layer"], alone["WeightNorm"].per_layer())
        assert_same(details["tasks go on"], fed(CASES["TaskAccuracy"], seeds_of(rank)).correct_by_task)


def test_a_rank_without_data_takes_part(two_ranks):
    case = CASES["EffectiveRank"]
    for rank in range(2):
        assert_same(two_ranks[rank]["details"]["one has data"], case.expected(case.updates(0)[:1]))


def test_ranks_with_different_numbers_of_units_are_refused(two_ranks):
    for rank in range(2):
        assert "same number of units, got 2 and 3" in two_ranks[rank]["details"]["uneven"]
