"""The base class: what it refuses and how, what it logs, when it examines and starts."""

import csv
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract.minimal_method import NoisyUnits
from contract.training import BATCHES, Batches, LightningNetwork, Network, adam, fit, hooks, layers, seeded, trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from lightning_plasticity import ContinualBackprop
from lightning_plasticity.engine import loop
from lightning_plasticity.engine.base import PlasticityCallback
from lightning_plasticity.engine.examination import Part
from lightning_plasticity.engine.forward import is_redirected
from lightning_plasticity.engine.maturity import whole_and_rest
from lightning_plasticity.units.calls import ForwardCall
from lightning_plasticity.units.examining import undisturbed

EXAMPLE = (torch.zeros(2, 6),)


def attached(**settings: Any) -> tuple[NoisyUnits, Network, torch.optim.Optimizer]:
    model = seeded(Network)
    optimizer = adam(model.parameters())
    return NoisyUnits(every_n_steps=3, **settings), model, optimizer


# ---- what is refused


def test_unknown_optimizer_state() -> None:
    with pytest.raises(ValueError, match="must be one of 'survivors', 'reset', 'keep', got 'clear'"):
        NoisyUnits(3, optimizer_state="clear")


def test_unknown_module_lists_the_children() -> None:
    method, model, optimizer = attached(module="encoder")
    with pytest.raises(ValueError, match=r"module of Network, got 'encoder'.* Its children are: net;"):
        method.attach(model, optimizer)
    assert hooks(model, optimizer) == 0
    with pytest.raises(ValueError, match="module of LightningNetwork, got 'encoder'"):
        fit(NoisyUnits(3, module="encoder"))


def test_step_before_attach() -> None:
    method, model, optimizer = attached()
    with pytest.raises(RuntimeError, match=r"NoisyUnits.step\(\) needs a model. Call attach"):
        method.step()
    method.attach(model, optimizer, EXAMPLE).detach()
    with pytest.raises(RuntimeError, match="needs a model"):
        method.step()
    for name in ("model", "scope"):
        with pytest.raises(RuntimeError, match="NoisyUnits is not attached to a model"):
            getattr(method, name)


def test_attach_twice() -> None:
    method, model, optimizer = attached()
    method.attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"attached to a model already. Call detach\(\) first"):
        method.attach(model, optimizer)
    with pytest.raises(RuntimeError, match=r"attached to a model already. Call detach\(\) before fit\(\)"):
        fit(method)
    method.detach()
    method.attach(model, optimizer)


def test_not_an_optimizer() -> None:
    method, model, _ = attached()
    with pytest.raises(ValueError, match=r"A torch.optim.Optimizer is required, got list"):
        method.attach(model, [list(model.parameters())])
    method.attach(model)  # what failed has left nothing behind


def test_example_inputs_must_be_a_tuple() -> None:
    method, model, optimizer = attached()
    with pytest.raises(ValueError, match=r"got Tensor. Write example_inputs=\(x,\)"):
        method.attach(model, optimizer, example_inputs=torch.zeros(2, 6))


def test_example_inputs_that_do_not_reach_the_module() -> None:
    class Unused(Network):
        def __init__(self) -> None:
            super().__init__()
            self.unused = layers()

    method, model = NoisyUnits(3, module="unused"), Unused()
    with pytest.raises(ValueError, match="module='unused' must name a module that is called when the model is called"):
        method.attach(model, adam(model.parameters()), EXAMPLE)
    assert hooks(model) == 0


class NeverCalled(LightningNetwork):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(nn.functional.linear(x, self.net.first.weight), y)


def test_model_that_is_never_called_as_a_module() -> None:
    with pytest.raises(RuntimeError, match=r"NoisyUnits needs to see a forward pass .* Call it as self\(x\)"):
        fit(NoisyUnits(3), module=NeverCalled)


@pytest.mark.parametrize(
    ("mark", "by"),
    [
        ("_is_flat_param", "FSDP1, .* strategy='fsdp'"),
        ("_fsdp_flattened", "FSDP1, .* strategy='fsdp'"),
        ("ds_id", "DeepSpeed stage 3"),
    ],
)
def test_sharded_parameters(mark: str, by: str) -> None:
    method, model, optimizer = attached()
    setattr(model.net.second.weight, mark, 1)
    with pytest.raises(RuntimeError, match=rf"'net.second.weight' is sharded \({by}.*\)\. .* strategy='ddp'"):
        method.attach(model, optimizer)
    module = LightningNetwork()
    setattr(module.net.head.bias, mark, 1)
    with pytest.raises(RuntimeError, match=r"'net.head.bias' is sharded"):
        fit(NoisyUnits(3), module=module)


