"""A small causal language model for benchmarks/continual_text.py: pre-training, and what it gives to a classifier.

The model: attention and feed-forward networks, width 128, two layers, BPE of 4,096 tokens. It and its tokenizer are
trained on the four books and on the training texts of both streams, without labels, before any task (as the TF-IDF
features are fitted on the training texts without labels).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from common import update, windows
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import load_corpus, train_bpe
from nestlearn.data.continual_text import token_encoder
from nestlearn.data.documents import Document
from nestlearn.data.synthetic import IGNORE

WIDTH, LAYERS, VOCABULARY, STEPS = 128, 2, 4096, 2000


def pretrained(folder: Path, books: Path, texts: list[str], steps: int = STEPS) -> tuple[HopeForCausalLM, Any]:
    """The language model and its tokenizer, trained once and saved in a folder.

    Args:
        folder: where it is, or will be.
        books: folder of .txt files.
        texts: the streams' training texts.
        steps: of training; half on windows of the books, half on whole texts.
    """
    if not (folder / "config.json").exists():
        documents = list(load_corpus(f"text:{books}"))
        tokenizer = train_bpe([*documents, Document("\n".join(texts), "intents")], VOCABULARY)
        torch.manual_seed(0)
        model = HopeForCausalLM(_config(tokenizer))
        _train(model, tokenizer, [document.text for document in documents], texts, steps)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return HopeForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _config(tokenizer: Any) -> HopeConfig:
    return HopeConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        mixer={"type": "attention", "conv_size": 4}, cms=[{"period": None, "expansion": 4}], tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _train(model: HopeForCausalLM, tokenizer: Any, books: list[str], texts: list[str], steps: int) -> None:
    """Next-token prediction, by turns on 16 windows of 48 tokens of the books and on 48 texts."""
    ids = torch.tensor([token for book in books for token in tokenizer(book)["input_ids"]])
    rows = token_encoder(tokenizer, 32)(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    padding = tokenizer.pad_token_id
    for step in range(steps):
        if step % 2 == 0:
            batch = windows(ids, 16, 48)
        else:
            batch = rows[torch.randint(len(rows), (48,))]
            batch = batch[:, : int((batch != padding).sum(1).max())]
        labels = batch.masked_fill(batch == padding, IGNORE)
        loss = model(batch, attention_mask=batch != padding, labels=labels).loss
        update(model, loss, optimizer, schedule)
        if step % 100 >= 98:
            kind = "texts" if step % 2 else "books"
            print(f"language model, step {step + 1}: {float(loss.detach()):.2f} nats per token of {kind}", flush=True)


class PooledOutputs(nn.Module):
    """The mean over a text of the embeddings and of each block's outputs, whitened: decorrelated, of unit variance.

    Mean and covariance are those of the training texts (no labels) before any task, and stay.

    Args:
        base: the language model.
        ids: training texts, Long[n, t], padded.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, base: HopeForCausalLM, ids: Tensor) -> None:
        super().__init__()
        self.base = base.model
        self.padding = base.config.pad_token_id
        pooled = torch.cat([self.pooled(part) for part in ids.split(256)]).double()
        values, vectors = torch.linalg.eigh(pooled.T.cov())
        self.register_buffer("mean", pooled.mean(0).float())
        self.register_buffer("whitening", (vectors * values.rsqrt()).float())

    @property
    def width(self) -> int:
        """Of the features."""
        return len(self.mean)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids to features, Float[n, width]."""
        return (self._pooled(ids) - self.mean) @ self.whitening

    @torch.no_grad()
    def pooled(self, ids: Tensor) -> Tensor:
        """Means of the layers' outputs, as they are."""
        return self._pooled(ids)

    def _pooled(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids != self.padding).sum(1).max())]  # padding that no text of the batch needs
        mask = ids != self.padding
        layers = self.base(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([(layer * mask[..., None]).sum(1) for layer in layers], 1) / mask.sum(1, keepdim=True)

    def thaw(self, part: str) -> None:
        """Says what is trained: "none", the linear maps of the "last" block or of all "blocks", or "all"."""
        blocks = {"none": [], "last": [self.base.layers[-1]], "blocks": [self.base.layers], "all": [self.base]}[part]
        self.requires_grad_(False)
        for block in blocks:
            for module in block.modules():
                if part == "all" or isinstance(module, nn.Linear):
                    module.requires_grad_(True)
