"""Compiled models stay whole with the methods that read activations, and are read as in eager mode."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from callbacks.streams import INPUT, convolutional, mlp
from callbacks.test_continual_backprop import record_choices
from contract.training import assert_same, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.callbacks.activation_reset import ActivationReset
from lightning_plasticity.callbacks.continual_backprop import ContinualBackprop
from lightning_plasticity.callbacks.redo import ReDo
from lightning_plasticity.engine import activations
from lightning_plasticity.functional.activation_reset import ActivationStrategy

# The tracer looks at every tensor's `grad` and hides the warning that this brings, unless warnings are errors.
# Inductor of torch 2.6 warns of a setting that it leaves out of the key of its cache.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),
]

METHODS = {
    "ContinualBackprop": lambda: ContinualBackprop(0.1, 2, seed=0),
    "ContinualBackprop of inputs": lambda: ContinualBackprop(0.1, 2, utility="zero_contribution", seed=0),
    "ActivationReset": lambda: ActivationReset(ActivationStrategy(0.1, 0.1, -0.5, 0.5), maturity_threshold=2, seed=0),
    "ReDo": lambda: ReDo(0.5, 3, seed=0),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
every_network = pytest.mark.parametrize("build", [mlp, convolutional])


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler() -> None:
    """Skips the test where inductor finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"inductor finds no C++ compiler: {error}")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(model: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def examples(build, count: int = 30) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, *INPUT[build], generator=generator, dtype=torch.float64),
            torch.randint(3, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def train(method, called: nn.Module, optimizer: torch.optim.Optimizer, batches, once_compiled: bool = False) -> None:
    """Trains; ``once_compiled``: after the first step it is an error if anything is compiled anew."""
    for step, (x, y) in enumerate(batches):
        with torch.compiler.set_stance("fail_on_recompile") if once_compiled and step else nullcontext():
            optimizer.zero_grad()
            cross_entropy(called(x).float(), y).backward()
            optimizer.step()
            method.step()


def run(build, make, wrap=lambda model: model, once_compiled: bool = False, method_first: bool = True, data=None):
    """The method, the model and the units replaced at each of 30 steps of a network that is wrapped."""
    data = examples(data or build)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = make()
    called = model if method_first else wrap(model)
    if not method_first:
        called.eval()(data[0][0])  # compiles it without the hooks
        called.train()
    method.attach(called, optimizer, example_inputs=data[0][:1])
    choices = record_choices(method)
    called = wrap(model) if method_first else called
    train(method, called, optimizer, data, once_compiled)
    return method, model, choices


def edits(method) -> int:
    """How many units were replaced or scaled."""
    return method.scaled_low + method.scaled_high if isinstance(method, ActivationReset) else method.replaced


def assert_as_in_eager_mode(found, expected) -> None:
    (method, model, choices), (twin, other, expected_choices) = found, expected
    assert choices == expected_choices
    assert edits(method) == edits(twin) > 0
    assert_same(method.state_dict(), twin.state_dict())  # averages, ages, utilities
    assert_same(weights(model), weights(other))


@every_network
@every_method
def test_one_graph_that_is_compiled_once_and_hears_what_eager_mode_does(build, make):
    found = run(build, make, whole, once_compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_as_in_eager_mode(found, run(build, make))


@every_network
def test_explain_sees_no_break(build):
    model, (x, _) = build(), examples(build)[0]
    method = METHODS["ContinualBackprop"]().attach(model, example_inputs=(x,))
    explanation = torch._dynamo.explain(model)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    operators = [node.target for node in explanation.graphs[0].graph.nodes]
    assert operators.count(torch.ops.lightning_plasticity.hear) == len(method._population._by_number) > 1


@every_network
@pytest.mark.parametrize("name", ["ContinualBackprop", "ContinualBackprop of inputs"])
def test_inductor(build, name, compiler):
    method, model, choices = run(build, METHODS[name], lambda m: whole(m, "inductor"), once_compiled=True)
    twin, other, expected_choices = run(build, METHODS[name])
    assert choices == expected_choices != []
    for ours, theirs in (
        (method._averages["utility"], twin._averages["utility"]),
        (method._averages["activation"], twin._averages["activation"]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrap", [whole, in_place])
def test_a_method_may_come_after_the_compiler(wrap):
    make = METHODS["ContinualBackprop"]
    found = run(mlp, make, wrap, once_compiled=True, method_first=False)
    assert_as_in_eager_mode(found, run(mlp, make))


def test_mixed_precision():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp().float()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x.float())

    make = METHODS["ContinualBackprop"]
    found = run(Mixed, make, whole, once_compiled=True, data=mlp)
    assert_as_in_eager_mode(found, run(Mixed, make, data=mlp))
    assert found[0]._averages["activation"].dtype == torch.float32


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12).double(), nn.Linear(12, 3).double()
        self.middle = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.middle, self.first(x).relu(), use_reentrant=False))


