"""The generator of the small world that `tiny` is pretrained on, and of the example rows."""
