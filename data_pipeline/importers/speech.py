"""Speech: questions read out by flite and espeak-ng, and recorded digits of many languages.

Held out: for spoken questions a voice (train never hears it), for digits whole languages.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.importers.capitals import QUESTION, Country
from data_pipeline.importers.item import Item, MediaFile, Task, generator
from data_pipeline.importers.packages import PackageStore, library_path
from data_pipeline.importers.recording import read_mono, wav

SPOKEN_QUESTION = "Answer the spoken question."
WRITE_DOWN = "Write down what is said."
DIGIT_QUESTION = "Which digit is spoken?"

FLITE, ESPEAK = "flite", "espeak-ng"
TEST_VOICE, VAL_VOICE = (FLITE, "awb"), (FLITE, "kal16")
TRAIN_VOICES = ((FLITE, "slt"), (FLITE, "rms"))
"""Natural voices; every training question is read by both."""
EXTRA_VOICES = tuple(
    (ESPEAK, voice) for voice in ("en-us", "en-gb", "en-gb-scotland", "en-us+f3", "en-gb+m3")
)
"""Synthetic voices; every training question is read by two of them."""

STAMPS = "tuxpaint-stamps-default"
PROMPTS = {
    "asterisk-core-sounds-en-wav": "en",
    "asterisk-core-sounds-es-wav": "es",
    "asterisk-core-sounds-fr-wav": "fr",
    "asterisk-core-sounds-it-wav": "it",
    "asterisk-core-sounds-ru-wav": "ru",
    "asterisk-prompt-it-menardi-wav": "it",
}
"""Package of recorded telephone prompts -> its language."""
HELD_OUT_LANGUAGES = {
    "test": ("be", "bg", "ca", "it", "nl", "pt", "sv"),
    "val": ("no", "ro", "sl"),
}
"""Each has a relative in the training languages, so that there is something to generalise from."""
_SAME_LANGUAGE = {"nb": "no", "nn": "no"}


class SpokenQuestions:
    """spk_qa and, from its training recordings, spk_asr.

    Args:
        store: where the synthesisers' packages come from.
        countries: what is asked about.
        seed: seed of the choice of voices.
        small: only two voices read each training question.

    Raises:
        PackageError: a package cannot be fetched.
        DataError: a synthesiser does not run here.
    """

    def __init__(self, store: PackageStore, countries: list[Country], seed: int, small: bool):
        self._voices = Synthesiser(store)
        self._countries = countries
        rng = generator(seed, "spk_qa")
        self._plan: list[tuple[str, Country, tuple[str, str]]] = []
        for index, country in enumerate(countries):
            extra = rng.sample(EXTRA_VOICES, 2)
            voices = (TRAIN_VOICES[0], extra[0]) if small else (*TRAIN_VOICES, *extra)
            self._plan += [("train", country, voice) for voice in voices]
            self._plan.append(("test", country, TEST_VOICE))
            if index % 2 == 0:
                self._plan.append(("val", country, VAL_VOICE))
        self._spoken: list[MediaFile] = []

    def tasks(self) -> list[Task]:
        """spk_qa and spk_asr."""
        trained = sum(split == "train" for split, _, _ in self._plan)
        return [
            Task("spk_qa", len(self._plan), self._question_items),
            Task("spk_asr", trained, self._transcript_items),
        ]

    def _recordings(self) -> Iterator[MediaFile]:
        """One recording per entry of the plan, made once."""
        yield from self._spoken
        rest = self._plan[len(self._spoken) :]
        if not rest:
            return
        with ThreadPoolExecutor(2) as pool:
            spoken = pool.map(
                lambda entry: self._voices.say(entry[2], QUESTION.format(entry[1].name)), rest
            )
            for recording in spoken:
                self._spoken.append(recording)
                yield recording

    def _question_items(self) -> Iterator[Item]:
        for (split, country, voice), sound in zip(self._plan, self._recordings(), strict=True):
            yield Item(split, SPOKEN_QUESTION, country.capital, (sound,), " ".join(voice))

    def _transcript_items(self) -> Iterator[Item]:
        for (split, country, voice), sound in zip(self._plan, self._recordings(), strict=True):
            if split == "train":
                text = QUESTION.format(country.name)
                yield Item(split, WRITE_DOWN, text, (sound,), " ".join(voice))


class Synthesiser:
    """flite and espeak-ng, run from their unpacked packages.

    Raises:
        PackageError: a package cannot be fetched.
        DataError: a program does not run here.
    """

    def __init__(self, store: PackageStore):
        roots = {name: store.programs(name) for name in (FLITE, ESPEAK)}
        every = tuple(dict.fromkeys(root for group in roots.values() for root in group))
        self._programs = {name: group[0] / "usr/bin" / name for name, group in roots.items()}
        self._environment = {**os.environ, "LD_LIBRARY_PATH": library_path(every)}
        for root in every:
            for table in root.rglob("espeak-ng-data/phontab"):
                self._environment["ESPEAK_DATA_PATH"] = str(table.parent.parent)
        for voice in (TRAIN_VOICES[0], EXTRA_VOICES[0]):
            self.say(voice, "Hello.")

    def say(self, voice: tuple[str, str], text: str) -> MediaFile:
        """Read a text out.

        Args:
            voice: program and voice.
            text: plain ASCII.

        Raises:
            DataError: the program fails.
        """
        program, name = voice
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            if program == FLITE:
                arguments = ["-voice", name, "-t", text, "-o", str(path)]
            else:
                arguments = ["-v", name, "-s", "150", "-w", str(path), text]
            try:
                subprocess.run(
                    [str(self._programs[program]), *arguments],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=True,
                    timeout=60,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise DataError(
                    f"{program} does not run on this machine ({error}); speech tasks need it"
                ) from error
            return wav("speech", *read_mono(path))


@dataclass(frozen=True)
class SpokenDigit:
    """One recorded digit.

    Attributes:
        path: the file.
        language: base language, such as ``en`` for American and British English.
        digit: 0-9.
    """

    path: Path
    language: str
    digit: int

    @property
    def split(self) -> str:
        """The split of its language."""
        held = (split for split, every in HELD_OUT_LANGUAGES.items() if self.language in every)
        return next(held, "train")


class SpokenDigits:
    """spk_digit: recorded digits.

    Args:
        store: where the packages come from.
        small: one language for val and test, two for train.

    Raises:
        PackageError: a package cannot be fetched.
    """

    def __init__(self, store: PackageStore, small: bool):
        digits = find_stamp_digits(store.get(STAMPS))
        for package, language in () if small else PROMPTS.items():
            digits += find_prompt_digits(store.get(package), language)
        languages = ("de", "en", "pt", "ro") if small else None
        self._digits = [
            digit for digit in digits if languages is None or digit.language in languages
        ]

    def tasks(self) -> list[Task]:
        """spk_digit."""
        return [Task("spk_digit", len(self._digits), self._items)]

    def _items(self) -> Iterator[Item]:
        for spoken in self._digits:
            sound = wav("speech", *read_mono(spoken.path))
            yield Item(spoken.split, DIGIT_QUESTION, str(spoken.digit), (sound,), spoken.language)


def find_stamp_digits(root: Path) -> list[SpokenDigit]:
    """Digits of Tux Paint: ``3_de.ogg``, ``3_desc_ru.ogg`` (the spoken caption), ``3.ogg``."""
    folder = root / "usr/share/tuxpaint/stamps/symbols/math"
    digits = []
    for path in sorted(folder.glob("*.ogg")):
        if match := re.fullmatch(r"([0-9])(?:_desc)?(?:_([a-z]+)(?:_[A-Za-z]+)?)?\.ogg", path.name):
            language = match[2] or "en"
            language = _SAME_LANGUAGE.get(language, language)
            digits.append(SpokenDigit(path, language, int(match[1])))
    return digits


def find_prompt_digits(root: Path, language: str) -> list[SpokenDigit]:
    """Digits of a package of telephone prompts: ``.../digits/3.wav``."""
    paths = sorted((root / "usr/share/asterisk/sounds").glob("*/digits/[0-9].wav"))
    return [SpokenDigit(path, language, int(path.stem)) for path in paths]
