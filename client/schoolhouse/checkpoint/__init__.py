"""A student on disk: `checkpoint` decides what is saved and restored, `file` writes and reads it."""
