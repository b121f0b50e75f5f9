"""A server that speaks the Messages API: the hosted code execution tool runs here, the model at its own API."""
