"""Names that callers share."""
