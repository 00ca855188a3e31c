"""Exact tokens of a prompt, found while the request waits: by a tokenizer in this process or by an engine that is asked.

Not here: which tokenizer a configuration wants (plugins.producers.token), what tokens are good for (prefix, scorers).
"""
