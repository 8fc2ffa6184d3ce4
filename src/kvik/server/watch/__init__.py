"""What an operator sees: metrics, health and logs."""
