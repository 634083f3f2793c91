"""The error of records."""


class RecordError(RuntimeError):
    """A record that cannot be used or written, in one line for people."""
