"""The model as it is met, and what it does over the time steps."""
