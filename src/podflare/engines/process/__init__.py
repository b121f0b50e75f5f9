"""Sandboxes from Linux namespaces and kernel fork."""
