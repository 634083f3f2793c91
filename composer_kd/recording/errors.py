"""The errors of records."""


class RecordError(RuntimeError):
    """A record that cannot be used or written, in one line for people."""


class DamagedShard(RecordError):
    """A shard was read, and is not what was written: its samples are to be recorded again.

    One that cannot be read now may be read later, and is none of these.
    """
