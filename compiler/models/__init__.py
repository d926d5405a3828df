"""What users call around a model: parallel decoding, slim caches, dynamic recommenders."""
