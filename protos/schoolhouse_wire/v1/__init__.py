"""Version 1 of the contract: the generated messages and stubs."""
