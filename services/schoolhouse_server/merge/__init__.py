"""Forwards of several requests at once.

`batching` says which requests may run together, `merging` when they do, `splitting` whose features are whose, and
`self_check` which modules may not be merged at all.
"""
