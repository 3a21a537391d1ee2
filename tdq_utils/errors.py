"""The kit's own exceptions. Each message states the rule, the value received and the fix."""


class TDQError(ValueError):
    """Bad input to the kit; a ``ValueError``, so callers need not import it."""


class DataError(TDQError):
    """A data file or model that is missing, corrupted or unknown."""
