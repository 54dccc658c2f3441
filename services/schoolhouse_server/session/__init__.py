"""Sessions: what comes from a client, until it stands in an engine's queue, and what goes back.

A request's way: `servicer` opens a `server_session` for each stream; `receiving` puts its frames together, `calls`
reads and checks what they ask for, `admission` lets it in by the job's `quotas`, and the engine's answer goes out in
any order; `notices` are the small messages beside it. `job_session` is the session's part in its job, `lease` ends it
when the client is silent, and `draining` ends all of them.
"""
