"""The `schoolhouse` command (`main`), its demo, and the probe for health checks."""
