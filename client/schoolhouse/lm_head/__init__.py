"""Heads: a head is the frozen function from a teacher's hidden states to its logits.

`head` is that function, a chain of the named `operations`; `describe` derives one from a submodule and checks it;
`local` holds the heads of a module in this process, `disk_cache` those that were fetched from remote teachers.
"""
