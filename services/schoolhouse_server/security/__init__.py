"""Who may do what: tokens, patterns of taps and what is kept back, TLS and its certificates, the interceptor before all
RPCs, and where servers listen."""
