"""Corpora: the running Python's own text, text files, streams, and what is said when they cannot be read."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

from nestlearn.data import LocalCorpus, StreamingCorpus, load_corpus
from nestlearn.data.documents import shingles
from nestlearn.data.python_docs import docstrings, parse, read_docs, read_source, standard_library
from nestlearn.data.text_files import cut_blocks, split_blocks


@pytest.fixture(scope="module")
def docs() -> tuple[LocalCorpus, LocalCorpus]:
    parts = tuple(load_corpus("python-docs", split) for split in ("train", "validation"))
    assert isinstance(parts[0], LocalCorpus)
    assert isinstance(parts[1], LocalCorpus)
    return parts[0], parts[1]


class TestPythonDocs:
    def test_size(self, docs: tuple[LocalCorpus, LocalCorpus]) -> None:
        train, validation = docs
        assert 1_000_000 < train.num_bytes < 8_000_000
        assert 0.03 < validation.num_bytes / train.num_bytes < 0.3

    def test_nothing_is_in_both_splits(self, docs: tuple[LocalCorpus, LocalCorpus]) -> None:
        train, validation = docs
        assert not {document.name for document in train} & {document.name for document in validation}
        seen = set().union(*(shingles(document.text) for document in train))
        held_out = [shingles(document.text) for document in validation]
        repeated = sum(len(part & seen) for part in held_out) / sum(map(len, held_out))
        assert repeated < 0.05

    def test_topics_and_docstrings_are_there(self, docs: tuple[LocalCorpus, LocalCorpus]) -> None:
        texts = {document.name: document.text for corpus in docs for document in corpus}
        assert "Split the source string by the occurrences of the pattern" in texts["module/re"]
        assert any(name.startswith("topic/") for name in texts)
        assert not [name for name in texts if ".test." in name or "site-packages" in name]

    def test_reading_again_gives_the_same(self, docs: tuple[LocalCorpus, LocalCorpus]) -> None:
        folder = standard_library() / "email"
        assert read_docs(folder) == read_docs(folder)
        assert load_corpus("python-docs") == docs[0]

    def test_modules_are_read_not_imported(self, tmp_path: Path) -> None:
        path = tmp_path / "loud.py"
        path.write_text(
            '"""Module."""\nraise SystemExit\nclass A(B):\n  "About A."\n  async def f(self, x=1, *y):\n    "F."'
        )
        tree = parse(path)
        assert tree is not None
        assert docstrings(tree, "loud") == "loud\n\nModule.\n\nclass A(B)\n\nAbout A.\n\nA.f(self, x=1, *y)\n\nF.\n"
        assert "turtle" not in sys.modules

    def test_a_file_of_another_python_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "old.py"
        path.write_text("print 'hello'")
        assert parse(path) is None

    def test_tests_and_packages_are_skipped(self, tmp_path: Path) -> None:
        for folder in ("a", "test", "a/tests", "site-packages"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "module.py").write_text(f'"""{folder} {"word " * 50}"""')
        assert [document.name for document in read_docs(tmp_path)] == ["module/a.module"]

    def test_a_python_without_sources_is_told_so(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="carries no source files"):
            read_docs(tmp_path)


def test_python_source_is_source(tmp_path: Path) -> None:
    documents = read_source(standard_library() / "json")
    assert {document.name for document in documents} >= {"source/decoder.py", "source/encoder.py"}
    assert all("import" in document.text for document in documents)
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n" + b"# caf\xe9\n" * 30)
    (tmp_path / "broken.py").write_bytes(b"# caf\xe9\n" * 30)
    assert [document.text[:25] for document in read_source(tmp_path)] == ["# coding: latin-1\n# café\n"]


class TestTextFiles:
    def test_a_file_is_split_in_blocks_without_loss(self, tmp_path: Path) -> None:
        text = "".join(f"line {number}\r\n" for number in range(5000))
        path = tmp_path / "book.txt"
        path.write_bytes(text.encode())
        train, validation = (load_corpus(f"text:{path}", split) for split in ("train", "validation"))
        held_out = "".join(document.text for document in validation)
        assert 0.03 < len(held_out) / len(text) < 0.07
        lines = [line for corpus in (train, validation) for d in corpus for line in d.text.splitlines(keepends=True)]
        assert sorted(lines) == sorted(text.splitlines(keepends=True))
        assert len(list(train)) <= 2  # the runs between the blocks held out

    def test_a_long_file_keeps_its_long_range(self) -> None:
        text = "x" * 79 + "\n"
        documents = split_blocks(text * 40_000, "book", "train")
        assert max(len(document.text) for document in documents) > 1_000_000
        assert all(len(d.text) < 70_000 for d in split_blocks(text * 40_000, "book", "validation"))

    @pytest.mark.parametrize("size", [1, 3, 7, 100])
    def test_blocks_cover_the_text(self, size: int) -> None:
        text = "ab\ncdefghij\n\nk\n"
        assert "".join(cut_blocks(text, size)) == text

    def test_a_folder_and_a_pattern(self, tmp_path: Path) -> None:
        for number in range(10):
            path = tmp_path / f"part{number % 2}" / f"{number}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"text {number}")
        (tmp_path / ".hidden").write_text("hidden")
        (tmp_path / "copy.txt").write_text("text  0\n")
        (tmp_path / "blank.txt").write_text(" \n")

        def names(spec: str) -> list[str]:
            return sorted(d.name for split in ("train", "validation") for d in load_corpus(spec, split))

        assert len(names(f"text:{tmp_path}")) == 10
        assert names(f"text:{tmp_path}/**/*.md") == sorted(f"part{n % 2}/{n}.md" for n in range(10))
        assert names(f"text:{tmp_path}/part1/*") == ["1.md", "3.md", "5.md", "7.md", "9.md"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"\n \n", "is empty"),
            (b"PNG\0\0", "is a binary file: byte 3 is NUL"),
            (b"caf\xe9", "is not UTF-8 text: byte 3 is 0xe9"),
            (b"a", "too short to be split"),
        ],
    )
    def test_a_file_that_cannot_be_learned_from(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus(f"text:{path}")

    def test_a_file_that_cannot_be_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        (tmp_path / "file").write_text("text")
        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match="file cannot be read: Permission denied"):
            load_corpus(f"text:{tmp_path}/file")

    def test_a_binary_file_in_a_folder_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        (tmp_path / "b.png").write_bytes(b"PNG\0")
        with pytest.raises(ValueError, match=r"b.png is a binary file.*leave it out of the pattern"):
            load_corpus(f"text:{tmp_path}")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="does not exist"):
            load_corpus(f"text:{tmp_path}/nothing")
        with pytest.raises(ValueError, match="empty folder"):
            load_corpus(f"text:{tmp_path}")
        (tmp_path / "a").write_text("same")
        (tmp_path / "b").write_text("same ")
        with pytest.raises(ValueError, match="hold 1 different texts"):
            load_corpus(f"text:{tmp_path}")

    def test_a_byte_order_mark_is_dropped(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + name.encode())
        texts = {
            document.text for split in ("train", "validation") for document in load_corpus(f"text:{tmp_path}", split)
        }
        assert texts == {"a", "b"}

    def test_real_books(self, shared_data: Path) -> None:
        corpus = load_corpus(f"text:{shared_data / 'tinyshakespeare' / 'input.txt'}", "validation")
        assert isinstance(corpus, LocalCorpus)
        assert corpus.num_bytes > 10_000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python-doc", "Did you mean 'python-docs'"),
        ("notes.txt", "write 'text:notes.txt'"),
        ("text:", "Something must follow text:"),
        ("hf:", "Something must follow hf:"),
        ("", "Unknown corpus ''"),
    ],
)
def test_unknown_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(spec)


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split is 'test'; it must be one of 'train', 'validation'"):
        load_corpus("python-docs", "test")  # pyright: ignore[reportArgumentType]


def write_rows(path: Path, count: int, column: str = "text") -> None:
    path.write_text("".join(json.dumps({column: f"document {index}"}) + "\n" for index in range(count)))


class TestStreams:
    def test_a_train_split_alone_is_divided(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train.jsonl", 500)
        train, validation = (load_corpus(f"hf:{tmp_path}", split) for split in ("train", "validation"))
        assert isinstance(train, StreamingCorpus)
        texts = [[document.text for document in corpus] for corpus in (train, validation)]
        assert sorted(texts[0] + texts[1]) == sorted(f"document {index}" for index in range(500))
        assert 0 < len(texts[1]) < 15
        assert [document.text for document in train] == texts[0]

    def test_own_validation_split_is_used(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train.jsonl", 5)
        write_rows(tmp_path / "test.jsonl", 3)
        assert len(list(load_corpus(f"hf:{tmp_path}", "train"))) == 5
        assert len(list(load_corpus(f"hf:{tmp_path}", "validation"))) == 3

    @pytest.mark.parametrize("taken", [0, 1, 7, 30])
    def test_reading_goes_on_where_it_stopped(self, tmp_path: Path, taken: int) -> None:
        write_rows(tmp_path / "train.jsonl", 30)
        corpus = load_corpus(f"hf:{tmp_path}")
        assert isinstance(corpus, StreamingCorpus)
        everything = list(corpus)
        reader = corpus.read()
        first = list(islice(reader, taken))
        state = json.loads(json.dumps(reader.state()))
        assert first + list(corpus.read(state)) == everything
        assert first + list(reader) == everything
        resumed = corpus.read(state)
        assert first + list(corpus.read(resumed.state())) == everything

    def test_no_column_of_text(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "train.jsonl", 3, column="label")
        with pytest.raises(ValueError, match=r"has the columns \['label'\]"):
            load_corpus(f"hf:{tmp_path}")

    def test_no_training_split(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "test.jsonl", 3)
        with pytest.raises(ValueError, match="no training split"):
            load_corpus(f"hf:{tmp_path}")

    def test_not_found(self) -> None:
        with pytest.raises(ValueError, match="hf:nobody/nothing cannot be opened"):
            load_corpus("hf:nobody/nothing")
