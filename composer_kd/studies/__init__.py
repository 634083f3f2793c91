"""Studies: many runs that belong together, each an ordinary `composer` process, and what they say together."""
