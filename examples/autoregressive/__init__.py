"""A small model of Fashion-MNIST: a VQ tokenizer, and a Llama over its tokens."""
