"""What a model costs in memory and time, before any of it is loaded."""
