"""Hope with a head for classes: equal to single rows without padding, the library's losses, files, training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.mixers import SMALL, slow_unless
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from nestlearn import HopeConfig, HopeForCausalLM, HopeForSequenceClassification, HopeForTokenClassification

from .conftest import small_config

CLASSES = 4
LENGTHS = (11, 4, 7)
LOSS_LEVELS: dict[str, Any] = {
    "cms": [{"period": 3, "expansion": 1, "lr": 0.5}, {"expansion": 2}], "cms_signal": "loss",
}  # fmt: skip
QUICK = ("self_modifying", "attention", "titans_mac", "deltanet", "levels")
CASES = [
    *(slow_unless(name in QUICK, name, "both") for name in (*SMALL, "levels")),
    *(("deltanet", side) for side in ("right", "left")),
]
HEADS = [HopeForSequenceClassification, HopeForTokenClassification]


def make(kind: Any, mixer: str = "attention", **fields: Any) -> Any:
    torch.manual_seed(0)
    model = kind(small_config(mixer, **{"num_labels": CLASSES} | fields)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".value") or name == "score.bias":  # what starts at zero
                parameter.normal_()
    return model


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The rows in one batch, and its mask; on the side "both" every row begins in another column."""
    width = max(LENGTHS) + (3 if side == "both" else 0)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for i, row in enumerate(rows()):
        start = {"right": 0, "left": width - len(row), "both": i + 1}[side]
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return torch.log(sum((torch.exp(z) for z in logits), torch.zeros(()))) - logits[label]


def one_by_one(model: Any) -> list[Tensor]:
    """``W h_t + b`` of every token of every row, read alone."""
    found = []
    for row in rows():
        hidden = model.model(row[None], output_layer=model.lm_head, use_cache=False).last_hidden_state[0]
        bias = 0 if model.score.bias is None else model.score.bias
        found.append(torch.stack([model.score.weight @ h + bias for h in hidden]))
    return found


def equal(a: Tensor, b: Tensor, bound: float = 1e-9) -> bool:
    return bool((a - b).abs().max() <= bound * b.abs().max().clamp(min=1))


@pytest.mark.parametrize(("mixer", "side"), CASES)
def test_the_label_of_a_sequence_is_that_of_the_row_alone(mixer: str, side: str) -> None:
    model = make(HopeForSequenceClassification, mixer)
    ids, mask = padded(side)
    labels = [2, 0, 3]
    expected = torch.stack([logits[-1] for logits in one_by_one(model)])
    loss = sum(cross_entropy(z, label) for z, label in zip(expected, labels, strict=True)) / len(labels)
    output = model(ids, attention_mask=mask, labels=torch.tensor(labels))
    assert equal(output.logits, expected) and equal(output.loss, cast(Tensor, loss))
    assert output.past_key_values is None


