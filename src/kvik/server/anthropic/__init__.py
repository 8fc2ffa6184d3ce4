"""Anthropic's routes: Messages and the count of their tokens."""
