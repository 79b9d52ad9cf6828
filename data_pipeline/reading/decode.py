"""Bytes of a picture, recording or clip become pixels or samples, within bounds.

Every function takes untrusted bytes: sizes are looked at before anything is allocated, only the
containers named are opened, and whatever goes wrong becomes a ``BrokenMediumError`` that names
the medium and says whether it is broken or too large. One thread each: parallelism belongs to
whoever calls. The same bytes give the same bits, whichever process decodes them.

Who decodes what is measured in ``benchmarks/decoders.py``:

=====================  ==============================  ===================
type                   decoder                         where it refuses
=====================  ==============================  ===================
JPEG                   simplejpeg (libjpeg-turbo)      Pillow
PNG, WebP              imagecodecs (libspng, libwebp)  Pillow
GIF, BMP, PPM          Pillow
WAV, FLAC, MP3, ...    soundfile (libsndfile)          PyAV (FFmpeg)
Opus                   PyAV (FFmpeg)                   soundfile
AAC, WebM, ...         PyAV (FFmpeg)
videos                 PyAV (FFmpeg)
=====================  ==============================  ===================

Pictures have the same bits whoever decodes them. Opus is decoded at 48 kHz and then resampled;
libsndfile decodes it at its original rate, which gives slightly other samples.
"""

from data_pipeline.reading.limits import BROKEN, LARGE, LIMITS, BrokenMediumError, DecodeLimits
from data_pipeline.reading.pictures import decode_image, probe_image
from data_pipeline.reading.recording import SoundFacts, sound_duration_ms
from data_pipeline.reading.sounds import decode_sound, probe_sound
from data_pipeline.reading.videos import VideoFacts, decode_video, probe_video

__all__ = [
    "BROKEN",
    "LARGE",
    "LIMITS",
    "BrokenMediumError",
    "DecodeLimits",
    "SoundFacts",
    "VideoFacts",
    "decode_image",
    "decode_sound",
    "decode_video",
    "probe_image",
    "probe_sound",
    "probe_video",
    "sound_duration_ms",
]