@pytest.mark.parametrize(("mixer", "side"), CASES)
def test_the_labels_of_tokens_are_those_of_the_row_alone(mixer: str, side: str) -> None:
    model = make(HopeForTokenClassification, mixer)
    ids, mask = padded(side)
    generator = torch.Generator().manual_seed(1)
    labels = torch.where(mask.bool(), torch.randint(CLASSES, ids.shape, generator=generator), -100)
    labels[0, mask[0].nonzero()[2]] = -100
    expected = one_by_one(model)
    output = model(ids, attention_mask=mask, labels=labels)
    losses = []
    for i, logits in enumerate(expected):
        columns = mask[i].nonzero()[:, 0]
        assert equal(output.logits[i, columns], logits)
        losses += [
            cross_entropy(z, int(labels[i, t])) for z, t in zip(logits, columns, strict=True) if labels[i, t] != -100
        ]
    assert len(losses) == sum(LENGTHS) - 1
    assert equal(output.loss, torch.stack(losses).mean())
    assert equal(
        model(ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss, torch.stack(losses).sum() / 7
    )


@pytest.mark.parametrize(
    "fields", [{"mixer": "deltanet"}, {"mixer": "self_modifying"}, {"mixer": "levels"}, LOSS_LEVELS]
)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_of_a_padded_batch_are_those_of_single_rows(kind: Any, fields: dict[str, Any]) -> None:
    model = make(kind, **fields)
    ids, mask = padded("both")
    whole = kind is HopeForSequenceClassification
    labels = torch.tensor([2, 0, 3]) if whole else torch.where(mask.bool(), ids % CLASSES, -100)
    alone = one_by_one(model)
    if whole:
        loss = sum(cross_entropy(z[-1], int(label)) for z, label in zip(alone, labels, strict=True)) / 3
    else:
        pairs = [
            (z, int(x) % CLASSES) for row, zs in zip(rows(), alone, strict=True) for x, z in zip(row, zs, strict=True)
        ]
        loss = torch.stack([cross_entropy(z, label) for z, label in pairs]).mean()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(cast(Tensor, loss), list(parameters.values()), allow_unused=True)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    learned = 0
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        if gradient is None or parameter.grad is None:
            assert (gradient is None or not gradient.any()) and (parameter.grad is None or not parameter.grad.any()), (
                name
            )
        else:
            assert equal(parameter.grad, gradient), name
            learned += bool(gradient.abs().max() > 0)
    # The output layer of the language model is a constant of what levels write.
    assert learned >= 0.9 * len([name for name in parameters if name != "lm_head.weight"])


def test_what_levels_write_reaches_the_label() -> None:
    model = make(HopeForSequenceClassification, **LOSS_LEVELS)
    ids, mask = padded("left")
    on, off = (model(ids, attention_mask=mask, writes=writes).logits for writes in (True, False))
    assert (on - off).abs().max() > 1e-4
    tied = make(HopeForSequenceClassification, **LOSS_LEVELS, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert make(HopeForSequenceClassification, tie_word_embeddings=True).lm_head is None


def test_without_a_mask_the_label_is_at_the_last_token_that_is_not_padding() -> None:
    model = make(HopeForSequenceClassification)  # pad_token_id is 0
    ids, _ = padded("right")
    expected = torch.stack([logits[-1] for logits in one_by_one(model)])
    assert equal(model(ids).logits, expected)
    unpadded = make(HopeForSequenceClassification, pad_token_id=None)
    assert equal(unpadded(rows()[0][None]).logits, expected[:1])
    embeds = model.model.embed_tokens(rows()[0][None])
    assert equal(model(inputs_embeds=embeds).logits, expected[:1])


def test_a_sequence_in_two_parts() -> None:
    model = make(HopeForSequenceClassification, "deltanet")
    row = rows()[0][None]
    cache = model(row[:, :5], use_cache=True).past_key_values
    assert equal(model(row[:, 5:], past_key_values=cache).logits, model(row).logits)


def test_the_losses_of_numbers_and_of_several_labels() -> None:
    ids, mask = padded("left")
    numbers = torch.tensor([0.5, -1.0, 2.0])
    model = make(HopeForSequenceClassification, num_labels=1)
    output = model(ids, attention_mask=mask, labels=numbers)
    expected = sum((float(z) - float(y)) ** 2 for z, y in zip(output.logits[:, 0].tolist(), numbers, strict=True)) / 3
    assert float(output.loss.detach()) == pytest.approx(expected) and model.config.problem_type == "regression"
    labels = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])
    model = make(HopeForSequenceClassification, problem_type="multi_label_classification")
    output = model(ids, attention_mask=mask, labels=labels)
    terms = [
        -math.log(p if y else 1 - p)
        for row, ys in zip(torch.sigmoid(output.logits).tolist(), labels.tolist(), strict=True)
        for p, y in zip(row, ys, strict=True)
    ]
    assert float(output.loss.detach()) == pytest.approx(sum(terms) / len(terms))
    several = make(HopeForSequenceClassification, problem_type="regression")
    labels = torch.randn(3, CLASSES)
    output = several(ids, attention_mask=mask, labels=labels)
    assert float(output.loss.detach()) == pytest.approx(float((output.logits.detach() - labels).square().mean()))
    by_labels = make(HopeForSequenceClassification)
    by_labels(ids, attention_mask=mask, labels=torch.rand(3, CLASSES))
    assert by_labels.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("fields", [{}, LOSS_LEVELS])
