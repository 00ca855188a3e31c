"""Which endpoint has which prompt prefix in its KV cache: block hashes and the bounded approximate index."""