def recomputed(model: nn.Module) -> nn.Module:
    compiled = whole(model)
    return lambda x: checkpoint(compiled, x, use_reentrant=False)


@pytest.mark.parametrize(("build", "wrap"), [(Checkpointed, whole), (mlp, recomputed)])
def test_activation_checkpointing_is_heard_once(build, wrap):
    make = METHODS["ContinualBackprop"]
    assert_as_in_eager_mode(run(build, make, wrap, True, data=mlp), run(build, make, data=mlp))


def test_data_parallel_around_a_compiled_model(process_group):
    make = METHODS["ContinualBackprop"]
    found = run(mlp, make, lambda model: DistributedDataParallel(whole(model)), once_compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert_as_in_eager_mode(found, run(mlp, make))


# It tells the profiler of its forward, and its logger of the time it took, which the tracer leaves out.
def test_a_compiled_data_parallel_model(process_group):
    make = METHODS["ContinualBackprop"]

    def wrap(model: nn.Module) -> nn.Module:
        return torch.compile(DistributedDataParallel(model), backend="aot_eager")

    assert_as_in_eager_mode(run(mlp, make, wrap), run(mlp, make))


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode, nullcontext])
def test_validation_is_not_heard(quiet):
    model, batches = mlp(), examples(mlp, 3)
    method = METHODS["ContinualBackprop"]().attach(model, example_inputs=batches[0][:1])
    compiled = whole(model)
    compiled(batches[0][0])
    heard = method._population.activations.state()
    assert heard[1].tolist() == [4, 4]
    compiled.eval()
    with quiet():
        compiled(batches[1][0])
    assert_same(method._population.activations.state(), heard)
    compiled.train()(batches[2][0])
    assert method._population.activations.state()[1].tolist() == [8, 8]


def test_detaching_stops_it():
    gc.collect()
    before = len(activations._listeners)
    model, ((x, _), *_) = mlp(), examples(mlp)
    method = METHODS["ContinualBackprop"]().attach(model, example_inputs=(x,))
    compiled = whole(model)
    compiled(x)
    heard = method._population.activations
    assert heard._rows == [4, 4]
    assert len(activations._listeners) == before + 2
    method.detach()
    compiled(x)
    assert heard._rows == [4, 4]
    method.attach(model, example_inputs=(x,))
    compiled(x)
    assert heard._rows == [4, 4]
    assert method._population.activations._rows == [8, 8]  # it goes on with what it had heard
    del heard
    method.detach()
    gc.collect()
    assert len(activations._listeners) == before


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 guards on each function in a closure")
def test_models_that_are_alike_share_their_code():
    models, (x, _) = [mlp() for _ in range(3)], examples(mlp)[0]
    methods = [METHODS["ContinualBackprop"]().attach(model, example_inputs=(x,)) for model in models]
    for count, model in enumerate(models, 1):
        whole(model)(x)
        assert [method._population.activations._rows for method in methods] == [[4, 4]] * count + [[0, 0]] * (3 - count)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_frame_that_the_compiler_gives_up_is_heard():
    class GivesUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.net:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    make = METHODS["ContinualBackprop"]
    found = run(GivesUp, make, lambda model: torch.compile(model, backend="aot_eager"), True, data=mlp)
    assert counters["stats"]["unique_graphs"] > 1
    assert_as_in_eager_mode(found, run(GivesUp, make, data=mlp))


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="this torch does not tell whether it exports a program"
)
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_no_hooks(strict):
    model, (x, _) = mlp(), examples(mlp)[0]
    method = METHODS["ContinualBackprop"]().attach(model, example_inputs=(x,))
    program = torch.export.export(model, (x,), strict=strict)
    assert "hear" not in program.graph_module.code
    assert method._population.activations._rows == [0, 0]


def test_the_operator_is_what_it_says():
    torch.library.opcheck(torch.ops.lightning_plasticity.hear.default, (torch.tensor(-1), torch.randn(2, 3)))
