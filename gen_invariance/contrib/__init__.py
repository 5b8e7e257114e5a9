"""Optional parts that need further libraries or models."""
