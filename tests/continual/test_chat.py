"""The conversation, line by line, over a memory that writes down what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestlearn.continual import Fact
from nestlearn.continual.chat import COMMANDS_HELP, Chat, Sampling


@dataclass
class Memory:
    """Answers with the number of texts it has read, and records every call."""

    template: str | None = None
    texts: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    forgotten: list[Any] = field(default_factory=list)
    log: tuple[Any, ...] = ()
    edits: tuple[Any, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(chat_template=self.template)

    def generate(self, prompt: str, **options: Any) -> str:
        on_text = options.pop("on_text", None)
        self.asked.append({"prompt": prompt, **options})
        for piece in (" ", "\n I ha", f"ve read {len(self.texts)}.") if on_text else ():
            on_text(piece)
        return f" I have read {len(self.texts)}.\n"

    def read(self, source: str | Path, progress: Any = None) -> str:
        text = source.read_text() if isinstance(source, Path) else source
        if progress is not None:
            progress("reading")
        self.texts.append(text)
        self.log = (*self.log, SimpleNamespace(what=str(source)))
        return f"{len(text)} bytes"

    def save(self, path: Path) -> None:
        path.write_text("\n".join(self.texts))

    def fork(self) -> Memory:
        return Memory(self.template, list(self.texts), log=self.log, edits=self.edits)

    def edit(self, facts: list[Fact], progress: Any) -> str:
        progress("editing")
        triples = tuple((fact.prompt, fact.subject, fact.target) for fact in facts)
        self.edits = (*self.edits, SimpleNamespace(facts=triples))
        self.log = (*self.log, SimpleNamespace(what=f"edited {facts[0].prompt} -> {facts[0].target}"))
        return f"{len(facts)} fact"

    def undo_edit(self) -> Any:
        *rest, last = self.edits
        self.edits = tuple(rest)
        return last

    def forget(self, levels: list[int] | None) -> None:
        if levels and max(levels) > 1:
            raise ValueError(f"there is no level {max(levels)}")
        self.forgotten.append(levels)

    def describe(self) -> list[Any]:
        return [
            SimpleNamespace(path=f"mlp {i}", level=level, period=period, tokens=tokens, change=0.5 * i, bytes=1000)
            for i in range(2)
            for level, period, tokens in ((0, 64, 1234), (1, None, 0))
        ]


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(Memory(), tmp_path / "mine", Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3))


def test_an_answer_sees_the_conversation_and_the_sampling(chat: Chat) -> None:
    assert chat.handle(" Hello ") == "I have read 0."
    chat.handle("And now?")
    last = chat.session.asked[-1]
    assert last.pop("prompt") == "You: Hello\nModel: I have read 0.\nYou: And now?\nModel:"
    assert last == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 5, "stop": "\nYou:"}
    chat.handle("/new")
    assert chat.prompt("Hi") == "You: Hi\nModel:"


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    chat = Chat(Memory(template="x"), tmp_path / "mine")
    chat.handle("Hello")
    chat.handle("Again")
    assert chat.session.asked[-1]["prompt"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "I have read 0."},
        {"role": "user", "content": "Again"},
    ]


def test_a_templated_turn_is_learned_as_the_template_writes_it(tmp_path: Path) -> None:
    chat = Chat(Memory(template="x"), tmp_path / "mine", learns=True)
    chat.handle("Hello")
    assert chat.session.texts == [
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I have read 0."}]
    ]


def test_files_are_read_and_errors_leave_everything(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("hello")
    said = []
    chat.report = said.append
    assert chat.handle(f'/read "{tmp_path}/a b.txt"') == f"{tmp_path}/a b.txt: 5 bytes"
    assert said == ["reading"]
    assert chat.session.texts == ["hello"]
    assert "No such file" in chat.handle("/read nowhere.txt")
    assert "Name at least one" in chat.handle("/read")
    assert "Close every quotation mark" in chat.handle('/read "a')
    assert chat.session.texts == ["hello"]


def test_the_conversation_is_learned_only_when_asked(chat: Chat) -> None:
    chat.handle("one")
    assert chat.handle("/learn") == "The conversation is not being learned; /learn on or /learn off."
    chat.handle("/learn on")
    chat.handle("two")
    chat.handle("/learn off")
    chat.handle("three")
    assert chat.session.texts == ["You: two\nModel: I have read 0.\n"]


def test_saving_forking_and_leaving(chat: Chat, tmp_path: Path) -> None:
    assert chat.handle("/quit") == "Nothing new to save." and chat.done
    chat.done = False
    chat.handle("/learn on")
    chat.handle("hello")
    first = chat.session
    other = tmp_path / "other"
    assert "goes on with a copy" in chat.handle(f"/fork {other}")
    assert other.exists() and not (tmp_path / "mine").exists()
    assert chat.session is not first and chat.file == other
    assert "already exists" in chat.handle(f"/fork {other}")
    chat.handle("more")
    assert chat.unsaved
    assert f"Saved {other}" in chat.handle("/quit")
    assert len(first.texts) == 1 and other.read_text().count("You:") == 2
    assert chat.handle("/quit!") == ""


def test_saving_elsewhere_is_not_saving_here(chat: Chat, tmp_path: Path) -> None:
    chat.handle("/learn on")
    chat.handle("hello")
    chat.handle(f"/save {tmp_path}/copy")
    assert chat.unsaved and (tmp_path / "copy").exists()
    assert chat.handle("/quit!") == "Left without saving."
    chat.handle("/save")
    assert not chat.unsaved


def test_levels_are_listed_and_forgotten(chat: Chat) -> None:
    lines = chat.handle("/levels").splitlines()
    assert lines[0].split() == ["level", "networks", "period", "tokens", "read", "change", "bytes"]
    assert lines[1].split() == ["0", "2", "64", "1,234", "0.2500", "2,000"]
    assert lines[2].split() == ["1", "2", "-", "0", "0.2500", "2,000"]
    assert chat.handle("/forget 0 1") == "Forgotten: level 0, 1."
    assert chat.handle("/forget") == "Forgotten: all levels."
    assert chat.handle("/forget 9") == "Error: there is no level 9"
    assert "no number of a level" in chat.handle("/forget fast")
    assert chat.session.forgotten == [[0, 1], None]


def test_an_answer_comes_piece_by_piece(chat: Chat) -> None:
    said: list[str] = []
    chat.say = said.append
    assert chat.handle("Hello") == "" and said == ["I ha", "ve read 0.", "\n"]
    assert chat.turns == [("Hello", "I have read 0.")]


def test_the_last_reading_is_undone(chat: Chat, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert "nothing to undo" in chat.handle("/undo")
    chat.handle(f"/read {tmp_path}/a {tmp_path}/b")
    assert chat.handle("/undo") == f"Undone: {tmp_path}/b." and chat.session.texts == ["a"] and chat.unsaved
    assert "nothing to undo" in chat.handle("/undo")
    chat.handle("/learn on")
    chat.handle("Hello")
    assert len(chat.session.texts) == 2
    assert chat.handle("/undo").startswith("Undone: You: Hello") and chat.session.texts == ["a"]
    chat.handle(f"/read {tmp_path}/b")
    chat.handle("/forget")
    assert "nothing to undo" in chat.handle("/undo")


def test_facts_are_edited_and_taken_back(chat: Chat) -> None:
    asked = []
    chat.report = asked.append
    first = chat.handle('/edit "The capital of France is" -> Rome')
    assert first == "Edited 1 fact." and asked == ["editing"] and chat.unsaved
    chat.handle('/edit "its king is" -> "Bo" "its king"')
    assert chat.session.edits[1].facts == (("its king is", "its king", "Bo"),)
    for line, message in (("/edit", "Write an edit as"), ('/edit "a" "b" "c"', "Write an edit as"),
                          ("/edit 'its king is' -> Bo Peru", "'Peru' is not in the prompt")):  # fmt: skip
        assert message in chat.handle(line)
    assert chat.handle("/undo") == "Undone: edited its king is -> Bo."
    assert chat.handle("/undo") == "Undone: edited The capital of France is -> Rome."
    assert chat.session.edits == () and "nothing to undo" in chat.handle("/undo")


def test_other_lines(chat: Chat) -> None:
    assert chat.handle("/help") == COMMANDS_HELP
    assert chat.handle("  ") == ""
    assert "Unknown command /why" in chat.handle("/why")
    assert chat.session.asked == []
    chat.handle(" /why")
    assert chat.session.asked[-1]["prompt"] == "You: /why\nModel:"
