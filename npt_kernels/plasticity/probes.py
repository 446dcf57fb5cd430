"""Texts that an edit is tested with: what a small model knows, subjects nobody knows, beginnings to state a fact behind."""

from __future__ import annotations

__all__ = ["HELD_BESIDE", "HELD_SUBJECTS", "KNOWN", "OTHER_SUBJECTS", "PREFIXES", "RELATIONS"]

#: Facts of the world that a small language model may know: prompt and answer. Those it does not know count as wrong before and
#: after.
KNOWN: tuple[tuple[str, str], ...] = (
    ("The capital of France is", "Paris"),
    ("The capital of Italy is the city of", "Rome"),
    ("The capital of Japan is", "Tokyo"),
    ("The capital of Germany is", "Berlin"),
    ("The largest planet in the solar system is", "Jupiter"),
    ("The Earth revolves around the", "Sun"),
    ("Water is made of hydrogen and", "oxygen"),
    ("The opposite of hot is", "cold"),
    ("One week has seven", "days"),
    ("The author of Romeo and Juliet is William", "Shakespeare"),
    ("The first president of the United States was George", "Washington"),
    ("The Great Wall is located in", "China"),
    ("In the northern hemisphere, the coldest season is", "winter"),
    ("The Statue of Liberty stands in New", "York"),
    ("Bees make", "honey"),
    ("The theory of relativity was developed by Albert", "Einstein"),
)

#: Subjects that exist nowhere, for facts that name no others: the answer must not come for them.
OTHER_SUBJECTS: tuple[str, ...] = ("Halvorn", "Misra Teld", "Ostrenka", "Quillane")

#: Subjects held in place while a context is written. Not those that reports ask about: what holds must not also test.
HELD_SUBJECTS: tuple[str, ...] = (
    "Tarvin", "Ellora Mund", "Bresquil", "Jandrell Voss", "Upsala Crane", "Corrigan", "Mellifex", "Dorrow Pike", "Vintala",
    "Harrog", "Selim Arnd", "Paxoria",
)  # fmt: skip

#: Where another subject stands beside the fact's own. Not how the benchmark asks about that.
HELD_BESIDE = "Here {subject} is named first. Now to {other}, which is something else. {prompt}"

#: Beginnings put before a fact while its value is fitted, so that the value does not hang on the fact being the first sentence.
PREFIXES: tuple[str, ...] = (
    "The meeting had gone on for most of the afternoon.",
    "In the second part of the book we turn to other matters.",
    "She closed the window, sat down and began to read aloud:",
)

#: Other relations of a subject: how far the next-token distribution behind them moves is reported.
RELATIONS: tuple[str, ...] = (
    "{subject} is best known for",
    "Many people think that {subject}",
    "I read about {subject} and",
)
