"""The command line as a person uses it: help, errors without tracebacks, exit codes, and the main path."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nestlearn import cli

TINY = ("--hidden-size 16 --num-attention-heads=2 --num-hidden-layers 1 --sequence-length 32 --batch-size 2 "
        "--threads 1 --eval-windows 4 --log-interval 2").split()  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        draw = random.Random(number)
        (folder / f"{number}.txt").write_text(" ".join(draw.choice("so many words to read".split()) for _ in range(80)))
    return f"text:{folder}"


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and without colours, the same wherever the tests run; the allocator of the test process is left alone."""
    for name, value in (
        ("COLUMNS", "200"),
        ("NO_COLOR", "1"),
        ("TERM", "dumb"),
        ("_TYPER_FORCE_DISABLE_TERMINAL", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("nestlearn.allocator.tune_allocator", lambda: None)
    monkeypatch.setattr("warnings.filterwarnings", lambda *_args, **_kwargs: None)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    output = capsys.readouterr()
    code = stop.value.code
    return int(code or 0), output.out, output.err


@pytest.mark.parametrize("command", ["", "train", "generate", "eval", "info", "demo"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str):
    code, out, _ = run(capsys, *([command] if command else []), "--help")
    assert code == 0 and "Usage" in out
    assert not command or f"nestlearn {command}" in out


def test_train_generate_eval_info(capsys: pytest.CaptureFixture[str], corpus: str, tmp_path: Path):
    out = tmp_path / "run"
    code, text, err = run(capsys, "train", "--preset", "hope-tiny", "--corpus", corpus, "--out", out, *TINY,
                          "--steps", "4")  # fmt: skip
    assert code == 0 and f"Saved {out}: 4 steps" in text, err
    assert "step 4/4" in err and "held-out loss" in err

    code, text, _ = run(capsys, "train", "--out", out)
    assert code == 1
    code, text, err = run(capsys, "train", "--resume", "--out", out, "--steps", "6")
    assert code == 0 and "6 steps" in text, err

    code, text, err = run(capsys, "generate", out, "so many", "--max-new-tokens", "5", "--seed", "1")
    assert code == 0 and text.startswith("so many"), err
    assert run(capsys, "generate", out, "so many", "--max-new-tokens", "5", "--seed", "1")[1] == text

    code, text, err = run(
        capsys, "eval", out, "--corpus", corpus, "--length", "64", "--documents", "2", "--context", "32"
    )
    assert code == 0, err
    assert "bits per byte: " in text and "memories exchanged" in text and "32-36" in text
    saved = json.loads((out / "evals" / "bits_per_byte.json").read_text())
    assert saved["command"] == f"nestlearn eval {out} --corpus {corpus} --task bits_per_byte --context 32"

    code, text, err = run(capsys, "info", out, "--json", "--context-length", "64")
    facts = json.loads(text)
    assert code == 0 and facts["mixers"] == ["self_modifying"], err
    assert facts["training_flops_per_token"] == 3 * facts["forward_flops_per_token"] > 0
    assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert facts["state_bytes_per_row"] > 0 and facts["activation_bytes"] > 0


@pytest.mark.parametrize("words", [
    ["train"], ["generate", "m", "text"], ["eval", "m"], ["learn", "m", "--stream", "a.txt", "--out", "o"],
    ["chat", "m", "--session", "s"],
])  # fmt: skip
@pytest.mark.parametrize("seed", ["99999999999999999999", "-1"])
def test_a_seed_out_of_range_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], seed: str
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words, f"--seed={seed}")
    bounds = ("at least 0", "equal to 0") if seed == "-1" else ("at most 4294967295", "equal to 4294967295")
    assert code != 0 and "seed" in err and any(bound in err for bound in bounds), err
    assert not list(tmp_path.iterdir())


def test_first_seed_of_a_benchmark_out_of_range_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, _, err = run(capsys, "bench", "quick", "--out", tmp_path / "o", "--first-seed", "99999999999999999999")
    assert code == 2 and "--first-seed" in err and "4294967295" in err
    assert not list(tmp_path.iterdir())


def test_help_of_bench_names_every_suite(capsys: pytest.CaptureFixture[str]):
    from nestlearn.evals.bench.suites import _suites

    code, text, _ = run(capsys, "bench", "--help")
    names = [suite.name for suite in _suites()]  # other tests may have registered suites of their own
    assert code == 0 and not [name for name in names if f" {name}," not in text and f" {name}." not in text]


UNREACHABLE = """
import sys, time
import nestlearn.models.stacking, nestlearn.train  # a busy machine may need long for them
from nestlearn import cli
for words in (["stack", "nobody/nothing", "--levels", "64"], ["train", "--corpus", "hf:nobody/nothing"]):
    began = time.monotonic()
    try:
        cli.main([*words, "--out", sys.argv[1]])
    except SystemExit as stop:
        print(stop.code, time.monotonic() - began)
"""


def test_names_on_the_hub_without_a_network_are_one_message_at_once(tmp_path: Path):
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", UNREACHABLE, str(tmp_path / "out")],
                          env={**os.environ, **offline}, capture_output=True, text=True, timeout=180)  # fmt: skip
    ends, lines = done.stdout.splitlines(), done.stderr.strip().splitlines()
    assert len(ends) == len(lines) == 2, done
    for end, line in zip(ends, lines, strict=True):
        code, seconds = end.split()
        assert code == "1" and float(seconds) < 30
        assert line.startswith("Error: ") and "nobody/nothing" in line and "127.0.0.1:9 does not answer" in line
    assert not (tmp_path / "out").exists()


