"""The mathematics: tensors in, tensors out; it knows no model."""
