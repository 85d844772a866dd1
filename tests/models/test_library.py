"""What users of transformers do with a model and its tokenizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

import nestlearn
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    HopeForCausalLM(HopeConfig.from_preset("hope-tiny", num_hidden_layers=1)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_text_generation_pipeline(folder):
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    texts = ["Nested", "A longer prompt"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    alone = [generate(text, **options)[0]["generated_text"] for text in texts]
    together = [made[0]["generated_text"] for made in generate(texts, batch_size=2, **options)]
    assert together == alone


def test_vocabulary_can_grow(folder):
    model = HopeForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(300, mean_resizing=False)
        after = model(ids).logits
    assert model.config.vocab_size == 300
    # Not bit by bit: processors divide products of other widths in other ways.
    torch.testing.assert_close(after[..., :259], before, rtol=1e-5, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert not any(name.startswith("nestlearn") for name in sys.modules)
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.save(model(torch.tensor([[5, 6, 7]])).logits, again + ".pt")
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == model.config.model_type
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__module__ == "nestlearn.models.modeling"
model.save_pretrained(again)
"""


def test_a_process_that_did_not_import_the_package_loads_a_saved_model(tmp_path):
    folder, again = tmp_path / "saved", tmp_path / "again"
    model = HopeForCausalLM(HopeConfig.from_preset("hope-tiny", num_hidden_layers=1)).eval()
    model.save_pretrained(folder)
    source = str(Path(nestlearn.__file__).parents[1])
    place = {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", LOAD, str(folder), str(again)], check=True, env=os.environ | place)
    logits = torch.load(tmp_path / "again.pt")
    assert torch.equal(logits, model(torch.tensor([[5, 6, 7]])).logits)
    # Saved again by a process that loaded it so: the same files, no copy of the package's source.
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()
