"""The metrics of a monitor by themselves: what each is made of, keeps, gives and forgets."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plasticity import metrics as M
from lightning_plasticity.monitoring.measures import Measures, mean_and_layers, named


class OutputSize(Metric):
    """A user's own measure."""

    def update(self, model: nn.Module, inputs: Tensor) -> None:
        self.size = model(inputs).norm()

    def compute(self) -> Tensor:
        return self.size


FEATURES = torch.tensor([[1.0, 0.0], [2.0, 0.0]])


def test_each_layer_has_a_metric_of_its_own_which_is_made_once() -> None:
    prototype = M.DeadUnits(unit_dim=1)
    measures = Measures({"dead": prototype, "ratio": M.UpdateRatio()}, synchronize=True)
    (first,) = measures.of("features", "a", -1)
    (second,) = measures.of("features", "b", None)
    assert measures.of("features", "a", -1)[0] is first
    assert len({id(metric) for metric in (first, second, prototype)}) == 3
    assert [metric.unit_dim for metric in (first, second, prototype)] == [-1, 1, 1]
    assert measures.of("model") == []
    assert [measures.has(*kinds) for kinds in (("features",), ("model", "step"), ("model", "batch"))] == [
        True, True, False,
    ]  # fmt: skip


def test_what_was_taken_starts_anew_and_what_no_rank_has_seen_has_no_value() -> None:
    measures = Measures({"dead": M.DeadUnits(), "norm": M.WeightNorm()}, synchronize=True)
    for layer in ("a", "b"):
        measures.of("features", layer, -1)
    measures.of("features", "a", -1)[0].update(FEATURES)
    measures.of("model")[0].update({"w": torch.tensor([[3.0, 4.0]])})
    assert measures.updates() == {("dead", "a"): 1, ("dead", "b"): 0, ("norm", ""): 1}
    values, matrices = measures.take(measures.updates())
    assert values == {"dead": {"a": 0.5}, "norm": {"": 5.0, "w": 5.0}}
    assert matrices == {}
    assert set(measures.updates().values()) == {0}


def test_only_metrics_of_the_kinds_forget() -> None:
    measures = Measures({"dead": M.DeadUnits(), "magnitude": M.WeightMagnitude()}, synchronize=True)
    measures.of("features", "a", -1)[0].update(FEATURES)
    measures.of("model")[0].update(nn.Linear(2, 2))
    measures.forget("features", "gradients")
    assert measures.updates() == {("dead", "a"): 0, ("magnitude", ""): 1}


def test_a_state_takes_the_place_of_all_that_was_measured() -> None:
    measures, other = (Measures({"distance": M.DistanceFromInit()}, synchronize=True) for _ in range(2))
    measures.of("model")[0].update({"w": torch.zeros(2)})
    state = measures.state_dict()
    assert list(state) == ["distance/"]
    (away,) = other.of("model")
    away.update({"w": torch.tensor([6.0, 8.0])})
    other.load_state_dict(state)
    assert other.state_dict() == state  # also before a metric is made from it
    (metric,) = other.of("model")
    assert metric is not away
    metric.update({"w": torch.tensor([3.0, 4.0])})
    assert other.take(other.updates())[0] == {"distance": {"": 5.0}}
    other.clear()
    assert other.state_dict() == {}


def test_of_parts_only_what_differentiates_the_model_is_refused() -> None:
    for metric in (M.Sharpness(), M.HessianSpectrum(), M.GradientCovariance(), M.LocalRedundancy(), M.NTKRank()):
        measures = Measures({"norm": M.WeightNorm(), "own": metric}, synchronize=True)
        with pytest.raises(RuntimeError, match=f"{type(metric).__name__} differentiates .* Leave 'own' out"):
            measures.check_take_parts()
    cheap = (M.WeightNorm(), M.DeadUnits(), M.GradientNorm(), M.UpdateRatio(), M.Churn(), OutputSize())
    Measures(named(cheap), synchronize=True).check_take_parts()


def test_one_number_is_required_of_a_metric() -> None:
    for value, shown in ((torch.ones(2), r"\(2,\)"), (torch.ones(0), r"\(0,\)"), (1.0, "float")):
        measures = Measures({"own": OutputSize()}, synchronize=True)
        measures.of("inputs")[0].compute = lambda value=value: value
        with pytest.raises(ValueError, match=f"one number, but that of 'own' gives {shown}"):
            measures.take({("own", ""): 1})


@pytest.mark.parametrize("synchronize", [False, True])
def test_ranks_that_measure_the_same_data_do_not_ask_each_other(synchronize: bool) -> None:
    prototype = M.WeightNorm()
    (metric,) = Measures({"norm": prototype}, synchronize=synchronize).of("model")
    assert (metric.distributed_available_fn is prototype.distributed_available_fn) is synchronize
    assert synchronize or metric.distributed_available_fn() is False


def test_what_only_another_rank_has_seen_is_taken_without_a_warning() -> None:
    measures = Measures({"norm": M.WeightNorm()}, synchronize=True)
    measures.of("model")
    assert math.isnan(measures.take({("norm", ""): 1})[0]["norm"][""])


def test_the_mean_of_layers_stands_beside_them_unless_the_model_has_a_value() -> None:
    values = {"dead": {"a": 0.25, "b": 0.75}, "norm": {"": 5.0, "w": 3.0}, "none": {"a": math.nan}}
    numbers = mean_and_layers(values)
    assert math.isnan(numbers.pop("plasticity/none"))
    assert math.isnan(numbers.pop("plasticity/none/a"))
    assert numbers == {
        "plasticity/dead": 0.5,
        "plasticity/dead/a": 0.25,
        "plasticity/dead/b": 0.75,
        "plasticity/norm": 5.0,
        "plasticity/norm/w": 3.0,
    }


def test_the_default_set() -> None:
    names = ["EffectiveRank", "DormantUnits", "DeadUnits", "WeightMagnitude", "WeightNorm", "DistanceFromInit"]
    assert list(named(None)) == names
    for wrong, message in (
        ([M.DeadUnits(), M.SignEntropy(), M.DeadUnits()], "but DeadUnits stands there more than once"),
        ({}, "at least one metric, got none"),
        ({"a": M.DeadUnits}, "but 'a' is of type ABCMeta"),
        (M.DeadUnits(), "a dict from names to metrics, or None, got DeadUnits"),
    ):
        with pytest.raises(ValueError, match=message):
            named(wrong)
