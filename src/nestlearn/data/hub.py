"""One quick request that tells whether the Hugging Face Hub can be reached."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_session

_TIMEOUT = 5.0  # seconds


def hub_unreachable(name: str) -> str | None:
    """The reason why the Hub cannot serve `name`; None if it can, or if `name` is a local path.

    It makes one request without retries and waits at most five seconds to connect. The Hub's own libraries repeat a
    failed request for up to a minute, for each file.

    Args:
        name: a local path or a name on the Hub.

    Example:
        >>> hub_unreachable(".") is None
        True
    """
    if Path(name).exists():
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    # The HTTP library of the Hub's client differs by its version, and so do its errors.
    except Exception as error:  # noqa: BLE001
        return f"{constants.ENDPOINT} does not answer: {str(error) or type(error).__name__}"
    return None
