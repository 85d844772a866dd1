"""`nestlearn info`, `eval` and `generate` on any causal language model, stacked or not, with and without a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.llama import tiny_llama
from transformers import LlamaForCausalLM

from nestlearn import Level, MemorySession, stack_levels
from nestlearn.data import byte_tokenizer

from .test_cli import _plain_terminal, run

pytestmark = pytest.mark.usefixtures("_plain_terminal")
_ = _plain_terminal
TEXT = "The lamp is red. The door is blue. The king has a parrot.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, the same stacked, a session that has read, and texts."""
    path = tmp_path_factory.mktemp("models")
    model = tiny_llama(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.2,
        tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None  # as of many models
    for name in ("llama", "stacked"):
        if name == "stacked":
            stack_levels(model, [Level(16, lr=8.0), Level(64, lr=8.0)], mode="split")
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    session = MemorySession(model, tokenizer)
    session.read(TEXT * 30)
    session.save(path / "session")
    (path / "texts").mkdir()
    for number in range(90):
        (path / "texts" / f"{number}.txt").write_text(f"{number}: {TEXT * (2 + number % 3)}")
    return path


def bits(capsys: pytest.CaptureFixture[str], folder: Path, model: str, *words: object) -> float:
    code, out, error = run(
        capsys, "eval", folder / model, "--corpus", f"text:{folder / 'texts'}", "--length", 32, "--documents", 2, *words
    )
    assert code == 0, error
    assert "Bits per byte by position" in out and "writes" not in out
    saved = next(
        Path(line.removeprefix("Saved in ")) for line in out.splitlines() if line.endswith("bits_per_byte.json")
    )
    record = json.loads(saved.read_text())
    assert all(str(word) in record["command"] for word in words)
    return record["value"]


def test_eval_measures_what_a_session_has_learned(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    plain, stacked = (bits(capsys, folder, name) for name in ("llama", "stacked"))
    assert plain == pytest.approx(stacked, rel=1e-5)
    assert bits(capsys, folder, "stacked", "--session", folder / "session") < 0.9 * plain
    assert bits(capsys, folder, "llama", "--dtype", "bf16") == pytest.approx(plain, rel=0.02)


def test_generate_continues_with_what_was_learned(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("The lamp", "--temperature", 0, "--max-new-tokens", 8)
    texts = []
    for model, more in (("llama", ()), ("stacked", ()), ("stacked", ("--session", folder / "session"))):
        code, out, error = run(capsys, "generate", folder / model, *words, *more)
        assert code == 0 and out.startswith("The lamp"), error
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]


def test_info_of_a_model_with_levels_and_a_session(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, error = run(capsys, "info", folder / "llama", "--json", "--context-length", 1024)
    facts = json.loads(out)
    model = LlamaForCausalLM.from_pretrained(folder / "llama")
    assert code == 0 and facts["parameters"] == sum(p.numel() for p in model.parameters()), error
    assert facts["context_length"] == 256 and facts["state_bytes_per_row"] == 2 * 2 * 256 * 32 * 4
    matrices = facts["parameters_without_embeddings"] - 5 * 32 + 259 * 32  # norms are no matrices; the output is one
    attention = 2 * 2 * 32 * 256  # scores and values of every pair, over two layers, as kernels without a mask count
    assert facts["forward_flops_per_token"] == 2 * (matrices + 2 * attention // 2)
    code, out, error = run(capsys, "info", folder / "stacked", "--session", folder / "session")
    assert code == 0 and "16, 64 tokens on 2 MLPs, mode split" in out and "tokens read" in out, error
    code, _, error = run(capsys, "info", folder / "llama", "--hidden-size", 64)
    assert code == 1 and "--hidden-size cannot change" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "llama", "a", "--session", "session"), "without levels"),
        (("eval", "llama", "--session", "session"), "nestlearn stack"),
        (("info", "stacked", "--session", "nowhere"), "nowhere does not exist"),
        (("generate", "stacked", "a", "--session", "texts/1.txt"), "1.txt is truncated, corrupted or not a session"),
        (("generate", "llama", "a", "--chat"), "no chat template"),
        (("eval", "no/such/folder"), "there is no file or folder 'no/such/folder'"),
        (("train", "--preset", "llama"), "nestlearn learn --method finetune"),
        (("learn", "llama", "--stream", "texts", "--out", "out"), "nestlearn stack llama --levels 64,512"),
        (
            ("learn", "stacked", "--stream", "texts", "--out", "out", "--learning-rate", "1"),
            "MemorySession(model, tokenizer, lr=0.5)",
        ),
        (
            ("learn", "llama", "--stream", "texts", "--out", "out", "--method", "lora", "--strength", "1"),
            "--method ewc",
        ),
    ],
)
def test_errors_name_cause_and_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, words: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    code, _, error = run(capsys, *words)
    assert code == 1 and error.startswith("Error: ") and message in error, error
    assert not (folder / "out").exists()


def test_a_command_without_a_terminal_says_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """One line after another on standard error, while nothing is printed on standard output."""
    monkeypatch.setattr("nestlearn.cli.common.Progress.seconds", 0.02)
    one = folder / "texts" / "1.txt"
    known = ("--known", f"text:{folder / 'texts'}", "--known-bytes", 200)
    for words, said in (
        (("stack", folder / "llama", "--levels", "16", "--general", "none", "--out", tmp_path / "new"), "0 s: "),
        (
            ("eval", folder / "llama", "--corpus", f"text:{folder / 'texts'}", "--task", "bits_per_byte"),
            "s: bits per byte: 0%",
        ),
        (("learn", folder / "stacked", "--stream", one, *known, "--out", tmp_path / "out"), "s: 1.txt: "),
    ):
        code, _, error = run(capsys, *map(str, words))
        assert code == 0 and said in error, error


def test_the_report_of_one_document_opens_with_unseen_text(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    words = ("learn", folder / "stacked", "--stream", folder / "texts" / "1.txt", "--known", f"text:{folder / 'texts'}",
             "--known-bytes", 200, "--out", tmp_path)  # fmt: skip
    code, out, error = run(capsys, *words)
    assert code == 0 and "1.txt: unseen " in out and out.index("unseen") < out.index("read again"), error
    record = json.loads((tmp_path / "results.json").read_text())["documents"][0]["online"]
    page = (tmp_path / "report.html").read_text()
    headline = f"{record['off']:.3f} → {record['bits_per_byte']:.3f}"
    assert headline in page and page.index(headline) < page.index("the same documents again")
    assert page.count("<svg") == 1  # the curve within the document; a chart over documents would be single dots
    assert "level (0 is the fastest)" not in page  # what each level contributes costs a pass for each
