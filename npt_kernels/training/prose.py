"""The demo's books as running text: line breaks inside paragraphs undone, what is not prose left out."""

from __future__ import annotations

import re

from .assets import demo_texts
from .config import RunConfig
from .loading import resolve_cache_dir
from .sources import Source

__all__ = ["demo_sources", "unwrap"]

#: File → title and the passages to keep, as pairs of lines (first kept, first not kept). Left out of the proceedings: table of
#: contents, timetable, and the participants' addresses, whose telephone numbers would end up in the held-out part.
_PASSAGES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "alice29.txt": ("Alice's Adventures in Wonderland", (("CHAPTER I", "THE END"),)),
    "lcet10.txt": (
        "Workshop on Electronic Texts, 1992",
        (
            ("INTRODUCTION", "Appendix I:  PROGRAM"),
            ("Appendix II:  ABSTRACTS", "Appendix III:  DIRECTORY OF PARTICIPANTS"),
        ),
    ),
}
_ORNAMENT = re.compile(r"^[\W_]+$")


def demo_sources(config: RunConfig) -> list[Source]:
    """One source per book. Raises ``AssetError`` if they cannot be fetched."""
    sources = []
    for file, text in demo_texts(resolve_cache_dir(config)).items():
        title, passages = _PASSAGES[file]
        kept = "\n\n".join(unwrap(_passage(text, first, end)) for first, end in passages)
        sources.append(Source(f"demo/{file}", f"{title} ({len(kept):,} characters)", [kept]))
    return sources


def _passage(text: str, first: str, end: str) -> str:
    lines = text.splitlines()
    stripped = [line.strip() for line in lines]
    start = stripped.index(first)
    return "\n".join(lines[start : stripped.index(end, start)])


def unwrap(text: str) -> str:
    """Hard-wrapped text with one line per paragraph.

    A line goes on the one before it unless it is indented (verse, headings, lists keep their lines) or follows a blank line.
    Ornaments and Project Gutenberg's notes go; runs of spaces become one.
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        words = " ".join(line.split())
        if "project gutenberg" in words.lower() or (words and _ORNAMENT.match(words)):
            words = ""
        if not words:
            paragraphs.append([])
        elif not paragraphs[-1] or line[0].isspace():
            paragraphs[-1].append(words)
        else:
            before = paragraphs[-1][-1]
            # "sheep-" + "bells" and "--" + "and" belong together; "- item" does not.
            glue = "" if before.endswith("-") and before[-2:-1] not in (" ", "") else " "
            paragraphs[-1][-1] = before + glue + words
    return "\n\n".join("\n".join(paragraph) for paragraph in paragraphs if paragraph) + "\n"
