"""Who may do what: tokens, TLS and its certificates, the interceptor in front of all RPCs, and where servers listen."""
