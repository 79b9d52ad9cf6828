"""One sample, from its row in the catalogue to tokens and decoded media."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from data_pipeline.conversation.limit import cut_tail
from data_pipeline.conversation.template import Rendered, render
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES, modality
from data_pipeline.planning.catalogue import Catalogue, MediaRule
from data_pipeline.reading.decode import LIMITS, BrokenMediumError, DecodeLimits
from data_pipeline.reading.features import feature_path, stored_features
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import prepare
from data_pipeline.reading.records import DamagedSampleError, RecordReader, parse_record
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.shards.index import MediumIndex, SampleIndex, ShardIndex
from data_pipeline.shards.schema import MAX_MEDIUM_BYTES, MAX_RECORD_BYTES
from unimoe_mcore.config.towers import EncoderConfig

if TYPE_CHECKING:
    from data_pipeline.reading.remote import ShardStore


@dataclass(frozen=True)
class ReadingJob:
    """All that reading a sample needs, in any process. It can be pickled.

    Attributes:
        catalogue: folder of the catalogue.
        tokenizer: ``TextTokenizer.serialised()``.
        rule: how media become language-model tokens, as the catalogue was compiled with.
        preparations: modality -> encoder that its media are decoded for; media of the others are
            not decoded.
        features: modality -> folder of its encoder's cached features; a medium found there is not
            decoded.
        store: where shards are that are not on this machine; None: all are.
        limits: what decoding one medium may cost.
        most_bytes: largest medium, bytes.
        in_progress: file in which a process that decodes by itself notes the sample it is at, see
            ``in_progress``; one for each such process. None: nothing is noted.
    """

    catalogue: Path
    tokenizer: str
    rule: MediaRule
    preparations: Mapping[str, EncoderConfig]
    features: Mapping[str, Path]
    store: ShardStore | None = None
    limits: DecodeLimits = LIMITS
    most_bytes: int = MAX_MEDIUM_BYTES
    in_progress: Path | None = None


class BrokenSampleError(DataError):
    """A sample that cannot be used, while its shard can.

    Attributes:
        sample: which one, and what is wrong with it.
    """

    def __init__(self, sample: BrokenSample) -> None:
        super().__init__(f"{sample.shard}: sample {sample.key} is {sample.kind}: {sample.reason}")
        self.sample = sample


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample's bytes, checked, and what the index says about them.

    Attributes:
        row: its row in the catalogue.
        shard: the shard it lies in.
        facts: its entry in the index.
        record: its JSON.
        media: its media, undecoded.
    """

    row: int
    shard: ShardIndex
    facts: SampleIndex
    record: bytes
    media: tuple[Medium, ...]


