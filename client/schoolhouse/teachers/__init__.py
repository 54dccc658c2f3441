"""Teachers: what a teacher is, and one in this process.

`query` is what a request asks of a teacher, `protocol` what a teacher is and answers. `local` is a module in this
process: `capture` takes what its submodules receive and return, `encoder` makes an encoding of that, `fingerprint` is
the digest of its weights, and `module_tree` shows the names of its submodules.
"""
