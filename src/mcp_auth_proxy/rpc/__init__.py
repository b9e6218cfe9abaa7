"""JSON-RPC bodies: what a request says, and answers of our own."""
