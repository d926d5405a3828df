"""What runs a program: sampling runs and their state, constants of the weights, sizes."""
