"""Context distillation on top of `transformers.Trainer`; the `disc-train` command."""