def test_info_of_a_preset_allocates_no_weights(capsys: pytest.CaptureFixture[str]):
    code, text, err = run(capsys, "info", "transformer-760m", "--context-length", "256", "--mixer", "attention")
    assert code == 0 and "24 × attention" in text and "GiB" in text, err


def test_dry_run_prints_every_setting_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], corpus: str, tmp_path: Path
):
    (tmp_path / "run.yaml").write_text("preset: transformer-tiny\nsteps: 9\nhidden_size: 64\nnum_attention_heads: 4\n")
    code, text, err = run(capsys, "train", "--config", tmp_path / "run.yaml", "--corpus", corpus, "--steps", "11",
                          "--out", tmp_path / "run", "--trainer.report_to", "tensorboard", "--dry-run")  # fmt: skip
    settings = json.loads(text)
    assert code == 0, err
    assert settings["train"]["steps"] == 11 and settings["train"]["preset"] == "transformer-tiny"
    assert settings["model"]["hidden_size"] == 64 and settings["model"]["mixer"]["type"] == "attention"
    assert settings["trainer"] == {"report_to": "tensorboard"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--preset", "hope-tinny"], "hope-tiny"),
        (["train", "--hiden-size", "3"], "Did you mean 'hidden_size'"),
        (["train", "--mixer", "atention"], "attention"),
        (["train", "--hidden-size", "31"], "not divisible"),
        (["train", "--mixer.chunk-size", "0"], "chunk_size=0"),
        (["train", "--sequence-length", "0"], "sequence_length=0 must be an integer of at least 2"),
        (["train", "--corpus", "text:/nonexistent"], "does not exist"),
        (["train", "--corpus", "pythondocs"], "python-docs"),
        (["train", "--vocab-size", "100", "--reset-token-id", "none"], "Vocabulary mismatch"),
        (["train", "word"], "Unexpected argument 'word'"),
        (["train", "--config", "/nonexistent.yaml"], "Cannot read the configuration file"),
        (["train", "--resume"], "holds no run to resume"),
        (["generate", "nowhere", "a"], "no model folder"),
        (["eval", "nowhere"], "no model folder"),
        # With a folder of tasks: without one the harness reads its fourteen thousand definitions.
        (["eval", "nowhere", "--task", "other", "--include-path", "."], "Unknown task 'other'"),
        (["info", "hope-tinny"], "hope-tiny"),
    ],
)
def test_errors_are_one_message_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 1 and err.startswith("Error: ") and message in err, err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]):
    for words in (["nothing"], ["generate"], ["info", "hope-tiny", "--context-length", "0"]):
        code, _, err = run(capsys, *words)
        assert code == 2 and "Usage" in err and "Traceback" not in err


def test_verbose_shows_the_traceback(capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "train", "--preset", "nothing", "--verbose")
    assert code == 1 and "Traceback" in err and "Error: " in err


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_saves_and_exits_130(corpus: str, tmp_path: Path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "nestlearn", "train", "--preset", "transformer-tiny", "--corpus", corpus, "--out",
               str(out), *TINY, "--steps", "100000", "--log-interval", "1"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        log = out / "train.jsonl"
        for _ in range(600):
            if log.exists() and log.read_text().count("\n") > 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"nestlearn train --resume --out {out}" in err and "Traceback" not in err
    (checkpoint,) = out.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()


PLUGIN = """
import torch
from nestlearn.train import register_optimizer
register_optimizer("plugged", torch.optim.RMSprop)
"""


def install(folder: Path, code: str) -> None:
    """A package as pip leaves it: its module, and the entry point that names it."""
    (folder / "plugged_in.py").write_text(code)
    (folder / "plugged-1.0.dist-info").mkdir()
    (folder / "plugged-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (folder / "plugged-1.0.dist-info" / "entry_points.txt").write_text("[nestlearn.plugins]\nmine = plugged_in\n")


def test_a_package_from_outside_brings_an_optimizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: str, tmp_path: Path
):
    from nestlearn.train import optimizers

    monkeypatch.setattr(optimizers, "_REGISTERED", dict(optimizers._REGISTERED))
    monkeypatch.delitem(sys.modules, "plugged_in", raising=False)
    words = ("train", "--corpus", corpus, "--optimizer", "plugged", "--out", tmp_path / "run", *TINY, "--steps", "2")
    assert "Unknown optimizer 'plugged'" in run(capsys, *words)[2]
    install(tmp_path, PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    code, text, err = run(capsys, *words)
    assert code == 0 and "2 steps" in text, err


def test_a_plugin_that_cannot_be_imported_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delitem(sys.modules, "plugged_in", raising=False)
    install(tmp_path, "import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = run(capsys, "info", "hope-tiny")
    assert code == 1 and err.startswith("Error: The plugin 'mine' (plugged_in) cannot be imported: ModuleNotFoundError")
    assert run(capsys, "info", "--help")[0] == 0
