"""A teacher behind gRPC, top to bottom as a request travels.

`connecting` sees that the teacher is there; `teacher` is the Teacher protocol over what follows, and knows its
`facts` and `heads`. `dispatcher` chooses a replica of the `replica_set` that `directory` and `watching` tell of,
through the `replica_pool`; a `session` carries the `request` when `flow_control` lets it,
`outstanding` waits for its answer to its deadline, `parking` keeps it while no replica can take it, and `budget`
bounds what is sent again. `verification` compares two replicas' answers, `handshake` says why a server cannot be
talked to, `settings` are checked once, and `at_exit` ends connections before the interpreter does.
"""
