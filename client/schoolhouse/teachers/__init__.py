"""Teachers: what is asked of one, the protocol, and a teacher in this process.

`query` is what a request asks for, `local` the protocol and the teacher in this process.

`encoder` makes an encoding of a feature where that was computed, `fingerprint` is the digest of a teacher's numbers,
and `module_tree` shows the names of its submodules.
"""
