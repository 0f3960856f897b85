"""Fast layers put into a model that exists: recognizing, adopting and checking."""
