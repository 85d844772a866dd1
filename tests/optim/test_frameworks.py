"""The optimizers inside the training loops of others: transformers' Trainer, Accelerate, Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from nestlearn.optim import DGD, M3, DeltaMomentum, InputProjection, MultiTimescale, NestedTransfer, param_groups

Make = Callable[[nn.Module], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "m3": lambda model: M3(param_groups(model), lr=0.02, slow_period=3),
    "delta-momentum": lambda model: DeltaMomentum(param_groups(model), lr=0.02),
    "multi-timescale": lambda model: MultiTimescale(M3(param_groups(model), lr=0.02), [2, 1, 3]),
    "dgd": lambda model: DGD(param_groups(model), model, lr=0.1, adamw_lr=0.02, erase=0.0),
    "multi-timescale-dgd": lambda model: MultiTimescale(
        DGD(param_groups(model), model, lr=0.1, adamw_lr=0.02, erase=0.0), [3, 1, 2]
    ),
    "dgd-inverse": lambda model: DGD(
        param_groups(model), model, lr=0.02, adamw_lr=0.02, precondition="inverse", refresh=3
    ),
    "input-projection": lambda model: InputProjection(M3(param_groups(model), lr=0.02), model, period=3),
    "nested-transfer": lambda model: NestedTransfer(M3(param_groups(model), lr=0.02), period=3),
}


def optimizers(*quick: str) -> pytest.MarkDecorator:
    """All optimizers in one framework, those that are not named in the slow suite."""
    cases = [
        pytest.param(make, id=name, marks=[] if name in quick else pytest.mark.slow)
        for name, make in OPTIMIZERS.items()
    ]
    return pytest.mark.parametrize("make", cases)


class Texts(torch.utils.data.Dataset):
    """Sequences that count up from their number."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(10) + index) % 11
        return {"input_ids": tokens, "labels": tokens}


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=11, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    ))  # fmt: skip


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def run_trainer(make: Make, folder: Path, resume: str | None = None) -> nn.Module:
    model = language_model()
    optimizer = make(model)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 8)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, save_steps=4, per_device_train_batch_size=3, logging_steps=4, seed=0,
        use_cpu=True, report_to="none", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Texts(), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=resume)
    return model


@optimizers("m3", "multi-timescale-dgd", "input-projection")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_transformers_trainer_trains_and_resumes_to_the_bit(make: Make, tmp_path: Path):
    whole = run_trainer(make, tmp_path / "whole")
    assert not same(whole, language_model())
    resumed = run_trainer(make, tmp_path / "again", str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole, resumed)


@optimizers("delta-momentum", "dgd", "nested-transfer")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_accelerate_trains_as_the_plain_loop_and_loads_its_state(make: Make, tmp_path: Path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    def run(engine: Accelerator | None, stop: int | None = None) -> nn.Module:
        model = language_model()
        optimizer = make(model)
        schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader: Any = torch.utils.data.DataLoader(Texts(), batch_size=4)
        if engine:
            model, optimizer, loader, schedule = engine.prepare(model, optimizer, loader, schedule)
        batches = [batch for _ in range(2) for batch in loader]
        for number, batch in enumerate(batches):
            if engine:
                with engine.accumulate(model):
                    engine.backward(model(**batch).loss)
                    engine.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                if number + 1 == stop:
                    engine.save_state(str(tmp_path / "state"))
            else:
                (model(**batch).loss / 2).backward()
                if number % 2:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        return model

    assert same(run(accelerator, stop=6), run(None))
    # What was saved is read back into a new model and optimizer.
    model, again = language_model(), Accelerator(cpu=True)
    prepared, optimizer = again.prepare(model, make(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    again.prepare(schedule)
    again.load_state(str(tmp_path / "state"))
    assert optimizer.state_dict()["state"]
    assert not same(prepared, language_model())


@optimizers("m3", "dgd-inverse", "multi-timescale")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_lightning_trains_as_the_plain_loop_and_resumes_to_the_bit(make: Make, tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = language_model()

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = make(self.model)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(epochs: int, resume: Path | None = None) -> nn.Module:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, accumulate_grad_batches=2, gradient_clip_val=1.0,
            default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(Texts(), batch_size=3), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.model

    plain = language_model()
    optimizer = make(plain)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for number, batch in enumerate([b for _ in range(2) for b in torch.utils.data.DataLoader(Texts(), batch_size=3)]):
        (plain(**batch).loss / 2).backward()
        if number % 2:
            # In the optimizer's order, as Lightning does: the norm is rounded.
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    whole = fit(2)
    assert same(whole, plain) and not same(whole, language_model())
    fit(1)  # four steps: in the middle of periods
    assert same(whole, fit(2, tmp_path / "1.ckpt"))
