"""Recordings of anything that sounds."""

from data_pipeline.reading.recorded import recorded

MODALITY = recorded("a sound that is not speech", "s of audio")
