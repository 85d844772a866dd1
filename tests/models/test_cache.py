"""HopeCache: rows, copies, files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nestlearn import HopeCache
from nestlearn.nn.state import tensors_of


@pytest.fixture
def read(build, ids):
    """read(mixer) -> (model, cache after six tokens, the five tokens that follow)."""

    def make(mixer="attention", **fields):
        model, cache = build(mixer, **fields), HopeCache()
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
        return model, cache, ids[:, 6:]

    return make


def logits(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=False).logits


def test_a_saved_cache_goes_on_to_the_bit(read, mixer, tmp_path):
    model, cache, rest = read(mixer)
    cache.reset([1])
    cache.save(tmp_path / "a.cache")
    again = HopeCache.load(tmp_path / "a.cache", model)
    assert again.seen == 6
    assert torch.equal(logits(model, rest, again), logits(model, rest, cache))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.cache"]


def test_forks_go_their_own_way(read, mixer):
    model, cache, rest = read(mixer)
    before = [x.clone() for x in tensors_of(cache.layers)]
    fork = cache.fork()
    with torch.no_grad():
        model(rest, past_key_values=fork)
    assert (cache.seen, fork.seen) == (6, 11)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(cache.layers), strict=True))


def test_rows_are_reordered_selected_and_repeated(read, mixer):
    model, cache, rest = read(mixer)
    expected = logits(model, rest, cache)
    swapped, one, many = cache.fork(), cache.fork(), cache.fork()
    swapped.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(logits(model, rest[[2, 0, 0]], swapped), expected[[2, 0, 0]])
    one.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(logits(model, rest[1:2], one), expected[1:2])
    many.batch_repeat_interleave(2)
    torch.testing.assert_close(logits(model, rest.repeat_interleave(2, 0), many), expected.repeat_interleave(2, 0))


def test_reset_of_all_is_a_new_cache(read):
    model, cache, rest = read()
    cache.reset()
    assert (cache.seen, cache.batch_size, cache.nbytes()) == (0, 0, 0)
    torch.testing.assert_close(logits(model, rest, cache), logits(model, rest, HopeCache()))


def test_rows_that_do_not_exist(read):
    _, cache, _ = read()
    with pytest.raises(ValueError, match="row the cache lacks"):
        cache.reset([3])
    with pytest.raises(ValueError, match="shape"):
        cache.reset(torch.tensor([True]))
    with pytest.raises(ValueError, match="Fork"):
        cache.crop(1)


def test_size_and_device(read):
    _, cache, _ = read("sliding_attention", conv_size=0)
    # 2 layers; keys, values: 3 rows x 2 heads x 3 tokens x 8 x 8 bytes; visible 1, place 8; position 8, poisoned 1
    assert cache.nbytes() == 2 * (2 * 3 * 2 * 3 * 8 * 8 + 3 * 3 * (1 + 8) + 3 * (8 + 1))
    _, full, _ = read("attention")
    # The same with all 6 tokens, and 3 more inputs of a convolution of width 4 on 48 channels.
    assert full.nbytes() == 2 * (2 * 3 * 2 * 6 * 8 * 8 + 3 * 6 * (1 + 8) + 3 * (8 + 1) + 3 * 3 * 48 * 8)
    assert "rows=3, seen=6" in repr(cache)
    assert tensors_of(cache.to("meta").layers)[0].is_meta
    assert not tensors_of(cache.layers)[0].is_meta


def test_size_does_not_depend_on_the_context(build, mixer):
    """The states after 8 and after 64 tokens, both at a chunk's start; only full attention grows."""
    model, sizes = build(mixer), []
    for tokens in (8, 64):
        cache = HopeCache()
        with torch.no_grad():
            model(torch.full((1, tokens), 7), past_key_values=cache)
        sizes.append(cache.nbytes())
    grows = mixer in ("attention", "levels")
    assert (sizes[1] > sizes[0]) == grows


def test_detached_state_carries_no_gradient(build, ids):
    model, cache = build(), HopeCache()
    model(ids, past_key_values=cache)
    assert any(x.requires_grad for x in tensors_of(cache.layers))
    assert not any(x.requires_grad for x in tensors_of(cache.detach().layers))


def test_truncated_at_any_length(read, tmp_path):
    _, cache, _ = read("sliding_attention")
    cache.save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "part").write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated"):
            HopeCache.load(tmp_path / "part")


def test_a_flipped_bit_is_noticed(read, tmp_path):
    _, cache, _ = read("sliding_attention")
    cache.save(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[-100] ^= 1
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        HopeCache.load(tmp_path / "a")


def test_a_changed_byte_anywhere_is_refused_or_changes_nothing(read, tmp_path):
    """Every byte of the header, and some of the tensors: a digit of ``seen`` would change the positions."""
    model, cache, rest = read("sliding_attention")
    cache.save(tmp_path / "a")
    expected, data = logits(model, rest, cache.fork()), (tmp_path / "a").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for place in (*range(header), *range(header, len(data), 89)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(changed)
        try:
            again = HopeCache.load(tmp_path / "b", model)
        except ValueError as error:
            refused += 1
            assert str(tmp_path / "b") in str(error)
            continue
        assert again.seen == cache.seen and torch.equal(logits(model, rest, again), expected)
    assert refused > header / 2


def test_foreign_files(read, tmp_path):
    model, cache, _ = read()
    (tmp_path / "text").write_text("hello " * 100)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    for name in ("text", "weights"):
        with pytest.raises(ValueError, match="not a HopeCache"):
            HopeCache.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        HopeCache.load(tmp_path / "absent")
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="hidden_size"):
        HopeCache.load(tmp_path / "cache", type(model.config)(hidden_size=32))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99"), ({"spec": {"value": 3}}, "header"), ({"seen": None}, "header")],
)
def test_a_changed_header_is_refused(read, tmp_path, change, message):
    _, cache, _ = read("sliding_attention")
    cache.save(tmp_path / "a")
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        header = json.loads(file.metadata()["nestlearn"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    save_file(tensors, tmp_path / "a", {"nestlearn": json.dumps(header | change)})
    with pytest.raises(ValueError, match=message):
        HopeCache.load(tmp_path / "a")


def test_a_failed_save_leaves_the_old_file(read, tmp_path, monkeypatch):
    _, cache, _ = read()
    cache.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestlearn.models.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
