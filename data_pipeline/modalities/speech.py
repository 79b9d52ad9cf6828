"""Recordings of speech."""

from data_pipeline.reading.recorded import recorded

MODALITY = recorded("a recording of speech", "s of speech")
