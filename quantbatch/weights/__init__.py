"""Loading weights: one file for each way."""
