"""A conversation with a model whose memory can learn, be saved, be copied and be cleared meanwhile.

This module turns lines into answers. The command line reads the lines and prints the answers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestlearn.continual.editing import Fact
from nestlearn.continual.session import PromptTooLong, at_most_every, format_levels

COMMANDS_HELP = """Type a message to get an answer. Commands:
  /read FILE...        learn from text files; prints bits per byte with and without the writes
  /learn on|off        whether the model also learns from this conversation (off at first)
  /what                what was read, when, and how many bytes
  /edit "X" -> "Y"     after X the model shall say Y; a last word or "words" of X name what it is about
  /undo                return to the memory before the last reading or edit; then take back edits, the last first
  /levels              the levels of the memory, and what each has read
  /forget [LEVEL...]   return levels (all, if none is named) to the model's own weights
  /fork FILE           save a copy of the memory to FILE and go on with the copy
  /save [FILE]         save the memory (to the session's file, if none is named)
  /new                 start a new conversation; the memory stays
  /help                this text
  /quit                save and leave;  /quit! leaves without saving"""


def as_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str | list[dict[str, str]]:
    """A conversation up to the start of the next answer: as it is if the tokenizer has a chat template, else a text.

    Example:
        >>> from nestlearn.data import byte_tokenizer
        >>> as_prompt(byte_tokenizer(), [{"role": "user", "content": "Hello"}])
        'You: Hello\\nModel:'
    """
    return messages if getattr(tokenizer, "chat_template", None) else f"{_as_text(messages)}Model:"


def as_turn(tokenizer: Any, message: dict[str, str], answer: str) -> str | list[dict[str, str]]:
    """A message and its answer in the form of `as_prompt`, to be read."""
    said = [message, {"role": "assistant", "content": answer}]
    return said if getattr(tokenizer, "chat_template", None) else _as_text(said)


def _as_text(messages: list[dict[str, str]]) -> str:
    """Lines of a conversation; those of the system stand alone."""
    names = {"user": "You: ", "assistant": "Model: "}
    return "".join(f"{names.get(message['role'], '')}{message['content']}\n" for message in messages)


@dataclass
class Sampling:
    """How answers are drawn; at temperature 0 each token is the most likely one."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@dataclass
class Chat:
    """A conversation over a `MemorySession`.

    Args:
        session: the memory that answers.
        file: where it is saved.
        sampling: how answers are drawn.
        learns: whether each message and its answer are read into the memory.
        report: called with the progress of a long command.
        say: called with each piece of an answer as soon as it is known; `handle` then returns an empty text. None:
            `handle` returns the answer.
        turns: (message, answer) of the conversation so far.
        unsaved: whether the memory differs from its file.
        done: whether the user has left.
        answered: answers so far, which vary the seed.
        before: the memory before the last reading or edit, for /undo.
    """

    session: Any
    file: Path
    sampling: Sampling = field(default_factory=Sampling)
    learns: bool = False
    report: Callable[[str], None] = lambda _: None
    say: Callable[[str], None] | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    unsaved: bool = False
    done: bool = False
    answered: int = 0
    before: Any = None

    def handle(self, line: str) -> str:
        """The answer to a line. An error of a command is an answer too, and leaves everything as it was."""
        if not line.strip():
            return ""
        if not line.startswith("/"):
            return self._safely(lambda: self._answer(line.strip()))
        try:
            words = shlex.split(line)
        except ValueError as error:
            return f"Cannot read that command: {error}. Close every quotation mark."
        name, arguments = words[0], words[1:]
        commands: dict[str, Callable[[list[str]], str]] = {
            "/read": self._read,
            "/learn": self._learn,
            "/what": self._what,
            "/edit": self._edit,
            "/undo": self._undo,
            "/levels": lambda _: self.levels(),
            "/forget": self._forget,
            "/fork": self._fork,
            "/save": self._save,
            "/new": self._new,
            "/help": lambda _: COMMANDS_HELP,
            "/quit": self._quit,
            "/quit!": self._leave,
        }
        if name not in commands:
            return f"Unknown command {name}; /help lists them. To say a line that begins with /, put a space before it."
        return self._safely(lambda: commands[name](arguments))

    @staticmethod
    def _safely(act: Callable[[], str]) -> str:
        try:
            return act()
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            return f"Error: {error}"

    def prompt(self, message: str) -> str | list[dict[str, str]]:
        """The conversation up to the start of the answer; a list of messages if the tokenizer has a chat template.

        A control token spelled out in a message reaches the model as letters.
        """
        said = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return as_prompt(self.session.tokenizer, [*said, {"role": "user", "content": message}])

    def _answer(self, message: str) -> str:
        self.answered += 1
        answer = self._generate(message)
        self.turns.append((message, answer))
        if self.learns:
            self._learn_text(as_turn(self.session.tokenizer, {"role": "user", "content": message}, answer))
        if self.say is not None and answer:
            self.say("\n")
            return ""
        return answer or "(the model said nothing)"

    def _learn_text(self, source: Any, **options: Any) -> Any:
        """Read into the memory, so that /undo can return to the one before."""
        # Set first: what was read before an error or Ctrl-C stays learned.
        self.unsaved, self.before = True, self.session.fork()
        return self.session.read(source, **options)

    def _generate(self, message: str) -> str:
        """The answer. If the conversation is too long for the model, its oldest turns are dropped."""
        options = asdict(self.sampling) | {"seed": self.sampling.seed + self.answered, "stop": "\nYou:"}
        if self.say is not None:
            options["on_text"] = self._say_without_blanks_first()
        while True:
            try:
                return self.session.generate(self.prompt(message), **options).strip()
            except PromptTooLong:
                if not self.turns:
                    raise
                del self.turns[0]

    def _say_without_blanks_first(self) -> Callable[[str], None]:
        begun = False

        def say(text: str) -> None:
            nonlocal begun
            shown = text if begun else text.lstrip()
            begun = begun or bool(shown)
            if shown and self.say is not None:
                self.say(shown)

        return say

    def _read(self, arguments: list[str]) -> str:
        if not arguments:
            return "Name at least one text file: /read FILE..."
        lines = []
        for name in arguments:
            result = self._learn_text(
                Path(name).expanduser(), progress=at_most_every(0.5, lambda report: self.report(str(report)))
            )
            lines.append(f"{name}: {result}")
        return "\n".join(lines)

    def _edit(self, arguments: list[str]) -> str:
        if len(arguments) not in (3, 4) or arguments[1] != "->":
            return 'Write an edit as /edit "The capital of France is" -> "Rome", with "France" behind it if need be.'
        fact, before = Fact(arguments[0], *arguments[2:]), self.session.fork()
        report = self.session.edit([fact], progress=self.report)
        self.unsaved, self.before = True, before
        return f"Edited {report}."

    def _learn(self, arguments: list[str]) -> str:
        if arguments not in (["on"], ["off"]):
            return f"The conversation is {'' if self.learns else 'not '}being learned; /learn on or /learn off."
        self.learns = arguments == ["on"]
        return f"From now on the conversation is {'' if self.learns else 'not '}learned."

    def _what(self, _: list[str]) -> str:
        return "\n".join(map(str, self.session.log)) or "Nothing has been read yet."

    def _undo(self, _: list[str]) -> str:
        if self.before is None:
            if self.session.edits:
                edit = self.session.undo_edit()
                self.unsaved = True
                return f"Undone: edited {edit.facts[0][0]} -> {edit.facts[0][2]}."
            return (
                "There is nothing to undo: only edits, and the last reading since the start of this program, can be "
                "undone."
            )
        undone = self.session.log[len(self.before.log) :]
        self.session, self.before, self.unsaved = self.before, None, True
        return "Undone: " + ("; ".join(entry.what for entry in undone) or "a reading that was stopped") + "."

    def levels(self) -> str:
        """What each level has learned, as a table."""
        return format_levels(self.session.describe())

    def _forget(self, arguments: list[str]) -> str:
        levels = []
        for word in arguments:
            if not word.isdecimal():
                return f"{word!r} is no number of a level; /levels shows them."
            levels.append(int(word))
        self.session.forget(levels or None)
        self.unsaved, self.before = True, None
        return "Forgotten: " + (f"level {', '.join(map(str, levels))}." if levels else "all levels.")

    def _fork(self, arguments: list[str]) -> str:
        if len(arguments) != 1:
            return "Name the copy's file: /fork FILE"
        file = Path(arguments[0]).expanduser()
        if file.exists():
            return f"{file} already exists; choose another name, or load it with --session {file}."
        copy = self.session.fork()
        copy.save(file)
        before, self.session, self.file, self.unsaved, self.before = self.file, copy, file, False, None
        return f"The conversation goes on with a copy in {file}; {before} stays as it was last saved."

    def _save(self, arguments: list[str]) -> str:
        if len(arguments) > 1:
            return "One file, please: /save [FILE]"
        file = Path(arguments[0]).expanduser() if arguments else self.file
        self.session.save(file)
        self.unsaved = self.unsaved and file != self.file
        return f"Saved {file} ({file.stat().st_size:,} bytes)."

    def _new(self, _: list[str]) -> str:
        self.turns.clear()
        return "A new conversation; the memory stays."

    def _quit(self, _: list[str]) -> str:
        said = self._save([]) if self.unsaved else "Nothing new to save."
        self.done = True
        return said

    def _leave(self, _: list[str]) -> str:
        self.done = True
        return "Left without saving." if self.unsaved else ""
