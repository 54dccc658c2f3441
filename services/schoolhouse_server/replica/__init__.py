"""A teacher server in one object (`replica`), started from any process by `serving`; its directory and health."""
