"""Fast layers put into a model that exists: recognising, adopting and checking."""
