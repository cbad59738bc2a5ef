"""What we say about ourselves: logs, access log, metrics."""