class SampleReader:
    """Reads samples by their row in the catalogue. Not shared between processes or threads.

    Raises:
        DataError: the catalogue or the tokenizer cannot be read.
    """

    def __init__(self, job: ReadingJob) -> None:
        self.job = job
        self.catalogue = Catalogue.load(job.catalogue)
        self._tokenizer = TextTokenizer(Tokenizer.from_str(job.tokenizer), "of the job")
        self._markers = frozenset(self._tokenizer.markers.values())
        self._records = RecordReader(job.store)

    def read(self, row: int) -> Sample:
        """One sample: fetched, rendered, its media decoded.

        Raises:
            BrokenSampleError: the sample cannot be used.
            DataError: its shard cannot be used.
        """
        return self.finish(self.fetch(row))

    def broken(self, row: int, kind: str, reason: str) -> BrokenSample:
        """Name the sample of a row as broken."""
        shard, facts = self.catalogue.entry(row)
        return BrokenSample(kind, shard.dataset, shard.path.name, facts.key, reason)

    def fetch(self, row: int) -> RawSample:
        """The bytes of a sample; they may come from far away.

        Raises:
            BrokenSampleError: they are damaged, or too many.
            DataError: the shard cannot be read, or its index is of another tar.
        """
        shard, facts = self.catalogue.entry(row)
        sizes = [("json", facts.json_size, MAX_RECORD_BYTES)]
        sizes += [(medium.member, medium.size, self.job.most_bytes) for medium in facts.media]
        for member, size, most in sizes:
            if size > most:
                reason = f"{facts.key}.{member} has {size} bytes, more than {most}"
                raise BrokenSampleError(self.broken(row, "large", reason))
        try:
            record = self._records.record_bytes(shard, facts)
            return RawSample(row, shard, facts, record, self._records.media(shard, facts))
        except DamagedSampleError as error:
            raise BrokenSampleError(self.broken(row, "broken", str(error))) from error

    def finish(self, raw: RawSample) -> Sample:
        """Render and decode a sample; its bytes may be hostile, and this may take long.

        Raises:
            BrokenSampleError: the sample cannot be used.
        """
        try:
            tokens, group = self._render(raw)
            media = tuple(map(self._medium, raw.media, raw.facts.media))
        except _InconsistentError as error:
            raise self._error(raw, "inconsistent", error) from error
        except _LongError as error:
            raise self._error(raw, "large", error) from error
        except BrokenMediumError as error:
            raise self._error(raw, error.kind, error) from error
        except DamagedSampleError as error:
            raise self._error(raw, "broken", error) from error
        return Sample(raw.facts.key, raw.shard.dataset, group, tokens, media)

    def _error(self, raw: RawSample, kind: str, error: Exception) -> BrokenSampleError:
        return BrokenSampleError(self.broken(raw.row, kind, str(error)))

    def _render(self, raw: RawSample) -> tuple[Rendered, str]:
        """The conversation as tokens, exactly as many as planned, and the sample's group."""
        record = parse_record(raw.record, raw.shard, raw.facts)
        counts: dict[str, list[int]] = {modality: [] for modality in MODALITIES}
        for medium in raw.facts.media:
            counts[medium.modality].append(
                self.job.rule.tokens(medium.modality, medium.duration_ms)
            )
        try:
            tokens = render(record["conversations"], self._tokenizer, counts)
        except DataError as error:
            raise _InconsistentError(str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedSampleError(
                f"not a sample record ({type(error).__name__}: {error})"
            ) from error
        if most := self.catalogue.sample_tokens:
            try:
                tokens = cut_tail(tokens, most, self._markers)
            except DataError as error:
                raise _LongError(str(error)) from error
        planned = int(self.catalogue.tokens[raw.row])
        if len(tokens.ids) != planned:
            raise _InconsistentError(
                f"it has {len(tokens.ids)} tokens where the plan counted {planned}"
            )
        return tokens, next((m for m in MODALITIES if counts[m]), "text")

    def _medium(self, medium: Medium, facts: MediumIndex) -> Medium:
        """A medium with its content, if it is wanted and its features are not on disk."""
        encoder = self.job.preparations.get(medium.modality)
        if encoder is None:
            return medium
        folder = self.job.features.get(medium.modality)
        if folder is not None:
            found = stored_features(feature_path(folder, medium))
            if found is not None:
                self._require_planned(medium, facts, encoder, found)
                return medium
        content = prepare(medium, encoder, self.job.limits)
        features = modality(medium.modality).features
        if features is not None:
            self._require_planned(medium, facts, encoder, features(content))
        return medium.with_content(content)

    def _require_planned(
        self, medium: Medium, facts: MediumIndex, encoder: EncoderConfig, features: int
    ) -> None:
        """Refuse a recording that yields other tokens than the plan counted from the index."""
        kind = modality(medium.modality)
        if kind.promised is None or features == kind.promised(encoder, facts.duration_ms):
            return
        # Another length, but it may still become as many tokens.
        assert kind.length is not None
        duration_ms = kind.length(medium, self.job.limits).duration_ms
        tokens, planned = (
            self.job.rule.tokens(medium.modality, length)
            for length in (duration_ms, facts.duration_ms)
        )
        if tokens != planned:
            raise _InconsistentError(
                f"{medium.source} lasts {duration_ms} ms, which makes {tokens} tokens, but the "
                f"index says {facts.duration_ms} ms, which makes {planned}"
            )


class _InconsistentError(Exception):
    """Text, media and plan do not agree."""


class _LongError(Exception):
    """A sample is longer than it may be and cannot be cut."""
