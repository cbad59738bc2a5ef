"""Keys, certificates and TLS records; no I/O."""
