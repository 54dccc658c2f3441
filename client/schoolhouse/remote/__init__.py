"""A teacher behind gRPC, in the order in which a request travels.

All connections of a process live in one event loop, in a thread of its own: `connections` makes it, with one channel
for each server. Sessions and watches are tasks there, deadlines and retries are alarms. Other threads hand a request
over and wait for its future; so nothing of what follows needs a lock, unless it says so.

`connecting` holds `connect`, which checks that the teacher is there; `settings` are checked once. `verification` wraps
a teacher, and compares the answers of two replicas. `teacher` implements the Teacher protocol with what follows, and
keeps the teacher's `facts` and `heads`. `request` has the table of a request's states, and alone changes one.
`dispatcher` chooses its replica: `directory` and `watching` say which there are, and `replica_pool` knows the state of
each, and `subset` to which few of many this client keeps. A `session` sends the request when `flow_control` allows it,
through `same_host` where it can; `pending` keeps it while no replica can take it, and fails it at its deadline;
`budget` limits how much is sent again. `handshake` finds out why a server cannot be reached, and `at_exit` closes
connections before the interpreter ends.
"""
