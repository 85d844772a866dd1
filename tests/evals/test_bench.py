"""`nestlearn bench`: equal models, resuming, budgets, what the table and the report say, and errors."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nestlearn import HopeConfig, HopeForCausalLM, cli
from nestlearn.evals.bench import (
    BenchOptions,
    CellError,
    Recipe,
    ResultStore,
    Suite,
    Training,
    find_suite,
    mixer_fields,
    named_mixers,
    parse_duration,
    plan,
    register_suite,
    run_bench,
    run_cell,
    suite_names,
)
from nestlearn.evals.bench.cells import parameters, sized_fields
from nestlearn.evals.bench.run import share_out
from nestlearn.evals.bench.tables import markdown, measured_table, published_table, summaries
from nestlearn.evals.bench.training import Solver, schedule
from nestlearn.evals.result import EvalResult
from nestlearn.evals.tasks import Compression, Memorization, Parity

QUIET = Console(quiet=True)
QUICK = find_suite("quick")


def options(out: Path, **changes) -> BenchOptions:
    fields = {"out": out, "mixers": ["deltanet", "attention"], "workers": 1, "command": "nestlearn bench quick"}
    return BenchOptions(**fields | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two mixers, two tasks and two seeds."""
    out = tmp_path_factory.mktemp("bench")
    run_bench(QUICK, options(out, seeds=2), QUIET)
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# -- mixers and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(named_mixers()))
def test_every_mixer_builds_and_runs_at_the_size_of_the_reference(name: str) -> None:
    recipe = QUICK.recipes[0]
    fields = sized_fields(recipe, name)
    model = HopeForCausalLM(HopeConfig(**fields))
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(fields)
    assert abs(count / parameters(sized_fields(recipe, recipe.reference)) - 1) < 0.05
    assert torch.isfinite(model(next(recipe.task.batches(2, 0)).inputs).logits).all()


@pytest.mark.parametrize("suite", ["formal", "recall", "recall-24", "recall-rewritten", "mad", "tracking"])
def test_models_of_a_suite_have_equal_numbers_of_parameters(suite: str) -> None:
    cells = plan(find_suite(suite))
    for task in {cell.task.name for cell in cells}:
        counts = [parameters(cell.model) for cell in cells if cell.task.name == task]
        assert len(counts) >= 5 and max(counts) <= 1.05 * min(counts)


def test_projections_write_within_the_sequences_of_mad() -> None:
    """Otherwise hope would be compared with its projections static: compression and memorization have 32 tokens."""
    for recipe in find_suite("mad").recipes:
        assert recipe.mixer["projection_chunk_size"] < recipe.task.config()["length"]


def test_a_state_is_tracked_in_one_chunk() -> None:
    """Beyond the trained lengths there would be boundaries of chunks that training never crossed."""
    tracking = [*find_suite("formal").select(["parity", "aa", "abab", "shuffle2"]), *find_suite("tracking").recipes]
    for recipe in tracking:
        longest = max(split.value for split in recipe.task.splits)
        assert min(recipe.mixer["chunk_size"], recipe.mixer["projection_chunk_size"]) >= longest


def test_mixer_tokens_change_fields() -> None:
    assert mixer_fields("hope:adaptive=k+v:max_step=1.5:step_size=raw:hidden_size=8") == {
        "mixer": {"type": "self_modifying", "adaptive": ["k", "v"], "max_step": 1.5, "step_size": "raw"},
        "hidden_size": 8,
    }
    assert mixer_fields("hope:adaptive=")["mixer"]["adaptive"] == []
    assert mixer_fields("titans:chunk_size=8:output_gate=true:max_step=none") == {
        "mixer": {"type": "memory", "memory": "titans", "chunk_size": 8, "output_gate": True, "max_step": None},
    }
    assert mixer_fields("deltanet-negative") == {"mixer": {"type": "memory", "memory": "deltanet", "max_step": 2.0}}


def test_fields_for_all_mixers_reach_those_that_have_them() -> None:
    shared = {"chunk_size": 8, "projection_chunk_size": 16}
    assert mixer_fields("hope:chunk_size=4", shared)["mixer"] == {
        "type": "self_modifying", "chunk_size": 4, "projection_chunk_size": 16,
    }  # fmt: skip
    assert mixer_fields("titans", shared)["mixer"] == {"type": "memory", "memory": "titans", "chunk_size": 8}
    assert mixer_fields("transformer", shared)["mixer"] == {"type": "attention"}


