"""The errors that a user can mend: one sentence, no traceback."""


class UserError(Exception):
    """Something in the recipe, the data or an earlier run is wrong; the message says what to do."""
