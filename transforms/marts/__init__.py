"""marts: the questions, answered."""
