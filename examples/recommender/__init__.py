"""Sequential recommenders on MovieLens-100k, static and dynamic."""
