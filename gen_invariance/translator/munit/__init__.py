"""MUNIT inside one domain."""
