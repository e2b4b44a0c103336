"""Policies: what the agent thinks with, how it is prompted, sampled from and warm-started."""
