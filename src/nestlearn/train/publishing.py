"""A trained model as a folder for others: it is loaded without this package, and its card tells how it was made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from nestlearn.atomic import atomic_write, write_text
from nestlearn.models import HopeForCausalLM, load_stacked
from nestlearn.models.files import refuse_pickled_weights
from nestlearn.models.stacking import StackedModel
from nestlearn.models.standalone import hope_code, stacked_code
from nestlearn.train.errors import CheckpointError
from nestlearn.train.folder import saved_config
from nestlearn.train.load import load_model, load_tokenizer
from nestlearn.train.meter import read_log

EXPECTED = "expected_logits.safetensors"
TOKENS, LAST = 128, 4
"""Tokens of the text whose logits are written, and for how many of its last positions."""

_TEXT = "A memory that is written while a text is read answers for what came before, wherever the text is cut. "
_SNIPPET = f'''import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

name = "."  # this folder, or the name of the model on the Hub
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="float32").eval()
expected = load_file(cached_file(name, "{EXPECTED}"))
with torch.inference_mode():
    logits = model(expected["input_ids"]).logits[:, -{LAST}:]
torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)

tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
prompt = torch.tensor([tokenizer("A memory that is")["input_ids"]])
mask = torch.ones_like(prompt)
print(tokenizer.decode(model.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)[0]))
'''
# An entry of None makes every import of the package fail, as where it is not installed.
_WITHOUT_US = "import sys; sys.modules['nestlearn'] = None; exec(sys.stdin.read())"
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def publish(model_folder: str | Path, out: str | Path) -> str:
    """Write a folder that `transformers` loads without this package, and run the example of its card there.

    The folder has the weights as safetensors, ``config.json``, the code as plain files, the tokenizer, the logits of a
    text, and a card (``README.md``) whose example compares the logits and generates.

    Args:
        model_folder: of a Hope or Transformer model that `nestlearn train` has made, or of a stacked model.
        out: the new folder.

    Returns:
        What the example of the card printed: a text that the model has generated.

    Raises:
        ValueError: ``out`` holds something, or the model needs code from outside this package and `transformers`.
        CheckpointError: there is no model, or one that cannot be loaded.
        RuntimeError: the example of the card failed; nothing was written.

    Example:
        >>> from nestlearn import HopeConfig, HopeForCausalLM
        >>> from nestlearn.data import byte_tokenizer
        >>> HopeForCausalLM(HopeConfig.from_preset("hope-tiny", num_hidden_layers=1)).save_pretrained("mine")
        >>> _ = byte_tokenizer().save_pretrained("mine")
        >>> publish("mine", "published").startswith("A memory that is")
        True
    """
    source, target = Path(model_folder), Path(out)
    refuse_used_folder(target)
    model = _load(source).eval()
    code, tokenizer = _code(model), load_tokenizer(source)
    card = write_card(model, source)
    with atomic_write(target, "the published model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, text in code.items():
            write_text(folder / name, text)
        ids = tokenizer(10 * _TEXT, add_special_tokens=False)["input_ids"][:TOKENS]
        save_file(_expected(model, ids), str(folder / EXPECTED))
        write_text(folder / "README.md", card)
        return run_card(folder)


def refuse_used_folder(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        ValueError: ``out`` is a file, or a folder that is not empty.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is a file or a folder that is not empty; choose another --out, or remove it first.")


def _load(folder: Path) -> PreTrainedModel:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no model: it has no config.json. Give the folder that `nestlearn train` or `nestlearn "
            "stack` has written."
        ) from error
    except (OSError, ValueError, AttributeError):
        kind = "hope"  # the loader says what is wrong with the file
    if kind.startswith("stacked_"):
        return load_stacked(folder)
    if kind != "hope":
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r}, which transformers loads without nestlearn: upload it as it is."
        )
    refuse_pickled_weights(folder)
    return load_model(folder)


def _code(model: PreTrainedModel) -> dict[str, str]:
    """The code of a model as files.

    Raises:
        ValueError: a part of it is neither of this package nor of `transformers`.
    """
    if isinstance(model, HopeForCausalLM):
        for mixer in model.config.mixers:
            _refuse_outside("mixer", mixer.type, type(mixer), "nestlearn")
        return hope_code()
    assert isinstance(model, StackedModel)
    base = model.unstacked_class
    _refuse_outside("model", base.__name__, base, "transformers")
    kind: Any = type(model.config)
    return stacked_code(kind.unstacked_class.model_type, (kind.__name__, "StackedForCausalLM"))


def _refuse_outside(what: str, name: str, kind: type, package: str) -> None:
    if kind.__module__.split(".")[0] != package:
        raise ValueError(
            f"the {what} {name!r} comes from {kind.__module__}, and only the code of {package} can be published with a "
            f"{what}. Publish that package too, and upload the folder as it was saved: it is loaded where both are "
            "installed."
        )


def _expected(model: PreTrainedModel, ids: list[int]) -> dict[str, torch.Tensor]:
    """A text and its last logits, computed in float32."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logits = model.float()(tokens).logits[:, -LAST:]
    return {"input_ids": tokens, "logits": logits.clone()}


