"""What a replica counts, by job: requests, rows, waits, bytes and errors."""

# Upper bounds of the buckets that Load.queue_delay_counts has, in seconds; one more is for what waited longer.
QUEUE_DELAY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
