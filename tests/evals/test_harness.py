"""The lm-evaluation-harness on our models: each number against a plain loop, without network."""

import functools
import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.mixers import SMALL

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import byte_tokenizer
from nestlearn.evals import EvalResult
from nestlearn.evals.harness import evaluate_harness, harness_tasks
from nestlearn.evals.harness_model import DocumentLM

TOKENIZER = byte_tokenizer()
BOS, EOS, PAD = 256, 257, 258
(HARNESS,) = importlib.util.find_spec("lm_eval").submodule_search_locations  # not imported here: it takes seconds
RULER = Path(HARNESS) / "tasks" / "ruler"
SENTENCES = ["the cat sat on the mat", "a dog ran to the old house", "we read it again", "so it was, at last, over"]


def make_model(mixer: str = "self_modifying", **options) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mixer=SMALL[mixer] | options,
        reset_token_id=BOS, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        initializer_range=0.3,
    )  # fmt: skip
    return HopeForCausalLM(config).double().eval()


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@torch.no_grad()
def plain_nats(model: HopeForCausalLM, context: str, continuation: str) -> float:
    """-ln p(continuation | <s> context), one row, one token after the other."""
    ids = torch.tensor([[BOS, *context.encode(), *continuation.encode()]])
    start = 1 + len(context.encode())
    logits = model(ids).logits[0]
    return torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()


