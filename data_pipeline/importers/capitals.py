"""Countries and their capitals (Debian ``miscfiles``), and the ways to ask for a capital."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass

from data_pipeline.errors import DataError
from data_pipeline.importers.item import generator
from data_pipeline.importers.packages import PackageStore

PACKAGE = "miscfiles"
QUESTION = "What is the capital of {}?"
"""How a capital is asked for in training, written and spoken."""
VAL_QUESTION = "Which city is the capital of {}?"
TEST_QUESTION = "Name the capital city of {}."
"""The held-out paraphrases: they occur in no training text."""
TWIN_QUESTIONS = (
    QUESTION,
    QUESTION + " Answer the spoken question.",
    "The capital of {} is",
    "Tell me the capital city of {}.",
    "{}: which capital?",
    "Name the country: {}. Its capital?",
)
"""Paraphrases for the base language model."""

MAX_TABLE_BYTES = 1024**2


@dataclass(frozen=True)
class Country:
    """A country and its capital.

    Attributes:
        name: English name, plain ASCII so that every speech synthesiser can say it.
        capital: English name.
    """

    name: str
    capital: str


def read_countries(store: PackageStore, seed: int, number: int) -> list[Country]:
    """``number`` countries in random order.

    Entries with remarks ("... (official capital), ...") are left out.

    Raises:
        PackageError: the package cannot be fetched.
        DataError: the table is not as expected.
    """
    path = store.get(PACKAGE) / "usr/share/misc/countries.gz"
    try:
        with gzip.open(path, "rb") as stream:
            text = stream.read(MAX_TABLE_BYTES).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    countries = []
    for line in text.splitlines():
        parts = line.strip().split(":")
        if len(parts) < 5 or not parts[0].isdigit():
            continue
        name, capital = parts[3].strip(), parts[4].strip()
        if re.fullmatch(r"[A-Za-z .'-]+", name) and re.fullmatch(r"[\w .'-]+", capital):
            countries.append(Country(name, capital))
    if len(countries) < number:
        raise DataError(f"{path} holds {len(countries)} countries, {number} are needed")
    generator(seed, "countries").shuffle(countries)
    return countries[:number]
