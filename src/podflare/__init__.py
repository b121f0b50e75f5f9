"""Self-hosted sandboxes for AI agents."""
