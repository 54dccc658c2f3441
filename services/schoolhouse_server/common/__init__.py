"""What several rooms use: YAML files, logs, tables, and the size of a request."""
