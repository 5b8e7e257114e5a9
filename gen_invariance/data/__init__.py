"""Long-tailed image data: class counts, splits, sampling rules, and batches; readers are in `data.readers.registry`."""
