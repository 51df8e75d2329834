"""The formats of others: per format, its `config.json` read and written, and its tensor names related to ours."""
