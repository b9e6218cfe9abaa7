"""The official MCP conformance suite, run against the proxy: see README.md and ``run.py``."""
