"""What a run reads, counts, logs and saves."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from safetensors.torch import load_file

from nestlearn import HopeForCausalLM, flops
from nestlearn.data import PackedDataset, PackedStream, StreamingCorpus, bytes_per_token, load_corpus
from nestlearn.train import TrainConfig, load_model, load_tokenizer, read_log, saved_config, train
from nestlearn.train import engine as engine_module
from nestlearn.train.load import prepare_model, prepare_model_config, prepare_tokenizer
from nestlearn.train.meter import Meter, append_line, count_targets, cut_log, nats_to_bits_per_byte
from nestlearn.train.stream import RecordedStream
from nestlearn.train.trainer import HopeTrainer

Make = Callable[..., TrainConfig]


def test_the_first_logged_loss_is_the_models_own(tiny: Make):
    config = tiny(log_interval=1, steps=1)
    train(config)
    tokenizer = prepare_tokenizer(config)
    model = prepare_model(config, prepare_model_config(config, tokenizer))
    data = PackedDataset(load_corpus(config.corpus, "train"), tokenizer, config.sequence_length, seed=config.seed)
    losses = [model(item["input_ids"][None], labels=item["labels"][None]).loss.item() for item in data]
    line = read_log(config.out)[0]
    assert abs(line["loss"] - math.log(259)) < 0.05 * math.log(259)
    assert min(losses) <= line["loss"] <= max(losses)
    assert line["tokens"] == config.batch_size * config.sequence_length
    assert line["flops"] == 3 * flops(model.config, config.sequence_length) * line["tokens"]
    # Every target but </s> is one byte.
    assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2), rel=0.05)


@pytest.mark.parametrize("preset", ["hope-tiny", "transformer-tiny"])
def test_a_run_learns_and_its_result_is_what_the_log_says(tiny: Make, preset: str):
    config = tiny(preset=preset, steps=25, batch_size=8, learning_rate=1e-2, eval_interval=10)
    result = train(config)
    log = read_log(config.out)
    assert result.eval_loss < 4.6 < log[0]["loss"]
    assert [line["step"] for line in log if "eval_loss" in line] == [10, 20, 25]
    assert (result.steps, result.tokens) == (25, 25 * config.tokens_per_step)
    assert result.loss == [line["loss"] for line in log if "loss" in line][-1]
    assert result.eval_bits_per_byte == log[-1]["eval_bits_per_byte"]


def test_accumulated_batches_equal_one_large_batch(tiny: Make, tmp_path: Path):
    # The same two windows per update, at once and one after the other: the same mean, up to rounding.
    runs = {"one": {"batch_size": 4}, "two": {"batch_size": 2, "gradient_accumulation": 2}}
    for name, changes in runs.items():
        train(tiny(out=str(tmp_path / name), steps=2, log_interval=1, dtype="float64", **changes))
    one, two = (read_log(tmp_path / name) for name in runs)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    assert one[0]["tokens"] == two[0]["tokens"]
    assert one[1]["loss"] == pytest.approx(two[1]["loss"], rel=1e-6)


def test_a_model_can_be_trained_further_from_its_folder(tiny: Make, tmp_path: Path):
    first = tiny(tokenizer="bpe:300", out=str(tmp_path / "first"))
    train(first)
    tokenizer = load_tokenizer(first.out)
    assert len(tokenizer) == 300 == load_model(first.out).config.vocab_size
    second = tiny(preset=first.out, out=str(tmp_path / "second"), model={}, steps=2, log_interval=1)
    train(second)
    assert len(load_tokenizer(second.out)) == 300
    assert read_log(second.out)[0]["loss"] < read_log(first.out)[0]["loss"]
    with pytest.raises(ValueError, match="hidden_size cannot change"):
        train(tiny(preset=first.out, out=str(tmp_path / "third"), model={"hidden_size": 32}))


def test_mixed_precision_keeps_float32_weights(tiny: Make):
    result = train(tiny(preset="hope-tiny", dtype="bfloat16", steps=2))
    assert math.isfinite(result.loss)
    assert {tensor.dtype for tensor in load_file(Path(tiny().out) / "model.safetensors").values()} == {torch.float32}


def test_the_saved_folder_is_a_hugging_face_model(tiny: Make):
    config = tiny(preset="hope-tiny")
    train(config)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(config.out)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    assert isinstance(model, HopeForCausalLM)
    assert model.config.use_cache and model.config.reset_token_id == tokenizer.bos_token_id
    inputs = tokenizer("the cat", return_tensors="pt")
    assert model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[0] == 1
    assert saved_config(config.out) == config
    last = load_file(Path(config.out) / "checkpoint-6" / "model.safetensors")
    for name, tensor in load_file(Path(config.out) / "model.safetensors").items():
        assert torch.equal(tensor, last[name])


def test_weight_decay_spares_vectors(tiny: Make):
    config = tiny(preset="hope-tiny")
    tokenizer = prepare_tokenizer(config)
    model = prepare_model(config, prepare_model_config(config, tokenizer))
    trainer = engine_module.build_trainer(config, model, tokenizer, engine_module.load_data(config, tokenizer), Meter())
    decayed = set(trainer.get_decay_parameter_names(model))
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}


def test_engine_settings_pass_through_and_unknown_ones_are_refused(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    train(tiny(trainer={"report_to": "tensorboard"}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "boards").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(file)).Reload()
    logged = {line["step"]: line["bits_per_byte"] for line in read_log(tiny().out) if "bits_per_byte" in line}
    scalars = {event.step: event.value for event in board.Scalars("train/bits_per_byte")}
    assert scalars == pytest.approx(logged)
    with pytest.raises(ValueError, match="Unknown TrainingArguments field.*reportto"):
        train(tiny(out=str(tmp_path / "other"), trainer={"reportto": "none"}))


def test_memories_that_cannot_learn_to_learn_are_named(tiny: Make):
    heard = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "mixer": {"architecture": "mlp", "chunk_size": 8, "projection_chunk_size": 32},
              "cms": [{"period": 64, "expansion": 1}, {"expansion": 1}]}  # fmt: skip
    train(tiny(preset="hope-tiny", steps=1, model=fields), console=heard)
    warning = heard.export_text()
    assert "level of period 64" in warning
    assert "projections of chunk 32" in warning


def test_progress_shows_loss_rate_and_time_left(tiny: Make):
    plain = Console(record=True, force_terminal=False, width=200)
    train(tiny(), console=plain)
    text = plain.export_text()
    assert "transformer-tiny step 1/6  loss" in text and "transformer-tiny step 6/6  loss" in text
    assert all(word in text for word in ("bits/byte", "tokens/s", "ETA", "held-out loss"))


def test_the_bar_shows_loss_and_time_left_from_the_first_step_on(tiny: Make, monkeypatch: pytest.MonkeyPatch):
    shown: list[tuple[int, str]] = []
    update = Progress.update

    def watched(bar: Progress, task: TaskID, **fields: Any) -> None:
        shown.append((fields["completed"], fields["status"]))
        update(bar, task, **fields)

    monkeypatch.setattr(Progress, "update", watched)
    train(tiny(log_interval=4), console=Console(file=io.StringIO(), force_terminal=True, width=200))
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    numbers = [re.fullmatch(r"loss ([\d.]+)  ([\d.]+) bits/byte  ([\d,]+) tokens/s  ETA (\d+) s", s) for _, s in shown]
    losses = [float(match[1]) for match in numbers if match]
    logged = [line["loss"] for line in read_log(tiny().out) if "loss" in line]
    assert (losses[3], losses[5]) == pytest.approx(logged, abs=1e-4)
    assert losses[0] == pytest.approx(math.log(259), rel=0.05)


def test_targets_and_bytes_are_counted_from_labels():
    token_bytes = torch.tensor([1, 2, 3, 0])
    labels = torch.tensor([[0, 1, -100, 2], [3, 3, 0, 0]])
    assert count_targets(labels, token_bytes) == (5, 2 + 3 + 0 + 1 + 1)
    assert nats_to_bits_per_byte(math.log(2) * 8, 4) == 2
    assert math.isnan(nats_to_bits_per_byte(1.0, 0))


def test_the_log_is_cut_where_a_run_is_resumed(tmp_path: Path):
    for step in (1, 2, 3):
        append_line(tmp_path, {"step": step, "loss": 1.0})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash while writing
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    cut_log(tmp_path, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [1, 2]
    assert read_log(tmp_path / "nothing") == []


def make_stream(split: str = "train") -> StreamingCorpus:
    rows = [{"text": f"document {number} " + "word " * (number % 7 + 3)} for number in range(60)]
    return StreamingCorpus("hf:test", split, datasets.IterableDataset.from_generator(rows.__iter__), "text")


def test_a_stream_starts_over_and_resumes_at_its_place(tmp_path: Path):
    tokenizer = prepare_tokenizer(TrainConfig())
    fresh = lambda: RecordedStream(PackedStream(make_stream(), tokenizer, 16), remember=10)  # noqa: E731
    one_pass = sum(1 for _ in PackedStream(make_stream(), tokenizer, 16))
    whole = fresh()
    windows = [window["input_ids"] for window, _ in zip(whole, range(2 * one_pass + 5), strict=False)]
    assert torch.equal(windows[0], windows[one_pass])
    assert len(whole.places) <= 10
    ahead = fresh()
    for _, _ in zip(ahead, range(20), strict=False):
        pass
    ahead.save(tmp_path, used=17)
    resumed = fresh()
    resumed.load(tmp_path)
    rest = [window["input_ids"] for window, _ in zip(resumed, range(one_pass), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(rest, windows[17:], strict=False))
    assert resumed.given >= 17 + one_pass


def test_training_on_a_stream_resumes_bit_exactly(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "load_corpus", lambda spec, split, **_: make_stream(split))
    whole = tiny(corpus="hf:test", out=str(tmp_path / "whole"), sequence_length=16, steps=8, eval_windows=2)
    train(whole)
    assert json.loads((tmp_path / "whole" / "checkpoint-8" / "stream.json").read_text())["used"] == 16
    half = tiny(corpus="hf:test", out=str(tmp_path / "half"), sequence_length=16, steps=8, eval_windows=2)

    class Stop(Exception):
        pass

    step = HopeTrainer.training_step

    def stop_at_five(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Stop
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HopeTrainer, "training_step", stop_at_five)
        with pytest.raises(Stop):
            train(half)
    train(half, resume=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_target_byte_is_counted(tiny: Make):
    config = tiny()
    tokenizer = prepare_tokenizer(config)
    data = engine_module.load_data(config, tokenizer)
    item = data.train[0]
    targets, size = count_targets(item["labels"][None], bytes_per_token(tokenizer))
    specials = sum(int(token) >= 256 for token in item["input_ids"][1:] if token != tokenizer.bos_token_id)
    assert size == targets - specials
