"""The demo's data: handwritten digits, rendered text, charts and the texts of the Python installation, all held by any machine with Python."""
