"""KV-cache events of the engines, from their sockets to the precise prefix index."""