def write_task(folder: Path, texts: list[str], **settings: object) -> Path:
    """A task of a local file, like the harness's LAMBADA unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "lambada_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                        {"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3.0},
    } | settings  # fmt: skip
    (folder / "task.yaml").write_text(json.dumps(task))
    return folder


def random_states() -> list:
    """Of all three global generators."""
    arrays = np.random.get_state()[1]  # noqa: NPY002 - the harness seeds this one
    return [random.getstate(), arrays.tolist(), torch.get_rng_state().tolist()]


@pytest.fixture(autouse=True)
def _caches_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets made by a test are not left on the machine."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("mixer", ["self_modifying", "titans", "attention"])
def test_scores_in_a_batch_equal_a_plain_loop(mixer: str):
    model = make_model(mixer)
    pairs = [(text[:cut], text[cut:]) for text in SENTENCES for cut in (1, 7, 14)]
    scored = DocumentLM(model, TOKENIZER, batch_size=4).loglikelihood(requests("loglikelihood", pairs), True)
    for (context, continuation), (log_probability, _) in zip(pairs, scored, strict=True):
        # A space before the cut belongs to what is scored: the harness moves it there.
        kept = context.rstrip()
        expected = -plain_nats(model, kept, context[len(kept) :] + continuation)
        assert log_probability == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mixer", ["self_modifying", "titans", "attention"])
def test_left_padded_prompts_are_answered_as_alone(mixer: str):
    model = make_model(mixer)
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    wanted = requests("generate_until", [(text[: 4 + 5 * number], options) for number, text in enumerate(SENTENCES)])
    together = DocumentLM(model, TOKENIZER, batch_size=4).generate_until(wanted, True)
    alone = DocumentLM(model, TOKENIZER, batch_size=1).generate_until(wanted, True)
    assert together == alone and any(together)


def test_prompts_are_padded_on_the_left_and_start_a_document():
    lm = DocumentLM(make_model("attention"), TOKENIZER)
    ids, mask = lm.tok_batch_encode(["a", "abcd"])
    assert ids.tolist() == [[PAD, PAD, PAD, BOS, 97], [BOS, 97, 98, 99, 100]]
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    ids, mask = lm.tok_batch_encode(["a", "abcd"], left_truncate_len=3)
    assert ids.tolist() == [[PAD, BOS, 97], [98, 99, 100]] and lm.cut_requests == 1


def test_requests_longer_than_the_limit_are_counted():
    model = make_model("attention")
    pairs = requests("loglikelihood", [("abcdefgh", " i"), ("a", "b")])
    lm = DocumentLM(model, TOKENIZER, max_length=6)
    lm.loglikelihood(pairs, True)
    assert lm.cut_requests == 1
    free = DocumentLM(model, TOKENIZER)
    free.loglikelihood(requests("loglikelihood", [("ab" * 3000, " i")]), True)
    assert free.cut_requests == 0


def test_lambada_of_a_local_file(tmp_path: Path):
    model = make_model().train()
    folder = write_task(tmp_path / "tasks", SENTENCES)
    before = random_states()
    (result,) = evaluate_harness(model, TOKENIZER, ["lambada_local"], include_path=folder, batch_size=3, command="c")
    assert random_states() == before and model.training
    nats = [plain_nats(model.eval(), text.rsplit(" ", 1)[0], " " + text.rsplit(" ", 1)[1]) for text in SENTENCES]
    assert result.details["metrics"]["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
    assert result.metric == "perplexity" and result.value == result.details["metrics"]["perplexity"]
    assert (result.n, result.version, result.command, result.task) == (4, 3, "c", "lm_eval_lambada_local")
    assert result.stderr is not None and result.stderr > 0
    result.save(tmp_path / "r.json")
    assert EvalResult.load(tmp_path / "r.json") == result
    (limited,) = evaluate_harness(model, TOKENIZER, ["lambada_local"], include_path=folder, limit=2)
    assert limited.n == 2 and limited.details["metrics"]["perplexity"] == pytest.approx(math.exp(sum(nats[:2]) / 2))


def test_groups_of_tasks(tmp_path: Path):
    model = make_model("attention")
    write_task(tmp_path / "a", SENTENCES[:3], task="words_a")
    write_task(tmp_path / "b", SENTENCES[3:], task="words_b")
    group = {
        "group": "words",
        "task": ["words_a", "words_b"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 2.0},
    }
    (tmp_path / "group.yaml").write_text(json.dumps(group))
    both = evaluate_harness(model, TOKENIZER, ["words"], include_path=tmp_path)
    results = {result.task.removeprefix("lm_eval_"): result for result in both}
    assert set(results) == {"words", "words_a", "words_b"} and results["words"].n == 4
    parts = [results[name].details["metrics"]["acc"] * results[name].n for name in ("words_a", "words_b")]
    assert results["words"].value == pytest.approx(sum(parts) / 4) and results["words"].version == 2


@pytest.mark.parametrize("max_length", [None, 10])
def test_whole_documents_are_read_in_windows_that_start_fresh(tmp_path: Path, max_length: int | None):
    """As the harness's wikitext: bits per byte of whole documents, each window `<s>` and what follows."""
    model = make_model()
    folder = write_task(
        tmp_path / "tasks", SENTENCES, task="documents", output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    (result,) = evaluate_harness(model, TOKENIZER, ["documents"], include_path=folder, max_length=max_length)
    nats = 0.0
    for text in SENTENCES:
        size = max_length or len(text)
        starts = range(0, len(text), size)
        for start in starts:
            # Every window but the first reads the last token before it in place of `<s>`, and the last one reads as
            # much more as fits, to have the most context.
            end = min(start + size, len(text))
            first = max(0, end - size) if start else 0
            before = [BOS] if first == 0 else [ord(text[first - 1])]
            ids = torch.tensor([[*before, *text[first:end].encode()]])
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            nats += losses[start - first :].sum().item()
    assert result.value == pytest.approx(nats / math.log(2) / sum(map(len, SENTENCES)), rel=1e-6)


def copying_generate(input_ids: torch.Tensor, max_length: int, **_options: object) -> torch.Tensor:
    """Answers every prompt with the number it contains, as a model that recalls perfectly would."""
    rows = []
    for row in input_ids.tolist():
        text = bytes(token for token in row if token < 256).decode()
        (value,) = re.findall(r"is: (\d{7})\.", text)
        rows.append([*row, *f" {value}.".encode(), EOS])
    return torch.tensor(rows)


@pytest.mark.slow  # the harness's needles take 8 seconds to import
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_niah_single_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.tasks.ruler import prepare_niah

    # The harness makes 500 prompts whatever the limit, for 20 seconds; these are its first four.
    few = functools.partial(prepare_niah.generate_samples, num_samples=4)
    monkeypatch.setattr(prepare_niah, "generate_samples", lambda *args, **kwargs: few(*args, **kwargs | few.keywords))
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    metadata = {"tokenizer": str(tmp_path / "model"), "max_seq_lengths": [1024]}
    options = {"limit": 2, "metadata": metadata, "include_path": RULER, "batch_size": 2}
    (untrained,) = evaluate_harness(model, TOKENIZER, ["niah_single_1"], **options)
    assert untrained.details["metrics"] == {"1024": 0.0, "1024_stderr": 0.0}
    assert (untrained.n, untrained.metric) == (2, "accuracy at 1024 tokens") and untrained.config["cut_requests"] == 0
    monkeypatch.setattr(model, "generate", copying_generate)
    (perfect,) = evaluate_harness(model, TOKENIZER, ["niah_single_1"], **options)
    assert perfect.value == 1.0


def test_data_that_cannot_be_had_are_named(tmp_path: Path):
    model, builtin = make_model("attention"), RULER.parent
    with pytest.raises(ValueError, match="data set 'baber/piqa' of the task piqa could not be loaded"):
        evaluate_harness(model, TOKENIZER, ["piqa"], include_path=builtin / "piqa")
    folder = write_task(tmp_path, SENTENCES)
    (folder / "data.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data\.jsonl'\}\) of the task lambada_local could not be loaded"):
        evaluate_harness(model, TOKENIZER, ["lambada_local"], include_path=folder)


@pytest.mark.slow  # the harness reads its fourteen thousand definitions
def test_unknown_tasks_are_refused_with_the_closest():
    with pytest.raises(ValueError, match="Unknown task 'lambada_openia'.*Did you mean lambada_openai"):
        harness_tasks(["lambada_openia"])


def test_no_task_and_no_folder_are_refused():
    with pytest.raises(ValueError, match="is not a folder"):
        harness_tasks(["piqa"], include_path="/nonexistent")
    with pytest.raises(ValueError, match="No task was named"):
        harness_tasks([])


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        evaluate_harness(make_model("attention"), tokenizer, ["lambada_local"],
                         include_path=write_task(tmp_path, SENTENCES))  # fmt: skip


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"pip install nestlearn\[eval\].*piqa"):
        harness_tasks(["piqa"])
