"""The text that each latent is active in, mined from a store."""