def run_card(folder: str | Path) -> str:
    """Run the Python example of a folder's card in a process that cannot import this package.

    Args:
        folder: with a ``README.md``.

    Returns:
        What it printed.

    Raises:
        RuntimeError: it failed.
    """
    example = "\n".join(_PYTHON.findall((Path(folder) / "README.md").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as modules:
        place = {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_US], input=example, capture_output=True, encoding="utf-8", cwd=folder,
            env=os.environ | place, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"the example of the card failed, so the model was not published: {done.stderr.strip()[-2000:]}"
        )
    return done.stdout.strip()


def write_card(model: PreTrainedModel, source: Path) -> str:
    """The card of a model as Markdown.

    Args:
        model: Hope or stacked.
        source: its folder; the settings and the log of a training run there are told.
    """
    kind = _describe_hope(model) if isinstance(model, HopeForCausalLM) else _describe_stacked(model)
    return "\n".join(
        [
            "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nested-learning",
            "- custom_code", "---", "", f"# {source.resolve().name}", "", kind, "",
            "The code of nestlearn (Apache-2.0) is in this folder, and the package need not be installed:",
            "`pip install torch transformers safetensors jaxtyping`. `trust_remote_code=True` runs that code.", "",
            "## Use and check", "",
            f"`{EXPECTED}` holds a text of up to {TOKENS} tokens and the logits at its last {LAST} positions, computed",
            "in float32 on a CPU when the model was published. This example compares them, then generates:", "",
            "```python", _SNIPPET + "```", "", "## Training", "", *_training(source), "",
            "## Limits", "", *_limits(model), "",
        ]
    )  # fmt: skip


def _describe_hope(model: HopeForCausalLM) -> str:
    config = model.config
    mixers = ", ".join(f"{count} × `{mixer.type}`" for mixer, count in config.mixer_counts)
    return (
        f"A causal language model of {model.num_parameters():,} parameters, made with nestlearn: "
        f"{config.num_hidden_layers} layers of width {config.hidden_size} ({mixers}), "
        f"{config.vocab_size:,} tokens. Nested Learning is described in arXiv 2512.24695."
    )


def _describe_stacked(model: Any) -> str:
    plan = model.stack_plan
    periods = ", ".join("frozen" if period is None else f"{period:,}" for period in plan.periods)
    return (
        f"{model.unstacked_class.__name__} with levels of memory on {len(plan.paths)} of its feed-forward networks "
        f"(periods in tokens: {periods}; mode {plan.mode}), {model.num_parameters():,} parameters, made with "
        "nestlearn. Nested Learning is described in arXiv 2512.24695."
    )


def _training(source: Path) -> list[str]:
    """The settings and figures of the run in a folder."""
    try:
        config = saved_config(source)
    except CheckpointError:
        return ["The folder of this model has no record of a training run."]
    shown = ("corpus", "tokenizer", "sequence_length", "batch_size", "steps", "optimizer", "dtype", "seed")
    rows = [f"| {name} | `{getattr(config, name)}` |" for name in shown]
    rows.append(f"| peak learning rate | {config.peak_learning_rate():g} |")
    latest: dict[str, Any] = {}
    for line in read_log(source):
        latest |= line
    figures = (f"| last {name} | {value:.6g} |" for name, value in latest.items() if isinstance(value, (int, float)))
    return ["| setting or figure of the run | value |", "|---|---|", *rows, *figures]


def _limits(model: PreTrainedModel) -> list[str]:
    if isinstance(model, HopeForCausalLM):
        return [
            "- The figures above are of one run; nothing else was measured when this card was written.",
            "- The code is a copy from the day of publishing, and gets no fixes.",
            "- The tolerance of the check is for float32; other types and processors differ by more.",
        ]
    return [
        "- Loaded this way the model predicts as it was saved. To let it read and forget, use nestlearn.",
        "- The code is a copy from the day of publishing, and gets no fixes. The license of the base model holds too.",
        "- The tolerance of the check is for float32; other types and processors differ by more.",
    ]
