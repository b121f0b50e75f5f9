"""The microvm engine: a virtual machine for each sandbox."""
