"""The benchmark suite: what the proxy costs beside Envoy, or any other, on the same track."""
