"""Tasks: what is asked of a row, and what its answer becomes. One file each; neither torch nor
Ray.
"""
