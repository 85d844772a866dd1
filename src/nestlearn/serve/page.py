"""The page at ``/``, with which a person uses sessions: its files, and what a browser may do with them."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from .access import PAGE_FILES
from .errors import ApiError

router = APIRouter(include_in_schema=False)
FOLDER = files("nestlearn.serve") / "page_files"
KINDS = {
    "css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain",
}  # fmt: skip
HEADERS = {
    # Nothing is loaded from elsewhere or sent elsewhere, no script stands in the page, and no text becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get(PAGE_FILES + "{name}")
async def page_file(name: str) -> Response:
    """A part of the page."""
    return _file(name)


def _file(name: str) -> Response:
    # A name is looked up, and never made a path of.
    found = next((file for file in FOLDER.iterdir() if file.name == name), None)
    if found is None:
        raise ApiError(404, f"the page has no file {name[:80]!r}.", "unknown_url")
    return Response(found.read_bytes(), media_type=KINDS[name.rpartition(".")[2]], headers=HEADERS)
