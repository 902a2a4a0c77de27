"""Small changes of weights in half precision add up to what they are in float32."""

import functools

import pytest
import torch
from torch import nn

from lightning_plasticity import L2Init, LayerReset, ShrinkAndPerturb, SoftWeightRescaling
from lightning_plasticity.editing.edits import Editor
from lightning_plasticity.editing.remainders import Remainders

METHODS = {
    "SoftWeightRescaling": lambda: SoftWeightRescaling(1e-3),
    "L2Init": lambda: L2Init(1e-3),  # at a learning rate of 0.1: a change of one in 10,000
    "ShrinkAndPerturb": lambda: ShrinkAndPerturb(1 - 1e-4, 1e-4, every_n_train_steps=1, seed=0),
}
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(dtype)


@functools.cache
def norms_after_1000_steps(name, dtype, noise):
    """Norms of the weights, which begin half as large again as the method found them."""
    make = METHODS[name] if name else None
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = make().attach(model, optimizer, example_inputs=(torch.zeros(1, 20, dtype=dtype),)) if make else None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for _ in range(1000):
        for parameter in model.parameters():
            parameter.grad = noise * torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
        if method is not None:
            method.step()
    return torch.stack([layer.weight.detach().double().norm() for layer in model[::2]])


@half_types
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.001), (0.01, 0.01)], ids=["unmoved", "moved by training"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_from_the_norms_what_it_takes_in_float32(name, noise, tolerance, dtype):
    def share_that_is_left(dtype):
        # against plain training in the same precision, which rounding moves as well
        return norms_after_1000_steps(name, dtype, noise) / norms_after_1000_steps(None, dtype, noise)

    expected = share_that_is_left(torch.float32)
    assert (expected < 0.98).all()  # so that a method without effect would be seen
    torch.testing.assert_close(share_that_is_left(dtype), expected, rtol=tolerance, atol=0.0)


def kept_by(model):
    return Editor(model), model.weight, model.bias


@half_types
def test_a_value_that_was_set_has_no_remainder(dtype):
    torch.manual_seed(0)
    editor, weight, _ = kept_by(nn.Linear(8, 8).to(dtype))
    editor.scale([weight], 0.9999)
    assert not editor.precise([weight])[0].equal(weight.float())
    weight.data[2] = 1e-4  # by another
    editor.zero_columns("", torch.tensor([3]))
    editor.scale([weight], 0.9999)
    assert (weight[:, 3] == 0).all()
    assert (weight[2, :3] == torch.tensor(1e-4, dtype=dtype)).all()
    values = torch.randn(8, 8).to(dtype)
    editor.write([weight], [values])
    assert editor.precise([weight])[0].equal(values.float())


def test_what_was_not_finite_leaves_no_trace():
    editor, weight, _ = kept_by(nn.Linear(2, 2).bfloat16())
    editor.add([weight], [torch.full((2, 2), torch.nan)])
    weight.data.fill_(1.0)
    editor.scale([weight], 0.5)
    assert (weight == 0.5).all()


def test_nothing_is_kept_where_nothing_is_lost():
    for dtype in (torch.float32, torch.float64):
        editor, weight, bias = kept_by(nn.Linear(2, 2).to(dtype))
        editor.scale([weight, bias], 0.999)
        assert editor.precise([weight])[0] is weight
        assert editor.remainders.state_dict() == {}
    model = network(torch.bfloat16)
    method = LayerReset(1, every_n_train_steps=1).attach(model, None, example_inputs=(torch.zeros(1, 20).bfloat16(),))
    method.step()
    assert "remainders" not in method.state_dict()  # fresh draws are set, once


def test_buffers_are_rounded():
    norm = nn.BatchNorm1d(2).bfloat16()
    editor = Editor(norm)
    editor.scale([norm.weight, norm.running_var], torch.tensor([0.999, 0.999]))
    assert list(editor.remainders.state_dict()) == ["weight"]


def test_state_goes_on_and_must_fit():
    torch.manual_seed(0)
    model = nn.Linear(4, 4).bfloat16()
    first, weight, bias = kept_by(model)
    first.scale([weight, bias], 0.999)
    state = first.remainders.state_dict()
    assert list(state) == ["weight", "bias"]
    second = Editor(model)
    second.remainders.load_state_dict(state)
    assert second.precise([weight])[0].equal(first.precise([weight])[0])
    first.scale([weight], 0.999)
    assert not first.remainders.state_dict()["weight"].equal(state["weight"])  # the state is a copy
    for other, what in (
        (nn.Linear(4, 4), r"is torch.float32 of shape \(4, 4\)"),
        (nn.Linear(4, 3).bfloat16(), r"is torch.bfloat16 of shape \(3, 4\)"),
        (nn.Sequential(nn.Linear(4, 4).bfloat16()), "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"kept back from 'weight'.*{what}.*Resume with the model"):
            Remainders(other).load_state_dict(state)
