"""A student on disk: `checkpoint` says what is saved and restored, `file` how that is written and read."""
