"""Running several requests as one forward.

`batching` says which requests are alike and puts their inputs together, `merging` decides when they run together,
`splitting` gives each request its own features, and `self_check` finds modules that must not be merged at all.
"""
