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


@pytest.mark.parametrize("name", ["_average_in", "_scale", "_pull"])
def test_they_compile(name):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_plasticity.kernels import on_gpu

    kernel = getattr(on_gpu, name)
    argument = kernel.arg_names[1]
    types = {"places": "*i64", argument: "*fp32" if argument == "factors" else "fp32", "BLOCK": "constexpr"}
    compiled = compile(ASTSource(kernel, types, {"BLOCK": 1024}), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


def test_contributions_compile():
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_plasticity.kernels import on_gpu

    types = dict.fromkeys(("places", "readers", "first"), "*i64") | {"sizes": "*fp32", "out": "*fp32"}
    constants = {"SIZED": True, "ROWS": 32, "UNITS": 32}
    signature = types | dict.fromkeys(constants, "constexpr")
    compiled = compile(ASTSource(on_gpu._contributions, signature, constants), target=GPUTarget("cuda", 80, 32))
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
