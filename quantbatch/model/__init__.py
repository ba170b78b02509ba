"""A model as files and as numbers: what it is and what memory it needs. No Ray, no torch."""
