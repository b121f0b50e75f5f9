"""The way out of sandboxes: a process that decides what each may reach, and carries it."""
