"""The numbers of SPEC.md, one file each, through the public API only.  No benchmark asserts anything."""