@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (HopeForSequenceClassification, AutoModelForSequenceClassification),
        (HopeForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_saved_and_loaded(kind: Any, auto: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    names = {0: "O", 1: "PER", 2: "LOC", 3: "ORG"}
    model = make(kind, id2label=names, label2id={name: i for i, name in names.items()}, **fields)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids, mask = padded("right")
    assert type(again) is kind and again.config.id2label == names
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert kind.__name__ in (tmp_path / "nestlearn_model.py").read_text()
    assert type(auto.from_config(small_config(num_labels=2))) is kind


@pytest.mark.parametrize("kind", HEADS)
def test_a_trained_language_model_gets_a_head(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    language = HopeForCausalLM(small_config(**LOSS_LEVELS))
    language.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, num_labels=3)
    assert model.score.weight.shape == (3, 16) and bool(model.score.weight.any())
    for name, weight in language.state_dict().items():  # the output layer too: the levels learn by it
        assert torch.equal(model.state_dict()[name], weight)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HopeForCausalLM


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (HopeForSequenceClassification, {"labels": torch.tensor([0, 4, 1])}, r"labels contains 4.*classes 0\.\.3"),
        (HopeForTokenClassification, {"labels": torch.full((3, 11), -1)}, r"labels contains -1"),
        (HopeForTokenClassification, {"labels": torch.zeros(3, 10, dtype=torch.long)}, r"shape \(3, 10\)"),
        (HopeForTokenClassification, {"labels": torch.zeros(3, 11)}, "dtype torch.float32"),
        (HopeForSequenceClassification, {"attention_mask": torch.eye(3, 11)[[0, 1, 1]] * torch.tensor([[1], [0], [1]])},
         "row 1 has no real token"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind: Any, arguments: dict[str, Any], message: str) -> None:
    ids, mask = padded("right")
    with pytest.raises(ValueError, match=message):
        make(kind)(ids, **{"attention_mask": mask} | arguments)


def test_tokens_without_any_label_give_0() -> None:
    model = make(HopeForTokenClassification)
    ids, mask = padded("right")
    loss = model(ids, attention_mask=mask, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0 and not model.score.weight.grad.any()


@pytest.mark.parametrize("kind", HEADS)
def test_the_trainer_trains_it(kind: Any, tmp_path: Path) -> None:
    """The class is which of two tokens was read last, of the whole sequence or up to each token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    mixer = {"type": "memory", "memory": "deltanet"}
    model = kind(HopeConfig(**cast(Any, {"mixer": mixer, "num_labels": 2, "pad_token_id": 0} | sizes)))
    generator = torch.Generator().manual_seed(0)
    data = []
    for length in torch.randint(4, 9, (64,), generator=generator).tolist():
        ids = torch.randint(3, 5, (length,), generator=generator).tolist()
        labels = ids[-1] - 3 if kind is HopeForSequenceClassification else [x - 3 for x in ids]
        data.append({"input_ids": ids, "labels": labels})

    def collate(examples: list[Any]) -> dict[str, Tensor]:
        width = max(len(example["input_ids"]) for example in examples)

        def fill(row: list[int], value: int) -> list[int]:
            return row + [value] * (width - len(row))

        ids = torch.tensor([fill(example["input_ids"], 0) for example in examples])
        whole = kind is HopeForSequenceClassification
        labels = torch.tensor([x["labels"] if whole else fill(x["labels"], -100) for x in examples])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=0.02, logging_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=cast(Any, data), eval_dataset=cast(Any, data), data_collator=collate
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0.4 < losses[0] < 1.0  # about ln 2: accumulation divides it once
    found = trainer.predict(cast(Any, data))
    right = cast(Any, found.predictions).argmax(-1) == found.label_ids
    real = cast(Any, found.label_ids) != -100
    assert right[real].mean() > 0.95
