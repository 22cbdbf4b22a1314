"""Data: sources (what users bring), shards (write), stream (read), features (cache), tokenizer."""
