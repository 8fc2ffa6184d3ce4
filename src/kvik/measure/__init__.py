"""Measuring, without printing: the race, the cases of the benchmark, and what each step costs."""
