"""Measures of what cannot be measured: a clear error, or the right value; and what must not leave a trace."""

import traceback
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_plasticity import ContinualBackprop, functional, metrics

matplotlib.use("agg")
FEATURES = {
    "None": None,
    "a list": [[1.0, 2.0]],
    "one dimension": torch.ones(3),
    "no dimension": torch.tensor(1.0),
    "integers": torch.ones(2, 3, dtype=torch.int),
    "complex": torch.ones(2, 3, dtype=torch.complex64),
    "booleans": torch.ones(2, 3, dtype=torch.bool),
    "no rows": torch.ones(0, 3),
    "no units": torch.ones(3, 0),
    "sparse": torch.ones(2, 3).to_sparse(),
    "without values": torch.ones(2, 2, device="meta"),
}
SOURCES = {
    "None": None,
    "a number": 1,
    "a word": "x",
    "a tensor": torch.ones(2),
    "a list of numbers": [1],
    "a list of tensors": [torch.ones(2)],
    "no tensor": {"a": 1},
    "None by name": {"a": None},
    "names that are none": {1: torch.ones(2)},
    "empty": {},
    "without parameters": nn.ReLU(),
    "triples": [("a", torch.ones(2), 1)],
    "integers": {"a": torch.ones(2, dtype=torch.int)},
    "complex": {"a": torch.ones(2, dtype=torch.complex64)},
    "sparse": {"a": torch.ones(2).to_sparse()},
    "lazy": nn.LazyLinear(3),
    "without values": nn.Linear(2, 2, device="meta"),
    "parameters without names": nn.Linear(2, 2).parameters(),
}
OF_FEATURES = ["dead_units", "rarely_active_units", "dormant_units", "saturated_units", "sign_entropy"]
OF_FEATURES += ["duplicate_units", "effective_rank", "stable_rank", "feature_rank"]
OF_MODELS = ["WeightMagnitude", "WeightNorm", "DistanceFromInit", "UpdateRatio", "Balancedness", "GradientNorm"]
OF_MODELS += ["ZeroGradientFraction"]
UNIT_METRICS = [name for name in metrics.__all__ if issubclass(getattr(metrics, name), metrics.base.UnitMetric)]


