"""Teachers: the Teacher protocol, and a teacher that is a module in this process.

`protocol` defines what a teacher is and what it returns, `query` what a request asks of it. `local` is a teacher in
this process: `capture` records what its submodules receive and return, `encoder` encodes that, `fingerprint` computes
the digest of its weights, and `module_tree` prints the names of its submodules.
"""
