"""Answers that are kept, so that no request is paid for twice.

`keys.py` says which requests are the same, `tables.py` writes answers as rows of Arrow,
`index.py` finds them among millions, `cache.py` keeps them in a folder that jobs share.
"""
