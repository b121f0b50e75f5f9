"""The daemon: which sandboxes exist, who owns them, and what runs in them.  Gets machines from an engine."""
