"""`nestlearn generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestlearn.cli.common import (
    Device,
    Dtype,
    MaxNewTokens,
    ModelName,
    Seed,
    SessionFile,
    Temperature,
    TopP,
    Verbose,
    hide_progress_bars,
    plain_console,
    require_file,
    tune,
)

HELP = """Continue a text, or answer a message.

[bold]Examples[/bold]

  nestlearn generate runs/docs "The for statement" --max-new-tokens 100 --temperature 0.7

  nestlearn generate smollm2-135m "What is the capital of France?" --chat

  nestlearn generate runs/stacked "The lamp" --session runs/learned/session.safetensors
"""


def run(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    session: SessionFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message, for the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Print the prompt and its continuation; of a message the answer alone."""
    require_file(session)
    tune(verbose)
    hide_progress_bars()
    from nestlearn.continual.pretrained import pretrained
    from nestlearn.continual.session import open_session
    from nestlearn.data import document_ids
    from nestlearn.data.control_tokens import LiteralText
    from nestlearn.models import generate_texts

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling["max_new_tokens"] = max_new_tokens
    messages = [{"role": "user", "content": prompt}]
    if session is not None:
        memory = open_session(model, session, dtype=dtype, device=device)
        text = memory.generate(messages if chat else prompt, **sampling)
    else:
        loaded, tokenizer = pretrained(model, dtype=dtype, device=device)
        ids = LiteralText(tokenizer).conversation(messages) if chat else document_ids(tokenizer, prompt)
        (text,) = generate_texts(loaded, tokenizer, [ids], **sampling)
    plain_console().print(text if chat else prompt + text)
