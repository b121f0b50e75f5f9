# Generated from _async/__init__.py by scripts/unasync.py: change that file, not this one.
"""The synchronous SDK, generated from `_sync`."""
