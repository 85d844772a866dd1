"""`nestlearn stack`, `learn` and `chat`: argument parsing, printing and the terminal only."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from nestlearn.fields import MAX_SEED

STACK_HELP = """Put levels of memory on a pretrained Hugging Face model, and save it.

Nothing it says changes until it reads. LEVELS are joined by commas, fastest first: a period in tokens, then options of
the level, each after a colon: 64,512:rank=8:lr=0.5,frozen.

[bold]Examples[/bold]

  nestlearn stack Qwen/Qwen3-0.6B --levels 64,512 --out runs/qwen

  nestlearn stack runs/llama --levels 32:rank=8,256:rank=8 --mode add --layers last:4 --out runs/stacked
"""

LEARN_HELP = """Let a model learn from text files, and report what it gained and what it forgot.

A stacked model, or one trained here, learns with its memory (--method cms), which is saved as one file. The other
methods train weights, for comparison: finetune, ewc, replay, lora.

[bold]Examples[/bold]

  nestlearn learn runs/qwen --stream notes/*.md --out runs/learned

  nestlearn learn runs/qwen --stream book.txt --method finetune --learning-rate 1e-5 --known text:old/ --out runs/plain
"""

CHAT_HELP = """Talk to a model in the terminal, and teach it: /read FILE, /save, /fork, /forget, /levels, /help.

[bold]Example[/bold]

  nestlearn chat runs/qwen --session runs/qwen/mine.safetensors
"""

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "expansion": float, "rule": str, "lr": float, "retain": float, "clip": float, "hidden": int, "rank": int,
    "momentum": float,
}  # fmt: skip


def parse_levels(text: str) -> list[Any]:
    """``64,512:rank=8:lr=0.5,frozen`` as levels.

    Raises:
        ValueError: no number where a period should be, or an unknown option.
    """
    from nestlearn.nn import Level

    levels = []
    for word in text.split(","):
        period, *options = word.strip().split(":")
        if period != "frozen" and not period.isdecimal():
            raise ValueError(
                f"--levels: {word!r} does not begin with a period in tokens (or 'frozen'). "
                "Write levels as 64,512:rank=8."
            )
        given: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in _OPTIONS:
                known = ", ".join(sorted(_OPTIONS))
                raise ValueError(f"--levels: unknown option {name!r} in {word!r}; known: {known}.")
            try:
                given[name] = _OPTIONS[name](value)
            except (ValueError, KeyError) as error:
                raise ValueError(f"--levels: {name}={value!r} in {word!r} cannot be read.") from error
        levels.append(Level(period=None if period == "frozen" else int(period), **given))
    return levels


def stack(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face name of a pretrained causal language model.")],
    levels: Annotated[str, typer.Option(help="Levels, fastest first, such as 64,512:rank=8.")],
    out: Annotated[Path, typer.Option(help="Folder for the stacked model.")],
    mode: Annotated[str, typer.Option(help="add, split or copy.")] = "add",
    layers: Annotated[str, typer.Option(help="all, last:N, or numbers joined by commas.")] = "all",
    mlp: Annotated[str | None, typer.Option(help="Pattern of the MLP modules' paths, for other models.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks of errors.")] = False,
) -> None:
    del verbose  # read by the main program
    _quiet()
    from nestlearn.continual.pretrained import load_pretrained
    from nestlearn.models.stacking import level_parameters, stack_levels

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is a file or a folder that is not empty; choose another folder, or remove it first.")
    chosen_levels = parse_levels(levels)
    pretrained, tokenizer = load_pretrained(model)
    chosen = [int(n) for n in layers.split(",")] if layers.replace(",", "").isdecimal() else layers
    stacked = stack_levels(pretrained, chosen_levels, layers=chosen, mode=cast(Any, mode), mlp=mlp)
    _save_folder(out, stacked, tokenizer)
    added = sum(parameter.numel() for parameter in level_parameters(stacked).values())
    plan = stacked.stack_plan
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"Saved {out}: levels of {_periods(plan.periods)} tokens on {len(plan.paths)} MLPs (mode {mode}); "
        f"their initial weights are {added:,} parameters."
    )
    console.print(f"Teach it: nestlearn learn {shlex.quote(str(out))} --stream FILE --out FOLDER")


def _command(*words: str, **options: Any) -> str:
    """The command line with these words and options."""
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["nestlearn", *map(shlex.quote, words), *given])


def _all_files(stream: list[str], more: list[str]) -> list[str]:
    """The stream with what a pattern of the shell has become: --stream a.md b.md c.md"""
    if len(stream) > 1 and more:
        raise ValueError(
            f"{' '.join(more)} stand beside several --stream, and their order would be lost. "
            "Give --stream once, followed by all files in the order to read them."
        )
    return [*stream, *more]


def _save_folder(out: Path, model: Any, tokenizer: Any) -> None:
    """Save a model under another name and rename it: the folder is complete or absent."""
    from safetensors import SafetensorError

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as part:
        folder = Path(part) / out.name
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folder.replace(out)
        except (OSError, SafetensorError) as error:
            raise OSError(f"could not write {out}: {error}. Check free space and rights; nothing is left.") from error


def _quiet() -> None:
    """No progress bars of the library's own: loading a file is not worth one."""
    from transformers.utils import logging

    from nestlearn.train.allocator import tune_allocator

    logging.disable_progress_bar()
    tune_allocator()


def _periods(periods: Any) -> str:
    return ", ".join("frozen" if period is None else f"{period:,}" for period in periods)


def learn(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a stacked model, or of one trained here.")],
    stream: Annotated[list[str], typer.Option(help="Text file, folder or pattern; may be repeated. Read in order.")],
    out: Annotated[Path, typer.Option(help="Folder for what was learned, results.json and report.html.")],
    method: Annotated[str, typer.Option(help="cms, finetune, ewc, replay or lora.")] = "cms",
    session: Annotated[Path | None, typer.Option(help="Go on from this session file (cms).")] = None,
    known: Annotated[str, typer.Option(help="Corpus the model knew before, for the probe of what it keeps.")]
    = "python-docs",
    known_bytes: Annotated[int, typer.Option(min=100, help="Bytes of it that are scored after each document.")] = 8192,
    passes: Annotated[int, typer.Option(min=1, help="Times each document is read.")] = 1,
    context_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of context; by default the model's, at most 1,024.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the methods that train weights.")] = None,
    strength: Annotated[float, typer.Option(min=0.0, help="Of EWC's penalty.")] = 1.0,
    capacity: Annotated[int, typer.Option(min=1, help="Sequences that replay keeps.")] = 256,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA's adapters.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the order of training sequences.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks of errors.")] = False,
) -> None:  # fmt: skip
    del verbose  # read by the main program
    stream = _all_files(stream, context.args)
    if method == "cms" and session is not None and not session.exists():
        raise ValueError(f"--session {session} does not exist; leave it out to begin with an empty memory.")
    _quiet()
    from nestlearn.evals.learning import StreamRecord
    from nestlearn.evals.learning_report import write_learning_report
    from nestlearn.evals.learning_setup import DEFAULT_RATES, known_text, make_method, stream_documents

    command = _command("learn", model, "--stream", *stream, **{
        "method": method, "session": session, "known": known, "passes": passes, "context-length": context_length,
        "learning-rate": learning_rate, "strength": strength, "capacity": capacity, "rank": rank,
        "known-bytes": known_bytes, "seed": seed, "out": out,
    })  # fmt: skip
    documents, probe = stream_documents(stream), known_text(known, known_bytes)
    rate = DEFAULT_RATES.get(method) if learning_rate is None else learning_rate
    learner = make_method(
        method, model, session=session, known=known, passes=passes, context_length=context_length, learning_rate=rate,
        strength=strength, capacity=capacity, rank=rank, seed=seed,
    )  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    settings = {"passes": passes, "context length": context_length, "learning rate": rate, "known text": known,
                "known bytes": len(probe.encode()), "seed": seed}  # fmt: skip
    about = StreamRecord(model, method, settings, known, learner.score(probe), (), command)
    result, saved = _read_stream(learner, documents, probe, about, out, console)
    report = write_learning_report(result, out / "report.html")
    console.print(f"Learned: {saved}\nReport: {report}")
    if method == "cms":
        console.print(f"Talk to it: nestlearn chat {shlex.quote(model)} --session {shlex.quote(str(saved))}")


def _read_stream(learner: Any, documents: Any, probe: str, about: Any, out: Path, console: Console) -> tuple[Any, Path]:
    """Learn the documents; what was learned and the record so far are saved after each."""
    from nestlearn.evals.learning import learn_stream

    out.mkdir(parents=True, exist_ok=True)
    console.print(f"Known before ({about.known_name}): {about.known_before:.3f} bits per byte.")
    saved = out
    with console.status("") as status:
        for record in learn_stream(learner, documents, probe, progress=lambda text: status.update(text)):
            saved = learner.save(out)
            about = replace(about, documents=(*about.documents, record))
            about.save(out / "results.json")
            change = 100 * (record.known / about.known_before - 1)
            console.print(
                f"{record.name}: {record.before:.3f} -> {record.after:.3f} bits per byte; known text "
                f"{record.known:.3f} ({change:+.1f} %); {record.seconds:.1f} s"
            )
    return about, saved


def chat(
    model: Annotated[str, typer.Argument(help="Folder of a stacked model, or of one trained here.")],
    session: Annotated[Path, typer.Option(help="The memory's file; made when it is saved first.")],
    learn_conversation: Annotated[
        bool, typer.Option("--learn/--no-learn", help="Also learn from the conversation.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks of errors.")] = False,
) -> None:
    del verbose  # read by the main program
    _quiet()
    from nestlearn.continual.chat import Chat, Sampling
    from nestlearn.continual.pretrained import open_session

    memory = open_session(model, session)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    conversation = Chat(
        memory, session, Sampling(max_new_tokens, temperature, top_p, seed), learn_conversation, report=_over(console)
    )
    state = f"{session} ({memory.nbytes:,} bytes)" if session.exists() else f"a new memory, to be saved as {session}"
    console.print(f"{model} with {state}. /help lists the commands.")
    if sys.stdin.isatty():
        # Importing it gives `input` line editing and a history.
        import readline  # noqa: F401
    while not conversation.done:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            console.print(conversation.handle("/quit"))
            if not conversation.done:
                # Nobody is there to name another file.
                raise SystemExit(1) from None
            break
        except KeyboardInterrupt:
            console.print("\n(/quit saves and leaves)")
            continue
        try:
            said = conversation.handle(line)
        except KeyboardInterrupt:
            said = "Stopped."
        if said:
            console.print(said)


def _over(console: Console) -> Callable[[str], None]:
    """Prints over the same line of a terminal, and nothing elsewhere."""

    def report(text: str) -> None:
        if console.is_terminal:
            console.print(text[: console.width - 1].ljust(console.width - 1), end="\r")

    return report
