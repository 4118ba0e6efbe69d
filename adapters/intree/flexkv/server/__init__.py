"""Where ranks report their tensors."""
