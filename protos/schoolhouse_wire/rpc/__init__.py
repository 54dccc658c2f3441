"""gRPC as both sides use it: channel options, security, the mapping of errors, and forks."""