def test_wrong_mixer_tokens_are_refused() -> None:
    for token, message in (
        ("delatnet", "deltanet"),
        ("hope:adaptiv=k", "adaptive"),
        ("hope:adaptive", "write field=value"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer_fields(token)


# -- cells ----------------------------------------------------------------------------------------------------------


def test_keys_depend_on_task_version_settings_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = plan(QUICK, ["hope"])[0]
    others = [
        dataclasses.replace(cell, seed=1),
        dataclasses.replace(cell, mixer="hope-static"),
        dataclasses.replace(cell, model=cell.model | {"hidden_size": 16}),
        dataclasses.replace(cell, training=dataclasses.replace(cell.training, steps=5)),
        dataclasses.replace(cell, task=dataclasses.replace(cell.task, eval_examples=31)),
    ]
    keys = {cell.key, *(other.key for other in others)}
    assert len(keys) == 6 and cell.key == plan(QUICK, ["hope"])[0].key
    monkeypatch.setattr(Parity, "version", 2)
    assert cell.key not in keys


def test_cells_come_seed_by_seed_and_select_tasks() -> None:
    cells = plan(QUICK, ["hope", "titans", "hope"], seeds=2, tasks=["mqar"], steps=7)
    assert [(c.mixer, c.seed, c.task.name, c.training.steps) for c in cells] == [
        ("hope", 0, "mqar", 7), ("titans", 0, "mqar", 7), ("hope", 1, "mqar", 7), ("titans", 1, "mqar", 7),
    ]  # fmt: skip
    assert [cell.seed for cell in plan(QUICK, ["hope"], seeds=2, tasks=["mqar"], first_seed=100)] == [100, 101]
    with pytest.raises(ValueError, match="must be at least 1"):
        plan(QUICK, seeds=0)
    with pytest.raises(ValueError, match="first_seed=-1"):
        plan(QUICK, first_seed=-1)


def test_one_learning_rate_replaces_those_of_the_mixers() -> None:
    training = dataclasses.replace(QUICK.recipes[0].training, mixer_rates={"hope": 3e-2, "hope:conv_size=0": 1e-3})
    suite = dataclasses.replace(QUICK, recipes=(dataclasses.replace(QUICK.recipes[0], training=training),))
    rates = [cell.training.rate(cell.mixer) for cell in plan(suite, ["hope", "attention", "hope:conv_size=0"])]
    assert rates == [3e-2, 4e-3, 1e-3]
    changed = plan(suite, ["hope", "attention"], learning_rate=2e-2)
    assert [cell.training.rate(cell.mixer) for cell in changed] == [2e-2, 2e-2]
    assert changed[0].key != plan(suite, ["hope"])[0].key
    with pytest.raises(ValueError, match="learning_rate=-1"):
        plan(suite, learning_rate=-1)


def test_a_cell_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    cell = plan(QUICK, ["hope"])[1]
    before = torch.get_rng_state()
    first, second = run_cell(cell), run_cell(cell)
    assert torch.equal(before, torch.get_rng_state())
    timeless = [
        [{k: v for k, v in point.items() if k != "seconds"} for point in result.details["curve"]]
        for result in (first, second)
    ]
    assert timeless[0] == timeless[1] and first.details["scores"] == second.details["scores"]
    assert [point["step"] for point in first.details["curve"]] == [2, 4]


def test_training_solves_a_task_and_stops() -> None:
    task = Memorization(vocabulary=9, length=8, eval_examples=20)
    recipe = Recipe(
        task=task,
        model={"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "initializer_range": 0.3},
        training=Training(steps=400, batch_size=16, learning_rate=1e-2, check_every=10),
    )
    cell = plan(Suite(name="s", title="t", recipes=(recipe,), mixers=("deltanet",)))[0]
    result = run_cell(cell)
    assert result.details["status"] == "solved" and result.value == 1.0, result.details["curve"][-1]
    assert result.details["steps"] < 400 and result.details["steps"] % 10 == 0
    assert all(score["value"] == 1.0 for score in result.details["scores"].values())


def test_scores_equal_a_plain_loop() -> None:
    """The reported accuracy is that of the trained weights, sequence by sequence, nothing padded or shifted."""
    cell = dataclasses.replace(plan(QUICK, ["attention"], tasks=["mqar"])[0], seed=3)
    result = run_cell(cell)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        solver = Solver(HopeConfig(**cell.model), cell.task)
    training, batches = cell.training, cell.task.batches(cell.training.batch_size, 3)
    optimizer = torch.optim.AdamW(solver.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate * schedule(training, step)
        batch = next(batches)
        log_probabilities = solver.train()(batch.inputs).log_softmax(-1)
        asked = batch.targets != -100
        loss = -log_probabilities[asked].gather(1, batch.targets[asked][:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
        optimizer.step()
    held_out, right, total = cell.task.examples("4 pairs"), 0, 0
    for inputs, targets in zip(held_out.inputs, held_out.targets, strict=True):
        answers = solver.eval()(inputs[None])[0].argmax(-1)
        for t in range(len(targets)):
            if targets[t] != -100:
                right, total = right + int(answers[t] == targets[t]), total + 1
    assert result.value == pytest.approx(right / total)


def test_a_task_with_its_own_head_trains_it() -> None:
    recipe = Recipe(
        task=Compression(train_examples=32, eval_examples=16, length=6),
        model=QUICK.recipes[0].model,
        training=Training(steps=2, batch_size=4),
    )
    cell = plan(Suite(name="s", title="t", recipes=(recipe,), mixers=("hope",)))[0]
    result = run_cell(cell)
    assert result.details["parameters"] > parameters(cell.model)
    assert result.task == "compression" and 0 <= result.value <= 1


def test_a_limit_ends_training_with_its_schedule_and_is_marked() -> None:
    cell = plan(QUICK, ["deltanet"], tasks=["mqar"], steps=100_000)[0]
    result = run_cell(cell, limit=0.5)
    assert result.details["status"] == "unconverged" and 0 < result.details["steps"] < 100_000
    assert result.details["train_seconds"] < 5
    training = Training(steps=100, warmup=10, final=0.1)
    assert schedule(training, 0) == pytest.approx(0.1)
    assert schedule(training, 99, 0.0) == pytest.approx(0.1, abs=1e-3)
    assert schedule(training, 50, 1.0) == pytest.approx(0.1)
    assert schedule(training, 50, 0.2) == schedule(training, 50)


def test_a_diverged_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = plan(QUICK, ["attention"], tasks=["mqar"])[0]
    monkeypatch.setattr(Solver, "forward", lambda self, x: self.model(x, use_cache=False).logits * math.nan)
    result = run_cell(cell)
    assert result.details["status"] == "diverged"
    assert json.loads(result.to_json())["details"]["curve"][0]["loss"] is None


def test_budget_is_divided_over_what_remains() -> None:
    now = 100.0
    limit = share_out(60.0, 2, clock=lambda: now)
    assert limit(6) == pytest.approx(0.9 * 20)
    now = 130.0
    assert limit(3) == pytest.approx(0.9 * 15)
    assert share_out(None, 2)(3) is None
    assert [parse_duration(text) for text in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    for text in ("", "m", "10 minutes", "-3s", "0"):
        with pytest.raises(ValueError, match="budget"):
            parse_duration(text)


# -- runs -----------------------------------------------------------------------------------------------------------


def test_results_are_complete_records(finished: Path) -> None:
    records = lines(finished)
    assert len(records) == 8 == len({record["details"]["key"] for record in records})
    for line in (finished / "results.jsonl").read_text().splitlines():
        result = EvalResult.from_json(line)
        assert result.command == "nestlearn bench quick" and result.seconds > 0
        assert result.metric in ("sequence accuracy", "token accuracy")
        assert {"steps", "tokens", "parameters", "state_bytes", "curve", "scores"} <= set(result.details)
        assert result.value == list(result.details["scores"].values())[-1]["value"]
    by_cell = {(r["task"], r["config"]["mixer"], r["seed"]): r for r in records}
    for seed in (0, 1):
        assert (
            by_cell["mqar", "deltanet", seed]["details"]["tokens"]
            == by_cell["mqar", "attention", seed]["details"]["tokens"]
        )


def test_the_table_has_means_and_errors_over_seeds(finished: Path) -> None:
    table = (finished / "table.md").read_text()
    measured, published = table.split("## Published, not measured here")
    for task, splits in (("parity", ("2-8", "9-16")), ("mqar", ("2 pairs", "4 pairs"))):
        for mixer in ("deltanet", "attention"):
            runs = [r for r in lines(finished) if (r["task"], r["config"]["mixer"]) == (task, mixer)]
            cells = []
            for split in splits:
                values = [100 * run["details"]["scores"][split]["value"] for run in runs]
                error = statistics.stdev(values) / 2**0.5
                cells.append(f"{sum(values) / 2:.1f} ± {error:.1f}")
            (row,) = [line for line in measured.splitlines() if line.startswith(f"| {mixer} |")]
            assert " / ".join(cells) in row
    assert "LSTM" not in measured and "| LSTM | 100.0 / 100.0 |" in published
    assert "arXiv 2512.24695" in published and "nestlearn bench quick" in published
    assert "within 5 %" in measured


def test_the_report_stands_alone_and_shows_the_numbers(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert html.count("<svg") == 2 and "nestlearn bench quick" in html
    _, rows = measured_table(plan(QUICK, ["deltanet", "attention"], 2), ResultStore(finished).results())
    for row in rows:
        for cell in row:
            assert cell in html
    for text in ("accuracy on 4 pairs, %", "training steps", "length", "pairs", "not measured here", "Models and cost"):
        assert text in html, text


def test_finished_cells_are_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "results.jsonl").read_bytes()

    def fail(*_args, **_kwargs):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr("nestlearn.evals.bench.pool.run_cell", fail)
    console = Console(record=True, width=200, file=io.StringIO())
    outcome = run_bench(QUICK, options(finished, seeds=2), console)
    assert "0 cells to run, 8 already in" in console.export_text()
    assert (finished / "results.jsonl").read_bytes() == before and len(outcome.results) == 8


def test_other_mixers_of_the_folder_stay_in_the_table(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes((finished / "results.jsonl").read_bytes())
    run_bench(QUICK, options(tmp_path, mixers=["retnet"]), QUIET)
    table = (tmp_path / "table.md").read_text()
    assert table.index("| retnet |") < table.index("| deltanet |") < table.index("| attention |")
    # Other steps are another recipe: never in one table.
    run_bench(QUICK, options(tmp_path, mixers=["retnet"], steps=1), QUIET)
    assert "deltanet" not in (tmp_path / "table.md").read_text()


def test_a_budget_too_small_leaves_cells_out_and_says_so(tmp_path: Path) -> None:
    outcome = run_bench(QUICK, options(tmp_path, budget=2.0), QUIET)
    assert len(outcome.left_out) == 4 and not outcome.results
    assert "4 of 4 runs are missing: parity deltanet seed 0" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "report.html").exists()


def test_unconverged_cells_are_marked_and_can_be_retried(tmp_path: Path) -> None:
    chosen = {"mixers": ["deltanet"], "tasks": ["mqar"], "steps": 100_000}
    run_bench(QUICK, options(tmp_path, budget=2.0, **chosen), QUIET)
    assert re.search(r"\| deltanet \| .*\\\* \|", (tmp_path / "table.md").read_text())
    assert "stopped by the time budget" in (tmp_path / "table.md").read_text()
    run_bench(QUICK, options(tmp_path, budget=2.0, **chosen), QUIET)
    assert len(lines(tmp_path)) == 1
    outcome = run_bench(QUICK, options(tmp_path, budget=2.0, retry_unconverged=True, **chosen), QUIET)
    assert len(lines(tmp_path)) == 2 and len(outcome.results) == 1


def test_a_failed_cell_names_itself_and_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_later(cell, *arguments):
        if cell.mixer == "attention":
            raise RuntimeError("no luck")
        return run_cell(cell, *arguments)

    monkeypatch.setattr("nestlearn.evals.bench.pool.run_cell", fail_later)
    with pytest.raises(CellError, match=r"parity, attention, seed 0: RuntimeError: no luck"):
        run_bench(QUICK, options(tmp_path), QUIET)
    assert len(lines(tmp_path)) == 1 and "3 of 4 runs are missing" in (tmp_path / "table.md").read_text()


def test_a_registered_suite_runs_in_worker_processes(tmp_path: Path) -> None:
    suite = register_suite(dataclasses.replace(QUICK, name="mine", title="Mine <b>", recipes=QUICK.recipes[1:]))
    assert "mine" in suite_names() and find_suite("mine") is suite
    outcome = run_bench(suite, options(tmp_path, workers=2), QUIET)
    alone = run_bench(suite, options(tmp_path / "alone"), QUIET)
    values = [{r.config["mixer"]: r.value for r in o.results} for o in (outcome, alone)]
    assert values[0] == values[1] and set(values[0]) == {"deltanet", "attention"}
    assert "Mine &lt;b&gt;" in outcome.report.read_text() and "Mine <b>" not in outcome.report.read_text()


def test_suites_refuse_two_recipes_of_one_name() -> None:
    with pytest.raises(ValueError, match="different task names"):
        dataclasses.replace(QUICK, recipes=QUICK.recipes[:1] * 2)
    with pytest.raises(ValueError, match="steps=0"):
        Training(steps=0)
    with pytest.raises(ValueError, match="learning_rate"):
        Training(steps=1, learning_rate=-1)


# -- files ----------------------------------------------------------------------------------------------------------


def test_half_a_line_is_cut_off(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole + whole[:100])
    store = ResultStore(tmp_path)
    assert len(store.results()) == 8 and (tmp_path / "results.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"schema": 99}, "line 1, is an evaluation result of schema 99, this version reads 1"),
        (lambda record: record | {"version": 7}, "task 'parity' in version 7; this nestlearn has version 1"),
        (lambda record: record | {"details": {}}, "line 1, is a result of 'parity', but not of a benchmark"),
        (lambda record: {"a": 1}, "line 1, is not a saved evaluation result"),
    ],
)
def test_results_of_another_version_are_refused(finished: Path, tmp_path: Path, change, message: str) -> None:
    record = change(lines(finished)[0])
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        run_bench(QUICK, options(tmp_path), QUIET)
    assert not (tmp_path / "table.md").exists()


def test_tables_of_nothing() -> None:
    cells = plan(QUICK, ["hope"])
    assert summaries(cells, []) == {}
    assert measured_table(cells, [])[1] == [["hope", "not run", "not run"]]
    assert published_table(cells[1:])[1] == []
    assert markdown(["a", "b"], [["x|y", "1*"]]).splitlines()[2] == "| x\\|y | 1\\* |"


# -- command --------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *map(str, words)])
    output = capsys.readouterr()
    code = stop.value.code
    return int(code or 0), output.out, output.err


@pytest.fixture
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMNS", "200"), ("NO_COLOR", "1"), ("TERM", "dumb"),
                        ("_TYPER_FORCE_DISABLE_TERMINAL", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("warnings.filterwarnings", lambda *_args, **_kwargs: None)


@pytest.mark.usefixtures("_plain_terminal")
def test_the_command_runs_resumes_and_prints_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("quick", "--mixers", "deltanet", "--tasks", "mqar", "--workers", 1, "--out", tmp_path / "a b")
    code, out, err = run(capsys, *words)
    assert code == 0 and "1 cells to run" in out and "| deltanet |" in out and "report.html" in out, err
    (record,) = lines(tmp_path / "a b")
    assert record["command"] == (
        f"nestlearn bench quick --mixers deltanet --seeds 1 --tasks mqar --workers 1 --out '{tmp_path / 'a b'}'"
    )
    code, out, err = run(capsys, *words)
    assert code == 0 and "0 cells to run, 1 already" in out, err
    assert len(lines(tmp_path / "a b")) == 1
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "nestlearn bench formal" in out and all(name in out for name in ("recall", "mad", "tracking"))


@pytest.mark.usefixtures("_plain_terminal")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["formla"], "unknown suite 'formla'. Did you mean 'formal'"),
        (["quick", "--mixers", "deltanett"], "Did you mean 'deltanet'"),
        (["quick", "--mixers", "hope:adaptve=k"], "Did you mean 'adaptive'"),
        (["quick", "--mixers", "hope:hidden_size=9:num_attention_heads=2"], "not divisible"),
        (["quick", "--tasks", "partiy"], "unknown task of suite quick 'partiy'. Did you mean 'parity'"),
        (["quick", "--budget", "soon"], "budget 'soon'"),
    ],
)
def test_errors_are_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = run(capsys, *words, "--out", tmp_path / "out")
    assert code == 1 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path, workers: int) -> None:
    words = ["quick", "--mixers", "deltanet,attention", "--seeds", "400", "--workers", str(workers), "--out",
             str(tmp_path)]  # fmt: skip
    command = [sys.executable, "-m", "nestlearn", "bench", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        results = tmp_path / "results.jsonl"
        for _ in range(600):
            if results.exists() and results.read_bytes().count(b"\n") >= 1:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    assert "Stopped: finished cells are in" in err and "Continue with: nestlearn bench quick --mixers" in err
    assert "Traceback" not in err
    done = lines(tmp_path)
    assert 1 <= len(done) < 1600 and "runs are missing" in (tmp_path / "table.md").read_text()
    keys = {record["details"]["key"] for record in done}
    assert len(keys) == len(done) and keys <= {cell.key for cell in plan(QUICK, ["deltanet", "attention"], 400)}
