"""product: clean events with the plan in force when they happened."""
