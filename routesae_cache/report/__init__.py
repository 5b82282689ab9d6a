"""What the stages left in a folder -> one self-contained HTML page."""
