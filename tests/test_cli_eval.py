"""`nestlearn eval` with tasks of the harness and of our own, as a person types it."""

import json
from pathlib import Path

import pytest
import torch

from nestlearn import HopeConfig, HopeForCausalLM, cli
from nestlearn.data import byte_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ran to the old house", "we read it again"]
TASK = {
    "task": "last_word",
    "dataset_path": "json",
    "output_type": "loglikelihood",
    "test_split": "test",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    for name, value in (("COLUMNS", "200"), ("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    monkeypatch.setattr("nestlearn.train.allocator.tune_allocator", lambda: None)
    monkeypatch.setattr("warnings.filterwarnings", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = HopeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mixer="self_modifying_titans", memory_chunk_size=8,
        projection_chunk_size=64, reset_token_id=256, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    HopeForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def test_harness_tasks_are_printed_and_saved(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tmp_path / "last_word.yaml").write_text(json.dumps(task))
    code, text, err = run(capsys, "eval", saved, "--tasks", "last_word", "--include-path", tmp_path, "--limit", "2",
                          "--out", tmp_path / "out")  # fmt: skip
    assert code == 0 and "last_word" in text and "Saved in" in text, err
    result = json.loads((tmp_path / "out" / "lm_eval_last_word.json").read_text())
    assert (result["n"], result["metric"]) == (2, "acc")
    assert result["command"] == f"nestlearn eval {saved} --tasks last_word --limit 2 --include-path {tmp_path}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "bits_per_bite"], "Did you mean bits_per_byte"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "piqa", "--metadata", "{"], "is not JSON"),
        (["--tasks", "piqa", "--metadata", "[1]"], "no JSON object"),
        (["--tasks", "piqa", "--include-path", "/nonexistent"], "is not a folder"),
    ],
)
def test_bad_options_are_one_message(capsys: pytest.CaptureFixture[str], saved: Path, words: list[str], message: str):
    code, _, err = run(capsys, "eval", saved, *words)
    assert code == 1 and err.startswith("Error: ") and message in err, err
