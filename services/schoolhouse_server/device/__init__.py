"""A device as stages of work, the watchdog over the threads that use it, and checks for numbers that are not finite."""
