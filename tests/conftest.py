"""Warnings are errors in these tests, but for those that Composer's dependencies give while they are imported."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import composer  # noqa: F401
