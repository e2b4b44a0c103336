"""Policies: loading, prompting, scoring and checking models."""
