"""What `schoolhouse demo` runs: models, data, and the student's job."""
