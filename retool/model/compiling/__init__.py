"""What is given to torch.compile, what is hidden from it, and how its kernels are called again."""
