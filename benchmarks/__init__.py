"""Measurements against the peers a user would pick instead, all in one run."""
