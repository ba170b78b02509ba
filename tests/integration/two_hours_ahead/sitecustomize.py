"""A clock that is two hours ahead: for processes that have this folder on their PYTHONPATH.

Not datetime, whose layout C extensions know; what asks for seconds sees another time.
"""

import time

AHEAD_S = 7200
_time, _time_ns = time.time, time.time_ns


def _ahead() -> float:
    return _time() + AHEAD_S


def _ahead_ns() -> int:
    return _time_ns() + AHEAD_S * 10**9


for _name, _clock in (("time", _ahead), ("time_ns", _ahead_ns)):
    # Where it is found decides how it is pickled: other processes are to take their own.
    _clock.__module__, _clock.__name__, _clock.__qualname__ = "time", _name, _name
    setattr(time, _name, _clock)
