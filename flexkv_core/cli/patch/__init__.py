"""``flexkv patch``: adds to an installed engine the hooks that its version lacks, and takes them out again byte for byte."""
