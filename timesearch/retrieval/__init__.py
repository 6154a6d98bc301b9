"""Search in one video: embeddings of its frames, and the choice among them."""