def assert_refused(measure: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
    """A clear error of the package: raised by a line that says so, not by what it calls."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the line that raises is what counts)
        measure(*arguments, **settings)
    last = traceback.extract_tb(refused.tb)[-1]
    assert "lightning_plasticity" in last.filename, last
    assert (last.line or "").startswith("raise"), last


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize("what", FEATURES)
def test_features_of_functions(name: str, what: str) -> None:
    assert_refused(getattr(functional, name), FEATURES[what])


@pytest.mark.parametrize("name", UNIT_METRICS)
@pytest.mark.parametrize("what", FEATURES)
def test_features_of_metrics(name: str, what: str) -> None:
    metric = getattr(metrics, name)()
    assert_refused(metric.update, FEATURES[what])
    metric.update(torch.rand(4, 3))  # and nothing of it has stayed
    assert metric.compute().isfinite()


@pytest.mark.parametrize("name", OF_MODELS)
@pytest.mark.parametrize("what", SOURCES)
def test_models_of_metrics(name: str, what: str) -> None:
    assert_refused(getattr(metrics, name)().update, SOURCES[what])


@pytest.mark.parametrize("name", ["weight_magnitude", "weight_norm", "weight_norms"])
@pytest.mark.parametrize("what", SOURCES)
def test_models_of_functions(name: str, what: str) -> None:
    assert_refused(getattr(functional, name), SOURCES[what])


@pytest.mark.parametrize("name", ["distance_from_init", "update_ratio", "balancedness"])
@pytest.mark.parametrize("what", SOURCES)
def test_pairs_of_models(name: str, what: str) -> None:
    whole = {"a": torch.ones(2)}
    assert_refused(getattr(functional, name), SOURCES[what], whole)
    assert_refused(getattr(functional, name), whole, SOURCES[what])


@pytest.mark.parametrize("name", ["per_sample_gradients", "gradient_covariance", "sharpness"])
def test_what_is_differentiated(name: str) -> None:
    measure, model, x, y = getattr(functional, name), nn.Linear(3, 2), torch.ones(2, 3), torch.zeros(2, 2)
    for wrong in (None, "net", lambda x: x, nn.LazyLinear(2), nn.ReLU(), nn.Linear(3, 2).requires_grad_(False)):
        assert_refused(measure, wrong, mse_loss, x, y)
    for wrong in (None, 1, [1.0], "x", torch.tensor(1.0), torch.ones(0, 3), torch.ones(3, 3)):
        assert_refused(measure, model, mse_loss, wrong, y)
        assert_refused(measure, model, mse_loss, x, wrong)
    for loss in (None, "mse", lambda output, target: None, lambda output, target: 1.0, lambda o, t: o - t):
        assert_refused(measure, model, loss, x, y)


def test_a_loss_that_is_cut_off_has_no_sharpness() -> None:
    model, x, y = nn.Linear(3, 2), torch.ones(2, 3), torch.zeros(2, 2)
    assert_refused(functional.sharpness, model, lambda output, target: mse_loss(output, target).detach(), x, y)


def test_what_is_fitted() -> None:
    x = torch.ones(2, 3)
    for wrong in (None, "net", lambda x: x, nn.ReLU(), nn.LazyLinear(2)):
        assert_refused(functional.trainability, wrong, x)
    for wrong in (None, [1.0], torch.tensor(1.0), torch.ones(0, 3)):
        assert_refused(functional.trainability, nn.Linear(3, 2), wrong)
    assert_refused(functional.trainability, nn.Linear(3, 2), x, lambda: None)

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x),)

    assert_refused(functional.trainability, Pair(3, 2), x)


def test_what_is_summed_up() -> None:
    for wrong in (None, [1], "x", torch.ones(2), torch.ones(2, 3)):
        assert_refused(functional.summarize_covariance, wrong)
    for wrong in (None, [1], "x", torch.ones(2, 2), torch.tensor(1.0)):
        assert_refused(functional.accuracy_slope, wrong)
    for wrong in (None, [1], "x", 1.0, torch.ones(2)):
        assert_refused(functional.gradient_norm, wrong)
    assert_refused(functional.online_accuracy, torch.ones(2, 0), torch.tensor([0, 1]))
    for wrong in (None, 1.5, "0", True, torch.tensor(1)):
        assert_refused(metrics.TaskAccuracy().update, torch.tensor([1]), torch.tensor([1]), wrong)


# ---- pictures


@pytest.mark.parametrize("name", metrics.__all__)
def test_what_is_drawn(name: str) -> None:
    metric = getattr(metrics, name)()
    wrong = ["x", [], [None], {}, {"a": "b"}, torch.ones(2, 2, 2), [{}], torch.ones(0, 0), torch.ones(0), object()]
    for values in wrong:
        assert_refused(metric.plot, values)
    assert_refused(metric.plot, torch.tensor(1.0), ax=3)
    metric.plot(0.5)
    metric.plot([0.5, 0.7])
    plt.close("all")


def test_norms_of_no_model_are_not_drawn() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        metrics.WeightNorm().compute()
    with pytest.raises(ValueError, match=r"draws the norm of each weight, got none yet: update it with a model first"):
        metrics.WeightNorm().plot()


# ---- state


@pytest.mark.parametrize("name", ["Balancedness", "DistanceFromInit", "UpdateRatio", "WeightNorm"])
def test_foreign_state(name: str) -> None:
    metric = getattr(metrics, name)()
    for state in ({}, None, {"others": 3}, {"reference": 3, "layers": 3}, {"reference": {"a": 1}, "layers": [1]}):
        assert_refused(metric.load_state_dict, {"_extra_state": state})


# ---- what leaves no trace


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, x, y: functional.trainability(model, x, budget=3),
        lambda model, x, y: functional.sharpness(model, mse_loss, x, y, tolerance=0.5),
        lambda model, x, y: functional.per_sample_gradients(model, mse_loss, x, y),
    ],
    ids=["trainability", "sharpness", "per_sample_gradients"],
)
@pytest.mark.filterwarnings("ignore:The largest eigenvalue must converge")
def test_methods_do_not_hear_what_is_measured(measure: Callable[..., Tensor]) -> None:
    courses = []
    for measures in (False, True):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        method = ContinualBackprop(0.1, 2, seed=0).attach(model, optimizer, (torch.zeros(1, 4),))
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            if measures:
                gradients = [p.grad.clone() for p in model.parameters()]
                measure(model, 100 * x, y)
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
            optimizer.step()
            method.step()
        assert method.replaced > 0
        method.detach()
        courses.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*courses, strict=True))


# ---- sharded parameters


def measured_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        whole = {name: p.detach() for name, p in two_layers().named_parameters()}
        sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
        values = {}
        for kind, tensors in (("whole", whole), ("sharded", sharded)):
            later = {name: tensor * 2 + 1 for name, tensor in tensors.items()}
            found: dict[str, Any] = {}
            for name in OF_MODELS:
                metric = getattr(metrics, name)(sync_on_compute=False)
                for step in (tensors, later):
                    with_gradient = {key: tensor.clone().requires_grad_() for key, tensor in step.items()}
                    for key, tensor in with_gradient.items():
                        tensor.grad = step[key].clone()
                    metric.update(with_gradient)
                found[name] = metric.compute()
                if name == "WeightNorm":
                    found["per layer"] = metric.per_layer()
            values[kind] = found
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
        for measure in (functional.sharpness, functional.per_sample_gradients):
            assert_refused(measure, model, mse_loss, torch.ones(2, 2), torch.ones(2, 2))
        assert_refused(functional.trainability, model, torch.ones(2, 2))
        torch.save(values, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_give_the_values_of_whole_ones(tmp_path: Any) -> None:
    mp.spawn(measured_on_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(values["sharded"], values["whole"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id"])
def test_parts_of_flat_parameters_are_refused(mark: str) -> None:
    weight = nn.Parameter(torch.ones(4))
    setattr(weight, mark, True)
    assert_refused(functional.weight_norm, {"weight": weight})
