"""How hypothesis runs here: the same examples in each run, however slow the machine."""

from hypothesis import settings

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=60)
