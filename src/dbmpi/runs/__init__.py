"""A run from its description, and what is done with a trained network."""
