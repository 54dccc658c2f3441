"""A teacher behind gRPC, in the order in which a request travels.

`connecting` holds `connect`, which checks that the teacher is there; `settings` are checked once. `verification` wraps
a teacher, and compares the answers of two replicas. `teacher` implements the Teacher protocol with what follows, and
keeps the teacher's `facts` and `heads`. `request` has the table of a request's states, and alone changes one.
`dispatcher` chooses its replica: `directory` and `watching` say which there are, and `replica_pool` knows the state of
each. A `session` sends the request when `flow_control` allows it, through `same_host` where it can; `pending` keeps it
while no replica can take it, and fails it at its deadline; `budget` limits how much is sent again. `handshake` finds
out why a server cannot be reached, and `at_exit` closes connections before the interpreter ends.
"""
