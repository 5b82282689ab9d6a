"""The model writing with latents held at other values."""
