"""Read files into training examples: records, documents, splits, templates and data sets."""
