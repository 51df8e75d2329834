"""The demo's data: handwritten digits, rendered text, charts and texts, all held by any machine with Python."""
