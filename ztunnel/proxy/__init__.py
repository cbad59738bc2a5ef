"""The five rooms: accept, classify, authorize, connect, relay."""
