"""Measurements of labeling: token masks, and structured answers against free ones."""
