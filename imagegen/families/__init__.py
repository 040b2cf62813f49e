"""One module per way of making a picture."""
