"""The demo's plays as running text: line breaks inside speeches undone, lists of persons left out."""

from __future__ import annotations

import re

from ..base_model.assets import demo_texts
from ..configs.schema import RunConfig
from .sources import Source

__all__ = ["demo_sources", "unwrap"]

#: File → title and the line its text begins with: lists of persons and scenes before it are left out.
_PLAYS: dict[str, tuple[str, str]] = {
    "merry_wives_of_windsor_gut.txt": ("The Merry Wives of Windsor", "ACT I."),
    "much_ado_about_nothing_gut.txt": ("Much Ado About Nothing", "Act 1."),
    "as_you_like_it_gut.txt": ("As You Like It", "ACT I."),
    "henry_iv_part_1_gut.txt": ("Henry IV, Part 1", "ACT I."),
    "henry_iv_part_2_gut.txt": ("Henry IV, Part 2", "ACT I."),
}
_ORNAMENT = re.compile(r"^[\W_]+$")


def demo_sources(config: RunConfig) -> list[Source]:
    """One source per play. Raises ``AssetError`` if they cannot be fetched."""
    sources = []
    for file, text in demo_texts(config.cache_dir).items():
        title, first = _PLAYS[file]
        lines = text.splitlines()
        kept = unwrap("\n".join(lines[[line.strip() for line in lines].index(first) :]))
        sources.append(Source(f"demo/{file}", f"{title} ({len(kept):,} characters)", [kept]))
    return sources


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
