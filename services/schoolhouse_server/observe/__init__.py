"""Watching a replica: counters, metrics, spans, its state as JSON, and panels for a web page, `top` and Grafana."""
