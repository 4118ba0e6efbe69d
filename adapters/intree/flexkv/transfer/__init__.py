"""Names of the transfer side that callers import."""
