"""What to do when a step runs out of memory: smaller steps, and carefully larger ones again.

A pure state machine. A step with prompts in it that failed had too many tokens, one without (or
with the fewest tokens) too many rows; the next may have half of them. When there is nothing left to
halve, the one row in it is at fault and fails alone, and the limits are what they were at first.
After a number of good steps the limits grow by an eighth; each further failure makes that number
larger, so that a limit found by failing is not tried again and again (as TCP does after a loss).
"""

from __future__ import annotations

from quantbatch.engine.pieces import Limits

SMALLEST_STEP_TOKENS = 16
GOOD_STEPS = 64
"""Steps without trouble before the limits grow. Placeholder, not measured."""
MOST_GOOD_STEPS = 8192


class Backoff:
    """Holds the limits of a step.

    Args:
        most: The limits when nothing goes wrong.
    """

    def __init__(self, most: Limits) -> None:
        self._most = most
        self.limits = most
        self._patience = GOOD_STEPS
        self._good_steps = 0

    def succeeded(self) -> None:
        """Note a step without trouble."""
        if self.limits == self._most:
            return
        self._good_steps += 1
        if self._good_steps >= self._patience:
            self._good_steps = 0
            self.limits = Limits(
                *(
                    min(most, now + max(1, now // 8))
                    for now, most in zip(self.limits, self._most, strict=True)
                )
            )

    def failed(self, *, rows: int, tokens: int) -> bool:
        """Note a step that ran out of memory.

        Args:
            rows: Rows that it had.
            tokens: Tokens that it had.

        Returns:
            Whether a smaller step can be tried; if not, its one row fails alone.
        """
        self._good_steps = 0
        self._patience = min(2 * self._patience, MOST_GOOD_STEPS)
        if rows <= 1 and tokens <= SMALLEST_STEP_TOKENS:
            # It was in all the steps that failed before this one: others need not be smaller.
            self.limits, self._patience = self._most, GOOD_STEPS
            return False
        fewer_rows, fewer_tokens = self.limits
        if tokens > max(rows, SMALLEST_STEP_TOKENS):
            fewer_tokens = max(SMALLEST_STEP_TOKENS, min(fewer_tokens, tokens) // 2)
        else:
            fewer_rows = max(1, min(fewer_rows, rows) // 2)
        self.limits = Limits(fewer_rows, fewer_tokens)
        return True
