"""A teacher server in one object (`replica`), which `serving` starts from any process; its directory and health."""
