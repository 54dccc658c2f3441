"""What several rooms use: a timer, threads for gRPC, YAML files, logs, tables, and the size of a request."""
