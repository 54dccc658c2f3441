"""What can be seen of a replica: counters, Prometheus metrics, spans, the JSON of its state, the web page and `top`."""
