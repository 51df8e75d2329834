"""Vision encoders, adaptors, language models, and how they are put together."""
