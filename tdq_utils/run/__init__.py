"""Execute and keep what was fitted."""
