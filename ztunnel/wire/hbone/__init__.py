"""HBONE: HTTP/2 for CONNECT tunnels only, as a state machine (RFC 9113)."""
