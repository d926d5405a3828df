"""`accel bench pade`: every predictor and every peer at the same compute, each at its best."""
