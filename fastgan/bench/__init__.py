"""Time implementations against each other, and keep the records."""
