"""Reporting: reads run folders and evaluation files, writes one self-contained HTML page. Imports nothing of the package but `config`."""
