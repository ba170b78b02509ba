"""Reading: which files an input has, what is in them, and the rows of a chunk. No Ray, no torch."""
