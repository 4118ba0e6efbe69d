"""``scripts/demo``: a real server answers, loses its prefix cache, and has it back from FlexKV's host tier."""
