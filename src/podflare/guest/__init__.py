"""Everything that is bundled and run by the template's interpreter: standard library only, Python 3.9."""
