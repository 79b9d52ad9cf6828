"""The errors of the data side that a user can mend: one sentence, no traceback."""


class DataError(Exception):
    """Data is missing, broken or inconsistent; the message names it and says what to do."""
