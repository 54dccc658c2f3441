"""gRPC as both sides use it: options and creation of channels, security, the mapping of errors, and forks."""
