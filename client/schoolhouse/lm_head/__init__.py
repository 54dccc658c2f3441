"""Heads: the frozen function from a teacher's hidden states to its logits.

`head` is that function, made of the named `operations`; `describe` makes one of a submodule, and checks it; `local`
are the heads of a module in this process, `disk_cache` those that were fetched once.
"""
