"""Kernels for GPUs: run in Triton's interpreter, compiled for GPUs, and, where there is one, run on it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not there")


def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("interpreted.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert "all agree" in run.stdout, run.stderr


# The types of what each is given; capitals are constants.
FOR_EACH = {"places": "*i64", "BLOCK": 1024}
WEIGHTS = dict.fromkeys(("places", "readers", "first"), "*i64")
ACTIVATION = {"total": "*fp32", "size": "*fp32", "apart": "*fp32", "ended": "*i32"} | dict.fromkeys(
    ("channels", "rows", "near", "to_far", "to_near", "to_channel", "rows_before"), "i32"
)
STARTS = dict.fromkeys(("rows_from", "columns_from", "entries_from"), "*i64")
VECTORS = dict.fromkeys(("given", "out", "vectors", "instead", "lengths", "lefts", "rights", "factors"), "*fp32")
TYPES = [
    ("average_in", {**FOR_EACH, "weight": "fp32"}),
    ("average_utilities", {**FOR_EACH, "gradients": "*i64", "weight": "fp32"}),
    ("scale", {**FOR_EACH, "factors": "*fp32"}),
    ("scale_from_diagonal", {**FOR_EACH, "factors": "*fp32", "target": "fp32"}),
    ("pull", {**FOR_EACH, "factor": "fp32"}),
    ("contributions", {**WEIGHTS, "sizes": "*fp32", "out": "*fp32", "SIZED": True, "ROWS": 32, "UNITS": 32}),
    ("sum_columns", {"x": "*fp32", **ACTIVATION, "SIZED": True, "ROWS": 32, "CHANNELS": 64}),
    ("times_matrices", {"places": "*i64", **STARTS, **VECTORS, "BY_ROW": True, "OUTPUTS": 16, "INPUTS": 128}),
    ("times_matrices", {"places": "*i64", **STARTS, **VECTORS, "BY_ROW": False, "OUTPUTS": 64, "INPUTS": 32}),
    ("directions", {"starts": "*i64", **VECTORS, "BLOCK": 1024}),
    ("outer_products", {**STARTS, **VECTORS, "BLOCK": 1024}),
    ("sum_columns", {"x": "*bf16", **ACTIVATION, "SIZED": False, "ROWS": 512, "CHANNELS": 4}),
]


@pytest.mark.parametrize(("name", "types"), TYPES)
def test_they_compile(name, types):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_plasticity.kernels import programs

    kernel = getattr(programs, name)
    constants = {argument: types[argument] for argument in kernel.arg_names if argument.isupper()}
    signature = {argument: "constexpr" if argument.isupper() else types[argument] for argument in kernel.arg_names}
    compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    from lightning_plasticity.kernels import Tensors, on_gpu

    values, others = ([torch.randn(n, device="cuda") for n in (3, 5000)] for _ in range(2))
    factors = torch.tensor([0.5, -3.0], device="cuda")
    scaled = [value * factor for value, factor in zip(values, factors, strict=True)]
    group = Tensors(values, others)
    assert group.kernels() is on_gpu
    on_gpu.scale(group, factors)
    torch.testing.assert_close(values, scaled, rtol=0, atol=0)
    expected = [value * 0.99 + other * 0.01 for value, other in zip(values, others, strict=True)]
    on_gpu.average_in(group, 0.01)
    torch.testing.assert_close(values, expected)
    expected = [value - 0.25 * (value - other) for value, other in zip(values, others, strict=True)]
    on_gpu.pull(group, 0.25)
    torch.testing.assert_close(values, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_activations_on_a_gpu(layout, dtype):
    from lightning_plasticity.kernels import on_gpu

    x = torch.randn(64, 70, 56, 56, device="cuda").to(dtype).to(memory_format=layout)
    total, size = torch.empty(2, 70, device="cuda")
    add = on_gpu.column_sums(-3, total, size)
    found = []
    for _ in range(20):  # the same bits each time, whichever program ends last
        add(x, 0)
        found.append(torch.stack([total, size]))
    assert all(torch.equal(other, found[0]) for other in found)
    rows = x.double()
    expected = torch.stack([rows.sum([0, 2, 3]), rows.abs().sum([0, 2, 3])])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=0.1)
