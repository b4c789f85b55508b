"""Tasks that measure a memory: associative retrieval, BABILong, perplexity of long texts."""
