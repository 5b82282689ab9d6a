"""What a chat model makes of the contexts of latents."""
