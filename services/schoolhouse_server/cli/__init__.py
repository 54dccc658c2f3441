"""The `schoolhouse` command: `main`, with the commands of `observing` and `credentials`; its demo; the health probe."""
