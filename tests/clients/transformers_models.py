"""Models of transformers, called by keywords; one of them with adapters of peft. Made from a configuration, tiny."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .harness import Client, Config, Refusal, Run, fit, instantiate

WORDS, LENGTH = 32, 6


class Sentences(Dataset):
    """Encoded sentences, as a tokenizer gives them, with a label each or with themselves as labels."""

    def __init__(self, classes: int | None) -> None:
        self.ids = torch.randint(1, WORDS, (16, LENGTH))
        self.labels = self.ids if classes is None else torch.arange(16) % classes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.labels[i]}


class Transformer(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=0.01)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def llama_with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
    )
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def train_bert(callbacks: list[Config]) -> Run:
    return fit(Transformer(bert().train()), DataLoader(Sentences(3), batch_size=4), instantiate(callbacks))


def train_gpt2(callbacks: list[Config]) -> Run:
    return fit(Transformer(gpt2().train()), DataLoader(Sentences(None), batch_size=4), instantiate(callbacks))


def train_lora(callbacks: list[Config]) -> Run:
    model = llama_with_lora().train()
    return fit(Transformer(model), DataLoader(Sentences(None), batch_size=4), instantiate(callbacks))


CLIENTS = [
    Client("BERT of transformers, called by keywords", train_bert, ("model",), needs=("transformers",)),
    Client(
        "GPT-2 of transformers, called by keywords",
        train_gpt2,
        ("model",),
        refused={
            "LayerReset": Refusal(
                "would also reset 'model.transformer.wte.weight', which is one parameter with 'model.lm_head.weight'",
                "The last layer and the embedding of words share their weights: whether both are meant is to be said.",
            ),
        },
        needs=("transformers",),
    ),
    Client("Llama of transformers with LoRA by peft", train_lora, ("model",), needs=("transformers", "peft")),
]
