"""The command ``hal``: what backends there are, whether they work, and one decode step to see it."""
