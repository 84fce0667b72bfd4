"""A native CPU runtime for exported integer networks, with exact integer Winograd convolutions."""
