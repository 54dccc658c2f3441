"""Watching a replica: counters, Prometheus metrics, spans, its state as JSON, the web page, and `schoolhouse top`."""
