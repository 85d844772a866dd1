"""`nestlearn eval` with tasks of the harness and of our own, as a person types it."""

import dataclasses
import json
import math
import re
import shlex
import shutil
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
    monkeypatch.setattr("nestlearn.allocator.tune_allocator", lambda: None)
    monkeypatch.setattr("warnings.filterwarnings", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = HopeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        mixer={"type": "self_modifying", "chunk_size": 8, "projection_chunk_size": 64},
        reset_token_id=256, bos_token_id=256, eos_token_id=257, pad_token_id=258,
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


def test_needles_made_here_stand_beside_published_numbers(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
):
    code, text, err = run(capsys, "eval", saved, "--tasks", "local_niah_single_1", "--lengths", "600,700", "--samples",
                          "2", "--out", tmp_path)  # fmt: skip
    assert code == 0, err
    for words in ("local_niah_single_1, %", "Hope (published)", "16384", "NL (arXiv 2512.24695), Table 1", "Saved in"):
        assert words in text
    result = json.loads((tmp_path / "local_niah_single_1.json").read_text())
    assert list(result["details"]["by_length"]) == ["600", "700"] and "published" not in json.dumps(result)
    assert result["command"] == (
        f"nestlearn eval {saved} --tasks local_niah_single_1 --lengths 600,700 --samples 2"
    )  # fmt: skip


def test_babilong_made_here(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path):
    story = "1 Mary moved to the bathroom.\n2 Where is Mary? \tbathroom\t1\n"
    for split in ("train", "test"):
        (tmp_path / f"qa1_{split}.txt").write_text(story)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    code, text, err = run(capsys, "eval", saved, "--tasks", "local_babilong_qa1", "--lengths", "0,300", "--babi",
                          tmp_path, "--book", tmp_path / "book.txt", "--out", tmp_path)  # fmt: skip
    assert code == 0 and "local_babilong_qa1, %" in text, err
    assert (tmp_path / "local_babilong_qa1.json").exists()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number, text in enumerate(TEXTS * 4):
        (folder / f"{number}.txt").write_text(f"{number} {text}")
    return folder


def test_short_documents_leave_out_the_loss_by_position(
    capsys: pytest.CaptureFixture[str], saved: Path, notes: Path, tmp_path: Path
):
    words = ["eval", saved, "--corpus", f"text:{notes}", "--out", tmp_path / "out"]
    code, text, err = run(capsys, *words)
    assert code == 0 and "bits per byte: " in text, err
    assert "loss_by_position is left out. Only 0 of" in text and "--length" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bits_per_byte.json"]
    code, _, err = run(capsys, *words, "--tasks", "loss_by_position")
    assert code == 1 and err.startswith("Error: Only 0 of")


def test_a_result_that_cannot_be_saved_is_printed(
    capsys: pytest.CaptureFixture[str], saved: Path, notes: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("")  # no folder can be made below a file, whoever runs the test
    out = tmp_path / "file" / "out"
    code, text, err = run(capsys, "eval", saved, "--corpus", f"text:{notes}", "--out", out)
    assert code == 1 and "bits per byte: " in text and "loss_by_position is left out" in text
    assert (
        err.startswith(f"Error: The result of bits_per_byte is printed, but cannot be saved as {out}")
        and "--out" in err
    )
    code, text, err = run(capsys, "eval", saved, "--tasks", "local_niah_single_1", "--lengths", "600", "--samples", "1",
                          "--out", out)  # fmt: skip
    assert code == 1 and "local_niah_single_1, %" in text and "cannot be saved" in err


def test_a_result_that_is_not_a_number_fails(
    capsys: pytest.CaptureFixture[str], saved: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from nestlearn import evals

    measure = evals.bits_per_byte
    monkeypatch.setattr(evals, "bits_per_byte", lambda *a, **k: dataclasses.replace(measure(*a, **k), value=math.nan))
    code, text, err = run(capsys, "eval", saved, "--corpus", f"text:{notes}", "--out", tmp_path / "out")
    assert code == 1 and "bits per byte: nan" in text
    assert err.startswith("Error: bits_per_byte: bits per byte is nan, not a finite number.")


@pytest.mark.parametrize("tasks", ["bits_per_byte", "local_niah_single_1"])
def test_a_model_that_overflows_fails(
    capsys: pytest.CaptureFixture[str], saved: Path, notes: Path, tmp_path: Path, tasks: str
):
    """Its weights are finite, its logits are not; an accuracy would be 0, as of an honest model."""
    model = HopeForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()  # the progress bar of loading it here
    code, text, err = run(capsys, "eval", tmp_path / "model", "--corpus", f"text:{notes}", "--tasks", tasks,
                          "--lengths", "600", "--samples", "1")  # fmt: skip
    assert code == 1 and err.startswith(f"Error: The model {tmp_path / 'model'} computes logits that are NaN"), err
    assert not text and not (tmp_path / "model" / "evals").exists()


def test_a_model_of_nan_weights_fails(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path):
    model = HopeForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    code, _, err = run(capsys, "eval", tmp_path / "model")
    assert code == 1 and "holds NaN or infinite numbers" in err and "weight" in err


PAGE = (Path(__file__).parents[1] / "docs" / "long_context.md").read_text()
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("nestlearn eval ")]


# Commands of tasks by name alone: the harness reads its fourteen thousand definitions. tests/evals has lighter twins.
SLOW = ("niah_single_1 --metadata", "piqa")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if any(words in command for words in SLOW) else [])
        for command in COMMANDS
    ],
)
def test_documented_commands_run(
    capsys: pytest.CaptureFixture[str],
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
):
    """In a folder with the files the page speaks of."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, "runs/mine")
    book = "".join(f"It was the best of times, it was the {number}th of times. " for number in range(60))
    Path("book.txt").write_text(book)
    for folder in ("texts", "babi", "my_tasks"):
        Path(folder).mkdir()
    for number in range(60):
        Path("texts", f"{number}.txt").write_text(f"{number} {book}")
    for split in ("train", "test"):
        Path("babi", f"qa1_{split}.txt").write_text("1 Mary moved to the bathroom.\n2 Where is Mary?\tbathroom\t1\n")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("my_tasks/last_word.yaml").write_text(yaml)
    Path("my_tasks/texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code, text, err = run(capsys, *shlex.split(command)[1:])
    if "piqa" in command:
        assert code == 1 and "'EleutherAI/lambada_openai' of the task lambada_openai could not be loaded" in err
    else:
        assert code == 0 and "runs/mine/evals" in text, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "bits_per_bite"], "Did you mean bits_per_byte"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "local_niah_singel_1"], "Did you mean local_niah_single_1"),
        (["--tasks", "local_other"], "Known: local_niah_single_1"),
        (["--tasks", "local_niah_single_1", "--lengths", "1k"], "no whole numbers"),
        (["--tasks", "local_niah_single_1", "--lengths", "200"], "length=200 is too small"),
        (["--tasks", "local_niah_single_2"], "none was given"),
        (["--tasks", "local_babilong_qa1", "--book", "a.txt"], "needs --babi"),
        (["--tasks", "local_babilong_qa1", "--babi", "folder"], "needs --book"),
        (["--tasks", "piqa", "--metadata", "{"], "is not JSON"),
        (["--tasks", "piqa", "--metadata", "[1]"], "no JSON object"),
        (["--tasks", "piqa", "--include-path", "/nonexistent"], "is not a folder"),
    ],
)
def test_bad_options_are_one_message(capsys: pytest.CaptureFixture[str], saved: Path, words: list[str], message: str):
    code, _, err = run(capsys, "eval", saved, *words)
    assert code == 1 and err.startswith("Error: ") and message in err, err
