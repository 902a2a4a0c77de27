"""Small models of Hugging Face families, which are called by names: MLPs and the values of attention in every block."""

import warnings

import pytest
import torch
from torch import nn

from lightning_plasticity.units import find_units
from units.property_check import invalid

transformers = pytest.importorskip("transformers", reason="needs transformers")

TOKENS = {"input_ids": torch.arange(7)[None]}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}

# the configuration, what the model is called with, and the ends of the names of layers with units
FAMILIES = {
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, **WORDS}, TOKENS, {"c_attn", "c_fc"}),
    "LlamaForCausalLM": ({"num_key_value_heads": 2, **SIZES, **WORDS}, TOKENS, {"v_proj", "gate_proj"}),
    "BertModel": ({**SIZES, **WORDS}, TOKENS, {"value", "intermediate.dense"}),
    "T5Model": ({**T5, **WORDS}, {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}, {"Attention.v", "wi"}),
    "ViTModel": ({**SIZES, "image_size": 32, "patch_size": 8}, {"pixel_values": torch.ones(1, 3, 32, 32)}, {"fc1"}),
}


class Called(nn.Module):
    """A model with the arguments it is called with."""

    def __init__(self, model, arguments):
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self):
        return self.model(**self.arguments)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_has_units_of_its_mlp_and_its_values(name):
    torch.manual_seed(0)
    settings, arguments, ends = FAMILIES[name]
    kind = getattr(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = kind(kind.config_class(**settings)).eval()
        assert len(find_units(model, **arguments)) == (10 if name == "T5Model" else 4)
        called = Called(model, arguments)
        found = find_units(called)
        for end in ends:
            assert sum(units.name.endswith(end) for units in found) >= 2, end
        assert all(units.exact for units in found)
        assert invalid(called, (), found) == []
