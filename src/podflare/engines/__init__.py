"""Engines make machines.  They know nothing of cells."""
