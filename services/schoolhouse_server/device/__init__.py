"""A device as stages of work, the watchdog over what calls into it, and numbers that are not finite."""
