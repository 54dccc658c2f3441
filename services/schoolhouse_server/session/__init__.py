"""Sessions: from a client's stream to an engine's queue, and back.

The way of a request: `servicer` opens a `server_session` for each stream; `calls` reads and checks what is asked for,
`admission` lets it in by the job's `quotas`, `receiving` puts its frames together, and answers go out in any order.
`notices` are small messages to the client, such as failures. `job_session` is a session's part in its job, `lease` ends
a session whose client is silent, and `draining` ends all sessions of a replica. `same_host` is shared memory and pipes
in place of the stream, of which `shared_bytes` are what all sessions have. `relief` ends sessions that do not read,
where others wait for the memory. `tappable` says which taps a client may ask for, `tidying` gives idle memory back to
the system, and `context` is what a session knows of its replica.
"""
