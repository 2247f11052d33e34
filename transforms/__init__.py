"""raw -> billing / product -> marts: one `.sql` or one `.py` a table, at `transforms/<layer>/<table>`."""
