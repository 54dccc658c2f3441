"""Who may do what: tokens, TLS and its certificates, the interceptor before all RPCs, and where servers listen."""