class HoldsAnOptimizer:
    """As DeepSpeed's optimizers, and the wrappers of Fabric, hold the one that they were given."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


def copies(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().float().clone()) for parameter in parameters]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("module", ["deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.bf16_optimizer"])
def test_deepspeed_is_refused_in_every_stage(module: str, wrapped: bool) -> None:
    model = seeded(Network)
    kind = type("DeepSpeedZeroOptimizer", (HoldsAnOptimizer,), {"__module__": module})
    optimizer = kind(adam(copies(model.parameters())))
    method = NoisyUnits(3)
    with pytest.raises(RuntimeError, match=r"DeepSpeed, .* \(DeepSpeedZeroOptimizer\): .* strategy='ddp'"):
        method.attach(model, HoldsAnOptimizer(optimizer) if wrapped else optimizer)
    method.attach(model, adam(model.parameters()))  # nothing is left of the failed one


class TrainsCopies(LightningNetwork):
    @override
    def configure_optimizers(self) -> Any:
        return adam(copies(self.parameters()))


def test_an_optimizer_of_copies_is_refused() -> None:
    model, other = seeded(Network), nn.Linear(2, 2)
    message = r"but Adam has none of those of \w+\. If it trains copies .* belong together"
    with pytest.raises(RuntimeError, match=message):
        NoisyUnits(3).attach(model, adam(copies(model.parameters())))
    with pytest.raises(RuntimeError, match=message):
        fit(NoisyUnits(3), module=TrainsCopies)
    NoisyUnits(3).attach(model, [adam(model.parameters()), adam(other.parameters())])  # one of them is enough


def test_child_that_is_first_called_after_the_first_step() -> None:
    model, method = nn.ModuleDict({"net": layers(), "later": layers()}), NoisyUnits(1)
    optimizer = adam(model.parameters())
    method.attach(model, optimizer)

    def train(child: str) -> None:
        model[child](torch.ones(4, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()

    train("net")
    assert [watched.layer for watched in method._watched] == ["net.first", "net.second"]
    assert not hooks(model["net"].head)
    assert method.replaced == 2
    train("later")
    assert [watched.layer for watched in method._watched] == ["net.first", "net.second", "later.first", "later.second"]
    assert method.replaced == 6  # all sets are the optimizer's
    method.detach()
    assert hooks(model) == 0


# ---- when it examines and starts


def shapes_in(call: ForwardCall) -> Any:
    def run(args: tuple[Any, ...], kwargs: Any) -> list[int]:
        with torch.no_grad():
            call.module.eval()(*args, **kwargs)
        return [x.shape[0] for x in (*args, *kwargs.values())]

    with undisturbed(call.module):
        return call.on_one_example(run)


class Recorder(PlasticityCallback):
    """Writes down what the base class asks for."""

    def __init__(self, asks: bool = True, **common: Any) -> None:
        super().__init__(question=shapes_in if asks else None, **common)
        self.events: list[Any] = []

    @override
    def hear_of(self, part: Part, call: ForwardCall | None) -> None:
        assert call is not None
        self.events.append(("hear of", part.name, type(call.module).__name__, part.found))

    @override
    def _works_on(self) -> str:
        return "nothing."

    @override
    def _start(self) -> None:
        assert not torch.is_grad_enabled()
        self.events.append("start")
        self.initial = [parameter.detach().clone() for parameter in self.model.parameters()]

    @override
    def _after_step(self, optimizer: Any) -> None:
        assert not torch.is_grad_enabled()
        self.events.append("step")

    @override
    def _stop(self) -> None:
        self.events.append("stop")


def train_one_batch(model: nn.Module, optimizer: torch.optim.Optimizer, method: Recorder) -> None:
    x, y = next(iter(Batches()))
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    method.step()


def test_examines_once_and_starts_before_the_first_step() -> None:
    model, method = seeded(Network), Recorder()
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = adam(model.parameters())
    method.attach(model, optimizer)
    model.eval()(*EXAMPLE)  # not a training call
    assert method.events == []
    model.train()
    train_one_batch(model, optimizer, method)
    train_one_batch(model, optimizer, method)
    assert method.events == [("hear of", "", "Network", [1]), "start", "step", "step"]
    assert all(torch.equal(a, b) for a, b in zip(method.initial, initial, strict=True))
    method.detach()
    assert method.events[-1] == "stop"


def test_starts_before_the_first_step_of_an_optimizer_that_calls_a_closure() -> None:
    model, method = seeded(Network), Recorder()
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    method.attach(model, optimizer)
    x, y = next(iter(Batches()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    method.step()
    assert method.events[1:] == ["start", "step"]
    assert all(torch.equal(a, b) for a, b in zip(method.initial, initial, strict=True))


def test_example_inputs_start_at_once() -> None:
    model, method = seeded(Network), Recorder()
    method.attach(model, adam(model.parameters()), EXAMPLE)
    assert method.events == [("hear of", "", "Network", [1]), "start"]


def test_example_inputs_are_those_of_the_model_also_with_module() -> None:
    class Doubled(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.cat([x, x])[:, :6])

    model, method = seeded(Doubled), Recorder(module="net.second")
    model.net.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    method.attach(model, adam(model.parameters()), (torch.ones(1, 6),))
    assert method.events == [("hear of", "net.second", "Linear", [1]), "start"]
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_need_of_an_example_it_starts_at_once() -> None:
    model, method = seeded(Network), Recorder(asks=False)
    method.attach(model, adam(model.parameters()))
    assert method.events == ["start"]


def test_the_whole_is_not_examined_after_its_children() -> None:
    class ChildFirst(LightningNetwork):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.net(x), y) + cross_entropy(self(x), y)

    method = Recorder()
    fit(method, module=ChildFirst, max_steps=2)
    assert method.events == [("hear of", "net", "Sequential", [1]), "start", "step", "step", "stop"]


def test_whole_batch_where_one_example_does_not_do() -> None:
    def examine(args: tuple[Any, ...], kwargs: Any) -> int:
        if len(args[0]) == 1:
            raise IndexError
        return len(args[0]) + len(kwargs["mask"][0])

    call = ForwardCall(nn.ReLU(), "", (torch.zeros(4, 2),), {"mask": [torch.zeros(4), None, "text"]})
    assert call.on_one_example(examine) == 8
    unequal = ForwardCall(nn.ReLU(), "", (torch.zeros(4, 2), torch.zeros(3)), {})
    assert unequal.on_one_example(lambda args, kwargs: len(args[0])) == 4


def test_every_call_counts_where_there_is_no_optimizer() -> None:
    method = Recorder(asks=False).attach(Network())
    method.step()
    method.step()
    assert method.optimizer_steps == 2


def test_a_step_without_gradients_in_the_scope_does_not_count() -> None:
    model, method = seeded(Network), Recorder(asks=False, module="net.head")
    optimizer = adam(model.parameters())
    method.attach(model, optimizer)
    model.net.head.requires_grad_(False)
    train_one_batch(model, optimizer, method)
    assert method.optimizer_steps == 0
    model.net.head.requires_grad_(True)
    train_one_batch(model, optimizer, method)
    assert method.optimizer_steps == 1


def test_steps_since_the_last_call_all_count() -> None:
    model, method = seeded(Network), Recorder(asks=False)
    optimizer = adam(model.parameters())
    method.attach(model, [optimizer])
    model(*EXAMPLE).sum().backward()
    optimizer.step()
    optimizer.step()
    method.step()
    method.step()
    assert method.optimizer_steps == 2


def test_tells_which_optimizer_has_stepped() -> None:
    class Tells(Recorder):
        @override
        def _after_step(self, optimizer: Any) -> None:
            self.events.append(optimizer)

    model, method = seeded(Network), Tells(asks=False)
    first, second = adam(model.net.first.parameters()), adam(model.net.second.parameters())
    method.attach(model, (first, second))
    model(*EXAMPLE).sum().backward()
    for optimizer in (second, first, second):
        optimizer.step()
    method.step()
    assert method.events == ["start", second, first, second]


def test_optimizer_of_finds_by_identity() -> None:
    model, method = seeded(Network), Recorder(asks=False)
    first, second = adam(model.net.first.parameters()), adam(model.net.second.parameters())
    method.attach(model, [first, second])
    assert method.optimizer_of(model.net.second.bias) is second
    assert method.optimizer_of(model.net.head.bias) is None


def test_same_seed_draws_differently_in_other_methods_and_modules() -> None:
    def draw(method: PlasticityCallback) -> Tensor:
        method.attach(seeded(Network), example_inputs=EXAMPLE)
        return torch.rand(8, generator=method.draws.generator("cpu"))

    draws = [draw(Recorder(seed=1)), draw(Recorder(seed=1, module="net")), draw(NoisyUnits(None, seed=1))]
    assert len({tuple(numbers.tolist()) for numbers in draws}) == 3
    assert torch.equal(draw(Recorder(seed=1)), draws[0])


def test_is_redirected() -> None:
    module = LightningNetwork()
    seen: list[bool] = []

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *args: Any) -> Any:
            seen.append(is_redirected(module))
            return self.inner(*args)

    module.register_forward_pre_hook(lambda *_: seen.append(is_redirected(module)))
    redirection = trainer().strategy._forward_redirection
    x, y = next(iter(Batches()))
    redirection(Wrapper(), module, "training_step", (x, y), 0)
    assert seen == [True, True, False]  # the wrapper, `training_step` in place of forward, forward itself
    module.forward = lambda x: x  # a forward of the user's own
    assert not is_redirected(module)


def test_whole_and_rest() -> None:
    assert whole_and_rest(2.75) == (2, 0.75)
    assert whole_and_rest(0.5) == (0, 0.5)


def test_no_hooks_where_there_is_nothing_to_train() -> None:
    module, method = seeded(LightningNetwork), NoisyUnits(3)
    run = trainer(method, max_epochs=0)
    run.fit(module)
    assert hooks(module, *run.optimizers) == 0
    fit(method, module=module, max_epochs=1)
    assert method.optimizer_steps == BATCHES


def test_steps_of_a_learning_rate_finder_do_not_count(tmp_path: Path) -> None:
    class WithRate(LightningNetwork):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    method = NoisyUnits(3)
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    fit(method, finder, module=WithRate, max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    assert method.optimizer_steps == BATCHES


# ---- the log


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_at_the_trainers_interval(tmp_path: Path, accumulate: int) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    batches = 2 * BATCHES * accumulate
    run = trainer(
        NoisyUnits(every_n_steps=2),
        NoisyUnits(every_n_steps=2, module="net"),
        logger=logger,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        max_epochs=batches // BATCHES,
    )
    run.fit(seeded(LightningNetwork))
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("plasticity/NoisyUnits/replaced", "plasticity/NoisyUnits/net/replaced"):
        logged = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        # after 3, 6, 9, 12 steps, each with two sets of units of which one is redrawn every second step
        assert logged == [(2, 2.0), (5, 6.0), (8, 8.0), (11, 12.0)]


def test_logs_nothing_without_a_logger() -> None:
    class Counts(NoisyUnits):
        def _numbers(self) -> Any:
            raise AssertionError("nobody reads them")

    fit(Counts(3), log_every_n_steps=1)


def test_nothing_to_log_before_the_first_step(tmp_path: Path) -> None:
    class FirstNone(LightningNetwork):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.global_step == 0 else super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".training_step. returned .None.", UserWarning)
        fit(NoisyUnits(2), module=FirstNone, logger=logger, log_every_n_steps=1, max_steps=3)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [1, 2]


# ---- state


def test_state_before_anything_was_learnt() -> None:
    method = NoisyUnits(3)
    assert method.state_dict() == {}
    method.load_state_dict({})
    assert method.state_dict() == {}


def test_state_keys_tell_modules_apart() -> None:
    keys = {NoisyUnits(3, module=module).state_key for module in (None, "net", "net.first")}
    assert len(keys) == 3


def test_state_that_was_loaded_is_for_the_next_model_only() -> None:
    source, model, optimizer = attached()
    source.attach(model, optimizer, EXAMPLE)
    source.optimizer_steps = 7
    state = source.state_dict()
    method, other, other_optimizer = attached()
    method.load_state_dict(state)
    method.attach(other, other_optimizer, EXAMPLE)
    assert method.optimizer_steps == 7
    method.detach()
    method.attach(other, other_optimizer, EXAMPLE)
    assert method.optimizer_steps == 7
    method.detach()
    third = seeded(Network)
    method.attach(third, adam(third.parameters()), EXAMPLE)
    assert method.optimizer_steps == 0


def test_lightning_wrappers_of_an_optimizer() -> None:
    method, model, optimizer = attached()
    method.attach(model, SimpleNamespace(optimizer=optimizer), EXAMPLE)
    assert method.optimizers == [optimizer]


# ---- optimizers and parameters that are replaced while training goes on


class ReplacesOptimizer(LightningNetwork):
    """Gives the Trainer a new optimizer before the fourth batch, while a layer still waits for its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.not_called = nn.Linear(2, 2)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.trainer.optimizers = [adam(self.parameters())]


