"""Networks of many kinds, small and untrained, each with an example input: for `find_units_sweep.py`."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

Network = tuple[nn.Module, tuple]


class Called(nn.Module):
    """A model with the arguments it is called with."""

    def __init__(self, model: nn.Module, arguments: dict) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self):
        """Calls it."""
        return self.model(**self.arguments)


# ---- Hugging Face, from small configurations

TOKENS = {"input_ids": torch.arange(2, 9)[None]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODED = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}
SEEN = {"image_size": 32, "patch_size": 8}
WHISPER = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "num_mel_bins": 8},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 16},
    **{"decoder_start_token_id": 1, **WORDS},
}
MODELS = {
    "BertModel": ({**SIZES, **WORDS}, TOKENS),
    "GPT2LMHeadModel": ({"n_embd": 64, "n_layer": 2, "n_head": 4, **WORDS}, TOKENS),
    "LlamaForCausalLM": ({**SIZES, **WORDS, "num_key_value_heads": 2}, TOKENS),
    "MistralForCausalLM": ({**SIZES, **WORDS, "num_key_value_heads": 2}, TOKENS),
    "Qwen2ForCausalLM": ({**SIZES, **WORDS, "num_key_value_heads": 2}, TOKENS),
    "Qwen3ForCausalLM": ({**SIZES, **WORDS, "num_key_value_heads": 2, "head_dim": 16}, TOKENS),
    "MixtralForCausalLM": ({**SIZES, **WORDS, "num_key_value_heads": 2, "num_local_experts": 4}, TOKENS),
    "AlbertModel": ({**SIZES, **WORDS, "embedding_size": 32}, TOKENS),
    "T5Model": ({"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16, **WORDS}, DECODED),
    "WhisperModel": (
        WHISPER,
        {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": torch.arange(2, 6)[None]},
    ),
    "CLIPModel": (
        {"text_config": {**SIZES, **WORDS}, "vision_config": {**SIZES, **SEEN}, "projection_dim": 32},
        {**TOKENS, **PIXELS},
    ),
    "ViTModel": ({**SIZES, **SEEN}, PIXELS),
    "Dinov2Model": ({**SIZES, **SEEN, "mlp_ratio": 2}, PIXELS),
    "MambaForCausalLM": ({"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, **WORDS}, TOKENS),
}


def hugging_face(name: str) -> Network:
    import transformers

    settings, arguments = MODELS[name]
    kind = getattr(transformers, name)
    return Called(kind(kind.config_class(**settings)), arguments), ()


# ---- torch's own parts


class Sequences(nn.Module):
    """Tokens, a recurrent network, a head on each position or on the last state."""

    def __init__(self, kind: type, outputs: int, by_state: bool = False, **settings) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 32), kind(32, 64, batch_first=True, **settings)
        self.head, self.by_state = nn.Linear(outputs, 5), by_state

    def forward(self, tokens):
        """Scores for each position, or one for all."""
        sequence, states = self.rnn(self.embed(tokens))
        last = (states[0] if isinstance(states, tuple) else states)[-1]
        return self.head(last if self.by_state else sequence)


class Translator(nn.Module):
    """An encoder whose state the decoder goes on from."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(64, 50)
        self.encoder, self.decoder = nn.LSTM(32, 64, 2, batch_first=True), nn.LSTM(32, 64, 2, batch_first=True)

    def forward(self, source, target):
        """Scores for each word of the target."""
        _, states = self.encoder(self.embed(source))
        return self.head(self.decoder(self.embed(target), states)[0])


class Autoencoder(nn.Module):
    """A variational autoencoder of images, by convolutions and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.mean, self.scale = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decode = nn.Sequential(
            nn.Linear(8, 32 * 49), nn.ReLU(), nn.Unflatten(1, (32, 7, 7)),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x):
        """The image again, and what it was drawn from."""
        hidden = self.encode(x)
        mean, scale = self.mean(hidden), self.scale(hidden)
        return self.decode(mean + torch.randn_like(mean) * (scale / 2).exp()), mean, scale


def generator() -> nn.Module:
    """A DCGAN's."""
    sizes = [100, 64, 32, 16]
    blocks = [
        part
        for i, (a, b) in enumerate(pairwise(sizes))
        for part in (nn.ConvTranspose2d(a, b, 4, 1 + (i > 0), int(i > 0), bias=False), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh())


def discriminator() -> nn.Module:
    """A DCGAN's."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4),
    )  # fmt: skip


def transformer() -> Network:
    model = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
    return model, (torch.randn(1, 6, 64), torch.randn(1, 5, 64))


# ---- U-Nets and graphs


def segmentation(name: str) -> Network:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=3), (torch.randn(1, 3, 64, 64),)


def diffusion() -> Network:
    from diffusers import UNet2DModel

    settings = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(**settings, **blocks)
    return Called(model, {"sample": torch.randn(1, 3, 16, 16), "timestep": 3}), ()


def latent_autoencoder() -> Network:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, **blocks)
    return Called(model, {"sample": torch.randn(1, 3, 32, 32)}), ()


def graph(name: str) -> Network:
    from torch_geometric.nn import models

    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    return getattr(models, name)(8, 32, 3, out_channels=4), (torch.randn(4, 8), edges)


IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS_OF_50 = torch.arange(7)[None]
NETWORKS: dict[tuple[str, str], Callable[[], Network]] = {
    **{("transformers", name): (lambda name=name: hugging_face(name)) for name in MODELS},
    ("torch", "Transformer"): transformer,
    ("torch", "LSTM classifier"): lambda: (Sequences(nn.LSTM, 64, True, num_layers=2), (WORDS_OF_50,)),
    ("torch", "LSTM with projections"): lambda: (Sequences(nn.LSTM, 16, proj_size=16), (WORDS_OF_50,)),
    ("torch", "GRU tagger, both ways"): lambda: (
        Sequences(nn.GRU, 128, num_layers=2, bidirectional=True),
        (WORDS_OF_50,),
    ),
    ("torch", "LSTM translator"): lambda: (Translator(), (WORDS_OF_50, WORDS_OF_50)),
    ("torch", "DCGAN generator"): lambda: (generator(), (torch.randn(1, 100, 1, 1),)),
    ("torch", "DCGAN discriminator"): lambda: (discriminator(), (IMAGE,)),
    ("torch", "VAE"): lambda: (Autoencoder(), (torch.randn(1, 1, 28, 28),)),
    **{("segmentation-models-pytorch", name): (lambda name=name: segmentation(name)) for name in ("Unet", "FPN")},
    ("diffusers", "UNet2DModel"): diffusion,
    ("diffusers", "AutoencoderKL"): latent_autoencoder,
    **{("torch-geometric", name): (lambda name=name: graph(name)) for name in ("GCN", "GAT", "GraphSAGE", "GIN")},
}
