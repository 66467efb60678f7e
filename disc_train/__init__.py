"""Train by context distillation on top of `transformers.Trainer`, evaluate, and generate."""