class ReplacesParameters(LightningNetwork):
    """Gives a layer new parameters, and the optimizer with it, before the fourth batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            for layer in (self.net.first, self.net.norm, self.net.second, self.net.head):
                layer.weight, layer.bias = (nn.Parameter(p.detach().clone()) for p in (layer.weight, layer.bias))
            self.trainer.optimizers = [adam(self.parameters())]


@pytest.mark.parametrize("module", [ReplacesOptimizer, ReplacesParameters])
def test_a_replaced_optimizer_is_followed_in_a_trainer(module: type) -> None:
    method = NoisyUnits(1)
    run = trainer(method, max_epochs=1)
    model = seeded(module)
    run.fit(model)
    assert method.optimizer_steps == BATCHES
    assert method.replaced == 2 * BATCHES  # of two sets
    assert hooks(model) == 0


def test_a_replaced_optimizer_is_said_in_a_plain_loop() -> None:
    method, model, optimizer = attached()
    method.attach(model, optimizer, EXAMPLE)
    model(*EXAMPLE).sum().backward()
    for _ in range(2):
        for _ in range(99):
            method.step()  # that another optimizer steps in between is not seen
        optimizer.step()
        method.step()  # counting begins anew
    for _ in range(99):
        method.step()
    message = r"none of its optimizers has made a step .* call detach\(\) and attach\(\)"
    with pytest.warns(UserWarning, match=message) as said:
        method.step()
    assert said[0].filename == __file__
    method.step()  # it is said once


def test_replaced_parameters_are_said_in_a_plain_loop() -> None:
    method, model, optimizer = attached()
    method.attach(model, optimizer, EXAMPLE)
    for layer in (model.net.first, model.net.norm, model.net.second, model.net.head):
        layer.weight, layer.bias = (nn.Parameter(p.detach().clone()) for p in (layer.weight, layer.bias))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    model(*EXAMPLE).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="the optimizer trains others, which the model has got since"):
        method.step()


def test_a_layer_that_the_optimizer_has_got_since_is_said_in_a_plain_loop() -> None:
    method, model, optimizer = attached()
    method.attach(model, optimizer, EXAMPLE)
    model.net.head = nn.Linear(12, 5)
    optimizer.add_param_group({"params": list(model.net.head.parameters())})
    model(*EXAMPLE).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"the model has got since\. Call detach\(\) and attach"):
        method.step()
    steps = method.optimizer_steps
    method.detach()
    method.attach(model, optimizer, EXAMPLE)
    model(*EXAMPLE).sum().backward()
    optimizer.step()
    method.step()
    assert method.optimizer_steps == steps + 1
    method.detach()


def test_without_an_optimizer_or_an_example_what_training_has_called_is_taken_at_the_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    method = ContinualBackprop(0.5, 0).attach(model)
    for _ in range(4):
        model(torch.randn(5, 3))
        method.step()
    assert method.optimizer_steps == 4
    assert method.replaced > 0


# ---- ranks


@pytest.mark.parametrize("others_agree", [True, False])
def test_ranks_with_other_parameters_are_refused_where_some_are_shared_out(
    others_agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OfParts(Recorder):
        works_on_parts = True

    asked: list[Any] = []
    monkeypatch.setattr(loop, "all_ranks_have", lambda value, device: asked.append(value) or others_agree)
    OfParts(asks=False).attach(seeded(Network)).detach()
    assert not asked, "nothing is shared out"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = seeded(Network), init_device_mesh("cpu", (1,))
        model.net.second.weight = nn.Parameter(distribute_tensor(model.net.second.weight, mesh, [Replicate()]))
        refused = pytest.raises(RuntimeError, match="OfParts needs the same network on every rank")
        with nullcontext() if others_agree else refused:
            OfParts(asks=False).attach(model)
    finally:
        dist.destroy_process_group()
    assert asked == [[(name, tuple(p.shape)) for name, p in model.named_parameters()]]


@pytest.mark.parametrize(
    ("ranks", "kernels", "off"), [(1, None, []), (2, None, [False]), (2, "some", []), (1, "some", [])]
)
def test_kernels_are_left_where_one_of_several_ranks_has_none(
    ranks: int, kernels: str | None, off: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    monkeypatch.setattr(loop, "world_size", lambda: ranks)
    monkeypatch.setattr(loop, "kernels_on", lambda device: kernels)
    monkeypatch.setattr(loop, "use_kernels", used.append)
    Recorder(asks=False).attach(seeded(Network))
    assert used == off
