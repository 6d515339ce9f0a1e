"""Tensors in, tensors out: low-rank products, column spaces, and GaLore's projected optimizer."""
