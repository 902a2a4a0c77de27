"""Models of timm and torchvision that between them hold every trap; the sweep over all families is a benchmark."""

import pytest
import torch

from lightning_plasticity.units.find import find_units
from units.property_check import invalid

timm = pytest.importorskip("timm", reason="needs timm: pip install lightning-plasticity[vision]")
torchvision = pytest.importorskip("torchvision", reason="needs torchvision: pip install lightning-plasticity[vision]")

MODELS = {  # image size, how many sets at least
    "test_vit": (160, 6),  # attention and LayerNorm on a stream
    "test_byobnet": (64, 10),  # several kinds of blocks, attention pooling
    "test_convnext": (64, 18),  # depthwise convolutions on the stream, LayerNorm on the way: not exact
    "test_efficientnet": (64, 10),  # depthwise convolutions inside blocks, squeeze-and-excite
    "test_efficientnet_gn": (64, 10),  # GroupNorm
    "test_nfnet": (64, 4),  # standardised weights
    "test_resnet": (64, 7),
    "test_maxvit": (160, 8),
    "convmixer_768_32": (32, 30),  # depthwise convolutions with a skip around them
    "mobilenetv3_small_050": (64, 20),
    "gmlp_ti16_224": (224, 30),  # a spatial gate
    "eva02_tiny_patch14_224": (224, 12),  # SwiGLU
    "googlenet": (96, 30),  # concatenation, heads that only training calls
    "shufflenet_v2_x0_5": (64, 10),  # channel shuffle and split
    "squeezenet1_1": (64, 20),
}


def build(name: str) -> torch.nn.Module:
    if timm.is_model(name):
        return timm.create_model(name, num_classes=10)
    arguments = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **arguments)


@pytest.mark.parametrize("name", MODELS)
def test_every_set_found_has_the_property(name):
    torch.manual_seed(0)
    size, at_least = MODELS[name]
    model = build(name).eval()
    inputs = (torch.randn(1, 3, size, size),)
    found = find_units(model, *inputs)
    assert invalid(model, inputs, found) == []
    assert len(found) >= at_least
