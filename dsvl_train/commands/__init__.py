"""Subcommands of `dsvl`, a module each: `add(commands)` declares one, its function runs it."""
