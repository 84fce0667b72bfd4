"""bitwright: train neural networks at 1 to 8 bits, and ship exactly what was trained."""
